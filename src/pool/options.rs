//! A pool's options, and opening it.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::shared::Shared;
use super::{Pool, keeper, pool_name, sweep};
use crate::backing::CowSize;
use crate::base::Durability;
use crate::call::ask;
use crate::error::{Error, Result, Retry, Step, errno_of};
use crate::kernel::{Clock, MACHINE, MAPPER_CONTROL};
use crate::snapshot;
use crate::snapshot::{Origin, SnapshotOptions};

/// Options for a [`Pool`], and the call that opens it.
///
/// ```no_run
/// use dmsnap::{Origin, PoolOptions};
/// use dmsnap::pool::CowFate;
///
/// let origin = Origin::open("/images/base.ext4")?;
/// let pool = PoolOptions::new().size(16).open(&origin, "/var/lib/vms")?;
/// let claimed = pool.claim("vm-42")?;
/// println!("boot from {}", claimed.snapshot.device().display());
/// // ... when the VM has exited:
/// pool.release(claimed.snapshot.handles(), CowFate::Delete)?;
/// # pool.drain()?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PoolOptions {
    snapshot: SnapshotOptions,
    durability: Option<Durability>,
    size: usize,
    when_empty: WhenEmpty,
    retry: Retry,
}

/// What a claim does when no snapshot is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenEmpty {
    /// The claim makes one, which takes as long as a `create`.
    #[default]
    Create,
    /// The claim waits up to this long for the refill.
    Wait(Duration),
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl PoolOptions {
    /// Makes the default options: eight throw-away snapshots with the other options of [`SnapshotOptions::new`] and COW
    /// files of the worst case's size; a claim on an empty pool makes one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            snapshot: SnapshotOptions::new(),
            durability: None,
            size: 8,
            when_empty: WhenEmpty::default(),
            retry: Retry::default(),
        }
    }

    /// Sets how the snapshots are made: store, chunk size, COW file. `replace_cow` has no effect, and without
    /// `make_cow` the COW files have the worst case's size.
    pub fn snapshot(&mut self, options: &SnapshotOptions) -> &mut Self {
        self.snapshot = options.clone();
        self
    }

    /// Sets what the disks' writes are to outlive, as [`SnapshotOptions::durability`] does; it goes before that of
    /// [`snapshot`](Self::snapshot).
    ///
    /// Where neither names a durability or a persistent store, they are thrown away
    /// ([`ThrowAway`](Durability::ThrowAway)), as a pool's COW files are deleted when they are released: such a disk is
    /// gone with its dm device, as at a reboot, and has nothing that could be kept ([`CowFate`](super::CowFate)),
    /// exported, or frozen. The setting is made when a snapshot is made ready, and costs a claim nothing.
    pub fn durability(&mut self, durability: Durability) -> &mut Self {
        self.durability = Some(durability);
        self
    }

    /// Sets how many snapshots are kept ready. At most as many spare dm devices are kept besides.
    pub fn size(&mut self, size: usize) -> &mut Self {
        self.size = size;
        self
    }

    /// Sets what a claim does when no snapshot is ready.
    pub fn when_empty(&mut self, when_empty: WhenEmpty) -> &mut Self {
        self.when_empty = when_empty;
        self
    }

    /// Sets how long [`Pool::release`], [`Pool::drain`] and the pool's threads wait while somebody has a device open:
    /// 15 seconds by default.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.retry = Retry::until(deadline);
        self
    }

    /// Opens a pool over `origin` and begins to fill it. It makes its COW files in `directory`, which must exist; pools
    /// may share one. The pool keeps a copy of `origin`, which need not live as long.
    ///
    /// First it takes down what dead pools left, those whose process was killed: their unclaimed devices on this host
    /// with their COW files, and COW files in `directory` that they were making. What cannot be taken down now is left
    /// to the next pool or `reap`.
    ///
    /// # Errors
    ///
    /// [`Refusal::StoreOfDurability`](crate::error::Refusal::StoreOfDurability) for a store that does not have the
    /// durability. [`Error::Failed`] if device-mapper or loop devices are not available, or a thread cannot be started.
    /// A failure to make snapshots ready is in [`Pool::status`].
    pub fn open(&self, origin: &Origin, directory: impl AsRef<Path>) -> Result<Pool> {
        let host = &MACHINE;
        let options = self.made_with()?;
        snapshot::open_controls(host)?;
        sweep::sweep(host, directory.as_ref())?;
        let control = Path::new(MAPPER_CONTROL);
        let random = ask(Step::Random, control, || host.random())?;
        let id = u64::try_from(random >> 64).unwrap_or_default();
        let keeper = keeper::make(host, &origin.0, &pool_name(id, "keeper")?)?;
        let shared = Arc::new(Shared {
            options,
            when_empty: self.when_empty,
            retry: self.retry,
            size: self.size,
            origin: origin.clone(),
            dir: directory.as_ref().to_owned(),
            id,
            state: Mutex::default(),
            claimed: Condvar::new(),
            released: Condvar::new(),
            made: Condvar::new(),
            changed: Condvar::new(),
        });
        let mut pool = Pool {
            shared: Arc::clone(&shared),
            refill: None,
            settle: None,
            recycle: None,
            keeper: Some(keeper),
        };
        let other = Arc::clone(&shared);
        if shared.settles() {
            let other = Arc::clone(&shared);
            pool.settle = Some(start("dmsnap-settle", move || other.settle())?);
        }
        pool.refill = Some(start("dmsnap-refill", move || shared.refill())?);
        pool.recycle = Some(start("dmsnap-recycle", move || other.recycle())?);
        Ok(pool)
    }

    /// Returns the options that its snapshots are made with.
    pub(super) fn made_with(&self) -> Result<SnapshotOptions> {
        let mut options = self.snapshot.clone();
        match self.durability {
            Some(durability) => {
                options.durability(durability);
            }
            None => options.default_durability(Durability::ThrowAway),
        }
        options.check_durability()?;
        options.cow.make = Some(options.cow.make.unwrap_or(CowSize::WorstCase));
        options.cow.replace = false;
        Ok(options)
    }
}

fn start<T: Send + 'static>(
    name: &str,
    life: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(life);
    started.map_err(|error| Error::failed(Step::StartThread, name, errno_of(&error)))
}
