//! Reads and writes device-mapper's texts: tables and status lines, and inside the crate its messages. Nothing here
//! makes a system call.

pub(crate) mod message;
mod status;
mod table;

pub(crate) use message::{Address, HEAD_BYTES, Head, Listed, Message};
pub use status::{SnapshotStatus, Usage};
pub use table::{Discard, SnapshotParams, TableError, Target, TargetLine};
