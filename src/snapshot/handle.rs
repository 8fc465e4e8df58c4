//! The value that stands for a live snapshot.

use std::path::Path;

use crate::backing::Warning;
use crate::base::{DeviceId, Handles};
use crate::dm::SnapshotStatus;
use crate::error::Result;
use crate::teardown;

/// A live snapshot: one VM's disk.
///
/// It belongs to the kernel, not to this process: dropping this value leaves it alone, so that a restarted control
/// plane finds its VMs' disks as they were. Take it down with [`Snapshot::cleanup`], or from any process with
/// [`cleanup`](crate::cleanup) and the [`Handles`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a snapshot stays until it is cleaned up"]
pub struct Snapshot {
    handles: Handles,
    warnings: Vec<Warning>,
}

impl Snapshot {
    pub(crate) fn of(handles: Handles, warnings: Vec<Warning>) -> Self {
        Self { handles, warnings }
    }

    /// Returns the path to give to the hypervisor: `/dev/dm-N`, or `/dev/mapper/<name>` where /dev is no devtmpfs. It
    /// can be opened at once.
    #[must_use]
    pub fn device(&self) -> &Path {
        self.handles.device.as_deref().unwrap_or(Path::new(""))
    }

    /// Returns the handles to store.
    #[must_use]
    pub fn handles(&self) -> &Handles {
        &self.handles
    }

    /// Returns the handles to store, and drops the rest.
    #[must_use]
    pub fn into_handles(self) -> Handles {
        self.handles
    }

    /// Returns the warnings about the snapshot, which works all the same.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Makes its COW file at least `bytes` long while it works, as [`grow`](crate::snapshot::grow()) does.
    ///
    /// # Errors
    ///
    /// Those of [`grow`](crate::snapshot::grow()).
    pub fn grow(&self, bytes: u64) -> Result<SnapshotStatus> {
        crate::snapshot::grow(&self.handles, bytes)
    }

    /// Takes the snapshot down, as [`cleanup`](crate::cleanup) does. The COW file stays.
    ///
    /// # Errors
    ///
    /// [`Error::Debris`](crate::Error::Debris) lists what remains.
    pub fn cleanup(self) -> Result<()> {
        teardown::cleanup(&self.handles)
    }
}

impl From<&Snapshot> for DeviceId {
    fn from(snapshot: &Snapshot) -> Self {
        Self::from(&snapshot.handles)
    }
}
