//! What a disk outlives.

/// What a disk's writes outlive, and so what its flushes cost.
///
/// A flush that the guest sends ends at the dm device with the first two: `write through` is set in its own
/// `queue/write_cache`, which goes with the device. A loop device's setting would stay for the next file on it, and is
/// never touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Durability {
    /// The death of any process, as long as the dm device stays; with that the disk ends, at the latest when the host stops. The store is
    /// [`Transient`](crate::Store::Transient), and no flush reaches the COW file. The fastest for first writes.
    ThrowAway,
    /// The death of any process, also by SIGKILL, and the removal of the dm device; **not a power cut or a crash of the
    /// host's kernel**, which may leave a COW file with less than the guest was told is written. The store is a
    /// persistent one; its own commits still flush the COW file, two flushes for each instead of three with the guest's.
    Processes,
    /// A power cut too, as far as the COW file's file system does: what the guest has flushed is on its disk.
    #[default]
    PowerCuts,
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ThrowAway => "throw-away",
            Self::Processes => "processes",
            Self::PowerCuts => "power-cuts",
        })
    }
}
