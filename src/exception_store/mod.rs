//! The COW file: the exception store's on-disk format and its sizes.
//!
//! Files only, no ioctl. A COW file may come from anywhere: nothing read from it is trusted.

mod extent;
mod header;
mod sizing;

pub(crate) use extent::{Extent, extent};
pub(crate) use header::{Header, HeaderFault, MARK_AT, PROBE_BYTES, Probe, mark, probe};
pub(crate) use sizing::{EXCEPTION_BYTES, grown, least_bytes, sound, sound_from, worst_case};
