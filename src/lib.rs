//! Copy-on-write root disks for microVMs: device-mapper snapshots over loop devices, by direct ioctls.
//!
//! Many VMs share one read-only root image; each gets a private, writable view of it in a few milliseconds. No
//! process is spawned, no daemon is waited for, and a process killed at any instant leaves at most one dm device, which
//! [`ReapOptions`] finds.
//!
//! ```no_run
//! let snapshot = dmsnap::SnapshotOptions::new().create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?;
//! println!("boot from {}", snapshot.device().display()); // /dev/dm-3, open it at once
//! // ... the VM runs, this process may come and go; when the VM has exited:
//! snapshot.cleanup()?;
//! # Ok::<(), dmsnap::Error>(())
//! ```
//!
//! Making devices needs CAP_SYS_ADMIN in the initial user namespace, Linux 5.8 or later, and the `loop` and
//! `dm-snapshot` modules. Reading tables, status lines and names needs nothing.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

mod backing;
mod base;
mod call;
mod dm;
mod error;
mod export;
mod find;
pub mod guide;
mod kernel;
mod merge;
mod pool;
mod snapshot;
mod store;
mod teardown;
mod watch;

pub use backing::{CowSize, Warning};
pub use base::{
    ChunkSize, DeviceName, DeviceNumber, DeviceUuid, FileId, Handles, InvalidChunkSize,
    InvalidName, InvalidNumber, InvalidUuid, LoopHandle, NameFault, OriginIdentity, SectorSize,
    Sectors, Store,
};
pub use call::{CallTiming, StepTiming, Timings};
pub use dm::{Discard, SnapshotParams, SnapshotStatus, TableError, Target, TargetLine, Usage};
pub use error::{Cause, Error, Leftover, Refusal, Result, Retry, Step, Verdict};
pub use export::{ExportOptions, ExportProgress, Exported};
pub use find::{LoopFacts, SnapshotInfo, State, adopt, list, status};
pub use merge::{MergeOptions, MergeOutcome, MergeProgress};
pub use pool::{Claimed, CowFate, Pool, PoolOptions, PoolStatus, Released, WhenEmpty};
pub use snapshot::{GrowOptions, Origin, Snapshot, SnapshotOptions, grow, recover};
pub use store::{
    Exception, ExceptionStore, Exceptions, Extent, Extents, StoreError, StoreFault, StoreSummary,
    least_bytes as least_cow_bytes, sound as sound_cow_bytes, worst_case as worst_case_bytes,
};
pub use teardown::{
    Fate, Outcome, ReapOptions, Reaped, cleanup, cleanup_all, cleanup_all_with, cleanup_deferred,
    cleanup_with, remove, remove_deferred, remove_with, try_remove, wait_gone,
};
pub use watch::{Change, Watch, WatchEvent};
