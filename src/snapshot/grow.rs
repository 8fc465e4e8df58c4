//! A COW file that is made longer under a live snapshot.

use std::path::Path;
use std::time::Duration;

use super::Snapshot;
use super::recover::recover_on;
use crate::base::{DeviceId, MAPPER_DIR};
use crate::call::ask;
use crate::dm::SnapshotStatus;
use crate::error::{Refusal, Result, Retry, Step};
use crate::find::{Live, live, reach, whole};
use crate::kernel::{FileKind, Host, MACHINE};
use crate::store;

/// Makes the COW file of a live snapshot at least `bytes` long, and the snapshot use it at once. Whoever has
/// it open notices nothing.
///
/// Never makes it shorter, whoever else is at it. The size is rounded up to whole chunks, and by one more where the
/// kernel would invalidate the full store instead of only filling it. Returns the status as the kernel gives it
/// afterwards; an overflow that came first shows there. A COW device that is no file is not made longer, only taken at
/// its new size.
///
/// ```no_run
/// use dmsnap::dm::SnapshotStatus;
///
/// if let SnapshotStatus::Usage(usage) = dmsnap::snapshot::grow("vm-42", 2 << 30)? {
///     println!("{}% of {} sectors", usage.percent(), usage.total);
/// }
/// # Ok::<(), dmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Refused`](crate::Error::Refused), with nothing done: [`Refusal::Overflowed`] when it is too late, and the
/// snapshot has to be made anew ([`recover`]); [`Refusal::Invalid`] when it is lost; [`Refusal::NotLive`];
/// [`Refusal::FileElsewhere`] when the file's path leads to it no more; [`Refusal::NotOurs`].
/// [`Error::Failed`](crate::Error::Failed) otherwise. The file may be longer then; ask again.
pub fn grow(device: impl Into<DeviceId>, bytes: u64) -> Result<SnapshotStatus> {
    GrowOptions::new().grow(device, bytes)
}

/// Makes the COW file of an overflowed `PO` snapshot at least `bytes` long, and the snapshot anew over the same files,
/// with the same name, store, chunk size, direct I/O and discard: what was written is there, and writes work again.
///
/// Nobody may have the device open: that is waited for, up to 15 seconds. The device's number, its uuid and its loop
/// devices are new ones.
///
/// # Errors
///
/// As [`grow`], and [`Refusal::NotOverflowed`] when there is nothing to recover from.
/// [`Error::Failed`](crate::Error::Failed) of kind [`Busy`](crate::ErrorKind::Busy) while somebody has the device
/// open; it is as it was then, and the file longer. If making it anew fails, the old device is gone and the note says
/// so: the COW file has everything, so `create` makes the snapshot once the reason is gone.
pub fn recover(device: impl Into<DeviceId>, bytes: u64) -> Result<Snapshot> {
    GrowOptions::new().recover(device, bytes)
}

/// Options for making a COW file longer, and the calls that do it.
#[derive(Clone, Debug, Default)]
pub struct GrowOptions {
    pub(super) reserve: bool,
    pub(super) retry: Retry,
}

impl GrowOptions {
    /// Makes the default options: the file stays sparse, and a recovery waits up to 15 seconds for the device to be
    /// closed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the space of the whole file is set aside (`fallocate`), so that the host's file system cannot run
    /// out of it later.
    pub fn reserve(&mut self, reserve: bool) -> &mut Self {
        self.reserve = reserve;
        self
    }

    /// Sets for how long [`GrowOptions::recover`] waits for the device to be closed.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.retry(Retry::until(deadline))
    }

    /// Sets the deadline and the pauses between attempts.
    pub fn retry(&mut self, retry: Retry) -> &mut Self {
        self.retry = retry;
        self
    }

    /// Does what [`grow`] does.
    ///
    /// # Errors
    ///
    /// Those of [`grow`].
    pub fn grow(&self, device: impl Into<DeviceId>, bytes: u64) -> Result<SnapshotStatus> {
        grow_on(&MACHINE, self, &device.into(), bytes)
    }

    /// Asks whether the COW file can be made longer as [`grow`](Self::grow) does it, and makes it no longer: not every
    /// file system can (ramfs), and a watch that is to grow it wants to know before the threshold is reached.
    ///
    /// # Errors
    ///
    /// As [`grow`](Self::grow).
    pub fn probe(&self, device: impl Into<DeviceId>) -> Result<()> {
        probe_on(&MACHINE, &device.into())
    }

    /// Does what [`recover`] does.
    ///
    /// # Errors
    ///
    /// Those of [`recover`].
    pub fn recover(&self, device: impl Into<DeviceId>, bytes: u64) -> Result<Snapshot> {
        recover_on(&MACHINE, self, &device.into(), bytes)
    }
}

pub(crate) fn grow_on<H: Host>(
    host: &H,
    options: &GrowOptions,
    device: &DeviceId,
    bytes: u64,
) -> Result<SnapshotStatus> {
    let live = live(host, device)?;
    let name = || live.device.name.clone();
    match live.status {
        SnapshotStatus::Overflow => return Err(Refusal::Overflowed { name: name() }.into()),
        SnapshotStatus::Invalid => return Err(Refusal::Invalid { name: name() }.into()),
        _ => (),
    }
    lengthen(host, options, &live, bytes)?;
    ask(Step::ResizeLoop, &live.cow.node, || {
        host.resize_loop(&live.cow.device)
    })?;
    let path = Path::new(MAPPER_DIR).join(&live.device.name);
    let status = ask(Step::Status, &path, || host.status(&live.uuid))?;
    let (_, text) = status.ok_or_else(|| Refusal::NotLive { name: name() })?;
    let Ok(status) = text.parse();
    Ok(status)
}

fn probe_on<H: Host>(host: &H, device: &DeviceId) -> Result<()> {
    let live = live(host, device)?;
    whole(&live.cow)?;
    let (file, facts) = reach(host, &live.cow, &live.device.name, true)?;
    if facts.kind != FileKind::Regular {
        return Ok(());
    }
    ask(Step::SizeFile, &live.cow.path, || {
        host.lengthen_file(&file, facts.size_bytes, false)
    })
}

/// Makes the file longer if it has to be. The loop device does not notice.
pub(super) fn lengthen<H: Host>(
    host: &H,
    options: &GrowOptions,
    live: &Live<H::Loop>,
    asked: u64,
) -> Result<()> {
    let (store, chunk) = (live.params.store, live.params.chunk);
    whole(&live.cow)?;
    let (file, facts) = reach(host, &live.cow, &live.device.name, true)?;
    let path = || live.cow.path.clone();
    let bytes = facts.size_bytes;
    let wanted = store::grown(bytes, asked, store, chunk)
        .ok_or_else(|| Refusal::CowTooLarge { path: path() })?;
    if wanted == bytes && !options.reserve {
        return Ok(());
    }
    if facts.kind == FileKind::Regular {
        return ask(Step::SizeFile, &live.cow.path, || {
            host.lengthen_file(&file, wanted, options.reserve)
        });
    }
    if asked > bytes {
        return Err(Refusal::CowDeviceShort {
            path: path(),
            bytes,
            asked,
        }
        .into());
    }
    if wanted > bytes {
        return Err(Refusal::CowSizeTrap {
            path: path(),
            bytes,
            sound_bytes: wanted,
        }
        .into());
    }
    Ok(())
}
