//! COW files on hosts that limit what can be done to them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};

use dmsnap::{CowSize, SnapshotOptions};

use crate::common::rows::Row;
use crate::common::tools::{complaint, finish};
use crate::common::{Losetup, Mounted, Scene, chain, dmsnap_under, output, run};

// ulimit -f 100, and a COW file to be made: SIGXFSZ killed the maker, and the empty file stayed.
#[test]
fn a_cow_file_over_the_file_size_limit_is_an_error_and_undone() {
    let scene = Scene::new();
    let cow = scene.path("cow");
    let mut limited = dmsnap_under(&["sh", "-c", "ulimit -f 100; exec \"$@\"", "sh"]);
    limited.args(["create", "--make-cow", "2M"]);
    limited.arg(scene.image()).arg(&cow).arg(scene.name());
    let said = complaint(&finish(&mut limited));
    println!("ulimit -f: {said}");
    assert!(said.contains("File too large (os error 27)"), "{said}");
    assert!(!cow.exists(), "the file that was made is undone");
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Percent(50));
    let made = options.create(scene.image(), &cow, &scene.name());
    made.expect("without the limit")
        .cleanup()
        .expect("nobody has it open");
}

// ramfs cannot punch holes: a guest's discards of written chunks fail, or give nothing back.
#[test]
fn discards_are_not_offered_where_no_hole_can_be_punched() {
    let scene = Scene::new();
    let mounted = Mounted::mount(["-t", "ramfs", "none"], &scene.path("ram"));
    let cow = mounted.at().join("cow");
    let file = File::create_new(&cow).expect("a new file");
    file.set_len(8 << 20).expect("ramfs has no size");
    drop(file);
    let witness = output!("fallocate", "-p", "-o", "0", "-l", "4096", &cow);
    assert!(!witness.status.success(), "ramfs punches holes");
    let mut options = SnapshotOptions::new();
    options
        .discard(true)
        .trust_discards(true)
        .chunk_size(dmsnap::ChunkSize::new(512).expect("a power of two"));
    let name = scene.name();
    let snapshot = options.create(scene.image(), &cow, &name);
    let snapshot = snapshot.expect("a snapshot");
    let table = run!("dmsetup", "table", &name);
    let warnings: Vec<_> = snapshot
        .warnings()
        .iter()
        .map(ToString::to_string)
        .collect();
    println!("discard on ramfs: {table}; {warnings:?}");
    assert!(!table.contains("discard_zeroes_cow"), "{table}");
    assert!(
        warnings.iter().any(|text| text.contains("discard")),
        "{warnings:?}"
    );
    snapshot.cleanup().expect("nobody has it open");
    drop(mounted);
}

// A table load on a read-only device is an input/output error that says nothing.
#[test]
fn a_read_only_block_device_is_no_cow_device() {
    let scene = Scene::new();
    let theirs = Losetup::attach_read_only(&scene.cow("cow"));
    let row = Row::new(&scene, "read-only device", scene.image(), &theirs.device);
    let (error, text) = row.refused(&SnapshotOptions::new());
    let expected = format!("COW device {:?} is read-only", theirs.device);
    assert_eq!(text, expected, "{error:?}");
}

#[test]
fn a_taken_name_is_said_to_be_one() {
    let scene = Scene::new();
    let snapshot = scene.snapshot();
    let name = snapshot.handles().name.clone().expect("a name");
    let cow = scene.cow("other");
    let again = SnapshotOptions::new().create(scene.image(), &cow, name.as_str());
    let text = chain(&again.expect_err("the name is taken"));
    println!("name taken: {text}");
    assert!(
        text.ends_with("there is a dm device of that name already"),
        "{text}"
    );
    snapshot.cleanup().expect("nobody has it open");
}

// md 1.2, bcache and bcachefs begin at 4 KiB, a ZFS label's list at 16 KiB; before them is nothing.
#[test]
fn what_begins_behind_zeroes_is_not_blank() {
    let scene = Scene::new();
    for (what, at, bytes) in [
        ("md 1.2", 0x1000u64, &[0xfc, 0x4e, 0x2b, 0xa9][..]),
        ("bcache", 0x1018, &[0xc6, 0x85, 0x73, 0xf6]),
        ("bcachefs", 0x1018, &[0xc6, 0x85, 0x73, 0xf6]),
        ("ZFS label", 0x4000, b"\x01\x01\0\0"),
        ("swap of 64 KiB pages", 0xfff6, b"SWAPSPACE2"),
        ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ] {
        let cow = scene.cow(what.replace(' ', "-"));
        let file = File::options().write(true).open(&cow).expect("writable");
        file.write_all_at(bytes, at).expect("room");
        drop(file);
        let row = Row::new(&scene, what, scene.image(), &cow);
        let (_, text) = row.refused(&SnapshotOptions::new());
        let page = at & !0xfff;
        let expected = format!(
            "COW file {cow:?} begins with zeroes and has data at byte {page}: it is not blank, and has no header of a snapshot's exception store"
        );
        assert_eq!(text, expected);
    }
}

#[test]
fn replace_cow_takes_no_symbolic_link() {
    let scene = Scene::new();
    let (target, link) = (scene.file("precious", vec![7; 1 << 20]), scene.path("link"));
    symlink(&target, &link).expect("a link");
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Percent(50)).replace_cow(true);
    let row = Row::new(&scene, "a link to replace", scene.image(), &link);
    let (_, text) = row.refused(&options);
    assert_eq!(
        text,
        format!("{link:?} is a symbolic link, not a file or a block device")
    );
    let kept = fs::read(&target).expect("it is there");
    assert!(kept == vec![7; 1 << 20], "the link's target is untouched");
}

// A /dev/mapper that takes no links undid the whole create.
#[test]
fn an_alias_that_cannot_be_made_is_a_warning() {
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.cow("cow"));
    let script =
        "mount --bind /dev/mapper /dev/mapper && mount -o remount,ro,bind /dev/mapper && \"$@\"";
    let mut create = dmsnap_under(&["unshare", "-m", "sh", "-ec", script, "sh"]);
    create.arg("create").arg(scene.image()).arg(&cow).arg(&name);
    let done = finish(&mut create);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    println!("read-only /dev/mapper: {said}");
    assert!(done.status.success(), "{done:?}");
    assert!(said.contains(&format!("/dev/mapper/{name}")), "{said}");
    assert!(run!("dmsetup", "ls").contains(&name));
    run!("dmsetup", "remove", "--noudevsync", &name);
}
