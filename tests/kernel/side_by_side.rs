//! The suite side by side: a process for each test, several at a time, and those that need the whole host alone.
//!
//! A plain run of this binary plays the scenes one after the other, in one process. The runner is one of its tests:
//!
//! ```sh
//! cargo test --all-features --test kernel -- --exact side_by_side [OPTION]... [FILTER...]
//! ```
//!
//! `--test-threads=N` has N processes run at a time, [`WORKERS`] by default; `--show-output`, `--skip FILTER` and the
//! filters mean what they mean to libtest. With `DMSNAP_TEST_SHARE=N/M` in the environment, the other shares of [`SHARED`]
//! are left out: M runs, with N from 1 to M, have all tests between them. Each test has a line with its time, failed ones
//! are shown with their output at the end, and the last line is like libtest's.

use std::collections::VecDeque;
use std::env;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::guard;
use crate::common::scene::BESIDE_OTHERS;

const NAME: &str = "side_by_side";

/// Names the share of a run: libtest reads the arguments before the runner does, and knows no such option.
const SHARE: &str = "DMSNAP_TEST_SHARE";

/// What waits leaves the CPU to others.
const WORKERS: usize = 3;

/// No test takes this long on the slowest guest beside a busy host; in the long form of the proof it may.
const DEADLINE: Duration = Duration::from_secs(1200);
const LONG_DEADLINE: Duration = Duration::from_secs(7200);

/// Tests that run when nothing else does, by the beginning of their paths, and what of the host they need.
///
/// All others see what they made and no more: their dm devices by the prefix of their process, their loop devices by the
/// directory of their scene. A test that sweeps, that looks at all devices of the host, that is surprised by a loop or
/// dm device more or fewer, or that changes the kernel has its place here.
const ALONE: &[(&str, &str)] = &[
    (
        "bad_host::a_dev_directory_that_the_kernel_does_not_fill",
        "finds every loop device free",
    ),
    (
        "bad_host::a_target_that_is_not_loaded_yet",
        "unloads dm-snapshot",
    ),
    ("bad_host::no_snapshot_target", "unloads dm-snapshot"),
    (
        "cases::loops::",
        "wants the next free loop device; a /dev of its own gets the nodes of all",
    ),
    ("cases_down::", "sweeps the host"),
    ("cli::list_and_status", "lists the host"),
    (
        "concurrency::losetup_races",
        "takes and gives back every free loop device",
    ),
    (
        "documented::",
        "the examples' names and paths are nobody else's; they sweep the host",
    ),
    (
        "durability::a_recycled_device",
        "a pool sweeps the host; counts flushes",
    ),
    (
        "fleet::",
        "sweeps the host; makes as many loop devices as it has snapshots",
    ),
    (
        "foreign::theirs_is_cleaned_up_by_handles",
        "names loop devices by numbers that others may have next",
    ),
    ("foreign::theirs_is_not_in_our_list", "lists the host"),
    (
        "handles::",
        "names devices by numbers that others may have next, or had before",
    ),
    (
        "kernel_facts::",
        "counts system calls; a device's number is free again",
    ),
    (
        "merge::cut_off::",
        "sets dm-snapshot's throttle; sweeps the host",
    ),
    ("origin::an_origin_that_is_open", "sweeps the host"),
    ("pool::", "sweeps the host; counts the devices of pools"),
    ("proof::contention", "races for every free loop device"),
    ("proof::fault", "counts system calls; sweeps the host"),
    (
        "proof::identity",
        "takes a device by the number that another had; sweeps the host",
    ),
    ("proof::kill", "counts system calls; sweeps the host"),
    ("proof::meddling", "counts system calls; sweeps the host"),
    ("proof::races", "counts system calls; sweeps the host"),
    ("proof::scale", "measures the host's memory"),
    ("proof::soak", "measures the host's memory; sweeps the host"),
    ("proof::stuck_udev", "stops udevd"),
    ("proof::thousands", "sweeps the host"),
    ("reaction::", "measures CPU time"),
    ("repair::sweeps::", "repairs and sweeps the host"),
    ("strace::", "counts system calls"),
    (
        "teardown::every_path",
        "names devices by numbers that others may have next",
    ),
    ("udev::", "stops udevd"),
    ("watch::only_live_snapshots", "lists the host"),
    ("watch::the_descriptor_wakes", "dm's events are the host's"),
];

/// Those that take longest begin first, so that nothing ends long after the rest.
const LONGEST: &[&str] = &[
    "witness::",
    "repair::states::",
    "facts::handover::",
    "checkpoint::",
    "stack::",
    "export::",
    "growth::",
    "merge::",
    "watch::",
    "discard::",
    "sizes::",
    // VMs beside one another and beside the builds of the stages would take each other's time.
    "vmm::",
];

/// Tests of what dmsnap itself decides: what it makes of arguments, of files and of other programs, by calls of the kernel
/// that the tests on every kernel make too. Runs on several kernels may share them.
const SHARED: &[&str] = &[
    "bad_cow::",
    "bad_input::",
    "bad_names::",
    "cases::",
    "cli::",
    "concurrency::",
    "discard::",
    "documented::",
    "durability::",
    "export::",
    "fleet::",
    "growth::",
    "handles::",
    "made_cow::",
    "merge::",
    "repair::",
    "sizes::",
    "stack::",
    "stores::",
    "timings::",
    "tree::",
    "vmm::",
    "watch::",
    "witness::",
];

/// Whether the run asked for this test by its name, and with what else.
fn asked() -> Option<Vec<String>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let exact = arguments.iter().any(|word| word == "--exact");
    let named = arguments.iter().filter(|word| *word == NAME).count() == 1;
    (exact && named).then(|| {
        let rest = arguments.into_iter();
        rest.filter(|word| word != "--exact" && word != NAME)
            .collect()
    })
}

/// Asked for by name it is the runner, and ends the process; otherwise it checks the runner's lists.
pub(crate) fn begin() {
    let all = listed(&[]);
    let alone = ALONE.iter().map(|(pattern, _)| pattern);
    for pattern in alone.chain(LONGEST).chain(SHARED) {
        let names_one = all.iter().any(|test| test.starts_with(pattern));
        assert!(names_one, "no test's path begins with {pattern}");
    }
    let Some(arguments) = asked() else { return };
    guard();
    let asked = Asked::of(&arguments);
    let mut tests = listed(&asked.filters);
    if let Ok(share) = env::var(SHARE) {
        let share = Share::parse(&share).expect("a share is N/M");
        // By their places among all, whatever the filters are.
        let others = share.others(&all);
        tests.retain(|test| !others.contains(test));
    }
    assert!(!tests.is_empty(), "no such test");
    std::process::exit(i32::from(!run(&asked, tests)));
}

/// What a run is to do.
struct Asked {
    workers: usize,
    show_output: bool,
    filters: Vec<String>,
}

/// The N-th share of M.
#[derive(Clone, Copy)]
struct Share {
    nth: usize,
    of: usize,
}

impl Share {
    fn parse(words: &str) -> Option<Self> {
        let (nth, of) = words.split_once('/')?;
        let (nth, of) = (nth.parse().ok()?, of.parse().ok()?);
        (1..=of).contains(&nth).then_some(Self { nth, of })
    }

    /// The tests that are in other shares.
    fn others(self, all: &[String]) -> Vec<String> {
        let is_shared = |test: &&String| SHARED.iter().any(|pattern| test.starts_with(pattern));
        let shared = all.iter().filter(is_shared).enumerate();
        shared
            .filter(|(place, _)| place % self.of + 1 != self.nth)
            .map(|(_, test)| test.clone())
            .collect()
    }
}

impl Asked {
    fn of(arguments: &[String]) -> Self {
        let mut asked = Self {
            workers: WORKERS,
            show_output: false,
            filters: Vec::new(),
        };
        let mut words = arguments.iter();
        let number = |word: &str| word.parse().expect("--test-threads takes a number");
        while let Some(word) = words.next() {
            match word.as_str() {
                "--show-output" => asked.show_output = true,
                "--nocapture" | "--no-capture" => (),
                "--test-threads" => {
                    asked.workers = words.next().map_or(WORKERS, |word| number(word))
                }
                word => match word.strip_prefix("--test-threads=") {
                    Some(workers) => asked.workers = number(workers),
                    None => asked.filters.push(word.to_owned()),
                },
            }
        }
        asked
    }
}

fn this() -> Command {
    Command::new(env::current_exe().expect("this binary"))
}

/// The paths of the tests that libtest would run, without this one.
fn listed(filters: &[String]) -> Vec<String> {
    let done = this()
        .args(["--list", "--format", "terse"])
        .args(filters)
        .output();
    let done = done.expect("this binary starts");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let text = String::from_utf8_lossy(&done.stdout);
    let tests = text.lines().filter_map(|line| line.strip_suffix(": test"));
    tests
        .filter(|test| *test != NAME)
        .map(str::to_owned)
        .collect()
}

fn is_alone(test: &str) -> bool {
    ALONE.iter().any(|(pattern, _)| test.starts_with(pattern))
}

/// What came of one test.
struct Done {
    test: String,
    output: String,
    well: bool,
}

#[derive(Default)]
struct Report {
    left: VecDeque<String>,
    done: Vec<Done>,
}

/// Runs the tests, and says whether all went well.
fn run(asked: &Asked, tests: Vec<String>) -> bool {
    let begin = Instant::now();
    let mut out = io::stdout();
    let count = tests.len();
    let (alone, mut beside): (Vec<_>, Vec<_>) = tests.into_iter().partition(|test| is_alone(test));
    // A stable sort: by libtest's order within a place.
    let place = |test: &String| LONGEST.iter().position(|pattern| test.starts_with(pattern));
    beside.sort_by_key(|test| place(test).unwrap_or(LONGEST.len()));
    let _ = writeln!(
        out,
        "\nrunning {count} tests, a process each: {} by {} side by side, {} alone",
        beside.len(),
        asked.workers,
        alone.len()
    );
    let mut done = work(asked.workers, beside, true);
    done.extend(work(1, alone, false));

    let failed: Vec<_> = done.iter().filter(|each| !each.well).collect();
    // Without what libtest says of the one test, which would pass for what is said here of all.
    let said = |line: &&str| {
        !["running 1 test", "test result:"]
            .iter()
            .any(|its| line.starts_with(its))
    };
    for each in done.iter().filter(|each| asked.show_output || !each.well) {
        let output: Vec<_> = each.output.lines().filter(said).collect();
        let _ = writeln!(
            out,
            "\n---- {} ----\n{}",
            each.test,
            output.join("\n").trim()
        );
    }
    if !failed.is_empty() {
        let _ = writeln!(out, "\nfailures:");
        for each in &failed {
            let _ = writeln!(out, "    {}", each.test);
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    let _ = writeln!(
        out,
        "\ntest result: {verdict}. {} passed; {} failed; 0 ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        count - failed.len(),
        failed.len(),
        begin.elapsed().as_secs_f64()
    );
    failed.is_empty()
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the tests, so many at a time; `beside` others they answer for less.
fn work(workers: usize, tests: Vec<String>, beside: bool) -> Vec<Done> {
    let report = Mutex::new(Report {
        left: tests.into(),
        done: Vec::new(),
    });
    thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                loop {
                    let Some(test) = lock(&report).left.pop_front() else {
                        return;
                    };
                    let done = one(test, beside);
                    lock(&report).done.push(done);
                }
            });
        }
    });
    report
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .done
}

/// One test in a process of its own, and its line.
fn one(test: String, beside: bool) -> Done {
    let long = env::var_os("DMSNAP_TEST_LONG").is_some_and(|value| value == "1");
    let deadline = if long { LONG_DEADLINE } else { DEADLINE };
    let begin = Instant::now();
    let mut command = this();
    command.args(["--exact", &test, "--nocapture", "--test-threads=1"]);
    if beside {
        command.env(BESIDE_OTHERS, "1");
    }
    let (ended, late) = finish(&mut command, deadline);
    let mut output = String::from_utf8_lossy(&ended.stdout).into_owned();
    output.push_str(&String::from_utf8_lossy(&ended.stderr));
    if late {
        output.push_str(&format!(
            "\npassed its deadline of {deadline:.0?}, and was killed"
        ));
    } else if let Some(signal) = ended.status.signal() {
        output.push_str(&format!("\nended by signal {signal}"));
    }
    // A name that named nothing would end well too.
    let well = ended.status.success() && !late && output.contains("test result: ok. 1 passed");
    let word = if well { "ok" } else { "FAILED" };
    let took = begin.elapsed().as_secs_f64();
    let _ = writeln!(io::stdout(), "test {test} ... {word} <{took:.3}s>");
    Done { test, output, well }
}

/// The output of a program and whether it passed the deadline; then it is killed, and all that it has started.
fn finish(command: &mut Command, deadline: Duration) -> (Output, bool) {
    let piped = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = piped.process_group(0).spawn().expect("this binary starts");
    let group = format!("-{}", child.id());
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    let in_time = done.recv_timeout(deadline);
    let late = in_time.is_err();
    let output = in_time.or_else(|_| {
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        done.recv()
    });
    (
        output
            .expect("it is waited for")
            .expect("a child can be waited for"),
        late,
    )
}
