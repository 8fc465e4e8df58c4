{
use dmsnap::teardown::Fate;
use dmsnap::{ErrorKind, ReapOptions};

fn main() -> dmsnap::Result<()> {
    // Written to your database before each create and claim, layers too. `keep` also answers true for other prefixes:
    // they are another control plane's.
    let living = ["acme-vm-1", "acme-vm-2"];
    let keep = |name: &str| !name.starts_with("acme-") || living.contains(&name);
    for item in ReapOptions::new().reap(|found| keep(&found.name))? {
        match &item.fate {
            Ok(Fate::Busy { open_count }) => println!("{}: {open_count} have it open", item.name),
            Ok(Fate::InProgress) => println!("{}: a live process makes it: look again later", item.name),
            Ok(fate) => println!("{}: {fate:?}", item.name),
            Err(error) => eprintln!("{}: {}", item.name, error.one_line()), // go on: it may be a stranger's
        }
    }
    match dmsnap::adopt("acme-vm-1") {
        Ok(handles) => println!("{:?}", handles.device), // whole handles from the kernel's state alone
        Err(error) if error.kind() == ErrorKind::Gone => println!("its disk is gone: create it again"),
        Err(error) => return Err(error),
    }
    Ok(())
}
main()
}
