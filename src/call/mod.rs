//! How every kernel call is made: asked for with a step and an object, waited for, recorded, or side by side.

mod ask;
mod flushes;
mod resume;
mod side_by_side;
pub(crate) mod spans;
pub mod timings;
mod wait;

pub(crate) use ask::{absent, ask, ask_unobserved};
pub(crate) use flushes::{end_flushes, ends_flushes};
pub(crate) use resume::resume;
pub(crate) use side_by_side::in_parallel;
pub(crate) use wait::{Wait, patiently, watchfully};
