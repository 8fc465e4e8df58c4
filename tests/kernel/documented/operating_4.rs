{
use dmsnap::snapshot::grow;
use dmsnap::watch::{Change, Watch};

const MAX_BYTES: u64 = 8 << 30;

let mut watch = Watch::new()?;
for name in ["vm-41", "vm-42"] { // from the database: all that run
    watch.add(name)?;
}
while !watch.is_empty() {
    for event in watch.check()? {
        let name = event.name.as_str();
        match event.change {
            Change::Above(usage) => {
                let bytes = usage.total.to_bytes().unwrap_or(MAX_BYTES);
                if bytes >= MAX_BYTES {
                    eprintln!("{name}: {}% full and at its maximum", usage.percent());
                } else if let Err(error) = grow(name, bytes.saturating_mul(2).min(MAX_BYTES)) {
                    eprintln!("{name}: {}", error.one_line()); // told again when half of what is left is gone
                }
            }
            // PO alone. The VM must have closed its disk; the snapshot made anew has a new uuid: add it again.
            Change::Overflow => println!("{name}: stop the VM, then recover(name, bytes) and watch.add(name)"),
            other => println!("{name}: {other}"),
        }
    }
    watch.wait()?;
}
Ok::<(), dmsnap::Error>(())
}
