//! What a disk's writes outlive.

/// What a disk's writes outlive, which decides what its flushes cost.
///
/// With the first two, the guest's flushes end at the dm device: `write through` is set in the device's own
/// `queue/write_cache` in sysfs, which goes with it. The loop device's setting is never touched, as it would stay for
/// the next file that is attached.
///
/// What is lost: of a [`ThrowAway`](Self::ThrowAway) disk everything when its dm device goes, by a removal, a reboot, a
/// power cut; of a [`Processes`](Self::Processes) disk, in a power cut or a crash of the host, any write, also one that the
/// guest had flushed; of a [`PowerCuts`](Self::PowerCuts) disk what the guest had not flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Durability {
    /// Writes outlive the death of any process, but not the dm device: with that the disk is gone, and nothing of it can
    /// be kept, exported or frozen. The store is [`Transient`](crate::Store::Transient), and no flush reaches the COW file.
    /// First writes are the fastest. The default of a [`Pool`](crate::Pool).
    ThrowAway,
    /// Writes outlive the death of any process, also by SIGKILL, and the removal of the dm device, but **not a power
    /// cut or a crash of the host's kernel**: the COW file may then lack what the guest was told is written. The store
    /// is a persistent one, [`Persistent`](crate::Store::Persistent) unless one is named. Its own commits still flush the
    /// COW file, two flushes for each instead of three with the guest's.
    Processes,
    /// The default of a snapshot. Writes that the guest has flushed outlive a power cut too, if the COW file's file
    /// system and its disk do. The store may be of any kind; a [`Transient`](crate::Store::Transient) one still goes with the dm device.
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
