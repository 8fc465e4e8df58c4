{
use dmsnap::ReapOptions;
use dmsnap::teardown::Fate;

let living = ["acme-vm-1", "acme-vm-2"]; // from the database
let is_stranger = |name: &str| !name.starts_with("acme-");
for item in ReapOptions::new().reap(|found| is_stranger(&found.name) || living.contains(&found.name.as_str()))? {
    match &item.fate {
        Ok(Fate::InProgress) => println!("{}: another process is making it, look again later", item.name),
        Ok(Fate::Busy { open_count }) => println!("{}: {open_count} have it open, stop that VMM first", item.name),
        Ok(fate) => println!("{}: {fate:?}", item.name),
        // An unreadable device does not stop the others, and must not stop you: it may be a stranger's.
        Err(error) => eprintln!("{}: {}", item.name, error.one_line()),
    }
}
Ok::<(), dmsnap::Error>(())
}
