//! What is in the way of an operation on a device that is there.

use crate::base::DeviceNumber;

/// Why a snapshot cannot be frozen by a checkpoint, or not now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeObstacle {
    /// Its store is transient: what is where in the COW file goes with the device.
    #[error("its store is transient")]
    Transient,
    /// It is suspended.
    #[error("it is suspended")]
    Suspended,
    /// A table is loaded beside the live one: another operation is under way, or was killed.
    #[error("it is about to get another table")]
    InactiveTable,
    /// It is a layer already.
    #[error("it is a layer")]
    Layer,
    /// A pool made its device, and would take back another one than it gave.
    #[error("its device is a pool's")]
    Pooled,
    /// Its COW file has no header of a persistent store.
    #[error("its store has no header")]
    NoHeader,
    /// Its uuid does not say how long the image is.
    #[error("its image is not known")]
    ImageUnknown,
    /// A further layer would be more than a stack may have.
    #[error("it stands on as many layers as a stack may have")]
    TooDeep,
    /// The new COW file is on the file system that the snapshot has: each would wait for the other.
    #[error("the new COW file is on its own file system")]
    OwnFileSystem,
    /// Somebody cleared the table with which it was to go on, or resumed it, in the middle of the checkpoint.
    #[error("its new table was taken away meanwhile")]
    TableTaken,
}

/// Why a snapshot cannot be exported while it is there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportObstacle {
    /// Its store is transient: what is where in the COW file is in the kernel's memory alone.
    #[error("its store is transient")]
    Transient,
    /// It is suspended, and an export would end that.
    #[error("it is suspended")]
    Suspended,
    /// It has no live table, or one of another target.
    #[error("it has no live table")]
    NoLiveTable,
    /// Its image or its COW file is not behind a loop device that can be read.
    #[error("its loop devices cannot be read")]
    LoopsUnreadable,
}

/// Why a dm device without a uuid cannot be taken over as a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptObstacle {
    /// It has no live table.
    #[error("it has no live table")]
    NoLiveTable,
    /// It is no snapshot, or one with a table that cannot be read.
    #[error("its target is {target}")]
    Target {
        /// The name of its target, such as `linear`.
        target: String,
    },
    /// Its origin is no loop device.
    #[error("its origin {number} is no loop device")]
    OriginNotALoop {
        /// The origin's number.
        number: DeviceNumber,
    },
    /// Its COW device is no loop device.
    #[error("its COW device {number} is no loop device")]
    CowNotALoop {
        /// The COW device's number.
        number: DeviceNumber,
    },
    /// It got another table, or a loop device another file, while it was looked at.
    #[error("it has another table by now")]
    TableChanged,
}

/// Why a snapshot that a killed process left half-way cannot be repaired.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RepairObstacle {
    /// Its layer has what it had, and somebody cleared the table that leads there.
    #[error("the table that it was to go on with is gone")]
    TableGone,
    /// Somebody cleared the layer's tables, by which its image and COW file would be known.
    #[error("the layer that it stands on has no table")]
    LayerWithoutTable,
    /// Its own table is none that dmsnap loads.
    #[error("its own table cannot be read")]
    TableUnreadable,
    /// It wrote while its layer could not be read: the kernel gave it up.
    #[error("a write failed while the layer that it stands on could not be read")]
    WriteFailed,
    /// The layer's uuid does not say how long the image is.
    #[error("its image is not known")]
    ImageUnknown,
}
