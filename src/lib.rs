//! Copy-on-write root disks for microVMs: device-mapper snapshots over loop devices, by direct ioctls.
//!
//! Many VMs share one read-only root image, the origin; each gets a private, writable view of it,
//! whose writes go to a COW file of its own. No process is spawned and no daemon is waited for.
//!
//! ```no_run
//! use dmsnap::{CowSize, SnapshotOptions};
//!
//! let snapshot = SnapshotOptions::new()
//!     .make_cow(CowSize::WorstCase)
//!     .create("/images/base.ext4", "/run/vm-42.cow", "vm-42")?;
//! println!("boot from {}", snapshot.device().display()); // /dev/dm-3, open it at once
//! // ... the VM runs, this process may come and go; when the VM has exited:
//! snapshot.cleanup()?;
//! # Ok::<(), dmsnap::Error>(())
//! ```
//!
//! A process that is killed leaves its live snapshots, which are its VMs' disks, a device and a COW file for each create that
//! was under way, and the devices and COW files of its pools; [`ReapOptions`] takes down what your database does not name.
//!
//! The main job is at the root: [`SnapshotOptions`], [`Origin`], [`PoolOptions`], [`Handles`], [`cleanup`], [`Teardown`],
//! [`list`], [`adopt`], [`repair`] and [`Error`]. The rest is in the modules: a running disk is checkpointed and forked by
//! [`snapshot`], copied by [`export`], and watched by [`watch`]. The [`guide`] has chapters on choosing, operating and errors.
//! Every call blocks its thread: an async program makes it on one for blocking work.
//!
//! Making devices needs CAP_SYS_ADMIN in the initial user namespace, Linux 5.8 or later, and the `loop` and
//! `dm-snapshot` modules. Reading tables, status lines and names needs nothing.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

mod backing;
pub mod base;
mod call;
pub mod dm;
pub mod error;
pub mod export;
pub mod find;
pub mod guide;
mod kernel;
pub mod merge;
pub mod pool;
pub mod snapshot;
pub mod store;
pub mod teardown;
pub mod watch;

pub use backing::{CowSize, Warning};
#[doc(inline)]
pub use base::{ChunkSize, DeviceId, Durability, Handles, SectorSize, Store};
#[doc(inline)]
pub use call::timings;
#[doc(inline)]
pub use error::{Error, ErrorKind, Result};
#[doc(inline)]
pub use find::{adopt, list, status};
#[doc(inline)]
pub use pool::{Pool, PoolOptions};
#[doc(inline)]
pub use snapshot::{Origin, Snapshot, SnapshotOptions};
#[doc(inline)]
pub use teardown::{ReapOptions, Teardown, WhenBusy, cleanup, remove, repair, repair_all};
