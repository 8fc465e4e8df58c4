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

mod alias;
mod ask;
mod backing;
mod binding;
mod closes;
mod dm_message;
mod error;
mod exception_store;
mod export;
mod fleet;
mod grow;
mod half_merged;
mod handles;
mod holders;
mod host;
mod inventory;
#[cfg(test)]
mod kernel_headers;
mod lookup;
#[cfg_attr(not(feature = "loopdev"), path = "loop_plain.rs")]
mod loop_crate;
mod loop_device;
mod made_cow;
mod mapper;
#[cfg_attr(not(feature = "devicemapper"), path = "mapper_plain.rs")]
mod mapper_crate;
mod merge;
mod name;
mod options;
mod origin;
mod origin_identity;
mod overlap;
mod policy;
mod pool;
mod reap;
mod refusal;
mod removal;
#[cfg(test)]
mod script;
mod snapshot;
mod spans;
mod status;
mod store_check;
mod sys;
mod table;
mod teardown;
mod timings;
mod units;
mod uuid;
mod watch;

pub use backing::Warning;
pub use error::{Cause, Error, Leftover, Result, Step};
pub use exception_store::{
    Exception, ExceptionStore, Exceptions, Extent, Extents, StoreError, StoreFault, StoreSummary,
    least_bytes as least_cow_bytes, sound as sound_cow_bytes, worst_case as worst_case_bytes,
};
pub use export::{ExportOptions, ExportProgress, Exported};
pub use fleet::{cleanup_all, cleanup_all_with};
pub use grow::{GrowOptions, grow, recover};
pub use handles::{FileId, Handles, LoopHandle};
pub use inventory::{LoopFacts, SnapshotInfo, State, adopt, list, status};
pub use merge::{MergeOptions, MergeOutcome, MergeProgress};
pub use name::{DeviceName, DeviceNumber};
pub use options::{CowSize, SnapshotOptions};
pub use origin::Origin;
pub use origin_identity::OriginIdentity;
pub use policy::{Retry, Verdict};
pub use pool::{Claimed, CowFate, Pool, PoolOptions, PoolStatus, Released, WhenEmpty};
pub use reap::{Fate, ReapOptions, Reaped};
pub use refusal::{NameFault, Refusal};
pub use removal::{Outcome, remove, remove_deferred, remove_with, try_remove};
pub use snapshot::Snapshot;
pub use status::{SnapshotStatus, Usage};
pub use table::{Discard, SnapshotParams, Store, TableError, Target, TargetLine};
pub use teardown::{cleanup, cleanup_deferred, cleanup_with, wait_gone};
pub use timings::{CallTiming, StepTiming, Timings};
pub use units::{ChunkSize, Sectors};
pub use uuid::DeviceUuid;
pub use watch::{Change, Watch, WatchEvent};
