//! Reads the exception store in a COW file, and computes how long a COW file must be.
//!
//! The exception store is the kernel's map from chunks of the origin to chunks of the COW file. This module works on
//! files alone, without ioctls and without privilege. A COW file may come from anywhere: nothing that is read from it
//! is trusted.

mod content;
mod extents;
mod fault;
mod header;
mod overlay;
mod place;
mod reader;
mod sizing;
mod writer;

pub(crate) use content::{CONTENT_AT, Content, DigestOf, content};
pub use extents::{Extent, Extents};
pub use fault::{StoreError, StoreFault};
pub(crate) use header::{
    BLANK_BYTES, CHAIN_AT, CHAIN_BYTES, Chain, Header, HeaderFault, MARK_AT, PROBE_BYTES, Probe,
    chain, mark, marks, probe,
};
pub(crate) use overlay::{Piece, overlay};
pub use place::StackPlace;
pub use reader::{Exception, ExceptionStore, Exceptions, StoreSummary};
pub(crate) use sizing::{grown, sound, sound_from, worst_case};
pub use sizing::{least_bytes, sound as sound_bytes, worst_case as worst_case_bytes};
pub(crate) use writer::Layout;
