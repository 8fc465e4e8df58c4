{
use dmsnap::snapshot::CheckpointOptions;
use dmsnap::{CowSize, SnapshotOptions};

// The VM runs on the disk of vm-42, and goes on running.
let noon = CheckpointOptions::new()
    .keep(true)
    .make_cow(CowSize::WorstCase)
    .checkpoint("vm-42", "vm-42-noon", "/var/lib/vms/vm-42.1.cow")?;
// Two more VMs begin with what it had.
for name in ["vm-43", "vm-44"] {
    let cow = format!("/var/lib/vms/{name}.cow");
    let fork = SnapshotOptions::new().make_cow(CowSize::WorstCase).create_on(noon.origin(), cow, name)?;
    println!("boot {name} from {}", fork.device().display());
}
Ok::<(), dmsnap::Error>(())
}
