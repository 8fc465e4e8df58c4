{
use dmsnap::pool::CowFate;
use dmsnap::{Origin, PoolOptions};

fn main() -> dmsnap::Result<()> {
    let origin = Origin::open("/images/base.ext4")?; // attached once, for any number of snapshots
    let pool = PoolOptions::new().size(16).open(&origin, "/var/lib/vms")?; // a thread keeps 16 ready

    let claimed = pool.claim("vm-42")?; // a rename and an alias: two system calls
    println!("boot from {}", claimed.snapshot.device().display());

    // When the VM has exited:
    pool.release(claimed.snapshot.handles(), CowFate::Delete)?;
    pool.drain()
}
main()
}
