//! `dmsnap cow`: what a COW file holds, and how long one must be. Needs no device-mapper and no privilege.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use clap::{Args as Arguments, Subcommand};
use dmsnap::base::Sectors;
use dmsnap::store::{ExceptionStore, Extent, StoreError};
use dmsnap::{ChunkSize, Store};

use crate::amounts::bytes;
use crate::args::{StoreArg, chunk_size};
use crate::{Failure, print, print_json};

#[derive(Debug, Subcommand)]
pub(crate) enum Cow {
    /// Show what a COW file's exception store says of itself
    Inspect {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The COW file
        cow: PathBuf,
    },
    /// List what a COW file changes: offset in the origin, length and offset in the COW file, in bytes
    Diff {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The COW file
        cow: PathBuf,
    },
    /// Show how long a COW file must be
    Size(Size),
}

#[derive(Debug, Arguments)]
pub(crate) struct Size {
    /// The origin image, or its size in bytes (or 512K, 64M, 2G)
    #[arg(long, value_name = "IMAGE|BYTES")]
    origin: PathBuf,
    /// The unit of copying, in 512-byte sectors: a power of two
    #[arg(long, value_name = "N", default_value = "8", value_parser = chunk_size)]
    chunk_sectors: ChunkSize,
    /// What keeps the writes
    #[arg(long, value_enum, default_value = "persistent")]
    store: StoreArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, serde::Serialize)]
struct Diff {
    chunk_sectors: ChunkSize,
    extents: Vec<Extent>,
}

/// Sizes of a COW file, in bytes.
#[derive(Debug, serde::Serialize)]
struct Sizes {
    least_bytes: u64,
    worst_case_bytes: u64,
    /// Files of one chunk more than a multiple of this many end invalid when full; `None` where none do.
    trap_every_chunks: Option<u64>,
}

pub(crate) fn run(command: Cow) -> Result<(), Failure> {
    match command {
        Cow::Inspect { json, cow } => inspect(&cow, json),
        Cow::Diff { json, cow } => diff(&cow, json),
        Cow::Size(size) => sizes(&size),
    }
}

fn inspect(cow: &Path, json: bool) -> Result<(), Failure> {
    let mut store = open(cow)?;
    let found = store.summary().map_err(|error| unsound(cow, error))?;
    if json {
        return print_json(&found);
    }
    let valid = if found.valid {
        "yes"
    } else {
        "no: it overflowed or a write failed"
    };
    let origin = match found.origin {
        Some(origin) => origin.to_string(),
        None => "unknown".to_owned(),
    };
    let (layer, over) = match found.place {
        None if found.origin.is_none() => ("no".to_owned(), "unknown".to_owned()),
        None => ("no".to_owned(), "an image".to_owned()),
        Some(place) => (
            match (place.frozen, place.id) {
                (true, Some(id)) => id.to_string(),
                (true, None) => "yes".to_owned(),
                (false, _) => "no".to_owned(),
            },
            match place.parent {
                Some(parent) => format!("layer {parent} ({} below)", place.depth),
                None => "an image".to_owned(),
            },
        ),
    };
    let mut text = String::new();
    for (key, value) in [
        ("chunk", format!("{} sectors", found.chunk)),
        ("valid", valid.to_owned()),
        ("origin", origin),
        ("layer", layer),
        ("over", over),
        ("exceptions", found.exceptions.to_string()),
        ("areas", found.areas.to_string()),
        (
            "used",
            format!("{} of {} bytes", found.used_bytes, found.file_bytes),
        ),
    ] {
        let _ = writeln!(text, "{key:<12}{value}");
    }
    print(text)
}

fn diff(cow: &Path, json: bool) -> Result<(), Failure> {
    let mut store = open(cow)?;
    let extents = store
        .changed_extents()
        .map_err(|error| unsound(cow, error))?;
    if json {
        return print_json(&Diff {
            chunk_sectors: store.chunk_size(),
            extents,
        });
    }
    // As many lines as there are extents: not to be held as one text.
    let mut stdout = BufWriter::new(std::io::stdout().lock());
    let mut lines = || -> std::io::Result<()> {
        for extent in &extents {
            let (origin, length, cow) = (extent.origin_offset, extent.length, extent.cow_offset);
            writeln!(stdout, "{origin} {length} {cow}")?;
        }
        stdout.flush()
    };
    match lines() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

fn sizes(size: &Size) -> Result<(), Failure> {
    let (store, chunk) = (Store::from(size.store), size.chunk_sectors);
    let given = bytes(&size.origin.to_string_lossy());
    let origin = given.or_else(|no_size| {
        length(&size.origin).map_err(|source| {
            let source = match source.kind() {
                std::io::ErrorKind::NotFound => {
                    std::io::Error::other(format!("{source}, and no size: {no_size}"))
                }
                _ => source,
            };
            Failure::Input {
                from: size.origin.display().to_string(),
                source,
            }
        })
    })?;
    let origin = Sectors::from_bytes_floor(origin);
    let worst_case_bytes =
        dmsnap::store::worst_case_bytes(origin, store, chunk).ok_or(Failure::TooLarge)?;
    let found = Sizes {
        least_bytes: dmsnap::store::least_bytes(store, chunk),
        worst_case_bytes,
        trap_every_chunks: store.is_persistent().then(|| chunk.bytes() / 16 + 1),
    };
    if size.json {
        return print_json(&found);
    }
    let mut text = String::new();
    for (what, bytes) in [
        ("least", found.least_bytes),
        ("worst case", found.worst_case_bytes),
    ] {
        let chunks = bytes / chunk.bytes();
        let _ = writeln!(text, "{what:<12}{bytes} bytes ({chunks} chunks)");
    }
    if let Some(every) = found.trap_every_chunks {
        let _ = writeln!(
            text,
            "{:<12}1 + n * {every} chunks: such a file ends invalid instead of full",
            "avoid"
        );
    }
    print(text)
}

/// A file's length, or a block device's.
fn length(path: &Path) -> std::io::Result<u64> {
    File::open(path)?.seek(SeekFrom::End(0))
}

fn open(cow: &Path) -> Result<ExceptionStore<File>, Failure> {
    let file = File::open(cow).map_err(|source| Failure::Input {
        from: cow.display().to_string(),
        source,
    })?;
    ExceptionStore::open(file).map_err(|error| unsound(cow, error))
}

fn unsound(cow: &Path, source: StoreError) -> Failure {
    Failure::Store {
        cow: cow.to_owned(),
        source,
    }
}
