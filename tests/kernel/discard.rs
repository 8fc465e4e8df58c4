//! What a guest's discards do: with the option, without it, and why they are not passed down to the image.

use std::fs;
use std::os::unix::fs::MetadataExt;

use dmsnap::{ChunkSize, SnapshotOptions};

use crate::common::reading::number;
use crate::common::scene::ext4;
use crate::common::{Foreign, Losetup, Mounted, Scene, output, run, stated_kernel};

#[test]
fn a_guests_fstrim_gives_the_cow_files_space_back() {
    let mut cases = vec![(true, 512), (false, 8)];
    // The others crash when they load such a table: see stores.rs.
    if ["5.10", "6.1", "6.12"].contains(&stated_kernel().as_str()) {
        cases.push((true, 8));
    }
    for (discard, sectors) in cases {
        // Blocks of a chunk, or discards that are not aligned to chunks give nothing back.
        let scene = Scene::over(|image| {
            ext4(image, 16 << 20);
            run!("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", image);
        });
        let mut options = SnapshotOptions::new();
        let chunk = ChunkSize::new(sectors).expect("a power of two");
        options.discard(discard).chunk_size(chunk);
        let (name, cow) = (scene.name(), scene.sparse("cow", 32 << 20));
        let snapshot = options.create(scene.image(), &cow, &name);
        let snapshot = snapshot.expect("a snapshot");
        let device = snapshot.device().to_str().expect("ASCII");
        let mounted = Mounted::mount([device], &scene.path("guest"));
        let file = mounted.at().join("file");
        fs::write(&file, vec![0xa5; 6 << 20]).expect("room");
        run!("sync");
        let bytes = || 512 * fs::metadata(&cow).expect("the COW file").blocks();
        let full = bytes();
        assert!(full >= 6 << 20, "{full}");
        fs::remove_file(&file).expect("it is there");
        run!("sync");
        let done = output!("fstrim", mounted.at());
        run!("sync");
        let (trimmed, said) = (bytes(), String::from_utf8_lossy(&done.stderr));
        println!("fstrim, discard {discard}, chunks of {sectors}: {full} -> {trimmed} {said}");
        assert_eq!(done.status.success(), discard, "{done:?}");
        if discard {
            // What lies in chunks with something else stays.
            assert!(trimmed + (5 << 20) <= full, "{full} -> {trimmed}");
        } else {
            assert!(said.contains("not supported"), "EOPNOTSUPP: {said}");
            // The file system writes a little more in the meantime.
            assert!(trimmed >= full, "{full} -> {trimmed}");
        }
        drop(mounted);
        snapshot.cleanup().expect("nobody has it open");
    }
}

// drivers/md/dm-snap.c, snapshot_map: with discard_passdown_origin each discard goes to both devices, and fails if
// either does. drivers/block/loop.c fails one to a read-only device, as our origins are.
#[test]
fn a_discard_that_is_passed_down_to_a_read_only_image_is_an_error_for_the_guest() {
    let scene = Scene::new();
    let cow = scene.cow("cow");
    let loops = [
        Losetup::attach_read_only(scene.image()),
        Losetup::attach(&cow),
    ];
    let [origin, cow] = loops.each_ref().map(|each| number(&each.device));
    let sectors = fs::metadata(scene.image()).expect("an image").len() / 512;
    let features = "2 discard_zeroes_cow discard_passdown_origin";
    let name = scene.name();
    let table = format!("0 {sectors} snapshot {origin} {cow} P 512 {features}");
    let _foreign = Foreign::create(&name, &table);
    let device = format!("/dev/mapper/{name}");
    let done = output!("blkdiscard", "-o", "0", "-l", "1048576", device);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    println!("discard passed down to a read-only image: {said}");
    assert!(!done.status.success(), "{done:?}");
    // The scene's end holds the image against what it was.
}
