//! Ways to the same snapshots: two loop devices under a dm device with the table `0 N snapshot A B <store> <chunk>`.
//!
//! Another one is a file here, a [`Make`] below, and its place in the scenarios where it matters
//! (`arena/scenarios.rs`).

mod crates;
mod fleet;
mod ioctls;
mod library;
mod origin;
mod polling;
mod processes;
mod stopped;
mod warm_pool;

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use dmsnap::{ChunkSize, Store};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What reports call them.
pub(crate) mod names {
    pub(crate) const IOCTLS: &str = "bare ioctls";
    pub(crate) const LIBRARY: &str = "dmsnap";
    pub(crate) const LIBRARY_ALONE: &str = "dmsnap, udevd stopped";
    pub(crate) const ON_ORIGIN: &str = "dmsnap, shared origin";
    pub(crate) const WARM_POOL: &str = "dmsnap, warm pool";
    pub(crate) const RECYCLED: &str = "dmsnap, warm pool, until recycled";
    pub(crate) const FLEET: &str = "dmsnap, cleanup_all";
    pub(crate) const CRATES: &str = "loopdev + devicemapper";
    pub(crate) const PROCESSES: &str = "losetup + blockdev + dmsetup";
    pub(crate) const POLLING_1: &str = "bare ioctls, tried each 1 ms";
    pub(crate) const POLLING_100: &str = "bare ioctls, tried each 100 ms";
}

/// What is to be made: paths of the image and of a fresh COW file, the dm device's name, and the end of its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) image: &'a Path,
    pub(crate) cow: &'a Path,
    pub(crate) name: &'a str,
    pub(crate) store: Store,
    pub(crate) chunk: ChunkSize,
}

impl Job<'_> {
    /// What a table line ends with.
    fn store_and_chunk(&self) -> String {
        format!("{} {}", self.store.letters(), self.chunk)
    }
}

/// One way. It keeps what it needs between `create` and `remove`, and what it can reasonably keep open for longer. Only
/// those two and `remove_all` are on the clock; the others are for who keeps more: an origin that stays attached, a
/// pool.
pub(crate) trait Contestant: Send {
    fn name(&self) -> &'static str;

    /// Before the first turn of a scenario, all of whose snapshots will be of this image.
    fn begin(&mut self, _image: &Path) -> Result<()> {
        Ok(())
    }

    /// Before each turn, which creates so many snapshots and then removes them.
    fn before_turn(&mut self, _jobs: usize) -> Result<()> {
        Ok(())
    }

    fn create(&mut self, job: Job<'_>) -> Result<()>;

    /// Between the creates of a turn and the removes.
    fn between(&mut self) -> Result<()> {
        Ok(())
    }

    /// Removes what `create` made, loop devices included.
    fn remove(&mut self, job: Job<'_>) -> Result<()>;

    /// Removes all of a turn's, for whom there is a better way than one after the other.
    fn remove_all(&mut self, jobs: &[Job<'_>]) -> Result<()> {
        jobs.iter().try_for_each(|job| self.remove(*job))
    }

    /// When the attempt began by which the last removal of a busy device succeeded.
    fn last_try(&self) -> Option<Instant> {
        None
    }

    fn after_turn(&mut self) -> Result<()> {
        Ok(())
    }

    /// After the last turn of a scenario: nothing may be left.
    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Makes one; each thread of a scenario has its own.
pub(crate) type Make = fn() -> Result<Box<dyn Contestant>>;

pub(crate) const IOCTLS: Make = || Ok(Box::new(ioctls::Ioctls::new()?));
pub(crate) const LIBRARY: Make = || Ok(Box::new(library::Library::default()));
pub(crate) const LIBRARY_TIMED: Make = || Ok(Box::new(library::Library::timed()));
pub(crate) const ON_ORIGIN: Make = || Ok(Box::new(origin::OnOrigin::default()));
pub(crate) const WARM_POOL: Make = || Ok(Box::new(warm_pool::WarmPool::default()));
pub(crate) const RECYCLED: Make = || Ok(Box::new(warm_pool::WarmPool::waiting()));
pub(crate) const FLEET: Make = || Ok(Box::new(fleet::Fleet::default()));
pub(crate) const CRATES: Make = || Ok(Box::new(crates::Crates::new()?));
pub(crate) const PROCESSES: Make = || Ok(Box::new(processes::Processes::default()));
pub(crate) const POLLING_1: Make = || Ok(Box::new(polling::Polling::each_ms(1, names::POLLING_1)?));
pub(crate) const POLLING_100: Make = || {
    Ok(Box::new(polling::Polling::each_ms(
        100,
        names::POLLING_100,
    )?))
};
pub(crate) const LIBRARY_ALONE: Make = || Ok(Box::new(stopped::Stopped::of(LIBRARY()?)));

/// What contestants keep of their snapshots, by name.
#[derive(Debug)]
struct Made<T>(Vec<(String, T)>);

impl<T> Default for Made<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Made<T> {
    fn keep(&mut self, job: &Job<'_>, made: T) {
        self.0.push((job.name.to_owned(), made));
    }

    fn take(&mut self, job: &Job<'_>) -> Result<T> {
        let place = self.0.iter().position(|(name, _)| name == job.name);
        Ok(self.0.swap_remove(place.ok_or("it was not made")?).1)
    }
}
