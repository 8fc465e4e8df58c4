//! The seam between dmsnap's operations and the kernel: traits with one method for each kernel call, which returns the
//! bare errno.
//!
//! [`Machine`](super::Machine) implements them for the real kernel. The operations are generic over [`Host`], so that a
//! test can fail the n-th call for every n and look at what stays behind.

mod clock;
mod files;
mod loops;
mod mapper;

pub(crate) use clock::Clock;
pub(crate) use files::{FileFacts, FileKind, Files};
pub(crate) use loops::{LOOP_CONTROL, Label, LoopStatus, Loops, SHARED_ORIGIN};
pub(crate) use mapper::{DevId, Device, DeviceMapper, MAPPER_CONTROL, TargetVersion};

/// All kernel calls that an operation makes.
pub(crate) trait Host: Files + Loops + DeviceMapper + Clock {}

impl<H: Files + Loops + DeviceMapper + Clock> Host for H {}
