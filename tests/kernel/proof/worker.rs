//! Processes beside the test: others' commands, and this binary once more, with a job to do by the library.

use std::env;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use dmsnap::SnapshotOptions;

use crate::common::scene::COW_BYTES;
use crate::common::{Scene, chain, eventually};

/// What makes this binary a worker, and says what is to be done.
const JOB: &str = "DMSNAP_TEST_JOB";

/// A process that does not outlive the test.
pub(crate) struct Process {
    child: Option<Child>,
    what: String,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let what = format!("{command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
        let child = Some(child);
        Self { child, what }
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("not waited for yet")
    }

    pub(crate) fn id(&mut self) -> u32 {
        self.child().id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// For commands that print less than a pipe holds.
    pub(crate) fn join(mut self, deadline: Duration) -> Output {
        assert!(
            eventually(deadline, || !self.is_running()),
            "{} passed its deadline",
            self.what
        );
        let child = self.child.take().expect("not waited for yet");
        child.wait_with_output().expect("a child can be waited for")
    }

    /// SIGKILL, and the end of the process.
    pub(crate) fn kill(mut self) {
        self.child().kill().expect("our child can be killed");
        self.child().wait().expect("a child can be waited for");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Make a snapshot, use it, clean it up: so many times.
pub(super) struct Job<'a> {
    pub(super) cycles: usize,
    pub(super) origin: &'a Path,
    pub(super) cow: PathBuf,
    pub(super) name: String,
}

impl Job<'_> {
    pub(super) fn start(&self) -> Process {
        let Self {
            cycles,
            origin,
            cow,
            name,
        } = self;
        let job = format!("{cycles}\n{}\n{}\n{name}", origin.display(), cow.display());
        let this = env::current_exe().expect("this binary");
        let words = [
            "--exact",
            "proof::worker::a_worker_does_its_job",
            "--nocapture",
        ];
        Process::start(Command::new(this).args(words).env(JOB, job))
    }
}

/// One cycle. The COW file is made anew each time.
pub(super) fn cycle(origin: &Path, cow: &Path, name: &str, nth: usize) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let file = File::create(cow).map_err(text)?;
    file.set_len(COW_BYTES).map_err(text)?;
    drop(file);
    let made = SnapshotOptions::new().create(origin, cow, name);
    let made = made.map_err(|error| chain(&error))?;
    let used = use_disk(made.device(), nth as u64).map_err(text);
    made.cleanup().map_err(|error| chain(&error))?;
    used
}

/// Writes something to a disk and reads it back.
pub(super) fn use_disk(device: &Path, nth: u64) -> std::io::Result<()> {
    let disk = File::options().read(true).write(true).open(device)?;
    let (content, at) = (nth.to_le_bytes().repeat(512), nth % 256 * 4096);
    disk.write_all_at(&content, at)?;
    disk.sync_all()?;
    let mut seen = vec![0; content.len()];
    disk.read_exact_at(&mut seen, at)?;
    match seen == content {
        true => Ok(()),
        false => Err(std::io::Error::other(
            "what was read is not what was written",
        )),
    }
}

fn work(job: &str) -> Result<(), String> {
    let words: Vec<&str> = job.split('\n').collect();
    let [cycles, origin, cow, name] = words[..] else {
        return Err(format!("no job: {job:?}"));
    };
    let cycles: usize = cycles.parse().map_err(|_| format!("no job: {job:?}"))?;
    for nth in 0..cycles {
        cycle(Path::new(origin), Path::new(cow), name, nth)
            .map_err(|why| format!("{name}, cycle {nth} of {cycles}: {why}"))?;
    }
    Ok(())
}

/// Called with a job in the environment it is the worker; otherwise it has one do one cycle.
#[test]
fn a_worker_does_its_job() {
    if let Ok(job) = env::var(JOB) {
        let done = work(&job);
        if let Err(why) = &done {
            let _ = writeln!(std::io::stderr(), "{why}");
        }
        std::process::exit(done.map_or(1, |()| 0));
    }
    let scene = Scene::new();
    let job = Job {
        cycles: 1,
        origin: scene.image(),
        cow: scene.path("cow"),
        name: scene.name(),
    };
    assert_done(job.start(), Duration::from_secs(60));
    assert!(scene.path("cow").exists(), "the worker was at work");
}

pub(super) fn assert_done(worker: Process, deadline: Duration) {
    let done = worker.join(deadline);
    let complaint = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{}: {complaint}", done.status);
}
