//! Plain types: units, names, numbers, uuids, handles and what identifies files and devices. Nothing here makes a
//! system call.

mod device_id;
mod digest;
mod durability;
mod handles;
mod identity;
mod layer_id;
#[cfg(feature = "serde")]
pub(crate) mod lossy;
mod name;
mod number;
mod progress;
mod store;
mod units;
mod uuid;

pub use device_id::DeviceId;
pub use digest::{Digest, InvalidDigest};
pub use durability::Durability;
pub use handles::{FileId, Handles, LoopHandle};
pub use identity::OriginIdentity;
pub use layer_id::{InvalidLayerId, LayerId};
pub use name::{DeviceName, InvalidName, NameFault};
pub(crate) use name::{KEPT, MAPPER_DIR, MERGING, POOLED};
pub use number::{DeviceNumber, InvalidNumber};
pub(crate) use number::{loop_node, loop_number};
pub use progress::Progress;
pub use store::Store;
pub(crate) use units::SECTOR_BYTES;
pub use units::{ChunkSize, InvalidChunkSize, SectorSize, Sectors};
pub(crate) use uuid::Kind;
pub use uuid::{DeviceUuid, InvalidUuid};
