//! This crate.

use std::time::Instant;

use dmsnap::error::Step;
use dmsnap::timings::Timings;
use dmsnap::{Snapshot, SnapshotOptions};

use super::{Contestant, Job, Made, Result, names};

#[derive(Debug, Default)]
pub(super) struct Library {
    made: Made<Snapshot>,
    /// Whether its removals are to be told apart from the waits for them, which costs two readings of the clock a call.
    timed: bool,
    last_try: Option<Instant>,
}

impl Library {
    pub(super) fn timed() -> Self {
        Self {
            timed: true,
            ..Self::default()
        }
    }

    pub(super) fn take(&mut self, job: &Job<'_>) -> Result<Snapshot> {
        self.made.take(job)
    }
}

impl Contestant for Library {
    fn name(&self) -> &'static str {
        names::LIBRARY
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let mut options = SnapshotOptions::new();
        options.store(job.store).chunk_size(job.chunk);
        let made = options.create(job.image, job.cow, job.name)?;
        self.made.keep(&job, made);
        Ok(())
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        let made = self.take(&job)?;
        if !self.timed {
            return Ok(made.cleanup()?);
        }
        let begin = Instant::now();
        let (done, timings) = Timings::of(|| made.cleanup());
        done?;
        let mut tries = timings.calls.iter().rev();
        let last = tries.find(|call| call.step == Step::Remove);
        self.last_try = last.map(|call| begin + call.start);
        Ok(())
    }

    fn last_try(&self) -> Option<Instant> {
        self.last_try
    }
}
