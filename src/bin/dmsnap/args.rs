//! The command line's grammar.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Arguments, Parser, Subcommand, ValueEnum};
use dmsnap::base::Digest;
use dmsnap::{ChunkSize, CowSize, Durability, SectorSize, SnapshotOptions, Store};

use crate::amounts::{bytes, cow_size, duration, percent};
use crate::cow::Cow;
use crate::export::Export;
use crate::flatten::Flatten;

/// Copy-on-write root disks for microVMs: device-mapper snapshots over loop devices.
#[derive(Debug, Parser)]
#[command(name = "dmsnap", version, about)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a snapshot and print its handles as JSON
    Create(Create),
    /// Freeze what a live snapshot has as a layer, and have it go on over that; prints the layer's handles as JSON
    Checkpoint(Checkpoint),
    /// Put layers that are gone together again from their COW files, and keep the topmost; prints its handles as JSON
    Layer(LayerArgs),
    /// Take a snapshot that nobody has open back to its last checkpoint, over another COW file; prints its handles as
    /// JSON
    Rollback(Rollback),
    /// Take down what handles name: dm device, COW loop, origin loop; many snapshots side by side
    Cleanup {
        /// How long to wait in all while devices are busy, such as 15s or 200ms
        #[arg(long, default_value = "15s", value_parser = duration)]
        deadline: Duration,
        /// Say on stderr how long each step took
        #[arg(long)]
        timings: bool,
        /// Files with the JSON that create printed, or arrays of it; - reads stdin
        #[arg(default_value = "-", value_name = "FILE")]
        files: Vec<String>,
    },
    /// Remove a dm device by name or path; its autoclear loop devices go with it
    Remove {
        /// How long to wait while the device is busy, such as 15s or 200ms
        #[arg(long, default_value = "15s", value_parser = duration)]
        deadline: Duration,
        /// If it is busy, have the kernel remove it at the last close
        #[arg(long)]
        defer: bool,
        /// Say on stderr how long each step took
        #[arg(long)]
        timings: bool,
        /// Name, /dev/mapper/NAME or /dev/dm-N
        name: PathBuf,
    },
    /// List our snapshots
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what stands on what: images, the layers over them, and the snapshots over those
    Tree {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// A dm device's name, or its uuid: what it stands on, and what stands on it; all of dmsnap's without
        name: Option<String>,
    },
    /// Print whole handles of a live snapshot as JSON, for cleanup, from the kernel's state alone
    Adopt {
        /// The dm device's name, or its uuid
        name: String,
    },
    /// Take down those of dmsnap's snapshots that are not to be kept, half-built ones included
    Reap(Reap),
    /// Finish or undo what a killed process left half-way, so that a hanging guest goes on
    Repair {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// For how long whoever is at work on a device is waited for
        #[arg(long, default_value = "500ms", value_parser = duration)]
        deadline: Duration,
        /// The dm devices' names, or their uuids; all of dmsnap's if there is none
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Fold a COW file's changes back into its image; neither may be in use
    Merge(Merge),
    /// Show one of our snapshots
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The dm device's name, or its uuid
        name: String,
    },
    /// Make the COW file of a live snapshot longer, and show the snapshot
    Grow {
        /// Set the space of the whole COW file aside
        #[arg(long)]
        reserve: bool,
        /// The dm device's name, or its uuid
        name: String,
        /// How long at least: bytes, or 512K, 64MiB, 2G; never made shorter
        #[arg(value_parser = bytes)]
        size: u64,
    },
    /// Make an overflowed snapshot anew over a longer COW file, and print its handles as JSON
    Recover {
        /// Set the space of the whole COW file aside
        #[arg(long)]
        reserve: bool,
        /// How long to wait while the device is open, such as 15s or 200ms
        #[arg(long, default_value = "15s", value_parser = duration)]
        deadline: Duration,
        /// The dm device's name, or its uuid
        name: String,
        /// How long the COW file is to be at least: bytes, or 512K, 64MiB, 2G
        #[arg(value_parser = bytes)]
        size: u64,
    },
    /// Say what happens to snapshots, and grow them as they fill up, until all of them are gone
    Watch(Watch),
    /// Write a snapshot's disk to a raw image of its own: a running one by name, or an idle COW file
    Export(Export),
    /// Make one COW file of those of a stack: of each chunk the newest
    Flatten(Flatten),
    /// Look into COW files, and size them
    #[command(subcommand)]
    Cow(Cow),
}

#[derive(Debug, Arguments)]
pub(crate) struct Checkpoint {
    /// Make the new COW file: bytes, or 512K, 64MiB, 2G; N% of the image; or worst-case
    #[arg(long, value_name = "SIZE|N%|worst-case", value_parser = cow_size)]
    pub(crate) make_cow: Option<CowSize>,
    /// Set its space aside
    #[arg(long, requires = "make_cow")]
    pub(crate) reserve: bool,
    /// Have the kernel's table of changed chunks made for so much, 64M unless named; more may change
    #[arg(long, value_name = "SIZE", value_parser = cow_size, requires = "make_cow")]
    pub(crate) expected_changes: Option<CowSize>,
    /// Keep the layer when nobody stands on it any more
    #[arg(long)]
    pub(crate) keep: bool,
    /// How long to wait for whoever else is at work on the snapshot, such as 15s or 200ms
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// The live snapshot's name, or its uuid
    pub(crate) name: String,
    /// The layer's name: `create /dev/mapper/LAYER ...` makes forks of it
    pub(crate) layer: String,
    /// The COW file that the snapshot goes on with
    pub(crate) cow: PathBuf,
}

#[derive(Debug, Arguments)]
pub(crate) struct LayerArgs {
    /// Take more than 32 layers
    #[arg(long)]
    pub(crate) any_depth: bool,
    /// How long to wait for whoever is making one of the layers, such as 15s or 200ms
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// What the lowest stood on: the image or a copy of it, or a layer as /dev/mapper/LAYER
    pub(crate) origin: PathBuf,
    /// The layers' COW files, in any order
    #[arg(required = true, value_name = "COW")]
    pub(crate) cows: Vec<PathBuf>,
    /// The topmost layer's name; those below are NAME.1, NAME.2 ... from the bottom up. A layer that is there keeps its
    /// name
    pub(crate) name: String,
}

#[derive(Debug, Arguments)]
pub(crate) struct Rollback {
    /// Make the COW file: bytes, or 512K, 64MiB, 2G; N% of the image; or worst-case
    #[arg(long, value_name = "SIZE|N%|worst-case", value_parser = cow_size)]
    pub(crate) make_cow: Option<CowSize>,
    /// Set its space aside
    #[arg(long, requires = "make_cow")]
    pub(crate) reserve: bool,
    /// Have the kernel's table of changed chunks made for so much, 64M unless named; more may change
    #[arg(long, value_name = "SIZE", value_parser = cow_size, requires = "make_cow")]
    pub(crate) expected_changes: Option<CowSize>,
    /// How long to wait for whoever else is at work on the snapshot, such as 15s or 200ms
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// The snapshot's name, or its uuid
    pub(crate) name: String,
    /// The COW file that it goes on with
    pub(crate) cow: PathBuf,
}

#[derive(Debug, Arguments)]
pub(crate) struct Watch {
    /// From how full on a COW file is told of, and grown
    #[arg(long, value_name = "PERCENT", default_value = "80%", value_parser = percent)]
    pub(crate) at: u8,
    /// Make it this much longer, several times over if need be: bytes, or 512K, 64MiB, 2G
    #[arg(long, value_name = "SIZE", value_parser = positive)]
    pub(crate) grow_by: Option<u64>,
    /// Make none longer than this (rounded up to whole chunks)
    #[arg(long, value_name = "SIZE", value_parser = bytes, requires = "grow_by")]
    pub(crate) max: Option<u64>,
    /// Set the space of the whole COW file aside
    #[arg(long, requires = "grow_by")]
    pub(crate) reserve: bool,
    /// Print each event as a line of JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The dm devices' names, or their uuids
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Arguments)]
pub(crate) struct Merge {
    /// The image, which is changed: every other COW file made over it becomes useless
    #[arg(long, value_name = "IMAGE")]
    pub(crate) origin: PathBuf,
    /// The COW file; empty afterwards
    #[arg(long, value_name = "COW")]
    pub(crate) cow: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// What the image holds: the digest that the COW file was made with, if it was, decides whether it is that image
    #[arg(long, value_name = "HEX")]
    pub(crate) digest: Option<Digest>,
    /// Merge even though the image's size or modification time is not what the COW file was made over
    #[arg(long)]
    pub(crate) any_origin: bool,
    /// How long to wait for whoever has a lock on either file, such as 15s or 200ms; a second if not given
    #[arg(long, value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// The name of the dm device that exists meanwhile
    #[arg(long)]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Arguments)]
pub(crate) struct Reap {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Take down every snapshot that nobody has open, whoever made it
    #[arg(long, conflicts_with_all = ["keep", "keep_open"])]
    pub(crate) all: bool,
    /// Keep this snapshot (may be repeated)
    #[arg(long, value_name = "NAME", required_unless_present_any = ["all", "dry_run", "keep_open"])]
    pub(crate) keep: Vec<String>,
    /// Keep every snapshot that somebody has open
    #[arg(long)]
    pub(crate) keep_open: bool,
    /// Have the kernel remove open ones at their last close
    #[arg(long, conflicts_with = "keep_open")]
    pub(crate) defer: bool,
}

#[derive(Debug, Arguments)]
pub(crate) struct Create {
    /// What keeps the writes, and what happens when the COW file is full; persistent, unless the durability says
    /// otherwise
    #[arg(long, value_enum)]
    store: Option<StoreArg>,
    /// What the disk's writes are to outlive
    #[arg(long, value_enum, default_value = "power-cuts")]
    durability: DurabilityArg,
    /// The unit of copying, in 512-byte sectors: a power of two
    #[arg(long, value_name = "N", default_value = "8", value_parser = chunk_size)]
    chunk_sectors: ChunkSize,
    /// Have the COW file bypass the page cache
    #[arg(long)]
    direct_io: bool,
    /// The sector size that the guest sees: 512, or 4096 for images made so
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = sector_size)]
    sector_size: SectorSize,
    /// Let the guest's discards give space back to the COW file's file system
    #[arg(long)]
    discard: bool,
    /// Take discards though chunks are larger than sectors: the guest's never cross into another chunk, or data is lost
    #[arg(long, requires = "discard")]
    trust_discards: bool,
    /// Make the COW file too, this large: bytes (or 512K, 64M, 2G), a share of the image (25%), or worst-case
    #[arg(long, value_name = "SIZE", value_parser = cow_size)]
    make_cow: Option<CowSize>,
    /// Take a file that is there in its place, and everything out of it
    #[arg(long, requires = "make_cow")]
    replace_cow: bool,
    /// Set the made COW file's space aside
    #[arg(long, requires = "make_cow")]
    reserve: bool,
    /// Have the kernel's table of changed chunks made for so much, 64M unless named; more may change
    #[arg(long, value_name = "SIZE", value_parser = cow_size, requires = "make_cow")]
    expected_changes: Option<CowSize>,
    /// What the image holds, in 32 or 64 bytes: kept in the COW file, and held against what is kept there
    #[arg(long, value_name = "HEX")]
    digest: Option<Digest>,
    /// Use the COW file even though the image's size or modification time is not what it was made over, or it does not
    /// say
    #[arg(long)]
    any_origin: bool,
    /// How long to wait for whoever has a lock on the image or the COW file, such as 15s or 200ms; a second if not given
    #[arg(long, value_parser = duration)]
    deadline: Option<Duration>,
    /// Say on stderr how long each step took
    #[arg(long)]
    pub(crate) timings: bool,
    /// The shared, read-only image
    pub(crate) origin: PathBuf,
    /// The file that takes this snapshot's writes
    pub(crate) cow: PathBuf,
    /// The dm device's name
    pub(crate) name: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum StoreArg {
    /// P: survives detaching; when full, it is invalid for good
    Persistent,
    /// PO: survives detaching; when full, writes fail and it stays valid
    PersistentOverflow,
    /// N: fastest, gone with the device
    Transient,
}

impl From<StoreArg> for Store {
    fn from(store: StoreArg) -> Self {
        match store {
            StoreArg::Persistent => Self::Persistent,
            StoreArg::PersistentOverflow => Self::PersistentOverflow,
            StoreArg::Transient => Self::Transient,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DurabilityArg {
    /// Nothing: a transient store, and no flush reaches the COW file
    ThrowAway,
    /// The death of processes, not a power cut: the guest's flushes end at the dm device
    Processes,
    /// A power cut: what the guest has flushed is on the disk
    PowerCuts,
}

impl From<DurabilityArg> for Durability {
    fn from(durability: DurabilityArg) -> Self {
        match durability {
            DurabilityArg::ThrowAway => Self::ThrowAway,
            DurabilityArg::Processes => Self::Processes,
            DurabilityArg::PowerCuts => Self::PowerCuts,
        }
    }
}

impl Create {
    pub(crate) fn options(&self) -> SnapshotOptions {
        let mut options = SnapshotOptions::new();
        options
            .durability(self.durability.into())
            .chunk_size(self.chunk_sectors)
            .direct_io(self.direct_io)
            .sector_size(self.sector_size)
            .discard(self.discard)
            .trust_discards(self.trust_discards)
            .any_origin(self.any_origin)
            .replace_cow(self.replace_cow)
            .reserve(self.reserve);
        if let Some(deadline) = self.deadline {
            options.deadline(deadline);
        }
        if let Some(digest) = self.digest {
            options.digest(digest);
        }
        if let Some(store) = self.store {
            options.store(store.into());
        }
        if let Some(size) = self.expected_changes {
            options.expected_changes(size);
        }
        if let Some(size) = self.make_cow {
            options.make_cow(size);
        }
        options
    }
}

pub(crate) fn chunk_size(text: &str) -> Result<ChunkSize, String> {
    let sectors = text.parse().map_err(|error| format!("{error}"))?;
    ChunkSize::new(sectors).map_err(|refusal| refusal.to_string())
}

fn sector_size(text: &str) -> Result<SectorSize, String> {
    match text {
        "512" => Ok(SectorSize::Bytes512),
        "4096" => Ok(SectorSize::Bytes4096),
        _ => Err("need 512 or 4096".to_owned()),
    }
}

fn positive(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        0 => Err("need at least one byte".to_owned()),
        size => Ok(size),
    }
}
