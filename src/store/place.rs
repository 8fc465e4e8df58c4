//! A store's place in a stack of layers, for who asks a file.

use super::header::Chain;
use crate::base::LayerId;

/// A store's place in a stack of layers, as its COW file's mark has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StackPlace {
    /// True if the file is a layer's: a checkpoint made it one, and it is never written again. False if it is a disk's.
    pub frozen: bool,
    /// The layer's id; `None` for a disk's file. A disk's file has one if a checkpoint of it was cut off: the id that
    /// the layer was to have.
    pub id: Option<LayerId>,
    /// The id of the layer that the file was made over; `None` for an image.
    pub parent: Option<LayerId>,
    /// How many layers there are below it.
    pub depth: u32,
}

impl From<Chain> for StackPlace {
    fn from(chain: Chain) -> Self {
        Self {
            frozen: chain.frozen,
            id: LayerId::new(chain.id),
            parent: LayerId::new(chain.parent),
            depth: chain.depth,
        }
    }
}
