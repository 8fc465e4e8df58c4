//! Finds dmsnap's devices: one by name, uuid, number or path, or all of them; and takes over what other programs made.

mod adopt;
pub(crate) mod at_work;
mod layers;
mod list;
mod lock;
mod lookup;
mod select;
#[cfg(test)]
mod tests;
mod tree;

pub use adopt::adopt;
pub(crate) use layers::layers_of;
pub use list::{LoopFacts, SnapshotInfo, State, list, status};
pub(crate) use list::{is_finished, ours as all, status_of};
pub(crate) use lock::locked;
pub(crate) use lookup::{
    Bound, Live, bound, find, find_snapshot, live, reach, still, whole, whole_file,
};
pub(crate) use select::{Key, select};
pub use tree::{Standing, TreeNode, tree, tree_of};
#[cfg(test)]
pub(crate) use tree::{tree_of_all, tree_of_one};
