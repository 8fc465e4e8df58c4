//! This crate's pool: a claim and a release.
//!
//! It lives for a turn only: while it does, no other snapshot is the host's last one, whose removal takes long on 6.12
//! and later, and the other contestants would have its gain.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dmsnap::pool::CowFate;
use dmsnap::{CowSize, Handles, Origin, Pool, PoolOptions, SnapshotOptions};

use super::{Contestant, Job, Made, Result, names};
use crate::arena::place::COW_BYTES;

const READY: usize = 4;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct WarmPool {
    origin: Option<Origin>,
    dir: PathBuf,
    pool: Option<Pool>,
    made: Made<Handles>,
    /// Whether a remove lasts until the device can serve again.
    waits: bool,
}

impl WarmPool {
    pub(super) fn waiting() -> Self {
        Self {
            waits: true,
            ..Self::default()
        }
    }

    fn pool(&self) -> Result<&Pool> {
        Ok(self.pool.as_ref().ok_or("there is no pool")?)
    }

    fn wait_ready(&self) -> Result<()> {
        let pool = self.pool()?;
        if pool.wait_ready(READY, PATIENCE) {
            Ok(())
        } else {
            Err(format!("not ready: {:?}", pool.status()).into())
        }
    }
}

impl Contestant for WarmPool {
    fn name(&self) -> &'static str {
        if self.waits {
            names::RECYCLED
        } else {
            names::WARM_POOL
        }
    }

    fn begin(&mut self, image: &Path) -> Result<()> {
        self.origin = Some(Origin::open(image)?);
        self.dir = image.parent().ok_or("no directory")?.to_owned();
        Ok(())
    }

    fn before_turn(&mut self, _jobs: usize) -> Result<()> {
        let origin = self.origin.as_ref().ok_or("it was not begun")?;
        let mut snapshot = SnapshotOptions::new();
        snapshot.make_cow(CowSize::Bytes(COW_BYTES));
        let mut options = PoolOptions::new();
        options.size(READY).snapshot(&snapshot);
        self.pool = Some(options.open(origin, &self.dir)?);
        self.wait_ready()
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let claimed = self.pool()?.claim(job.name)?;
        if !claimed.warm {
            return Err("none was ready".into());
        }
        self.made.keep(&job, claimed.snapshot.handles().clone());
        Ok(())
    }

    fn between(&mut self) -> Result<()> {
        self.wait_ready()
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        let handles = self.made.take(&job)?;
        let released = self.pool()?.release(&handles, CowFate::Delete)?;
        if !released.taken_back {
            return Err("it was removed".into());
        }
        if self.waits && !self.pool()?.wait_recycled(PATIENCE) {
            return Err(format!("not recycled: {:?}", self.pool()?.status()).into());
        }
        Ok(())
    }

    fn after_turn(&mut self) -> Result<()> {
        Ok(self.pool.take().ok_or("there is no pool")?.drain()?)
    }

    fn end(&mut self) -> Result<()> {
        self.origin = None;
        Ok(())
    }
}
