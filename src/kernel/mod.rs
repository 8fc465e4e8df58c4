//! All calls to the kernel: the unsafe ones, the seam (traits) through which operations make them, the real machine
//! that implements the seam, and a fake one for tests.

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod headers;
mod loop_numbers;
mod machine;
mod seam;
mod sys;

pub(crate) use loop_numbers::{LoopChoice, LoopNumbers};
pub(crate) use machine::{LoopDevice, MACHINE, Machine};
pub(crate) use seam::*;
pub(crate) use sys::{LO_AUTOCLEAR, LO_DIRECT_IO, LO_READ_ONLY};
