//! Device-mapper as text and bytes: tables, status lines, messages. Nothing here asks the kernel.

pub(crate) mod message;
mod status;
mod table;

pub(crate) use message::{Address, HEAD_BYTES, Head, Listed, Message};
pub use status::{SnapshotStatus, Usage};
pub use table::{Discard, SnapshotParams, TableError, Target, TargetLine};
