//! strace as the hand that kills and fails: which system calls a command makes, and one of them gone wrong.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use super::worker::Process;
use crate::common::tools::finish;
use crate::common::{dmsnap_under, eventually, run};

/// Nothing that is started here takes this long, on the slowest guest.
const DEADLINE: Duration = Duration::from_secs(180);

/// One system call of a run of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// As strace spells it.
    pub(super) name: String,
    /// Its place among the calls of that name since `execve`, from 1: what strace's `when=` counts.
    pub(super) nth: usize,
    /// The whole line.
    line: String,
}

/// The calls of a run, from the first open of a control node to the end.
pub(super) fn calls(log: &Path, arguments: &[&str]) -> Vec<Call> {
    let nodes = ["\"/dev/mapper/control\"", "\"/dev/loop-control\""];
    calls_from(log, arguments, &nodes)
}

/// The calls of a run, from the first one about one of these to the end.
pub(super) fn calls_from(log: &Path, arguments: &[&str], about: &[&str]) -> Vec<Call> {
    let done = finish(under_strace(log, &[]).args(arguments));
    assert!(
        done.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    let all = read(log);
    let first = all
        .iter()
        .position(|call| about.iter().any(|what| call.line.contains(what)));
    let first = first.unwrap_or_else(|| panic!("{arguments:?}, nothing about {about:?}: {all:?}"));
    all[first..].to_vec()
}

/// A run with something injected.
pub(super) struct Injected {
    pub(super) done: Output,
    /// Whether the run came by the call: one that waited for less may not.
    pub(super) hit: bool,
}

/// A run with something injected, as strace's option has it behind the name: `signal=KILL`, `error=EIO`; `more` follows
/// the ordinal: `+` for that call and all later ones of its name.
pub(super) fn with(
    log: &Path,
    call: &Call,
    what: &str,
    more: &str,
    arguments: &[&str],
) -> Injected {
    let done = finish(injecting(log, call, what, more).args(arguments));
    let hit = read(log).len() >= call.nth;
    Injected { done, hit }
}

/// The command line of ours under a strace that injects; its arguments are still to come.
pub(super) fn injecting(log: &Path, call: &Call, what: &str, more: &str) -> Command {
    let Call { name, nth, .. } = call;
    let trace = format!("trace={name}");
    let inject = format!("inject={name}:{what}:when={nth}{more}");
    under_strace(log, &["-e", &trace, "-e", &inject])
}

fn under_strace(log: &Path, options: &[&str]) -> Command {
    let log = log.to_str().expect("an ASCII path");
    dmsnap_under(&[&["strace", "-o", log], options].concat())
}

fn read(log: &Path) -> Vec<Call> {
    let text = fs::read(log).expect("strace writes its log");
    let mut seen: HashMap<String, usize> = HashMap::new();
    let text = String::from_utf8_lossy(&text);
    let calls = text.lines().filter_map(|line| {
        let (name, _) = line.split_once('(')?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if name.is_empty() || !name.bytes().all(plain) {
            return None;
        }
        let nth = seen.entry(name.to_owned()).or_default();
        *nth += 1;
        Some(Call {
            name: name.to_owned(),
            nth: *nth,
            line: line.to_owned(),
        })
    });
    calls.collect()
}

impl Call {
    /// Its name where there are both forms: arm64 has only those of some calls that take a directory too.
    pub(super) fn plain_name(&self) -> &str {
        match self.name.as_str() {
            "faccessat" => "access",
            "readlinkat" => "readlink",
            "symlinkat" => "symlink",
            "unlinkat" => "unlink",
            name => name,
        }
    }

    /// In few words: the call, and what it is about.
    pub(super) fn brief(&self) -> String {
        let Self { name, line, .. } = self;
        let subject = match self.plain_name() {
            "ioctl" => between(line, ", ", &[',', ')']),
            "openat" | "readlink" | "unlink" | "symlink" | "statx" | "rename" => {
                line.split('"').nth(1)
            }
            _ => between(line, "(", &[',', ')']),
        };
        let subject = subject.unwrap_or_default();
        let short = subject.rsplit_once("/tmp").map_or(subject, |(_, end)| {
            end.rsplit_once('/').map_or(end, |(_, file)| file)
        });
        format!("{name} {short}")
    }

    pub(super) fn is_about(&self, what: &str) -> bool {
        self.line.contains(what)
    }

    /// Whether it changes nothing outside its process, so that a death before it and one after it leave the same.
    pub(super) fn only_looks(&self) -> bool {
        let about = |all: &[&str]| all.iter().any(|what| self.line.contains(what));
        match self.plain_name() {
            "ioctl" => about(&[
                "BLKGETDISKSEQ",
                "BLKGETSIZE64",
                "DM_DEV_STATUS",
                "DM_LIST_",
                "DM_TABLE_STATUS",
                "DM_VERSION",
                "LOOP_GET_STATUS64",
            ]),
            // Whose locks are there is asked more often than it is answered by a maker's: a lock that is tested is let go.
            "fcntl" => about(&["F_OFD_GETLK"]),
            "flock" => about(&["LOCK_SH|LOCK_NB"]),
            // Of a device it is more: the last close of a loop device may clear it.
            "openat" => about(&["\"/proc/", "\"/sys/"]),
            "access" | "brk" | "clone3" | "exit_group" | "fstat" | "futex" | "getdents64"
            | "getrandom" | "lstat" | "madvise" | "mmap" | "mprotect" | "munmap" | "newfstatat"
            | "pread64" | "read" | "readlink" | "rt_sigaction" | "rt_sigprocmask"
            | "sigaltstack" | "stat" | "statx" | "write" => true,
            // Clocks and pauses: the C library cannot read a clock by itself on an emulated 5.10.
            name => name.starts_with("clock_"),
        }
    }
}

fn between<'a>(line: &'a str, before: &str, after: &[char]) -> Option<&'a str> {
    let (_, rest) = line.split_once(before)?;
    rest.split(after).next()
}

/// A command of ours, stopped (SIGSTOP) right after one of its calls.
pub(super) struct Stopped {
    strace: Process,
    pid: String,
}

impl Stopped {
    /// The signal is not fatal, so the call it comes with is carried out first.
    pub(super) fn after(log: &Path, call: &Call, arguments: &[&str]) -> Self {
        let _ = fs::remove_file(log);
        let mut command = injecting(log, call, "signal=STOP", "");
        let mut strace = Process::start(command.args(arguments));
        let stopped = || {
            let text = fs::read_to_string(log).unwrap_or_default();
            text.contains("stopped by SIGSTOP")
        };
        assert!(eventually(DEADLINE, stopped), "{call:?} was not reached");
        let id = strace.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        let pid = children.expect("/proc is mounted").trim().to_owned();
        Self { strace, pid }
    }

    pub(super) fn go_on(self) -> Output {
        run!("kill", "-CONT", &self.pid);
        self.strace.join(DEADLINE)
    }

    pub(super) fn kill(self) -> Output {
        run!("kill", "-KILL", &self.pid);
        self.strace.join(DEADLINE)
    }
}
