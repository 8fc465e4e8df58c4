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
    /// `P`: on the COW device; survives detaching. When full, the kernel invalidates it for good.
    #[default]
    Persistent,
    /// `PO`: as `P`, but when full only writes fail, and the store stays valid on disk.
    PersistentOverflow,
    /// `N`: in memory; fastest, and gone with the device.
    Transient,
}

impl Store {
    /// The letters in a table line.
    #[must_use]
    pub const fn letters(self) -> &'static str {
        match self {
            Self::Persistent => "P",
            Self::PersistentOverflow => "PO",
            Self::Transient => "N",
        }
    }

    /// Whether the exceptions are written to the COW device.
    #[must_use]
    pub const fn is_persistent(self) -> bool {
        !matches!(self, Self::Transient)
    }
}
