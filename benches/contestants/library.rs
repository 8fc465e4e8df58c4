//! This crate.

use dmsnap::{Snapshot, SnapshotOptions};

use super::{Contestant, Job, Result};

#[derive(Debug, Default)]
pub(super) struct Library {
    made: Option<Snapshot>,
}

impl Contestant for Library {
    fn name(&self) -> &'static str {
        "dmsnap"
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        self.made = Some(SnapshotOptions::new().create(job.image, job.cow, job.name)?);
        Ok(())
    }

    fn remove(&mut self, _: Job<'_>) -> Result<()> {
        Ok(self.made.take().ok_or("nothing made")?.cleanup()?)
    }
}
