//! The kinds of exception store that the kernel has.

/// Where a snapshot keeps its exceptions, and what it does when the COW device is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Store {
    /// `P`: exceptions are kept on the COW device, and outlive the dm device. When the COW device is full, the kernel
    /// invalidates the store, and the disk is lost.
    #[default]
    Persistent,
    /// `PO`: exceptions are kept as with `P`, but when the COW device is full only writes fail, and the store stays
    /// valid.
    PersistentOverflow,
    /// `N`: exceptions are kept in memory, which is the fastest. The disk is gone with the dm device.
    Transient,
}

impl Store {
    /// Returns the store's letters in a table line.
    #[must_use]
    pub const fn letters(self) -> &'static str {
        match self {
            Self::Persistent => "P",
            Self::PersistentOverflow => "PO",
            Self::Transient => "N",
        }
    }

    /// True if the exceptions are written to the COW device.
    #[must_use]
    pub const fn is_persistent(self) -> bool {
        !matches!(self, Self::Transient)
    }
}
