//! Programs that are not ours, and ours as a program: every one with a deadline.

use std::error::Error;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Nothing that a test starts takes this long, on the slowest guest.
const DEADLINE: Duration = Duration::from_secs(540);

/// Runs a program and returns what it printed to stdout; panics unless it succeeds.
macro_rules! run {
    ($program:expr $(, $argument:expr)* $(,)?) => {{
        let mut command = std::process::Command::new($program);
        $(command.arg($argument);)*
        $crate::common::tools::success(&mut command)
    }};
}

/// Runs a program and returns its status and output, whatever they are.
macro_rules! output {
    ($program:expr $(, $argument:expr)* $(,)?) => {{
        let mut command = std::process::Command::new($program);
        $(command.arg($argument);)*
        $crate::common::tools::finish(&mut command)
    }};
}

pub(crate) use output;
pub(crate) use run;

/// What the command printed to stdout, without the last newline.
pub(crate) fn success(command: &mut Command) -> String {
    let done = finish(command);
    assert!(
        done.status.success(),
        "{command:?}: {}\n{}{}",
        done.status,
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8_lossy(&done.stdout).trim_end().to_owned()
}

/// Status and output; a program that passes the deadline is killed, and the test fails.
pub(crate) fn finish(command: &mut Command) -> Output {
    start(command).join()
}

/// A program that runs beside the test.
pub(crate) struct Running {
    what: String,
    id: u32,
    done: mpsc::Receiver<std::io::Result<Output>>,
}

pub(crate) fn start(command: &mut Command) -> Running {
    let what = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
    let id = child.id();
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    Running { what, id, done }
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn join(self) -> Output {
        match self.done.recv_timeout(DEADLINE) {
            Ok(output) => output.expect("a child can be waited for"),
            Err(_) => {
                let _ = Command::new("kill")
                    .args(["-KILL", &self.id.to_string()])
                    .status();
                panic!("{} passed its deadline", self.what);
            }
        }
    }
}

/// The command line of ours: the one that cargo built beside this binary, or the one on PATH in a guest.
pub(crate) fn dmsnap() -> Command {
    dmsnap_under(&[])
}

/// The same, started by another program.
pub(crate) fn dmsnap_under(wrapper: &[&str]) -> Command {
    let built = env!("CARGO_BIN_EXE_dmsnap");
    let ours = if Path::new(built).exists() {
        built
    } else {
        "dmsnap"
    };
    let mut words = wrapper.iter().copied().chain([ours]);
    let mut command = Command::new(words.next().unwrap_or(ours));
    command.args(words);
    command
}

/// Waits for a condition, and says whether it came true.
pub(crate) fn eventually(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let (start, mut pause) = (Instant::now(), Duration::from_millis(1));
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() >= deadline {
            return false;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// What a user sees of an error.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// The one line on stderr of a command that failed as our command line fails.
pub(crate) fn complaint(done: &Output) -> String {
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(
        done.status.code(),
        Some(1),
        "exit status of a failure; stderr: {stderr}"
    );
    assert!(done.stdout.is_empty(), "a failure prints nothing to stdout");
    let line = stderr
        .strip_prefix("dmsnap: ")
        .and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("not a line of ours: {stderr:?}"));
    assert!(!line.contains('\n'), "more than one line: {stderr:?}");
    line.to_owned()
}
