//! The bare ioctls, in a loop that tries again while the device is busy, as scripts do.

use std::io;
use std::time::{Duration, Instant};

use super::ioctls::Ioctls;
use super::{Contestant, Job, Result};

#[derive(Debug)]
pub(super) struct Polling {
    ioctls: Ioctls,
    pause: Duration,
    name: &'static str,
    last_try: Option<Instant>,
}

impl Polling {
    pub(super) fn each_ms(pause: u64, name: &'static str) -> Result<Self> {
        Ok(Self {
            ioctls: Ioctls::new()?,
            pause: Duration::from_millis(pause),
            name,
            last_try: None,
        })
    }
}

impl Contestant for Polling {
    fn name(&self) -> &'static str {
        self.name
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        self.ioctls.create(job)
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        loop {
            self.last_try = Some(Instant::now());
            let Err(error) = self.ioctls.remove(job) else {
                return Ok(());
            };
            let errno = error.downcast_ref().and_then(io::Error::raw_os_error);
            if errno != Some(libc::EBUSY) {
                return Err(error);
            }
            std::thread::sleep(self.pause);
        }
    }

    fn last_try(&self) -> Option<Instant> {
        self.last_try
    }
}
