//! The seam between the stories and the kernel: one method per kernel call, each answering with its bare errno.
//!
//! [`Machine`](super::Machine) is the real one. The stories are generic over [`Host`], so that a test can fail the n-th
//! call for every n and look at what stays behind.

mod clock;
mod files;
mod loops;
mod mapper;

pub(crate) use clock::Clock;
pub(crate) use files::{FileFacts, FileKind, Files};
pub(crate) use loops::{LOOP_CONTROL, Label, LoopStatus, Loops, SHARED_ORIGIN};
pub(crate) use mapper::{DevId, Device, DeviceMapper, MAPPER_CONTROL, TargetVersion};

/// Every kernel call that a story makes.
pub(crate) trait Host: Files + Loops + DeviceMapper + Clock {}

impl<H: Files + Loops + DeviceMapper + Clock> Host for H {}
