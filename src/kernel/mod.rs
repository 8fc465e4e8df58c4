//! The one way to the kernel: the unsafe calls, the seam that stories talk to, the real machine behind it, and in tests
//! a fake one.

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod headers;
mod machine;
mod seam;
mod sys;

pub(crate) use machine::{LoopDevice, MACHINE, Machine};
pub(crate) use seam::*;
pub(crate) use sys::{LO_AUTOCLEAR, LO_DIRECT_IO, LO_READ_ONLY};
