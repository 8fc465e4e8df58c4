//! Takes snapshots down: one dm device, all that handles name, many at once, or all that nobody claims; and repairs
//! what a killed process left half-way.

mod cleanup;
mod interrupted;
mod many;
mod options;
mod pool_mark;
mod reap;
mod rebuild;
mod remove;
mod repair;
#[cfg(test)]
mod repair_tests;
#[cfg(test)]
mod tests;

pub(crate) use cleanup::clean;
pub use cleanup::cleanup;
pub use options::{Teardown, WhenBusy};
#[cfg(test)]
pub(crate) use pool_mark::forget_cow;
pub(crate) use pool_mark::is_alive;
pub use reap::{Fate, ReapOptions, Reaped};
pub(crate) use rebuild::rebuilt;
pub use remove::{Outcome, remove};
pub(crate) use remove::{Subject, When, remove_subject};
#[cfg(test)]
pub(crate) use repair::repair_every;
pub use repair::{Repair, RepairOptions, Repaired, repair, repair_all};
