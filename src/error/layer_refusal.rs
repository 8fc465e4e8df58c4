//! What a layer, or a file or device that is to stand on one, is refused for.

use std::path::PathBuf;

/// Why a request was turned down that has to do with layers: a stack does not fit together, or is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerRefusal {
    /// The COW file is a layer's: other COW files were made over what it holds.
    #[error("COW file {path:?} is a layer's, and never to be written again")]
    Frozen {
        /// The COW file.
        path: PathBuf,
    },
    /// No checkpoint made a layer of the COW file.
    #[error("COW file {path:?} is no layer's")]
    NotFrozen {
        /// The COW file.
        path: PathBuf,
    },
    /// The COW file was made over another layer, over a layer where this is an image, or over an image where this is a
    /// layer.
    #[error("COW file {cow:?} was not made over {origin:?}, but over another layer or image")]
    Foreign {
        /// The COW file.
        cow: PathBuf,
        /// What it was to be used over.
        origin: PathBuf,
    },
    /// Two of a stack's files are one layer's: the same file, or a copy of it.
    #[error("COW files {first:?} and {second:?} are of one and the same layer")]
    Twice {
        /// The one.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Two of a stack's files were made over the same: there they part, and are two stacks.
    #[error("COW files {first:?} and {second:?} were made over the same, and are of two stacks")]
    Apart {
        /// The one.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// One of a stack's files was made over a layer that is not there.
    #[error("the layer that COW file {cow:?} was made over is missing")]
    Missing {
        /// The COW file.
        cow: PathBuf,
    },
    /// A stack of more layers than are sensible, which has to be asked for.
    #[error("a stack of {layers} layers: at most {most} are taken, unless more are asked for")]
    TooDeep {
        /// How many there are.
        layers: u32,
        /// How many are taken.
        most: u32,
    },
    /// The device is no layer, where one is needed.
    #[error("{name:?} is no layer")]
    NotALayer {
        /// The dm device's name.
        name: String,
    },
    /// The snapshot has no checkpoint to go back to, or is not in working order.
    #[error("{name:?} stands on no layer")]
    NotOnLayer {
        /// The dm device's name.
        name: String,
    },
}
