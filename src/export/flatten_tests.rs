//! Every call of a flattening, and of a stack's export, failed in turn.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::ExportOptions;
use super::flatten::{FlattenOptions, flatten};
use super::stack::export_stack;
use crate::base::OriginIdentity;
use crate::error::{Error, Result, Step};
use crate::kernel::fake::Script;
use crate::kernel::fake::world::{CHUNK, FILE_BYTES};
use crate::store::{self, CHAIN_AT, Chain, MARK_AT};

const OUT: &str = "/exports/out";
const COWS: [&str; 2] = ["/c", "/the/cow"];

/// A machine with an image and the COW files of two layers, the upper one a disk's own.
fn machine() -> Script {
    let script = Script::new(|_, _| None);
    let image = OriginIdentity {
        size_bytes: FILE_BYTES,
        mtime_ns: 1,
    };
    for (path, nth) in COWS.into_iter().zip(0u8..) {
        let mut file = vec![0; 3 * CHUNK];
        for (nth, word) in [0x7041_6e53_u32, 1, 1, 8].iter().enumerate() {
            file[nth * 4..nth * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        let chain = store::chain(Chain {
            id: u128::from(1 - nth),
            parent: nth.into(),
            depth: nth.into(),
            frozen: nth == 0,
        });
        file[MARK_AT..MARK_AT + 64].copy_from_slice(&store::mark(image, None));
        file[CHAIN_AT..CHAIN_AT + chain.len()].copy_from_slice(&chain);
        // The disk's chunk 7 or 8 is in the COW file's chunk 2.
        (file[CHUNK], file[CHUNK + 8], file[2 * CHUNK]) = (7 + nth, 2, b'x');
        let mut world = script.world.borrow_mut();
        let inode = world.file_at(Path::new(path)).expect("it is there");
        world.contents.insert(inode, file);
    }
    script.world.borrow_mut().missing.insert(OUT.into());
    script
}

/// Both stories end with the output, whole, or with nothing.
fn whichever_call_fails(story: impl Fn(&Script) -> Result<u64>) {
    let script = machine();
    assert_eq!(story(&script), Ok(2 * 4096));
    let calls = script.calls.take();
    let mut all_the_same = BTreeSet::new();
    for (index, step) in calls.iter().enumerate() {
        let script = machine();
        let before = script.world.borrow().residue();
        script.restart(move |_, nth| (nth == index + 1).then_some(Errno::EIO));
        let result = story(&script);
        let mut after = script.world.borrow().residue();
        match result {
            Ok(changed) => {
                assert_eq!(changed, 2 * 4096);
                all_the_same.insert(format!("{step:?}"));
                assert!(after.remove(Path::new(OUT)));
            }
            Err(Error::Failed { step: named, .. }) => {
                let sized = (named, *step) == (Step::WriteFile, Step::SizeFile);
                assert!(named == *step || sized, "call {index}: {named:?}, {step:?}");
                // The last call of all: the output has its name, and its directory is not synced.
                if index + 1 == calls.len() {
                    assert!(after.remove(Path::new(OUT)));
                }
            }
            Err(other) => panic!("call {index}, {step:?}: {other}"),
        }
        assert_eq!(after, before, "call {index}, {step:?}");
    }
    let harmless = ["FindData", "MakeFile"].map(str::to_owned);
    let harmless = BTreeSet::from(harmless);
    assert!(all_the_same.is_subset(&harmless), "{all_the_same:?}");
}

#[test]
fn whichever_call_of_a_flattening_fails_no_output_is_left() {
    let cows = COWS.map(PathBuf::from);
    whichever_call_fails(|script| {
        let (options, out) = (FlattenOptions::new(), Path::new(OUT));
        let go_on = &mut |_| ControlFlow::Continue(());
        let done = flatten(script, &options, &cows, out, go_on)?;
        Ok(done.expect("not broken off").changed_bytes)
    });
}

#[test]
fn whichever_call_of_a_stacks_export_fails_no_output_is_left() {
    let cows = COWS.map(PathBuf::from);
    whichever_call_fails(|script| {
        let (options, out) = (ExportOptions::new(), Path::new(OUT));
        let go_on = &mut |_| ControlFlow::Continue(());
        let image = Path::new("/image");
        let done = export_stack(script, &options, image, &cows, out, go_on)?;
        Ok(done.expect("not broken off").changed_bytes)
    });
}
