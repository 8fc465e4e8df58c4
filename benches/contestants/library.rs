//! This crate.

use dmsnap::{Snapshot, SnapshotOptions};

use super::{Contestant, Job, Made, Result};

#[derive(Debug, Default)]
pub(super) struct Library {
    made: Made<Snapshot>,
}

impl Contestant for Library {
    fn name(&self) -> &'static str {
        "dmsnap"
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let mut options = SnapshotOptions::new();
        options.store(job.store).chunk_size(job.chunk);
        let made = options.create(job.image, job.cow, job.name)?;
        self.made.keep(&job, made);
        Ok(())
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        Ok(self.made.take(&job)?.cleanup()?)
    }
}
