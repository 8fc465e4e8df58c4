//! A row of bad input: the message that a user would see, and the proof that nothing came of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use dmsnap::{Error, SnapshotOptions};

use super::tools::{complaint, finish};
use super::{Scene, chain, dmsnap_under, eventually};

/// A request that is bad in one respect.
pub(crate) struct Row<'a> {
    pub(crate) scene: &'a Scene,
    /// What is bad, in the words of the report.
    pub(crate) what: &'a str,
    pub(crate) origin: &'a Path,
    pub(crate) cow: &'a Path,
    pub(crate) name: String,
}

impl<'a> Row<'a> {
    /// The scene's image, a COW file, a free name.
    pub(crate) fn new(scene: &'a Scene, what: &'a str, origin: &'a Path, cow: &'a Path) -> Self {
        let name = scene.name();
        Self {
            scene,
            what,
            origin,
            cow,
            name,
        }
    }

    /// Asks the library; returns its error and its message.
    pub(crate) fn refused(&self, options: &SnapshotOptions) -> (Error, String) {
        let error = self.without_a_trace(|| {
            options
                .create(self.origin, self.cow, &self.name)
                .expect_err("it is bad input")
        });
        let message = chain(&error);
        self.report(&message);
        (error, message)
    }

    /// Asks the command line, started by `wrapper`; returns its message.
    pub(crate) fn refused_under(&self, wrapper: &[&str]) -> String {
        self.refused_by(&mut dmsnap_under(wrapper))
    }

    /// Asks the command line, as `command` starts it.
    pub(crate) fn refused_by(&self, command: &mut Command) -> String {
        let message = self.without_a_trace(|| {
            command.arg("create").args([self.origin, self.cow]);
            complaint(&finish(command.arg(&self.name)))
        });
        self.report(&message);
        message
    }

    fn report(&self, message: &str) {
        assert!(!message.contains('\n'), "more than one line: {message:?}");
        println!("bad input: {}: {message}", self.what);
    }

    fn without_a_trace<T>(&self, ask: impl FnOnce() -> T) -> T {
        let files = || [self.origin, self.cow].map(trace);
        let (residue, traces) = (self.scene.residue(), files());
        let answer = ask();
        let same = || self.scene.residue() == residue;
        assert!(
            eventually(Duration::from_secs(60), same),
            "{}: before {residue:#?}, after {:#?}",
            self.what,
            self.scene.residue()
        );
        assert!(files() == traces, "{}: a file has changed", self.what);
        answer
    }
}

/// What a regular file's reader and writer would notice; nothing else is read, as reading might hang.
fn trace(path: &Path) -> Option<(Vec<u8>, Option<SystemTime>)> {
    let found = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some((fs::read(path).ok()?, found.modified().ok()))
}
