//! The command line's grammar.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Arguments, Parser, Subcommand, ValueEnum};
use dmsnap::{ChunkSize, CowSize, SnapshotOptions, Store};

use crate::cow::Cow;
use crate::export::Export;

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
    /// Take down what handles name: dm device, COW loop, origin loop
    Cleanup {
        /// How long to wait while the device is busy, such as 15s or 200ms
        #[arg(long, default_value = "15s", value_parser = duration)]
        deadline: Duration,
        /// A file with the JSON that create printed; - reads stdin
        #[arg(default_value = "-")]
        file: String,
    },
    /// Remove a dm device by name or path; its autoclear loop devices go with it
    Remove {
        /// How long to wait while the device is busy, such as 15s or 200ms
        #[arg(long, default_value = "15s", value_parser = duration)]
        deadline: Duration,
        /// If it is busy, have the kernel remove it at the last close
        #[arg(long)]
        defer: bool,
        /// Name, /dev/mapper/NAME or /dev/dm-N
        name: PathBuf,
    },
    /// List our snapshots
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print whole handles of a live snapshot as JSON, for cleanup, from the kernel's state alone
    Adopt {
        /// The dm device's name, or its uuid
        name: String,
    },
    /// Take down our snapshots that nobody claims, half-built ones included
    Reap(Reap),
    /// Show one of our snapshots
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The dm device's name, or its uuid
        name: String,
    },
    /// Write a snapshot's disk to a raw image of its own: a running one by name, or an idle COW file
    Export(Export),
    /// Look into COW files, and size them
    #[command(subcommand)]
    Cow(Cow),
}

#[derive(Debug, Arguments)]
pub(crate) struct Reap {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep this snapshot (may be repeated)
    #[arg(long, value_name = "NAME")]
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
    /// What keeps the writes, and what happens when the COW file is full
    #[arg(long, value_enum, default_value = "persistent")]
    store: StoreArg,
    /// The unit of copying, in 512-byte sectors: a power of two
    #[arg(long, value_name = "N", default_value = "8", value_parser = chunk_size)]
    chunk_sectors: ChunkSize,
    /// Have the COW file bypass the page cache
    #[arg(long)]
    direct_io: bool,
    /// Let the guest's discards give space back to the COW file's file system
    #[arg(long)]
    discard: bool,
    /// Make the COW file too, this large: bytes (or 512K, 64M, 2G), a share of the image (25%), or worst-case
    #[arg(long, value_name = "SIZE", value_parser = cow_size)]
    make_cow: Option<CowSize>,
    /// Set the made COW file's space aside
    #[arg(long, requires = "make_cow")]
    reserve: bool,
    /// Use the COW file even though the image's size or modification time is not what it was made over
    #[arg(long)]
    any_origin: bool,
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

impl Create {
    pub(crate) fn options(&self) -> SnapshotOptions {
        let mut options = SnapshotOptions::new();
        options
            .store(self.store.into())
            .chunk_size(self.chunk_sectors)
            .direct_io(self.direct_io)
            .discard(self.discard)
            .any_origin(self.any_origin)
            .reserve(self.reserve);
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

/// `67108864`, `64M`, `25%` or `worst-case`.
fn cow_size(text: &str) -> Result<CowSize, String> {
    if text == "worst-case" {
        return Ok(CowSize::WorstCase);
    }
    if let Some(percent) = text.strip_suffix('%') {
        return percent
            .parse()
            .map(CowSize::Percent)
            .map_err(|error| format!("{error}"));
    }
    bytes(text).map(CowSize::Bytes)
}

/// `67108864` or `64M`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let units = [
        ('K', 1u64 << 10),
        ('M', 1 << 20),
        ('G', 1 << 30),
        ('T', 1 << 40),
    ];
    let unit = units
        .iter()
        .find_map(|(letter, unit)| Some((text.strip_suffix(*letter)?, *unit)));
    let (number, unit) = unit.unwrap_or((text, 1));
    let number: u64 = number.parse().map_err(|error| format!("{error}"))?;
    number
        .checked_mul(unit)
        .ok_or_else(|| "too large".to_owned())
}

/// `15s`, `1.5s` or `200ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|error| error.to_string())? * unit;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
