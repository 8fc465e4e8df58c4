//! The guide: chapters for those who run microVMs on dmsnap.
//!
//! - [`choosing`]: stores, COW files, chunk sizes, discard.
//! - [`operating`]: teardown, after a crash, two control planes, pools, watching and growing, udev.
//! - [`checkpoint`]: a running disk frozen as a layer, and forks of it.
//! - [`firecracker`]: a disk in a jail, and disk and memory of one moment.
//! - [`errors`]: kinds, chains, and what an errno means.
//! - [`kernels`]: what it was run on, and features by version.
//! - [`landmines`]: what bites.
//! - [`merging_and_export`]: reading COW files, raw images, changes folded into the image.
//! - [`figures`]: what was measured, and how.

#[doc = include_str!("choosing.md")]
pub mod choosing {}
#[doc = include_str!("operating.md")]
pub mod operating {}
#[doc = include_str!("checkpoint.md")]
pub mod checkpoint {}
#[doc = include_str!("firecracker.md")]
pub mod firecracker {}
#[doc = include_str!("errors.md")]
pub mod errors {}
#[doc = include_str!("kernels.md")]
pub mod kernels {}
#[doc = include_str!("landmines.md")]
pub mod landmines {}
#[doc = include_str!("merging-and-export.md")]
pub mod merging_and_export {}
#[doc = include_str!("figures.md")]
pub mod figures {}
