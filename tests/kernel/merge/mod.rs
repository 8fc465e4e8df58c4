//! Merging a COW file into its image: the right bytes, whatever cuts it off.

mod cut_off;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use dmsnap::base::Sectors;
use dmsnap::error::{Refusal, Step};
use dmsnap::merge::{MergeOptions, MergeOutcome};
use dmsnap::store::StoreFault;
use dmsnap::{ChunkSize, Error, SnapshotOptions, Store};

use crate::common::scene::patterned;
use crate::common::tools::{complaint, finish};
use crate::common::{Mounted, Scene, chain, dmsnap, run};

/// How many chunks are changed at random places where the number matters.
const MANY: u64 = 1000;

/// An image of its own and a COW file over it, with what the snapshot showed.
struct Pair {
    scene: Scene,
    image: PathBuf,
    cow: PathBuf,
    shown: Vec<u8>,
    /// How many chunks the COW file has.
    changed: u64,
}

impl Pair {
    /// Changes so many chunks of four times as many, in an order that is not theirs on the disk.
    fn of_random_chunks(changed: u64) -> Self {
        let mut next = 12345u64;
        let mut random = || {
            // Knuth's MMIX generator: its high bits are good enough.
            next = next
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            next >> 33
        };
        let mut places: Vec<u64> = (0..4 * changed).collect();
        for nth in (1..places.len()).rev() {
            let other = usize::try_from(random()).expect("31 bits") % (nth + 1);
            places.swap(nth, other);
        }
        places.truncate(usize::try_from(changed).expect("few"));
        let options = SnapshotOptions::new();
        let pair = Self::written(4 * changed * 4096, &options, |device| {
            for some in places.chunks(50) {
                for place in some {
                    let content = (place ^ u64::MAX).to_le_bytes().repeat(512);
                    device
                        .write_all_at(&content, place * 4096)
                        .expect("writable");
                }
                device.sync_all().expect("the COW file takes it");
            }
        });
        Self { changed, ..pair }
    }

    fn written(bytes: u64, options: &SnapshotOptions, write: impl FnOnce(&File)) -> Self {
        let scene = Scene::new();
        let (image, cow) = (
            scene.path("base.img"),
            scene.sparse("cow", 2 * bytes + (8 << 20)),
        );
        patterned(&image, bytes);
        let name = scene.name();
        let snapshot = options.create(&image, &cow, &name).expect("a snapshot");
        let opened = File::options().write(true).open(snapshot.device());
        let device = opened.expect("it opens");
        write(&device);
        device.sync_all().expect("the COW file takes it");
        drop(device);
        let shown = fs::read(snapshot.device()).expect("readable");
        snapshot.cleanup().expect("nobody has it open");
        Self {
            scene,
            image,
            cow,
            shown,
            changed: 0,
        }
    }

    fn merge(&self) -> dmsnap::Result<MergeOutcome> {
        MergeOptions::new().merge(&self.image, &self.cow, |_| ControlFlow::Continue(()))
    }

    /// Merges what is left, and holds the image against what the snapshot showed.
    fn finish(&self) -> MergeOutcome {
        let merged = self
            .merge()
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert!(
            matches!(merged, MergeOutcome::Complete { .. }),
            "{merged:?}"
        );
        self.assert_image();
        self.scene.assert_clean();
        merged
    }

    fn assert_image(&self) {
        let image = fs::read(&self.image).expect("readable");
        let visible = &image[..self.shown.len()];
        assert!(
            visible == self.shown,
            "the image is not what the snapshot was"
        );
    }

    /// A snapshot over the two, half merged or whole, shows what it showed before.
    fn assert_snapshot(&self, options: &SnapshotOptions) {
        let snapshot = options
            .create(&self.image, &self.cow, &self.scene.name())
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        let shown = fs::read(snapshot.device()).expect("readable");
        assert!(shown == self.shown, "the snapshot shows something else");
        snapshot.cleanup().expect("nobody has it open");
    }

    /// Another COW file, made over the image as it is now.
    fn other_cow(&self) -> PathBuf {
        let cow = self.scene.cow("other.cow");
        let other = SnapshotOptions::new().create(&self.image, &cow, &self.scene.name());
        other.expect("a snapshot").cleanup().expect("idle");
        cow
    }

    /// As every other COW file over an image that was merged into is.
    fn assert_refused(&self, other: &Path) {
        let refused = SnapshotOptions::new().create(&self.image, other, &self.scene.name());
        assert!(
            matches!(refused, Err(Error::Refused(Refusal::OriginChanged { .. }))),
            "{refused:?}"
        );
    }
}

fn sectors(chunks: u64) -> Sectors {
    Sectors::new(chunks * 8)
}

#[test]
fn a_merge_of_a_thousand_random_chunks_makes_the_image_what_the_snapshot_was() {
    let pair = Pair::of_random_chunks(MANY);
    let other = pair.other_cow();
    let mut seen = Vec::new();
    let merged = MergeOptions::new().merge(&pair.image, &pair.cow, |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    });
    let all = MergeOutcome::Complete {
        merged_bytes: sectors(MANY).count() * 512,
    };
    assert_eq!(merged, Ok(all));
    pair.assert_image();
    pair.scene.assert_clean();
    assert!(
        seen.is_sorted_by_key(|progress| progress.done_bytes),
        "{seen:?}"
    );
    assert!(
        seen.iter()
            .all(|progress| progress.total_bytes == sectors(MANY).count() * 512)
    );
    let last = seen.last().expect("a call at the end");
    assert_eq!(last.done_bytes, last.total_bytes);
    println!("merged {MANY} chunks, {} calls of progress", seen.len());

    pair.assert_refused(&other);
    // The store is empty, and the COW file may be used again over the new image.
    let nothing = MergeOutcome::Complete { merged_bytes: 0 };
    assert_eq!(pair.merge(), Ok(nothing));
    pair.assert_snapshot(&SnapshotOptions::new());
}

// dm-snap.c, merge_callback: the image is written and flushed before the exceptions are cleared. So what a power cut
// leaves is an image that may be ahead of the store: here by a tenth of the merge, which is more than any cut leaves.
#[test]
fn every_chunk_size_and_an_image_that_ends_in_the_middle_of_a_chunk() {
    for chunk in [1, 32, 2048] {
        let chunk = ChunkSize::new(chunk).expect("a power of two");
        let mut options = SnapshotOptions::new();
        options.store(Store::PersistentOverflow).chunk_size(chunk);
        // Two sectors and 188 bytes more than whole chunks; the bytes are not visible, and stay.
        let bytes = (2 << 20) + 1212;
        let pair = Pair::written(bytes, &options, |device| {
            for at in [(2 << 20) + 512, 0, 1 << 20] {
                device.write_all_at(&[0x5a; 512], at).expect("writable");
                device.sync_all().expect("the COW file takes it");
            }
        });
        let tail = || fs::read(&pair.image).expect("readable")[pair.shown.len()..].to_vec();
        let before = tail();
        assert_eq!(before.len(), 188);
        let merged = pair.finish();
        // The page cache writes its own blocks, which may be more than a sector.
        let least = 3 * chunk.bytes();
        assert!(
            matches!(merged, MergeOutcome::Complete { merged_bytes } if merged_bytes >= least),
            "{merged:?}"
        );
        assert_eq!(tail(), before);
        pair.assert_snapshot(&options);
    }
}

#[test]
fn an_image_that_cannot_be_written_stops_the_merge_until_it_can() {
    let scene = Scene::new();
    let small = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"];
    let mounted = Mounted::mount(small, &scene.path("small"));
    let (image, cow) = (mounted.at().join("base.img"), scene.cow("cow"));
    File::create(&image)
        .and_then(|image| image.set_len(4 << 20))
        .expect("sparse");
    let snapshot = SnapshotOptions::new().create(&image, &cow, &scene.name());
    let snapshot = snapshot.expect("a snapshot");
    let device = File::options()
        .write(true)
        .open(snapshot.device())
        .expect("it opens");
    device
        .write_all_at(&vec![0xa5; 2 << 20], 0)
        .expect("writable");
    device.sync_all().expect("the COW file takes it");
    drop(device);
    // Not read through the device: on 5.10 a loop device that reads a hole of a file on tmpfs fills it.
    let mut shown = vec![0xa5; 2 << 20];
    shown.resize(4 << 20, 0);
    snapshot.cleanup().expect("nobody has it open");

    let merge = || MergeOptions::new().merge(&image, &cow, |_| ControlFlow::Continue(()));
    let error = merge().expect_err("there is no room");
    println!("message: merge into a full file system: {}", chain(&error));
    assert!(
        matches!(
            error,
            Error::Failed {
                step: Step::Merge,
                ..
            }
        ),
        "{error:?}"
    );
    scene.assert_clean();
    run!("mount", "-o", "remount,size=8m", mounted.at());
    assert!(matches!(merge(), Ok(MergeOutcome::Complete { .. })));
    assert!(fs::read(&image).expect("readable") == shown);
}

fn fault_of(refusal: &Refusal) -> &StoreFault {
    match refusal {
        Refusal::CowUnsound { fault, .. } => fault,
        other => panic!("{other}"),
    }
}

#[test]
fn what_cannot_be_merged_is_refused_and_left_alone() {
    let pair = Pair::written(1 << 20, &SnapshotOptions::new(), |device| {
        device.write_all_at(&[1; 4096], 1 << 19).expect("writable");
    });
    let scene = &pair.scene;
    let refused = |what: &str, image: &Path, cow: &Path, any_origin: bool| {
        let before = (fs::read(image).ok(), fs::read(cow).ok());
        let merged = MergeOptions::new()
            .any_origin(any_origin)
            .merge(image, cow, |_| ControlFlow::Continue(()));
        let error = merged.expect_err(what);
        println!("bad input: merge, {what}: {}", chain(&error));
        assert!(
            before == (fs::read(image).ok(), fs::read(cow).ok()),
            "{what}"
        );
        match error {
            Error::Refused(refusal) => refusal,
            other => panic!("{what}: {other:?}"),
        }
    };
    let path = || pair.image.clone();
    for store in [Store::Persistent, Store::Transient] {
        let mut options = SnapshotOptions::new();
        let cow = scene.cow(format!("{store:?}.cow"));
        let live = options
            .store(store)
            .create(&pair.image, &cow, &scene.name());
        let live = live.expect("a snapshot");
        for cow in [&cow, &pair.cow] {
            let refusal = refused("a live snapshot", &pair.image, cow, false);
            assert_eq!(refusal, Refusal::OriginInUse { path: path() });
        }
        live.cleanup().expect("idle");
    }
    let blank = scene.cow("blank.cow");
    let refusal = refused("a blank COW file", &pair.image, &blank, false);
    assert_eq!(refusal, Refusal::CowBlank { path: blank });
    let image = pair.image.as_path();
    assert_eq!(
        refused("the image itself", image, image, false),
        Refusal::SameFile {
            origin: path(),
            cow: path()
        }
    );
    run!("chmod", "444", image);
    assert_eq!(
        refused("a read-only image", image, &pair.cow, false),
        Refusal::OriginReadOnly {
            path: path(),
            mode: 0o444
        }
    );
    run!("chmod", "644", image);

    let short = scene.file("short.img", vec![0; 1 << 19]);
    let changed = refused("another image", &short, &pair.cow, false);
    assert!(
        matches!(changed, Refusal::OriginChanged { .. }),
        "{changed}"
    );
    let refusal = refused("a shorter image", &short, &pair.cow, true);
    let fault = fault_of(&refusal);
    assert!(matches!(fault, StoreFault::OriginChunk { .. }), "{refusal}");

    let cut = scene.path("cut.cow");
    fs::copy(&pair.cow, &cut).expect("room for a copy");
    run!("truncate", "-s", "8192", &cut);
    let refusal = refused("a COW file cut off", image, &cut, false);
    let fault = fault_of(&refusal);
    assert!(matches!(fault, StoreFault::CowChunk { .. }), "{refusal}");
    let mut command: Command = dmsnap();
    command.arg("merge").arg("--origin").arg(image);
    let line = complaint(&finish(command.arg("--cow").arg(&cut)));
    assert_eq!(line, refusal.to_string());
    let _ = pair.finish();
}
