//! How many system calls a create and a remove take, which no noise can touch: by strace, of another process of this
//! program that does both a few times, the last time between marks.

use std::os::unix::process::parent_id;
use std::process::Command;
use std::{env, fs};

use super::place::Place;
use super::scenarios::ALL;
use crate::contestants::{CRATES, IOCTLS, LIBRARY, Make, PROCESSES, Result};
use crate::figures::Calls;

const COUNTED: [Make; 4] = [IOCTLS, LIBRARY, CRATES, PROCESSES];

/// What the other process is called with, and the place of its contestant.
pub(crate) const ARGUMENT: &str = "--count-calls-of=";

/// No contestant asks for its parent.
const MARK: &str = "getppid(";

/// Counts for each contestant.
pub(crate) fn count() -> Result<Vec<Calls>> {
    let log = tempfile::NamedTempFile::new()?;
    let mut counted = Vec::new();
    for (nth, make) in COUNTED.iter().enumerate() {
        let status = Command::new("strace")
            .args(["-f", "-qq", "-o"])
            .arg(log.path())
            .arg(env::current_exe()?)
            .args(["--bench".to_owned(), format!("{ARGUMENT}{nth}")])
            .status()
            .map_err(|error| format!("cannot run strace: {error}"))?;
        if !status.success() {
            return Err(format!("strace: {status}").into());
        }
        let text = fs::read_to_string(log.path())?;
        counted.push(between_marks(make()?.name(), &text)?);
    }
    Ok(counted)
}

fn between_marks(contestant: &'static str, text: &str) -> Result<Calls> {
    // With -f each line begins with the process's number.
    let calls = text.lines().filter_map(|line| line.split_once(' '));
    let calls = calls.map(|(_, call)| call.trim_start());
    // A call that another process's came between is printed in two pieces; signals and exits are no calls. Reading the
    // clock enters the kernel only where the clock is a slow one, as under emulation on 5.10.
    let others = ["<... ", "--- ", "+++ ", "clock_gettime("];
    let calls: Vec<_> = calls
        .filter(|call| !others.iter().any(|other| call.starts_with(other)))
        .collect();
    let pieces: Vec<_> = calls.split(|call| call.starts_with(MARK)).collect();
    let [_, create, _, remove, _] = pieces[..] else {
        return Err(format!("{contestant}: {} marks", pieces.len() - 1).into());
    };
    let executed = |calls: &[&str]| {
        calls
            .iter()
            .filter(|call| call.starts_with("execve("))
            .count()
    };
    let lines = |calls: &[&str]| calls.iter().map(|call| (*call).to_owned()).collect();
    Ok(Calls {
        contestant,
        processes: [executed(create), executed(remove)],
        create: lines(create),
        remove: lines(remove),
    })
}

/// The other process's part. What the first times take once (memory, control nodes) does not count.
pub(crate) fn perform(nth: &str) -> Result<()> {
    let nth: usize = nth.parse()?;
    let mut contestant = COUNTED.get(nth).ok_or("no such contestant")?()?;
    let place = Place::new()?;
    for round in 0..3 {
        let fresh = place.fresh(&ALL[0], &format!("counted-{round}"))?;
        let is_last = round == 2;
        let mark = || is_last.then(parent_id);
        mark();
        contestant.create(fresh.job())?;
        mark();
        mark();
        contestant.remove(fresh.job())?;
        mark();
        place.settle(&fresh)?;
    }
    place.check_empty()
}
