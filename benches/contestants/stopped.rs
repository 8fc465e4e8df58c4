//! Another contestant, with udevd under SIGSTOP for the length of its turn.

use std::fs;
use std::process::Command;

use super::{Contestant, Job, Result, names};

pub(super) struct Stopped(Box<dyn Contestant>);

impl Stopped {
    pub(super) fn of(contestant: Box<dyn Contestant>) -> Self {
        Self(contestant)
    }
}

impl Contestant for Stopped {
    fn name(&self) -> &'static str {
        names::LIBRARY_ALONE
    }

    fn before_turn(&mut self, jobs: usize) -> Result<()> {
        signal("-STOP")?;
        self.0.before_turn(jobs)
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        self.0.create(job)
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        self.0.remove(job)
    }

    fn after_turn(&mut self) -> Result<()> {
        signal("-CONT")?;
        self.0.after_turn()
    }
}

/// To udevd and its workers.
fn signal(signal: &str) -> Result<()> {
    let mut daemons = 0;
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if !["systemd-udevd", "(udev-worker)", "udevadm"].contains(&comm.trim_end()) {
            continue;
        }
        daemons += 1;
        let pid = path.file_name().unwrap_or_default();
        // A worker may have ended since.
        Command::new("kill").arg(signal).arg(pid).status()?;
    }
    if daemons == 0 {
        return Err("no udevd runs".into());
    }
    Ok(())
}
