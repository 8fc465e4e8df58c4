//! This crate, over an image that stays attached.

use std::path::Path;

use dmsnap::{Origin, Snapshot, SnapshotOptions};

use super::{Contestant, Job, Made, Result, names};

#[derive(Debug, Default)]
pub(super) struct OnOrigin {
    origin: Option<Origin>,
    made: Made<Snapshot>,
}

impl Contestant for OnOrigin {
    fn name(&self) -> &'static str {
        names::ON_ORIGIN
    }

    fn begin(&mut self, image: &Path) -> Result<()> {
        self.origin = Some(Origin::open(image)?);
        Ok(())
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let origin = self.origin.as_ref().ok_or("it was not begun")?;
        let mut options = SnapshotOptions::new();
        options.store(job.store).chunk_size(job.chunk);
        let made = options.create_on(origin, job.cow, job.name)?;
        self.made.keep(&job, made);
        Ok(())
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        Ok(self.made.take(&job)?.cleanup()?)
    }

    fn end(&mut self) -> Result<()> {
        self.origin = None;
        Ok(())
    }
}
