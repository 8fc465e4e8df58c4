//! Every call of putting a stack together failed in turn.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use super::create::create_on;
use super::origin::open as open_origin;
use super::stack::{StackOptions, open_stack};
use super::{Base, SnapshotOptions};
use crate::backing::{CowOptions, CowSize};
use crate::base::{DeviceName, Handles, OriginIdentity};
use crate::dm::Address;
use crate::error::{LayerRefusal, Result, Retry, Step};
use crate::find::{TreeNode, tree_of_all, tree_of_one};
use crate::kernel::DeviceMapper;
use crate::kernel::fake::world::FILE_BYTES;
use crate::kernel::fake::{Script, ScriptLoop};
use crate::store::{self, CHAIN_AT, Chain, MARK_AT};
use crate::teardown::{ReapOptions, clean};

/// From the bottom up.
const COWS: [&str; 3] = ["/c", "/the/cow", "/the/next/cow"];

fn never(_: Step, _: usize) -> Option<Errno> {
    None
}

/// A machine with an image and three layers' COW files.
fn stage() -> (Script, Base<ScriptLoop>) {
    let script = Script::new(never);
    let image = OriginIdentity {
        size_bytes: FILE_BYTES,
        mtime_ns: 1,
    };
    for (path, id) in COWS.into_iter().zip(1..) {
        let mut start = vec![0; 4096];
        for (nth, word) in [0x7041_6e53_u32, 1, 1, 8].iter().enumerate() {
            start[nth * 4..nth * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        let chain = store::chain(Chain {
            id,
            parent: id - 1,
            depth: u32::try_from(id - 1).expect("small"),
            frozen: true,
        });
        start[MARK_AT..MARK_AT + 64].copy_from_slice(&store::mark(image, None));
        start[CHAIN_AT..CHAIN_AT + chain.len()].copy_from_slice(&chain);
        let mut world = script.world.borrow_mut();
        let inode = world.file_at(Path::new(path)).expect("it is there");
        world.contents.insert(inode, start);
    }
    let image =
        open_origin(&script, Path::new("/image"), &CowOptions::default()).expect("nothing fails");
    script.restart(never);
    (script, image)
}

fn open(
    script: &Script,
    image: &Base<ScriptLoop>,
    cows: &[PathBuf],
) -> Result<(Base<ScriptLoop>, Handles)> {
    let mut options = StackOptions::new();
    options.keep(true).deadline(Duration::ZERO);
    let name = DeviceName::new("noon").expect("a name");
    open_stack(script, &options, image, cows, &name)
}

fn cows() -> Vec<PathBuf> {
    COWS.map(PathBuf::from).to_vec()
}

/// The names of what a device stands on, from the top down.
fn below(script: &Script, name: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut next = script.query(Address::Name(name)).ok();
    while let Some(device) = next {
        let world = script.world.borrow();
        let live = world.devices[&device.uuid].live.as_ref();
        let params = live.expect("it is live").params().expect("a snapshot");
        let origin = params.origin;
        drop(world);
        names.push(device.name);
        next = script.query(Address::Number(origin)).ok();
    }
    names
}

#[test]
fn files_given_in_any_order_are_one_stack_which_goes_with_its_topmost_layer() {
    for turn in 0..3 {
        for swapped in [false, true] {
            let (script, image) = stage();
            let before = script.world.borrow().residue();
            let mut given = cows();
            given.rotate_left(turn);
            if swapped {
                given.swap(0, 1);
            }
            let (top, handles) = open(&script, &image, &given).expect("nothing fails");
            assert_eq!(below(&script, "noon"), ["noon", "noon.2", "noon.1"]);
            // What is there is used, also by another stack.
            let (again, same) = open(&script, &image, &given).expect("nothing fails");
            assert_eq!(same.uuid, handles.uuid);
            let (lower, _) = open(&script, &image, &cows()[..2]).expect("nothing fails");
            assert_eq!(below(&script, "noon"), ["noon", "noon.2", "noon.1"]);
            drop((top, again, lower));
            clean(&script, &handles, &Retry::ONCE).expect("nobody stands on it");
            assert_eq!(script.world.borrow().residue(), before);
        }
    }
}

#[test]
fn a_stack_that_is_too_deep_or_changes_meanwhile_is_refused() {
    let (script, image) = stage();
    let before = script.world.borrow().residue();
    let refused = |cows: &[PathBuf]| open(&script, &image, cows).map(drop).expect_err("refused");
    let cow = PathBuf::from(COWS[2]);
    let missing = LayerRefusal::Missing { cow: cow.clone() };
    assert_eq!(refused(&[COWS[0].into(), cow.clone()]), missing.into());
    let cut = {
        let mut world = script.world.borrow_mut();
        let inode = world.file_at(&cow).expect("it is there");
        world.sizes.insert(inode, 4096)
    };
    assert_eq!(cut, None);
    let unsound = refused(&cows());
    assert!(unsound.to_string().contains(COWS[2]), "{unsound}");
    assert_eq!(script.world.borrow().residue(), before);
}

#[test]
fn whichever_call_of_it_fails_nothing_is_left_and_asking_again_does_it() {
    let (script, image) = stage();
    let (top, _) = open(&script, &image, &cows()).expect("nothing fails");
    let calls = script.calls.take();
    drop(top);
    for (index, step) in calls.iter().enumerate() {
        let (script, image) = stage();
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let opened = open(&script, &image, &cows());
        if opened.is_ok() {
            // The number of a binding that cannot be read.
            assert_eq!(*step, Step::ReadDiskseq, "call {index}");
            continue;
        }
        drop(opened);
        script.restart(never);
        let after = script.world.borrow().residue();
        assert_eq!(after, before, "call {index}, {step:?}");
        let again = open(&script, &image, &cows());
        assert!(again.is_ok(), "after call {index}, {step:?}");
    }
    assert!(calls.len() > 60, "{calls:?}");
}

/// What stands on what, as nested names.
fn nested(node: &TreeNode) -> String {
    let above: Vec<_> = node.above.iter().map(nested).collect();
    let name = node.name().unwrap_or("image");
    match above.is_empty() {
        true => name.to_owned(),
        false => format!("{name}({})", above.join(" ")),
    }
}

#[test]
fn a_tree_shows_what_stands_on_what_and_whichever_call_of_it_fails_hides_nothing_else() {
    let (script, image) = stage();
    let (top, _) = open(&script, &image, &cows()).expect("nothing fails");
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Bytes(1 << 20));
    for (name, base) in [("fork", &top), ("vm", &image), ("also", &top)] {
        let (cow, dm_name) = (format!("/cows/of/{name}"), DeviceName::new(name));
        script.world.borrow_mut().missing.insert(cow.clone().into());
        let made = create_on(
            &script,
            &options,
            base,
            Path::new(&cow),
            &dm_name.expect("a name"),
        );
        let _ = made.expect("nothing fails").into_handles();
    }
    script.restart(never);
    let trees = tree_of_all(&script).expect("nothing fails");
    let calls = script.calls.take().len();
    let [Ok(tree)] = &trees[..] else {
        panic!("one image: {trees:?}");
    };
    assert_eq!(nested(tree), "image(noon.1(noon.2(noon(also fork))) vm)");
    assert_eq!(tree.size_bytes, Some(FILE_BYTES));
    for (name, expected) in [
        ("noon.2", "image(noon.1(noon.2(noon(also fork))))"),
        ("fork", "image(noon.1(noon.2(noon(fork))))"),
        ("vm", "image(vm)"),
    ] {
        let found = tree_of_one(&script, &name.into()).expect("nothing fails");
        assert_eq!(nested(&found), expected);
    }
    for index in 0..calls {
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let Ok(trees) = tree_of_all(&script) else {
            // Device-mapper cannot be asked at all.
            assert!(index < 2, "call {index}");
            continue;
        };
        let failed = trees.iter().filter(|tree| tree.is_err()).count();
        let text: String = trees.iter().flatten().map(nested).collect();
        let shown = ["noon.1", "noon.2", "noon(", "also", "fork", "vm"];
        let shown = shown.iter().filter(|name| text.contains(*name)).count();
        assert!(failed + shown >= 6 && failed <= 1, "call {index}: {text}");
    }
}

/// As a SIGKILL: what comes behind is not done, and what the process had open is closed.
#[test]
fn whichever_call_it_dies_at_a_sweep_takes_what_is_left() {
    let calls = {
        let (script, image) = stage();
        open(&script, &image, &cows())
            .map(drop)
            .expect("nothing fails");
        script.calls.take().len()
    };
    for index in 0..calls {
        let (script, image) = stage();
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth > index).then_some(Errno::EIO));
        let _ = open(&script, &image, &cows()).map(drop);
        script.restart(never);
        let reaped = ReapOptions::new().reap_on(&script, |_| false);
        for item in reaped.expect("it can be asked") {
            assert!(item.fate.is_ok(), "call {index}: {item:?}");
        }
        assert_eq!(script.world.borrow().residue(), before, "call {index}");
    }
}
