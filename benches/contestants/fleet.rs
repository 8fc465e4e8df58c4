//! This crate, with the teardowns of a turn side by side.

use dmsnap::{Snapshot, Teardown};

use super::library::Library;
use super::{Contestant, Job, Result, names};

#[derive(Debug, Default)]
pub(super) struct Fleet(Library);

impl Contestant for Fleet {
    fn name(&self) -> &'static str {
        names::FLEET
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        self.0.create(job)
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        self.0.remove(job)
    }

    fn remove_all(&mut self, jobs: &[Job<'_>]) -> Result<()> {
        let made = jobs.iter().map(|job| self.0.take(job));
        let made = made.collect::<Result<Vec<_>>>()?;
        for result in Teardown::new().cleanup_all(made.iter().map(Snapshot::handles)) {
            result?;
        }
        Ok(())
    }
}
