//! The COW file: the exception store's on-disk format and its sizes.
//!
//! Files only, no ioctl. A COW file may come from anywhere: nothing read from it is trusted.

mod extents;
mod fault;
mod header;
mod overlay;
mod reader;
mod sizing;
mod writer;

pub use extents::{Extent, Extents};
pub use fault::{StoreError, StoreFault};
pub(crate) use header::{
    CHAIN_AT, CHAIN_BYTES, CONTENT_AT, Chain, Header, HeaderFault, MARK_AT, PROBE_BYTES, Probe,
    chain, content, mark, marks, probe,
};
pub(crate) use overlay::{Piece, overlay};
pub use reader::{Exception, ExceptionStore, Exceptions, StoreSummary};
pub(crate) use sizing::{grown, sound, sound_from, worst_case};
pub use sizing::{least_bytes, sound as sound_bytes, worst_case as worst_case_bytes};
pub(crate) use writer::Layout;
