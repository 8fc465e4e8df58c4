{
use dmsnap::{ErrorKind, SnapshotOptions};

match SnapshotOptions::new().create("/images/base.ext4", "/run/vm-42.cow", "vm-42") {
    Ok(snapshot) => println!("{}", snapshot.device().display()),
    Err(error) => match error.kind() {
        ErrorKind::Conflict => eprintln!("a device of that name or a snapshot on that file exists: {error}"),
        ErrorKind::Exhausted => eprintln!("free space, memory or devices, then try again: {error}"),
        _ => {
            let mut source: Option<&dyn std::error::Error> = Some(&error);
            while let Some(part) = source {
                eprintln!("{part}");
                source = part.source();
            }
        }
    },
}
}
