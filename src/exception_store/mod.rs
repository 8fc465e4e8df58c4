//! The COW file: the exception store's on-disk format and its sizes.
//!
//! Files only, no ioctl. A COW file may come from anywhere: nothing read from it is trusted.

mod header;
mod sizing;

pub(crate) use header::{MARK_AT, PROBE_BYTES, Probe, mark, probe};
pub(crate) use sizing::{grown, least_bytes, sound, sound_from, worst_case};
