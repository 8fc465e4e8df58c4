//! Four ways to the same snapshot: two loop devices under a dm device with the table `0 N snapshot A B P 8`.

mod crates;
mod ioctls;
mod library;
mod processes;

use std::error::Error;
use std::path::Path;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What is to be made: paths of the image and of a fresh COW file, and the dm device's name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) image: &'a Path,
    pub(crate) cow: &'a Path,
    pub(crate) name: &'a str,
}

/// One way. It keeps what it needs between `create` and `remove`, and what it can reasonably keep open for longer.
pub(crate) trait Contestant {
    fn name(&self) -> &'static str;
    fn create(&mut self, job: Job<'_>) -> Result<()>;
    /// Removes what `create` made, loop devices included.
    fn remove(&mut self, job: Job<'_>) -> Result<()>;
}

/// All of them; the first is the floor that the others are held against.
pub(crate) fn all() -> Result<Vec<Box<dyn Contestant>>> {
    Ok(vec![
        Box::new(ioctls::Ioctls::new()?),
        Box::new(library::Library::default()),
        Box::new(crates::Crates::new()?),
        Box::new(processes::Processes::default()),
    ])
}
