//! What shell scripts do: losetup, blockdev and dmsetup.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use super::{Contestant, Job, Made, Result, names};

#[derive(Debug, Default)]
pub(super) struct Processes {
    made: Made<[String; 2]>,
}

impl Contestant for Processes {
    fn name(&self) -> &'static str {
        names::PROCESSES
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let show = OsStr::new("--show");
        let find = OsStr::new("--find");
        let read_only = OsStr::new("--read-only");
        let origin = run("losetup", &[find, show, read_only, job.image.as_ref()])?;
        let cow = run("losetup", &[find, show, job.cow.as_ref()])?;
        let sectors = run("blockdev", &["--getsz", &origin])?;
        let table = format!(
            "0 {sectors} snapshot {origin} {cow} {}",
            job.store_and_chunk()
        );
        run("dmsetup", &["create", job.name, "--table", &table])?;
        self.made.keep(&job, [cow, origin]);
        Ok(())
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        run("dmsetup", &["remove", job.name])?;
        for device in self.made.take(&job)? {
            run("losetup", &["--detach", &device])?;
        }
        Ok(())
    }
}

/// Runs it and returns what it printed; what it complains about goes to our stderr.
fn run<A: AsRef<OsStr>>(program: &str, args: &[A]) -> Result<String> {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = command
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
