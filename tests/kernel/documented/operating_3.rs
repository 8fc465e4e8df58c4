{
use dmsnap::pool::CowFate;
use dmsnap::{ErrorKind, Origin, PoolOptions};

let origin = Origin::open("/images/base.ext4")?;
let pool = PoolOptions::new().size(4).open(&origin, "/var/lib/vms")?;
for name in ["acme-vm-1", "acme-vm-2", "acme-vm-3"] { // from the database: VMs that have exited meanwhile
    let released = match dmsnap::adopt(name) {
        Ok(handles) => pool.release(&handles, CowFate::Delete)?,
        Err(error) if error.kind() == ErrorKind::Gone => {
            println!("{name}: gone already");
            continue;
        }
        Err(error) => return Err(error.into()),
    };
    println!("{name}: {}", if released.taken_back { "recycled" } else { "removed" });
}
pool.drain()?;
Ok::<(), Box<dyn std::error::Error>>(())
}
