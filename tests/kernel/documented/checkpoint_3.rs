{
use dmsnap::snapshot::StackOptions;
use dmsnap::{Origin, SnapshotOptions};

let image = Origin::open("/images/base.ext4")?;
let evening = StackOptions::new()
    .keep(true)
    .open(&image, ["/var/lib/vms/vm-42.1.cow", "/var/lib/vms/vm-42.cow"], "vm-42-evening")?;
let disk = SnapshotOptions::new().create_on(evening.origin(), "/var/lib/vms/vm-42.2.cow", "vm-42")?;
println!("boot from {}", disk.device().display());
Ok::<(), dmsnap::Error>(())
}
