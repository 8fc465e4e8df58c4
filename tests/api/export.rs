//! Exports of idle COW files, over stores made from the description of the format.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use dmsnap::base::OriginIdentity;
use dmsnap::error::{Refusal, Step};
use dmsnap::export::{ExportOptions, Exported};
use dmsnap::store::StoreFault;
use dmsnap::{Error, ErrorKind};
use nix::fcntl::{Flock, FlockArg};
use proptest::prelude::*;
use tempfile::TempDir;

use super::made_store::{MadeStore, content};
use super::{cases, chain};

/// A directory with an origin and a COW file over it.
struct Stage {
    dir: TempDir,
    made: MadeStore,
    /// What the export must be.
    expected: Vec<u8>,
}

const HOLE: u64 = 256 << 10;

impl Stage {
    /// An origin of that many bytes, a hole in its middle, and a store with the chunks.
    fn new(bytes: u64, chunk_sectors: u32, chunks: &[u64]) -> Self {
        let dir = TempDir::with_prefix("dmsnap-test-").expect("a temporary directory");
        let made = MadeStore::new(chunk_sectors, chunks, 1);
        let length = usize::try_from(bytes).expect("small");
        let mut expected: Vec<u8> = (0..length).map(|at| content(at as u64 / 4096)).collect();
        let hole = length / 3..(length / 3 + usize::try_from(HOLE).expect("small")).min(length);
        expected[hole.clone()].fill(0);
        let stage = Self {
            dir,
            made,
            expected: Vec::new(),
        };
        let origin = File::create(stage.origin()).expect("a new file");
        origin.set_len(bytes).expect("room");
        origin
            .write_all_at(&expected[..hole.start], 0)
            .expect("room");
        origin
            .write_all_at(&expected[hole.end..], hole.end as u64)
            .expect("room");
        fs::write(stage.cow(), &stage.made.file).expect("room");
        stage.mark(identity(&stage.origin()));
        expected.truncate(length / 512 * 512);
        for (chunk, _) in &stage.made.exceptions {
            let start = usize::try_from(*chunk).expect("small") * stage.made.chunk;
            let end = (start + stage.made.chunk).min(expected.len());
            expected[start..end].fill(content(*chunk));
        }
        Self { expected, ..stage }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn origin(&self) -> PathBuf {
        self.path("origin.img")
    }

    fn cow(&self) -> PathBuf {
        self.path("cow")
    }

    fn export(&self, options: &ExportOptions) -> dmsnap::Result<Exported> {
        options.export(self.origin(), self.cow(), self.path("out"))
    }

    /// Overwrites bytes of the COW file.
    fn damage(&self, at: u64, bytes: &[u8]) {
        let cow = File::options().write(true).open(self.cow());
        cow.and_then(|cow| cow.write_all_at(bytes, at))
            .expect("a COW file");
    }

    /// Says in the COW file what it was made over.
    fn mark(&self, origin: OriginIdentity) {
        let mut mark = b"dmsnap origin 1\0".to_vec();
        mark.extend(origin.size_bytes.to_le_bytes());
        mark.extend(origin.mtime_ns.to_le_bytes());
        self.damage(64, &mark);
    }

    #[track_caller]
    fn refused(&self, options: &ExportOptions, expected: Refusal) {
        let before = self.names();
        let found = self.export(options).expect_err("refused");
        assert_eq!(found, Error::Refused(expected));
        assert_eq!(self.names(), before);
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("a directory");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            let name = entry.expect("an entry").file_name();
            name.to_string_lossy().into_owned()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }
}

fn identity(path: &Path) -> OriginIdentity {
    let found = fs::metadata(path).expect("an origin");
    OriginIdentity {
        size_bytes: found.len(),
        mtime_ns: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..cases() })]

    #[test]
    fn an_export_is_the_origin_with_the_changes_over_it(
        bytes in (1 << 20)..(3u64 << 20),
        power in 0..8u32,
        places in prop::collection::vec(0.0..1.0f64, 0..200),
        reflink in any::<bool>(),
    ) {
        let chunks = (bytes / 512 * 512).div_ceil(512 << power);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a share of a small number")]
        let places: Vec<u64> = places.iter().map(|place| (place * chunks as f64) as u64).collect();
        let stage = Stage::new(bytes, 1 << power, &places);
        let done = stage.export(ExportOptions::new().reflink(reflink)).expect("an export");
        prop_assert!(fs::read(stage.path("out")).expect("the export") == stage.expected);
        prop_assert_eq!(done.bytes, bytes / 512 * 512);
        prop_assert!(reflink || !done.reflinked);
        prop_assert_eq!(stage.names(), ["cow", "origin.img", "out"]);
    }
}

#[test]
fn an_export_is_sparse_private_and_counted() {
    let stage = Stage::new(4 << 20, 8, &[3, 700]);
    // A changed chunk that is all zeroes, as a discarded one is.
    stage.damage(3 * 4096, &[0; 4096]);
    let done = stage
        .export(ExportOptions::new().reflink(false))
        .expect("an export");
    assert_eq!((done.bytes, done.changed_bytes), (4 << 20, 8192));
    let hole = HOLE / 4096 * 4096;
    let most = (4 << 20) - hole - 4096 + 8192;
    assert!(done.written_bytes <= most, "{done:?}");
    let found = fs::metadata(stage.path("out")).expect("the export");
    assert_eq!(found.permissions().mode() & 0o7777, 0o600);
    assert!(found.blocks() * 512 <= most, "{} blocks", found.blocks());
    let mut expected = stage.expected.clone();
    expected[3 * 4096..4 * 4096].fill(content(3));
    expected[700 * 4096..701 * 4096].fill(0);
    assert!(fs::read(stage.path("out")).expect("the export") == expected);
}

#[test]
fn an_output_is_replaced_only_when_told_and_only_if_it_is_a_file() {
    let stage = Stage::new(1 << 20, 8, &[3]);
    let out = stage.path("out");
    let options = ExportOptions::new();
    let mut replace = ExportOptions::new();
    replace.replace(true);
    fs::write(&out, "keep me").expect("room");
    stage.refused(&options, Refusal::OutputExists { path: out.clone() });
    assert_eq!(fs::read(&out).expect("kept"), b"keep me");
    stage.export(&replace).expect("replaced");
    assert!(fs::read(&out).expect("the export") == stage.expected);
    assert_eq!(stage.names(), ["cow", "origin.img", "out"]);

    fs::remove_file(&out).expect("it is there");
    symlink(stage.origin(), &out).expect("a link");
    let kind = "a symbolic link";
    let path = out.clone();
    stage.refused(&replace, Refusal::OutputNotAFile { path, kind });
    fs::remove_file(&out).expect("it is there");
    fs::create_dir(&out).expect("a directory");
    let kind = "a directory";
    let path = out.clone();
    stage.refused(&replace, Refusal::OutputNotAFile { path, kind });
    let same = options.export(stage.cow(), stage.cow(), stage.path("other"));
    let (origin, cow) = (stage.cow(), stage.cow());
    assert_eq!(same, Err(Error::Refused(Refusal::SameFile { origin, cow })));
    for input in [stage.cow(), stage.origin()] {
        let found = replace.export(stage.origin(), stage.cow(), &input);
        let refusal = Refusal::OutputIsInput { path: input };
        assert_eq!(found, Err(Error::Refused(refusal)));
    }
}

#[test]
fn a_cow_file_that_a_snapshot_has_is_refused() {
    let stage = Stage::new(1 << 20, 8, &[3]);
    let file = File::open(stage.cow()).expect("a COW file");
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("nobody has it");
    let path = stage.cow();
    stage.refused(&ExportOptions::new(), Refusal::CowInUse { path });
    drop(lock);
    let mut attached = false;
    let whole = ExportOptions::new().export_with(
        stage.origin(),
        stage.cow(),
        stage.path("out"),
        &mut |_| {
            let file = File::open(stage.cow()).expect("a COW file");
            attached |= Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok();
            ControlFlow::Continue(())
        },
    );
    assert!(whole.expect("an export").is_some() && !attached);
}

#[test]
fn a_store_that_is_invalid_or_damaged_is_refused() {
    let stage = Stage::new(1 << 20, 8, &[3, 9]);
    let options = ExportOptions::new();
    stage.damage(4, &[0]);
    stage.refused(&options, Refusal::CowInvalid { path: stage.cow() });
    stage
        .export(ExportOptions::new().invalid_store(true))
        .expect("what was written before");
    assert!(fs::read(stage.path("out")).expect("the export") == stage.expected);
    fs::remove_file(stage.path("out")).expect("it is there");

    stage.damage(4, &[1]);
    stage.damage(4096, &300u64.to_le_bytes());
    let fault = StoreFault::OriginChunk {
        offset: 4096,
        chunk: 300,
    };
    let path = stage.cow();
    stage.refused(&options, Refusal::CowUnsound { path, fault });
    stage.damage(8, &[2]);
    let (path, field, value) = (stage.cow(), "version", 2);
    stage.refused(&options, Refusal::CowDamaged { path, field, value });
    stage.damage(0, &[1]);
    stage.refused(&options, Refusal::CowForeign { path: stage.cow() });
    fs::write(stage.cow(), [0; 8192]).expect("room");
    let (path, fault) = (stage.cow(), StoreFault::Blank);
    stage.refused(&options, Refusal::CowUnsound { path, fault });
}

#[test]
fn an_origin_that_is_not_the_marked_one_is_refused() {
    let stage = Stage::new(1 << 20, 8, &[3]);
    let found = identity(&stage.origin());
    let expected = OriginIdentity {
        mtime_ns: found.mtime_ns - 1,
        ..found
    };
    stage.mark(expected);
    let path = stage.origin();
    let refusal = Refusal::OriginChanged {
        path,
        expected,
        found,
    };
    stage.refused(&ExportOptions::new(), refusal);
    stage
        .export(ExportOptions::new().any_origin(true))
        .expect("as it is");
    stage.mark(found);
    let mut replace = ExportOptions::new();
    stage.export(replace.replace(true)).expect("the marked one");
    let changed = replace.export_with(stage.origin(), stage.cow(), stage.path("out"), &mut |_| {
        let origin = File::options().write(true).open(stage.origin());
        let touched = origin.and_then(|origin| origin.write_all_at(b"x", 0));
        touched.expect("an origin");
        ControlFlow::Continue(())
    });
    let changed = changed.expect_err("written to meanwhile");
    assert!(
        matches!(changed, Error::Refused(Refusal::OriginChanged { .. })),
        "{changed:?}"
    );
    assert!(fs::read(stage.path("out")).expect("the older export") == stage.expected);
}

#[test]
fn an_export_that_is_broken_off_or_fails_leaves_nothing() {
    let stage = Stage::new(4 << 20, 8, &[3]);
    let before = stage.names();
    let export = |progress: &mut dyn FnMut(dmsnap::export::Progress) -> ControlFlow<()>| {
        ExportOptions::new().export_with(stage.origin(), stage.cow(), stage.path("out"), progress)
    };
    let mut calls = 0;
    let broken_off = export(&mut |progress| {
        calls += 1;
        assert!(progress.done_bytes <= progress.total_bytes);
        ControlFlow::Break(())
    });
    assert_eq!((broken_off, calls), (Ok(None), 1));
    assert_eq!(stage.names(), before);
    let panicked = catch_unwind(AssertUnwindSafe(|| export(&mut |_| panic!("the caller's"))));
    assert!(panicked.is_err());
    assert_eq!(stage.names(), before);
    let mut last = (0, 1);
    let whole = export(&mut |progress| {
        last = (progress.done_bytes, progress.total_bytes);
        ControlFlow::Continue(())
    });
    assert_eq!(whole.expect("an export").expect("whole").bytes, 4 << 20);
    assert_eq!(last.0, last.1, "it ends with all of it");

    let nowhere = stage.path("no such directory/out");
    let error = ExportOptions::new()
        .export(stage.origin(), stage.cow(), &nowhere)
        .expect_err("no such directory");
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(
        matches!(
            error,
            Error::Failed {
                step: Step::MakeFile,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(chain(&error).ends_with("No such file or directory (os error 2)"));
}

#[test]
fn a_name_that_is_taken_meanwhile_is_not_replaced() {
    let stage = Stage::new(1 << 20, 8, &[3]);
    let out = stage.path("out");
    let error = ExportOptions::new()
        .export_with(stage.origin(), stage.cow(), &out, &mut |_| {
            fs::write(&out, "somebody else's").expect("room");
            ControlFlow::Continue(())
        })
        .expect_err("the name is taken");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(fs::read(&out).expect("theirs"), b"somebody else's");
    assert_eq!(stage.names(), ["cow", "origin.img", "out"]);
}
