{
use dmsnap::snapshot::CheckpointOptions;
use dmsnap::{Origin, SnapshotOptions};

let image = Origin::open("/images/base.ext4")?;
let noon = CheckpointOptions::new()
    .keep(true)
    .attach_layer(&image, "/var/lib/vms/vm-42.cow", "vm-42-noon")?; // its first COW file
let disk = SnapshotOptions::new().create_on(noon.origin(), "/var/lib/vms/vm-42.1.cow", "vm-42")?;
println!("boot from {}", disk.device().display());
Ok::<(), dmsnap::Error>(())
}
