//! The files behind a snapshot: this module opens, locks and checks them, and attaches them to loop devices.

mod attach;
mod binding;
mod check;
mod content;
mod cow;
mod file;
mod half_merged;
mod make;
mod options;
mod reader;
mod sample;
mod stack;
mod warning;

pub(crate) use attach::{Attached, attach, loop_length};
pub(crate) use binding::{Binding, binding, diskseq, note_free};
pub(crate) use check::{
    Evidence, check_header, check_identity, check_unmarked, probe_store, unsound, valid,
};
pub(crate) use content::content;
pub(crate) use cow::{Cow, Mark, admit_file, open_cow, open_layer_cow, open_merged_cow};
pub(crate) use file::{
    Backing, open_cow_file, open_locked_origin, open_origin, open_store, open_unlocked,
};
pub(crate) use make::unmake;
pub(crate) use options::CowOptions;
pub use options::CowSize;
pub(crate) use reader::Reader;
pub(crate) use stack::{DEEPEST, Ground, Place, in_order, shallow};
pub use warning::Warning;
pub(crate) use warning::note_sizes;
