//! The stories of a COW file that is made longer: under a live snapshot, and for one that has overflowed.

use std::path::Path;

use crate::ask::ask;
use crate::error::{Result, Step};
use crate::exception_store;
use crate::host::{FileKind, Host, MACHINE};
use crate::lookup::{Live, bound, live, reach};
use crate::name::{DeviceName, MAPPER_DIR};
use crate::options::SnapshotOptions;
use crate::policy::Retry;
use crate::refusal::Refusal;
use crate::removal::{self, Subject, When};
use crate::snapshot::{self, Snapshot};
use crate::status::SnapshotStatus;
use crate::store_check::check_identity;
use crate::table::Discard;

/// Makes the COW file of a live snapshot at least `bytes` long, and the snapshot use it at once. The device is named by
/// its name or uuid; whoever has it open notices nothing.
///
/// Never makes it shorter, whoever else is at it. The size is rounded up to whole chunks, and by one more where the
/// kernel would invalidate the full store instead of only filling it. Returns the status as the kernel gives it
/// afterwards; an overflow that came first shows there. A COW device that is no file is not made longer, only taken at
/// its new size.
///
/// ```no_run
/// use dmsnap::SnapshotStatus;
///
/// if let SnapshotStatus::Usage(usage) = dmsnap::grow("vm-42", 2 << 30)? {
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
pub fn grow(device: impl AsRef<str>, bytes: u64) -> Result<SnapshotStatus> {
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
/// [`Error::Failed`](crate::Error::Failed) with [`Verdict::Busy`](crate::Verdict::Busy) while somebody has the device
/// open; it is as it was then, and the file longer. If making it anew fails, the old device is gone and the note says
/// so: the COW file has everything, so `create` makes the snapshot once the reason is gone.
pub fn recover(device: impl AsRef<str>, bytes: u64) -> Result<Snapshot> {
    GrowOptions::new().recover(device, bytes)
}

/// Options for making a COW file longer.
#[derive(Clone, Debug, Default)]
pub struct GrowOptions {
    reserve: bool,
    retry: Retry,
}

impl GrowOptions {
    /// A sparse file; up to 15 seconds for a device to be closed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the space of the whole file aside, so that the host's file system cannot run out of it later.
    pub fn reserve(&mut self, reserve: bool) -> &mut Self {
        self.reserve = reserve;
        self
    }

    /// Sets how [`GrowOptions::recover`] waits for the device to be closed.
    pub fn retry(&mut self, retry: Retry) -> &mut Self {
        self.retry = retry;
        self
    }

    /// As [`grow`].
    ///
    /// # Errors
    ///
    /// As [`grow`].
    pub fn grow(&self, device: impl AsRef<str>, bytes: u64) -> Result<SnapshotStatus> {
        grow_on(&MACHINE, self, device.as_ref(), bytes)
    }

    /// As [`recover`].
    ///
    /// # Errors
    ///
    /// As [`recover`].
    pub fn recover(&self, device: impl AsRef<str>, bytes: u64) -> Result<Snapshot> {
        recover_on(&MACHINE, self, device.as_ref(), bytes)
    }
}

pub(crate) fn grow_on<H: Host>(
    host: &H,
    options: &GrowOptions,
    device: &str,
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

/// Makes the file longer if it has to be. The loop device does not notice.
fn lengthen<H: Host>(
    host: &H,
    options: &GrowOptions,
    live: &Live<H::Loop>,
    asked: u64,
) -> Result<()> {
    let (store, chunk) = (live.params.store, live.params.chunk);
    let (file, facts) = reach(host, &live.cow, &live.device.name, true)?;
    let path = || live.cow.path.clone();
    let bytes = facts.size_bytes;
    let wanted = exception_store::grown(bytes, asked, store, chunk)
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

/// Everything that can be known to fail is asked for while the old device is still there.
pub(crate) fn recover_on<H: Host>(
    host: &H,
    options: &GrowOptions,
    device: &str,
    bytes: u64,
) -> Result<Snapshot> {
    let live = live(host, device)?;
    let name = DeviceName::new(live.device.name.as_str())?;
    let text = || name.to_string();
    match live.status {
        SnapshotStatus::Overflow => (),
        SnapshotStatus::Invalid => return Err(Refusal::Invalid { name: text() }.into()),
        _ => return Err(Refusal::NotOverflowed { name: text() }.into()),
    }
    let mut anew = SnapshotOptions::new();
    anew.store(live.params.store)
        .chunk_size(live.params.chunk)
        .direct_io(live.cow.status.direct_io)
        .discard(live.params.discard != Discard::Unsupported);
    anew.expected_origin = live.uuid.origin();
    snapshot::check_target(host, &anew)?;
    let origin = bound(host, live.params.origin)?;
    let (_, facts) = reach(host, &origin, name.as_str(), false)?;
    check_identity(
        &origin.path,
        facts.identity(),
        anew.expected_origin,
        anew.any_origin,
    )?;
    lengthen(host, options, &live, bytes)?;

    // Open, the loop devices would outlive the dm device, and with them the COW file's lock.
    drop((origin.device, live.cow.device));
    let (origin, cow) = (origin.path, live.cow.path);
    let subject = Subject::ours(live.uuid, &name);
    removal::remove_subject(host, &subject, &options.retry, When::Now)?;
    snapshot::create(host, &anew, &origin, &cow, &name).map_err(|error| {
        error.noted("the overflowed device is removed, and its COW file has everything")
    })
}
