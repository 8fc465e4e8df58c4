{
use std::fs::File;
use dmsnap::store::ExceptionStore;

let store = ExceptionStore::open(File::open("/var/lib/vms/vm-42.cow")?)?;
match store.place() {
    Some(place) if place.frozen => println!("a layer's, with {} below it: keep it", place.depth),
    Some(place) if place.parent.is_some() => println!("a disk's, over a layer"),
    _ => println!("a disk's, over an image"),
}
Ok::<(), Box<dyn std::error::Error>>(())
}
