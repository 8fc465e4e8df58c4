//! Attaches an origin image once for many snapshots.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::build::OriginDevice;
use crate::backing::{
    Attached, Backing, CowOptions, Evidence, attach, content, diskseq, loop_length,
    open_locked_origin,
};
use crate::base::{
    Digest, LoopHandle, OriginIdentity, SECTOR_BYTES, SectorSize, Sectors, loop_node,
};
use crate::call::ask;
use crate::error::{Result, Step, Verdict};
use crate::kernel::{FileFacts, Host, LOOP_CONTROL, LoopDevice, Loops, MACHINE, SHARED_ORIGIN};
use crate::kernel::{LO_AUTOCLEAR, LO_READ_ONLY};
use crate::store::{Chain, Content};

/// An origin image that is attached to a loop device, which any number of snapshots share.
///
/// Open it before the boot path: attaching the image, and on Linux 6.17 and later an `fsync` of it, are then done once
/// and not for each VM. The loop device belongs to the kernel, which detaches it when its last user is gone: a
/// snapshot, a pool or a value of this type. So dropping this value, or a killed process, harms no snapshot. Another
/// process that opens the same image, by whatever path, shares the loop device.
///
/// ```no_run
/// use dmsnap::{Origin, SnapshotOptions};
///
/// let origin = Origin::open("/images/base.ext4")?;
/// let snapshot = SnapshotOptions::new().create_on(&origin, "/run/vm-42.cow", "vm-42")?;
/// # snapshot.cleanup()?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Origin(pub(crate) Arc<Base<LoopDevice>>);

/// An image and the loop device that it is attached to, or a layer and its open device.
#[derive(Debug)]
pub(crate) struct Base<L> {
    pub(super) path: PathBuf,
    pub(super) facts: FileFacts,
    /// What it held when it was opened; `None` for a layer.
    pub(super) content: Option<Content>,
    /// The caller's digest of it.
    pub(super) digest: Option<Digest>,
    pub(super) length: Sectors,
    pub(super) device: Attached<L>,
    /// Behind the device, so that it is dropped once that is closed.
    pub(super) _node: MadeNode,
    /// The loop device's; a layer has none.
    pub(crate) handle: Option<LoopHandle>,
    /// The place of what is made over it, if it is a layer.
    pub(super) above: Option<Chain>,
}

/// The node of an origin's loop device where /dev does not get the kernel's: nobody cleans an origin up, so it goes with
/// this value, if the loop device is free by then.
#[derive(Debug)]
pub(super) struct MadeNode;

impl Drop for MadeNode {
    fn drop(&mut self) {
        MACHINE.sweep_nodes();
    }
}

impl<L> Base<L> {
    /// The image, which is not open any more: the loop device has it.
    pub(crate) fn image(&self) -> Backing<'_, ()> {
        Backing {
            path: &self.path,
            file: (),
            facts: self.facts,
            above: self.above,
        }
    }

    pub(super) fn content(&self) -> Content {
        self.content.unwrap_or_default()
    }

    /// What stores are held against, and new ones are marked with. `take` returns [`Self::content`]; `given` is the digest
    /// that the caller has given for this store alone.
    pub(super) fn evidence<'a>(
        &self,
        take: &'a dyn Fn() -> Result<Content>,
        given: Option<Digest>,
    ) -> Evidence<'a> {
        Evidence {
            given: given.or(self.digest).filter(|_| self.above.is_none()),
            take,
            marks: self.content.is_some(),
        }
    }

    pub(crate) fn over(&self) -> OriginDevice<'_> {
        OriginDevice {
            facts: &self.facts,
            device: self.device.dev,
            length: self.length,
            above: self.above,
        }
    }
}

impl Origin {
    /// Attaches the image read-only, or uses the loop device that this function attached before, in any process, to the
    /// same file of the same size. Two calls at the same instant may make a loop device each, which does no harm.
    ///
    /// A loop device on which 512 snapshots stand is left to those, and another one attached, which shares the page cache:
    /// what a create takes grows with the number of snapshots over one loop device. For thousands over one image, open it
    /// anew for every few hundred.
    ///
    /// The image is synced first (`fsync`).
    ///
    /// # Errors
    ///
    /// Those of [`SnapshotOptions::create`](crate::SnapshotOptions::create) that concern the image.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        OriginOptions::new().open(path)
    }

    /// Returns the image's path, as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Returns the loop device, `/dev/loopN`.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.0.device.path
    }

    /// Returns the image's size and modification time when it was opened.
    #[must_use]
    pub fn identity(&self) -> OriginIdentity {
        self.0.facts.identity()
    }
}

/// Options for opening an [`Origin`].
#[derive(Clone, Debug, Default)]
pub struct OriginOptions {
    cow: CowOptions,
}

impl OriginOptions {
    /// Makes the options that [`Origin::open`] uses.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how long to wait for a program that has locked the image exclusively, as a merge does: a second by default.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.cow.deadline = Some(deadline);
        self
    }

    /// Says what the image holds, for every COW file that is used over it, as
    /// [`SnapshotOptions::digest`](crate::SnapshotOptions::digest) does.
    pub fn digest(&mut self, digest: impl Into<Digest>) -> &mut Self {
        self.cow.digest = Some(digest.into());
        self
    }

    /// Does what [`Origin::open`] does.
    ///
    /// # Errors
    ///
    /// Those of [`Origin::open`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Origin> {
        let base = open(&MACHINE, path.as_ref(), &self.cow)?;
        Ok(Origin(Arc::new(base)))
    }
}

pub(crate) fn open<H: Host>(host: &H, path: &Path, options: &CowOptions) -> Result<Base<H::Loop>> {
    ask(Step::OpenLoopControl, Path::new(LOOP_CONTROL), || {
        host.open_loop_control()
    })?;
    let origin = open_locked_origin(host, path, false, options)?;
    match ask(Step::SyncFile, path, || host.sync_file(&origin.file)) {
        // A file system that is never written, as squashfs and erofs are.
        Err(error) if error.verdict() == Some(Verdict::Unsupported) => (),
        synced => synced?,
    }
    let found = host.read_only_loops().into_iter();
    let (device, handle) = match found
        .filter_map(|number| join(host, &origin, number))
        .next()
    {
        Some(found) => found,
        None => {
            let mut label = PathBuf::from(SHARED_ORIGIN).into_os_string();
            label.push(path);
            let (mut handle, flags) = (None, LO_READ_ONLY | LO_AUTOCLEAR);
            let device = attach(
                host,
                &origin,
                flags,
                SectorSize::Bytes512,
                Path::new(&label),
                &mut handle,
            )?;
            let handle = handle.unwrap_or_else(|| LoopHandle::at(&device.path));
            (device, handle)
        }
    };
    Ok(Base {
        length: loop_length(host, &device)?,
        content: Some(content(host, &origin)?),
        digest: options.digest,
        above: None,
        path: path.to_owned(),
        facts: origin.facts,
        device,
        _node: MadeNode,
        handle: Some(handle),
    })
}

/// So many dm devices stand on a shared loop device before another one is attached for those to come. At each load and
/// each resume the kernel looks through all snapshots of the origin for one with the same COW device
/// (`__find_snapshots_sharing_cow`, `drivers/md/dm-snap.c`).
pub(super) const CROWD: usize = 512;

/// The loop device of that number, if it is a shared one over this image, as long as the image is. From the moment that
/// it is open it cannot change hands. One that cannot be looked at is somebody else's.
fn join<H: Host>(
    host: &H,
    origin: &Backing<'_, H::File>,
    number: u32,
) -> Option<(Attached<H::Loop>, LoopHandle)> {
    let path = loop_node(number);
    let device = ask(Step::InspectLoop, &path, || host.open_loop(&path, false)).ok()?;
    let status = ask(Step::InspectLoop, &path, || host.loop_status(&device)).ok()?;
    let bytes = ask(Step::SizeLoop, &path, || host.loop_size_bytes(&device)).ok()?;
    let whole = origin.facts.size_bytes - origin.facts.size_bytes % SECTOR_BYTES;
    let same = status.backing == origin.facts.id && status.autoclear && bytes == whole;
    if !status.label.is_shared() || !same || host.count_users(&path, CROWD) >= CROWD {
        return None;
    }
    let diskseq = diskseq(host, &device, &path).ok()?;
    let dev = ask(Step::InspectLoop, &path, || host.loop_number(&device)).ok()?;
    let backing = Some(status.backing);
    let handle = LoopHandle {
        path: path.clone(),
        diskseq,
        backing,
    };
    let device = Attached {
        path,
        number,
        dev,
        device,
    };
    Some((device, handle))
}
