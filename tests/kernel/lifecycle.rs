//! From nothing to a disk and back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use dmsnap::base::Sectors;
use dmsnap::dm::SnapshotStatus;
use dmsnap::find::State;
use dmsnap::{SnapshotOptions, Store, Warning};

use crate::common::reading::{self, dm_info, dm_table, loops_below, number};
use crate::common::scene::{IMAGE_BYTES, content, patterned};
use crate::common::{Losetup, Mounted, Scene};

#[test]
fn the_table_is_the_one_that_the_shell_made() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &name)
        .expect("a snapshot");

    let handles = snapshot.handles().clone();
    let origin_loop = handles.origin_loop.expect("an origin loop").path;
    let cow_loop = handles.cow_loop.expect("a COW loop").path;
    let (origin_number, cow_number) = (number(&origin_loop), number(&cow_loop));
    assert_eq!(
        dm_table(&name),
        format!(
            "0 {} snapshot {origin_number} {cow_number} P 8",
            IMAGE_BYTES / 512
        )
    );
    let uuid = handles.uuid.expect("a uuid");
    assert_eq!(dm_info(&name, "uuid"), uuid.as_str());
    assert_eq!(dm_info(&name, "open"), "0");

    let bound = loops_below(scene.dir());
    let facts = |of: &Path| {
        bound
            .iter()
            .find(|bound| bound.device == of)
            .expect("it is bound")
            .clone()
    };
    let (origin, cow_facts) = (facts(&origin_loop), facts(&cow_loop));
    assert_eq!(bound.len(), 2, "{bound:?}");
    assert_eq!(
        (origin.backing.as_path(), origin.read_only, origin.autoclear),
        (scene.image(), true, true)
    );
    assert_eq!(
        (&cow_facts.backing, cow_facts.read_only, cow_facts.autoclear),
        (&cow, false, true)
    );
    assert!(snapshot.warnings().is_empty(), "{:?}", snapshot.warnings());

    snapshot.cleanup().expect("nobody has it open");
    assert!(!reading::dm_exists(&name));
}

#[test]
fn the_device_opens_at_once_by_both_paths_and_holds_the_image() {
    let scene = Scene::new();
    for _ in 0..5 {
        let snapshot = scene.snapshot();
        let mapper = snapshot.handles().mapper.clone().expect("an alias");
        assert!(snapshot.device().starts_with("/dev"), "{snapshot:?}");
        let device = File::options()
            .read(true)
            .write(true)
            .open(snapshot.device())
            .expect("the device opens");
        let alias = File::open(&mapper).expect("the alias opens");
        assert_eq!(number(snapshot.device()), number(&mapper));
        assert_eq!(content(snapshot.device()), content(scene.image()));

        device
            .write_all_at(b"the guest was here", 8192)
            .expect("writable");
        device.sync_all().expect("the COW file takes it");
        let mut seen = [0; 18];
        alias
            .read_exact_at(&mut seen, 8192)
            .expect("readable by the alias");
        assert_eq!(&seen, b"the guest was here");
        drop((device, alias));
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn a_guests_file_system_keeps_its_writes_and_the_image_none() {
    let scene = Scene::ext4();
    let (name, cow) = (scene.name(), scene.sparse("cow", 32 << 20));
    let at = scene.path("mnt");
    let create = || {
        SnapshotOptions::new()
            .create(scene.image(), &cow, &name)
            .expect("a snapshot")
    };
    let mount = |device: &Path| Mounted::mount([device.to_str().expect("ASCII")], &at);

    let snapshot = create();
    {
        let mounted = mount(snapshot.device());
        fs::write(mounted.at().join("hello"), "from the guest").expect("a writable disk");
    }
    {
        let mounted = mount(&snapshot.handles().mapper.clone().expect("an alias"));
        let text = fs::read_to_string(mounted.at().join("hello")).expect("remounted");
        assert_eq!(text, "from the guest");
    }
    snapshot.cleanup().expect("nobody has it open");
    scene.assert_clean();

    // The COW file is all that there is of it; a second snapshot over the same image finds the writes there.
    let snapshot = create();
    {
        let mounted = mount(snapshot.device());
        let text = fs::read_to_string(mounted.at().join("hello")).expect("attached again");
        assert_eq!(text, "from the guest");
    }
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn many_snapshots_over_one_image_see_their_own_writes() {
    let scene = Scene::new();
    let snapshots: Vec<_> = (0..4).map(|_| scene.snapshot()).collect();
    let open = |path: &Path| File::options().read(true).write(true).open(path);
    for (nth, snapshot) in (b'a'..).zip(&snapshots) {
        let device = open(snapshot.device()).expect("the device opens");
        device.write_all_at(&[nth; 512], 4096).expect("writable");
        device.sync_all().expect("the COW file takes it");
    }
    for (nth, snapshot) in (b'a'..).zip(&snapshots) {
        let device = open(snapshot.device()).expect("the device opens");
        let mut seen = [0; 512];
        device.read_exact_at(&mut seen, 4096).expect("readable");
        assert_eq!(seen, [nth; 512]);
    }
    for snapshot in snapshots {
        snapshot.cleanup().expect("nobody has it open");
    }
}

#[test]
fn dropping_the_value_leaves_the_disk_alone() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let handles = snapshot.handles().clone();
    drop(snapshot);
    let name = handles.name.clone().expect("a name").to_string();
    assert!(reading::dm_exists(&name));
    assert_eq!(loops_below(scene.dir()).len(), 2);
    File::open(handles.device.as_ref().expect("a device")).expect("still there");
    dmsnap::cleanup(&handles).expect("nobody has it open");
}

#[test]
fn list_and_status_tell_what_dmsetup_tells() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let handles = snapshot.handles();
    let name = handles.name.clone().expect("a name");
    let listed: Vec<_> = dmsnap::list()
        .expect("a list")
        .into_iter()
        .map(|entry| entry.expect("readable"))
        .filter(|info| info.name == name.as_str())
        .collect();
    let info = dmsnap::status(&name).expect("a status");
    assert_eq!(listed, std::slice::from_ref(&info));
    assert_eq!(
        (info.state, info.open_count, info.deferred_remove),
        (State::Live, 0, false)
    );
    assert_eq!(Some(info.dev), handles.dev);
    let params = info.params.expect("a table");
    assert_eq!(
        (params.store, params.chunk.sectors()),
        (Store::Persistent, Sectors::new(8))
    );
    let origin = info.origin.expect("an origin loop");
    let origin_loop = handles.origin_loop.as_ref().expect("an origin loop");
    assert_eq!(
        (&origin.device, origin.backing, origin.diskseq),
        (&origin_loop.path, origin_loop.backing, origin_loop.diskseq)
    );
    assert_eq!(origin.path.as_deref(), Some(scene.image()));
    let Some(SnapshotStatus::Usage(usage)) = info.status else {
        panic!("{:?}", info.status)
    };
    let line = crate::common::run!("dmsetup", "status", name.as_str());
    assert!(
        line.trim_end().ends_with(&format!(
            "snapshot {}/{} {}",
            usage.allocated, usage.total, usage.metadata
        )),
        "{line}"
    );

    crate::common::run!("dmsetup", "suspend", name.as_str());
    let state = dmsnap::status(&name).map(|info| info.state);
    crate::common::run!("dmsetup", "resume", "--noudevsync", name.as_str());
    assert_eq!(state, Ok(State::Suspended));
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn an_image_with_a_tail_loses_it_and_says_so() {
    let scene = Scene::over(|image| patterned(image, IMAGE_BYTES + 100));
    let snapshot = scene.snapshot();
    println!(
        "bad input: size not a multiple of 512: (warning) {}",
        snapshot.warnings()[0]
    );
    assert_eq!(snapshot.warnings(), [Warning::OriginTail { bytes: 100 }]);
    assert_eq!(
        snapshot.warnings()[0].to_string(),
        "the last 100 bytes of the origin image are no whole sector and not visible"
    );
    let name = snapshot.handles().name.clone().expect("a name");
    assert!(dm_table(name.as_str()).starts_with(&format!("0 {} snapshot ", IMAGE_BYTES / 512)));
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn a_cow_file_that_a_full_overwrite_would_fill_is_worth_a_warning() {
    let scene = Scene::new();
    let cow = scene.sparse("small", 1 << 20);
    let snapshot = SnapshotOptions::new()
        .create(scene.image(), &cow, &scene.name())
        .expect("a snapshot");
    // 1024 chunks of data, the header, and 5 metadata areas of 256 exceptions each.
    let worst_case_bytes = (1024 + 1 + 5) * 4096;
    assert_eq!(
        snapshot.warnings(),
        [Warning::CowBelowWorstCase {
            bytes: 1 << 20,
            worst_case_bytes
        }]
    );
    snapshot.cleanup().expect("nobody has it open");
}

#[test]
fn block_devices_serve_as_origin_and_cow_too() {
    let scene = Scene::new();
    let origin = Losetup::attach_read_only(scene.image());
    let cow = Losetup::attach(&scene.cow("cow"));
    let snapshot = SnapshotOptions::new()
        .create(&origin.device, &cow.device, &scene.name())
        .expect("a snapshot");
    assert_eq!(content(snapshot.device()), content(scene.image()));
    snapshot.cleanup().expect("nobody has it open");
    assert!(origin.is_bound() && cow.is_bound(), "those are not ours");
}
