//! What a guest's discards do: with the option, without it, and why they are not passed down to the image.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use dmsnap::error::Refusal;
use dmsnap::{ChunkSize, Error, SectorSize, SnapshotOptions};

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
        // Chunks of a sector: no discard crosses from one into another.
        options
            .discard(discard)
            .sector_size(SectorSize::Bytes4096)
            .trust_discards(sectors != 8)
            .chunk_size(chunk);
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

#[test]
fn a_discard_that_could_cross_into_another_chunk_is_refused() {
    let scene = Scene::new();
    let mut options = SnapshotOptions::new();
    options.discard(true);
    let refused = options.create(scene.image(), scene.cow("cow"), &scene.name());
    let refusal = Refusal::DiscardUnaligned {
        chunk: ChunkSize::DEFAULT,
        sector_bytes: 512,
    };
    assert_eq!(refused, Err(Error::Refused(refusal)));
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

// drivers/md/dm-snap.c: snapshot_map maps a discard as a whole to where its first chunk lies in the COW device, and dm
// splits discards by size alone (__process_abnormal_io), so that the end of one that crosses into another chunk falls on
// whatever chunk comes next there. Seen on 5.10, 6.1, 6.12 and 7.3 alike; found when a VM on 7.3 lost a file of its
// image after fstrim.
#[test]
fn a_discard_that_crosses_into_another_chunk_destroys_a_third() {
    const CHUNK: usize = 512 * 512;
    let scene = Scene::over(|image| fs::write(image, vec![0; 8 * CHUNK]).expect("room"));
    let cow = scene.sparse("cow", 4 << 20);
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&cow);
    let loops = [&origin, &cow].map(|each| number(&each.device));
    let table = format!(
        "0 {} snapshot {} {} P 512 1 discard_zeroes_cow",
        8 * CHUNK / 512,
        loops[0],
        loops[1]
    );
    let name = scene.name();
    let _foreign = Foreign::create(&name, &table);
    let path = format!("/dev/mapper/{name}");
    let device = fs::File::options().write(true).open(&path);
    let device = device.expect("writable");
    // Chunks 0, 2 and 1 follow one another in the COW device.
    for chunk in [0, 2, 1usize] {
        let fill = vec![u8::try_from(chunk).expect("small") + 1; CHUNK];
        device
            .write_all_at(&fill, (chunk * CHUNK) as u64)
            .expect("it is written");
        device.sync_all().expect("the COW device takes it");
    }
    drop(device);
    let (from, length) = ((CHUNK / 2).to_string(), CHUNK.to_string());
    run!("blkdiscard", "-o", from, "-l", length, &path);
    let content = fs::read(&path).expect("readable");
    let halves: Vec<_> = content
        .chunks(CHUNK / 2)
        .take(6)
        .map(|half| half[0])
        .collect();
    assert_eq!(
        halves,
        [1, 0, 2, 2, 0, 3],
        "right would be 1, 0, 0, 2, 3, 3"
    );
}
