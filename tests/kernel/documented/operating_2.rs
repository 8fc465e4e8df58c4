{
use std::time::Duration;

use dmsnap::pool::{CowFate, WhenEmpty};
use dmsnap::{Durability, Origin, PoolOptions};

let origin = Origin::open("/images/base.ext4")?;
let mut options = PoolOptions::new();
options.size(4).when_empty(WhenEmpty::Wait(Duration::from_secs(5)));
options.durability(Durability::PowerCuts); // its disks are kept
let pool = options.open(&origin, "/var/lib/vms")?;
drop(origin); // the pool has its own

for name in ["vm-41", "vm-42"] {
    let claimed = pool.claim(name)?;
    println!("{name}: boot from {}, writes go to {}", claimed.snapshot.device().display(), claimed.cow.display());
    let released = pool.release(claimed.snapshot.handles(), CowFate::Keep)?; // when the VM has exited
    println!("{name}: its writes are in {:?}", released.cow);
}
pool.drain()?; // or drop it, which hides errors
Ok::<(), dmsnap::Error>(())
}
