//! The main job: makes snapshots, makes their COW files longer, and freezes them as layers, over which others are made.

mod build;
mod checkpoint;
#[cfg(test)]
mod checkpoint_tests;
mod create;
mod fingerprint;
mod grow;
#[cfg(test)]
mod grow_tests;
mod handle;
mod layer;
mod options;
mod origin;
#[cfg(test)]
mod origin_tests;
mod recover;
mod rollback;
mod stack;
#[cfg(test)]
mod stack_tests;
#[cfg(test)]
mod tests;

pub(crate) use build::{Destination, LiveDevice};
pub(crate) use build::{MappedDevice, build, load, make_device, settle, undone};
pub use checkpoint::CheckpointOptions;
#[cfg(test)]
pub(crate) use create::create;
pub(crate) use create::{create_on, link, open_controls, prepare, unbuilt};
pub use grow::{GrowOptions, grow, recover};
pub use handle::Snapshot;
pub use layer::Layer;
pub use options::SnapshotOptions;
pub(crate) use origin::Base;
#[cfg(test)]
pub(crate) use origin::open as open_origin;
pub use origin::{Origin, OriginOptions};
pub use stack::StackOptions;
