//! Stacks of COW files made one, and exported, over stores and marks made from the description of the format: each is
//! held against the other, and against the disk as it is put together here.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dmsnap::error::{LayerRefusal, Refusal};
use dmsnap::export::{ExportOptions, FlattenOptions, Flattened};
use dmsnap::store::ExceptionStore;
use dmsnap::{ChunkSize, Error};
use nix::fcntl::{Flock, FlockArg};
use proptest::prelude::*;
use tempfile::TempDir;

use super::cases;
use super::made_store::{MadeStore, content, plain_reading};

/// What a chain mark says: the id of the layer, of the one below, how many are below it, whether it is frozen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Chain {
    id: u128,
    parent: u128,
    depth: u32,
    frozen: bool,
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The mark at byte 128.
fn chain_mark(chain: Chain) -> [u8; 96] {
    let mut mark = [0; 96];
    mark[..14].copy_from_slice(b"dmsnap chain 1");
    mark[16..32].copy_from_slice(&chain.id.to_le_bytes());
    mark[32..48].copy_from_slice(&chain.parent.to_le_bytes());
    mark[72..76].copy_from_slice(&chain.depth.to_le_bytes());
    mark[76] = u8::from(chain.frozen);
    let sum = fnv(&mark[..88]);
    mark[88..].copy_from_slice(&sum.to_le_bytes());
    mark
}

/// What the file's chain mark is, if it is there as it should be.
fn chain_of(file: &[u8]) -> Option<Chain> {
    let mark = &file[128..224];
    let id = |at: usize| u128::from_le_bytes(mark[at..at + 16].try_into().expect("16 bytes"));
    let chain = Chain {
        id: id(16),
        parent: id(32),
        depth: u32::from_le_bytes(mark[72..76].try_into().expect("4 bytes")),
        frozen: mark[76] == 1,
    };
    (mark == chain_mark(chain)).then_some(chain)
}

/// The mark at byte 64.
fn origin_mark(image: &Path) -> [u8; 64] {
    let found = fs::metadata(image).expect("an image");
    let mtime = found.mtime() * 1_000_000_000 + found.mtime_nsec();
    let mut mark = [0; 64];
    mark[..15].copy_from_slice(b"dmsnap origin 1");
    mark[16..24].copy_from_slice(&found.len().to_le_bytes());
    mark[24..32].copy_from_slice(&mtime.to_le_bytes());
    mark
}

/// A directory with an image and a stack of COW files over it.
struct Stage {
    dir: TempDir,
    /// From the bottom up.
    cows: Vec<PathBuf>,
    /// What a disk over all of them shows.
    expected: Vec<u8>,
}

impl Stage {
    /// An image of that many bytes, and over it a layer for each of `layers`: its chunk size in sectors, and the chunks
    /// that it changes. The topmost is a disk's own if it is not `frozen`.
    fn new(bytes: u64, layers: &[(u32, Vec<u64>)], frozen: bool) -> Self {
        let dir = TempDir::with_prefix("dmsnap-test-").expect("a temporary directory");
        let length = usize::try_from(bytes).expect("small");
        let mut expected: Vec<u8> = (0..length).map(|at| content(at as u64 / 512)).collect();
        let image = dir.path().join("image");
        fs::write(&image, &expected).expect("room");
        let mut cows = Vec::new();
        for (nth, (sectors, chunks)) in (0u8..).zip(layers) {
            let last = usize::from(nth) + 1 == layers.len();
            let mut made = MadeStore::new(*sectors, chunks, 1);
            made.file[64..128].copy_from_slice(&origin_mark(&image));
            let chain = Chain {
                id: if last && !frozen {
                    0
                } else {
                    u128::from(nth) + 1
                },
                parent: nth.into(),
                depth: nth.into(),
                frozen: frozen || !last,
            };
            if chain != Chain::default() {
                made.file[128..224].copy_from_slice(&chain_mark(chain));
            }
            for (origin, cow) in &made.exceptions {
                // Now and then a chunk of zeroes, as a discard leaves it.
                let with = (content(*origin) % 7).wrapping_mul(nth + 1);
                let at = usize::try_from(*cow).expect("small") * made.chunk;
                made.file[at..at + made.chunk].fill(with);
                let start = usize::try_from(*origin).expect("small") * made.chunk;
                let end = (start + made.chunk).min(length);
                expected[start..end].fill(with);
            }
            let cow = dir.path().join(format!("cow.{nth}"));
            fs::write(&cow, &made.file).expect("room");
            cows.push(cow);
        }
        Self {
            dir,
            cows,
            expected,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What an export of the files makes of the image.
    fn exported(&self, cows: &[PathBuf], options: &ExportOptions) -> Vec<u8> {
        let out = self.path("out");
        let done = options
            .export_stack(self.path("image"), cows, &out)
            .expect("an export");
        let found = fs::read(&out).expect("the export");
        assert_eq!(done.bytes, found.len() as u64);
        fs::remove_file(out).expect("it is there");
        found
    }

    fn flatten(&self, cows: &[PathBuf], name: &str) -> (PathBuf, Flattened) {
        let flat = self.path(name);
        let done = FlattenOptions::new()
            .flatten(cows, &flat)
            .expect("one file");
        (flat, done)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("a directory");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Which chunks of an image of so many bytes are changed, as shares of it.
fn chunks(bytes: u64, sectors: u32, shares: &[f64]) -> Vec<u64> {
    let count = bytes.div_ceil(u64::from(sectors) * 512);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a small number"
    )]
    let chunk = |share: &f64| (share * count as f64) as u64;
    shares.iter().map(chunk).collect()
}

fn layers() -> impl Strategy<Value = Vec<(u32, Vec<f64>)>> {
    let layer = (0..5u32, prop::collection::vec(0.0..1.0f64, 0..120));
    prop::collection::vec(layer, 1..6)
}

/// A layer's id as the uuid of its device has it.
fn digits(id: u128) -> Option<String> {
    (id != 0).then(|| format!("{id:032x}"))
}

#[test]
fn a_file_says_whether_it_is_a_layers_and_what_it_was_made_over() {
    let layers = [(8, vec![1]), (8, vec![2]), (8, vec![3])];
    for frozen in [true, false] {
        let stage = Stage::new(65536, &layers, frozen);
        for cow in &stage.cows {
            let bytes = fs::read(cow).expect("a file");
            let marked = chain_of(&bytes).expect("a mark");
            let mut store = ExceptionStore::open(File::open(cow).expect("a file")).expect("good");
            let place = store.place().expect("its mark is read");
            assert_eq!(place.frozen, marked.frozen);
            assert_eq!(place.depth, marked.depth);
            let ids = [place.id, place.parent].map(|id| id.map(|id| id.to_string()));
            assert_eq!(ids, [digits(marked.id), digits(marked.parent)]);
            assert_eq!(store.summary().expect("good").place, Some(place));
        }
    }
    // One file over an image, as a create leaves it.
    let stage = Stage::new(65536, &layers[..1], false);
    let store = ExceptionStore::open(File::open(&stage.cows[0]).expect("a file"));
    let store = store.expect("good");
    assert_eq!(store.place(), None);
    assert!(store.origin().is_some());
}

#[cfg(feature = "cli")]
#[test]
fn the_command_says_whose_file_it_is() {
    let layers = [(8, vec![1]), (8, vec![2])];
    let stage = Stage::new(65536, &layers, false);
    let said = |cow: &Path| {
        let command = env!("CARGO_BIN_EXE_dmsnap");
        let mut command = std::process::Command::new(command);
        let output = command.args(["cow", "inspect"]).arg(cow).output();
        let text = String::from_utf8(output.expect("it runs").stdout).expect("UTF-8");
        let lines = text.lines().map(str::to_owned);
        lines
            .filter(|line| line.starts_with("layer ") || line.starts_with("over "))
            .collect::<Vec<_>>()
    };
    let one = digits(1).expect("an id");
    let layer = [
        format!("layer       {one}"),
        "over        an image".to_owned(),
    ];
    assert_eq!(said(&stage.cows[0]), layer);
    let over = format!("over        layer {one} (1 below)");
    assert_eq!(said(&stage.cows[1]), ["layer       no".to_owned(), over]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..cases() })]

    #[test]
    fn a_flattened_stack_is_exported_as_the_stack_is(
        sectors in 300..900u64,
        power in 0..5u32,
        layers in layers(),
        frozen in any::<bool>(),
        turn in 0..6usize,
        part in 0..6usize,
        reflink in any::<bool>(),
    ) {
        let bytes = sectors * 512;
        let all: Vec<_> = layers
            .iter()
            .map(|(_, shares)| (1 << power, chunks(bytes, 1 << power, shares)))
            .collect();
        let stage = Stage::new(bytes, &all, frozen);
        let mut given = stage.cows.clone();
        given.rotate_left(turn % all.len());
        let mut options = ExportOptions::new();
        options.reflink(reflink);
        prop_assert!(stage.exported(&given, &options) == stage.expected);
        let before: Vec<_> = stage.cows.iter().map(|cow| fs::read(cow).expect("a file")).collect();

        // All of them are one file over the image.
        let (flat, done) = stage.flatten(&given, "flat");
        let file = fs::read(&flat).expect("a file");
        prop_assert_eq!(done.bytes, file.len() as u64);
        let exceptions = plain_reading(&file).expect("a sound store");
        let mut origin_chunks: Vec<_> = exceptions.iter().map(|(origin, _)| *origin).collect();
        origin_chunks.dedup();
        prop_assert_eq!(origin_chunks.len() as u64 * (512 << power), done.changed_bytes);
        let id = if frozen { all.len() as u128 } else { 0 };
        let expected = Chain { id, frozen, ..Chain::default() };
        prop_assert_eq!(chain_of(&file), Some(expected).filter(|chain| *chain != Chain::default()));
        prop_assert!(stage.exported(std::slice::from_ref(&flat), &options) == stage.expected);
        ExportOptions::new().export(stage.path("image"), &flat, stage.path("out")).expect("an export");
        prop_assert!(fs::read(stage.path("out")).expect("the export") == stage.expected);
        fs::remove_file(stage.path("out")).expect("it is there");

        // So are the lower ones, or the upper ones, and the rest fits under or over it.
        let (lower, upper) = stage.cows.split_at(part % all.len());
        if !lower.is_empty() {
            let (flat_lower, _) = stage.flatten(lower, "lower");
            let mut both = upper.to_vec();
            both.push(flat_lower);
            prop_assert!(stage.exported(&both, &options) == stage.expected);
            let (flat_upper, _) = stage.flatten(upper, "upper");
            let mut both = lower.to_vec();
            both.insert(0, flat_upper);
            prop_assert!(stage.exported(&both, &options) == stage.expected);
        }
        let after: Vec<_> = stage.cows.iter().map(|cow| fs::read(cow).expect("a file")).collect();
        prop_assert!(after == before);
    }

    #[test]
    fn a_stack_of_any_chunk_sizes_is_exported(
        sectors in 300..900u64,
        layers in layers(),
        reflink in any::<bool>(),
    ) {
        let bytes = sectors * 512;
        let all: Vec<_> = layers
            .iter()
            .map(|(power, shares)| (1 << power, chunks(bytes, 1 << power, shares)))
            .collect();
        let stage = Stage::new(bytes, &all, false);
        let mut options = ExportOptions::new();
        options.reflink(reflink);
        prop_assert!(stage.exported(&stage.cows, &options) == stage.expected);
    }
}

#[test]
fn a_disks_own_file_has_room_for_the_whole_disk_and_a_layers_has_none_and_both_are_sparse() {
    let wide = vec![(8, vec![0, 3, 5]), (8, vec![3, 4, 100]), (8, vec![])];
    for (frozen, chunks) in [(false, 256 + 3), (true, 2 + 5)] {
        let stage = Stage::new(1 << 20, &wide, frozen);
        let (flat, done) = stage.flatten(&stage.cows, "flat");
        assert_eq!((done.bytes, done.changed_bytes), (chunks * 4096, 5 * 4096));
        let found = fs::metadata(&flat).expect("a file");
        assert!(
            found.blocks() * 512 <= 7 * 4096,
            "{} blocks",
            found.blocks()
        );
        assert_eq!(found.mode() & 0o7777, 0o600);
    }
}

#[test]
fn what_is_no_stack_or_in_use_is_refused_and_nothing_is_left() {
    let stage = Stage::new(1 << 20, &[(8, vec![1]), (8, vec![2]), (8, vec![3])], false);
    let [one, two, three] = [0, 1, 2].map(|nth| stage.cows[nth].clone());
    let before = stage.names();
    let refused = |cows: &[PathBuf]| {
        let flat = FlattenOptions::new().flatten(cows, stage.path("flat"));
        let out = ExportOptions::new().export_stack(stage.path("image"), cows, stage.path("out"));
        assert_eq!(stage.names(), before);
        let refusal = |error| match error {
            Error::Refused(refusal) => refusal,
            other => panic!("{other}"),
        };
        let flat = refusal(flat.expect_err("refused"));
        assert_eq!(flat, refusal(out.expect_err("refused")));
        flat
    };
    let missing = LayerRefusal::Missing { cow: three.clone() };
    assert_eq!(refused(&[one.clone(), three.clone()]), missing.into());
    let twice = LayerRefusal::Twice {
        first: two.clone(),
        second: two.clone(),
    };
    assert_eq!(
        refused(&[one.clone(), two.clone(), two.clone()]),
        twice.into()
    );

    let held = Flock::lock(
        File::open(&two).expect("a file"),
        FlockArg::LockExclusiveNonblock,
    );
    let held = held.map_err(|(_, errno)| errno).expect("nobody has it");
    let in_use = Refusal::CowInUse { path: two.clone() };
    assert_eq!(refused(&stage.cows), in_use);
    drop(held);

    let flat = |cows: &[PathBuf]| FlattenOptions::new().flatten(cows, stage.path("flat"));
    let other = Stage::new(1 << 20, &[(8, vec![1]), (16, vec![2])], false);
    let chunk = |sectors| ChunkSize::new(sectors).expect("a power of two");
    let sizes = Refusal::CowChunkSize {
        path: other.cows[1].clone(),
        found: chunk(16),
        asked: chunk(8),
    };
    assert_eq!(flat(&other.cows), Err(sizes.into()));
    let mut invalid = fs::read(&three).expect("a file");
    invalid[4] = 0;
    fs::write(&three, invalid).expect("room");
    let found = Refusal::CowInvalid { path: three };
    assert_eq!(flat(&stage.cows), Err(found.into()));
    assert_eq!(stage.names(), before);

    let output = stage.path("image");
    let exists = Refusal::OutputExists {
        path: output.clone(),
    };
    let taken = FlattenOptions::new().flatten(&stage.cows[..2], &output);
    assert_eq!(taken, Err(exists.into()));
    let input = Refusal::OutputIsInput { path: one.clone() };
    let own = FlattenOptions::new()
        .replace(true)
        .flatten(&stage.cows[..2], &one);
    assert_eq!(own, Err(input.into()));
    let broken_off =
        FlattenOptions::new().flatten_with(&stage.cows[..2], stage.path("flat"), &mut |_| {
            ControlFlow::Break(())
        });
    assert_eq!(broken_off, Ok(None));
    assert_eq!(stage.names(), before);
}
