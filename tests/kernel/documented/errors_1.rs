{
use dmsnap::{ErrorKind, SnapshotOptions};

match SnapshotOptions::new().create("/images/base.ext4", "/run/vm-42.cow", "vm-42") {
    Ok(snapshot) => println!("{}", snapshot.device().display()),
    Err(error) => match error.kind() {
        ErrorKind::Conflict => eprintln!("a device of that name or a snapshot on that file exists: {}", error.one_line()),
        ErrorKind::Exhausted => eprintln!("free space, memory or devices, then try again: {}", error.one_line()),
        _ => eprintln!("{}", error.one_line()), // `{error}` alone prints the first part, without the cause
    },
}
}
