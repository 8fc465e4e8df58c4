//! The conditions under which contestants meet.

use dmsnap::{ChunkSize, Store};

use crate::contestants::{
    CRATES, FLEET, IOCTLS, LIBRARY, LIBRARY_ALONE, LIBRARY_TIMED, Make, ON_ORIGIN, POLLING_1,
    POLLING_100, PROCESSES, RECYCLED, Result, WARM_POOL,
};

/// Where the COW files are; the image is on tmpfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    Tmpfs,
    Ext4,
}

/// Beside which udevd a scenario is worth its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Udev {
    Any,
    Running,
    None,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) store: Store,
    pub(crate) chunk_sectors: u64,
    pub(crate) disk: Disk,
    pub(crate) udev: Udev,
    /// Snapshots that are alive all the time, over the same image.
    pub(crate) neighbours: usize,
    pub(crate) threads: usize,
    /// How many snapshots each thread makes in a turn, before it removes them.
    pub(crate) each: usize,
    /// Whether somebody has the device open when it is to be removed, and closes it at some moment: then a removal
    /// counts from the close.
    pub(crate) busy: bool,
    /// The first is the floor that the others are held against.
    pub(crate) contestants: &'static [Make],
    pub(crate) rounds: usize,
    /// How many do for the promises; none, if none is made of it.
    pub(crate) promised_rounds: usize,
}

impl Scenario {
    pub(crate) fn chunk(&self) -> Result<ChunkSize> {
        Ok(ChunkSize::new(self.chunk_sectors)?)
    }
}

// The names of those that promises are made of.
pub(crate) const ALONE: &str = "alone";
pub(crate) const KEPT: &str = "origin and pool";
pub(crate) const PIPELINE: &str = "process pipeline";
pub(crate) const STOPPED: &str = "udevd stopped";
pub(crate) const AT_ONCE: &str = "64 at once";
pub(crate) const BUSY: &str = "busy";

const BASE: Scenario = Scenario {
    name: ALONE,
    store: Store::Persistent,
    chunk_sectors: 8,
    disk: Disk::Tmpfs,
    udev: Udev::None,
    neighbours: 0,
    threads: 1,
    each: 1,
    busy: false,
    contestants: &[IOCTLS, LIBRARY, CRATES],
    rounds: 40,
    promised_rounds: 0,
};

const THREADS: Scenario = Scenario {
    contestants: &[IOCTLS, LIBRARY],
    rounds: 20,
    ..BASE
};

pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        udev: Udev::Any,
        rounds: 100,
        promised_rounds: 100,
        ..BASE
    },
    // Apart, since a pool's beginning and end take longer than a turn.
    Scenario {
        name: KEPT,
        udev: Udev::Any,
        contestants: &[IOCTLS, LIBRARY, ON_ORIGIN, WARM_POOL, RECYCLED],
        rounds: 60,
        promised_rounds: 60,
        ..BASE
    },
    // Apart, since it takes longer than all the others together.
    Scenario {
        name: PIPELINE,
        udev: Udev::Any,
        contestants: &[IOCTLS, LIBRARY, PROCESSES, WARM_POOL],
        rounds: 40,
        promised_rounds: 15,
        ..BASE
    },
    Scenario {
        name: STOPPED,
        udev: Udev::Running,
        contestants: &[LIBRARY, LIBRARY_ALONE],
        rounds: 60,
        promised_rounds: 40,
        ..BASE
    },
    Scenario {
        name: "64 alive",
        udev: Udev::Any,
        neighbours: 64,
        ..BASE
    },
    Scenario {
        name: "store PO",
        store: Store::PersistentOverflow,
        ..BASE
    },
    Scenario {
        name: "store N",
        store: Store::Transient,
        ..BASE
    },
    Scenario {
        name: "chunk 32",
        chunk_sectors: 32,
        ..BASE
    },
    Scenario {
        name: "chunk 128",
        chunk_sectors: 128,
        ..BASE
    },
    Scenario {
        name: "COW on ext4",
        disk: Disk::Ext4,
        ..BASE
    },
    Scenario {
        name: "1 thread",
        ..THREADS
    },
    Scenario {
        name: "2 threads",
        threads: 2,
        ..THREADS
    },
    Scenario {
        name: "4 threads",
        threads: 4,
        ..THREADS
    },
    Scenario {
        name: "8 threads",
        threads: 8,
        ..THREADS
    },
    Scenario {
        name: AT_ONCE,
        each: 64,
        contestants: &[IOCTLS, LIBRARY, FLEET],
        rounds: 6,
        promised_rounds: 4,
        ..BASE
    },
    Scenario {
        name: BUSY,
        udev: Udev::Any,
        busy: true,
        contestants: &[POLLING_1, LIBRARY_TIMED, POLLING_100, CRATES],
        rounds: 100,
        promised_rounds: 100,
        ..BASE
    },
];
