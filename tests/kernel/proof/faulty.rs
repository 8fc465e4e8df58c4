//! One command with one thing wrong, and what is demanded of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use dmsnap::find::State;
use dmsnap::{Handles, cleanup};

use super::trace::{self, Call, Injected};
use super::world::World;
use crate::common::tools::complaint;

/// How long the end of a process may take to let go of what it held.
const MOMENT: Duration = Duration::from_secs(10);

/// One command with one thing wrong.
pub(super) struct Fault<'a> {
    pub(super) world: &'a World,
    pub(super) call: &'a Call,
    pub(super) errno: (&'static str, i32),
    /// `+` for that call and all later ones of its name.
    pub(super) more: &'a str,
}

/// What became of it, as the matrix prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// Success, with everything in place.
    Done,
    /// A typed error, with nothing left.
    Failed,
    /// A typed error, with what it names left, and nothing else.
    Left,
    /// What it names could not be looked at, and is gone.
    Unsure,
    /// The errno said something of the object that was not true, and no answer is right. A sweep clears it.
    Lie,
    /// None of these.
    Broken,
    /// Not in the short form.
    Unasked,
}

impl Cell {
    pub(super) fn letter(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Failed => "err",
            Self::Left => "left",
            Self::Unsure => "?",
            Self::Lie => "lie",
            Self::Broken => "BAD",
            Self::Unasked => ".",
        }
    }
}

impl Fault<'_> {
    pub(super) fn what(&self) -> String {
        format!("{}{} at {:?}", self.errno.0, self.more, self.call)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let log = self.world.scene.path("strace.log");
        let error = format!("error={}", self.errno.0);
        let Injected { done, hit } = trace::with(&log, self.call, &error, self.more, arguments);
        assert!(
            hit || self.call.only_looks(),
            "not reached: {:?}",
            self.call
        );
        done
    }

    pub(super) fn create(&self) -> Result<Cell, String> {
        let cow = self.world.fresh_cow();
        let done = self.run(&arguments(self.world, &cow));
        match done.status.success() {
            true => self.made(&done, &cow),
            false => self.judge(&done),
        }
    }

    /// A create that makes its COW file too, and takes it back when it fails.
    pub(super) fn create_with_cow(&self) -> Result<Cell, String> {
        let cow = self.world.scene.path("victim.cow");
        let _ = fs::remove_file(&cow);
        let done = self.run(&with_cow(&arguments(self.world, &cow)));
        if done.status.success() {
            return self.made(&done, &cow);
        }
        if cow.exists() && !complaint(&done).contains("victim.cow") {
            return Err(format!("left and not named: {cow:?}: {}", complaint(&done)));
        }
        let _ = fs::remove_file(&cow);
        self.judge(&done)
    }

    fn made(&self, done: &Output, cow: &Path) -> Result<Cell, String> {
        let handles: Handles = serde_json::from_slice(&done.stdout).expect("handles");
        let used = self.use_it(&handles, cow);
        cleanup(&handles).map_err(|error| error.to_string())?;
        used?;
        match self.world.settled_left(MOMENT) {
            left if left.is_empty() => Ok(Cell::Done),
            left => Err(format!("cleaned up, and {left:?}")),
        }
    }

    /// Everything is in place.
    fn use_it(&self, handles: &Handles, cow: &Path) -> Result<(), String> {
        let uuid = handles.uuid.as_ref().expect("a uuid");
        let info = dmsnap::status(uuid).map_err(|error| error.to_string())?;
        let path = info.cow.as_ref().and_then(|cow| cow.path.as_deref());
        let left = self.world.left();
        let victim = [self.world.victim()];
        // An alias that cannot be made is a warning.
        let unnamed = self.call.plain_name() == "symlink" && left.aliases.is_empty();
        let complete = (info.state, info.open_count) == (State::Live, 0)
            && path == Some(cow)
            && left.devices == victim
            && (left.aliases == victim || unnamed)
            && left.loops.len() == 2;
        if !complete {
            return Err(format!("success, and {info:?}, {left:?}"));
        }
        let device = handles.device.as_ref().expect("a device");
        let device = File::options().read(true).write(true).open(device);
        let write = device.and_then(|device| {
            device.write_all_at(b"in place", 0)?;
            device.sync_all()
        });
        write.map_err(|error| error.to_string())
    }

    pub(super) fn cleanup(&self) -> Result<Cell, String> {
        let world = self.world;
        let handles = world.make_victim();
        let file = world.scene.path("handles.json");
        fs::write(&file, serde_json::to_string(&handles).expect("plain data")).expect("room");
        let file = file.to_str().expect("ASCII");
        let done = self.run(&["cleanup", "--deadline", "500ms", file]);
        if self.is_lie() {
            return Ok(Cell::Lie);
        }
        if !done.status.success() {
            return self.judge(&done);
        }
        match world.settled_left(MOMENT) {
            left if left.is_empty() => Ok(Cell::Done),
            left => Err(format!("success, and {left:?}")),
        }
    }

    /// ENXIO from device-mapper: there is no such device. EINVAL from readlink: that is no link.
    fn is_lie(&self) -> bool {
        let about = |what| self.call.is_about(what);
        match self.errno.0 {
            "ENXIO" => about("DM_DEV_STATUS") || about("DM_DEV_REMOVE"),
            "EINVAL" => self.call.name == "readlink",
            _ => false,
        }
    }

    /// Holds a complaint against what is left.
    fn judge(&self, done: &Output) -> Result<Cell, String> {
        let line = complaint(done);
        let (named, cause) = named(&line);
        // These say that somebody else has the file, which is no failure of the call.
        let in_use = [("flock", "EAGAIN"), ("openat", "EBUSY")];
        let locked = in_use.contains(&(self.call.name.as_str(), self.errno.0));
        let number = format!("(os error {})", self.errno.1);
        let object = cause.contains('/') || cause.contains("stdout");
        let typed = cause.starts_with("cannot ") && object && cause.contains(&number);
        if !typed && !locked {
            return Err(format!("names no step, object or errno: {line}"));
        }

        let patience = if named.is_empty() {
            MOMENT
        } else {
            Duration::ZERO
        };
        let left = self.world.settled_left(patience);
        let held = !left.devices.is_empty();
        let dm = left.devices.iter().chain(&left.aliases);
        let dm: Vec<PathBuf> = dm.map(|name| Path::new("/dev/mapper").join(name)).collect();
        let loops: Vec<_> = left.loops.iter().map(|each| each.device.clone()).collect();
        // A device that is left holds its loop devices; they go with it.
        let unnamed = dm.iter().chain(loops.iter().filter(|_| !held));
        let unnamed: Vec<_> = unnamed.filter(|path| !named.contains(path)).collect();
        if !unnamed.is_empty() {
            return Err(format!("left and not named: {unnamed:?}: {line}"));
        }
        let unsure = named
            .iter()
            .any(|path| !dm.contains(path) && !loops.contains(path));
        let looked = cause.contains("cannot inspect") || cause.contains("cannot query");
        if unsure && !looked {
            return Err(format!("named and not left: {left:?}: {line}"));
        }
        Ok(match (named.is_empty(), unsure) {
            (true, _) => Cell::Failed,
            (false, true) => Cell::Unsure,
            (false, false) => Cell::Left,
        })
    }

    /// The cell of `act`; what is wrong with it goes to `wrong`. Whatever is left, one sweep takes it away.
    pub(super) fn cell(&self, act: Act, wrong: &mut Vec<String>) -> &'static str {
        let cell = act(self).unwrap_or_else(|why| {
            wrong.push(format!("{}: {why}", self.what()));
            Cell::Broken
        });
        if !self.world.left().is_empty() {
            self.world.reap_once();
        }
        let left = self.world.settled_left(MOMENT);
        assert!(left.is_empty(), "{}: not swept: {left:#?}", self.what());
        cell.letter()
    }
}

pub(super) type Act = fn(&Fault<'_>) -> Result<Cell, String>;

/// The objects that a complaint names as left behind, and the rest of it.
fn named(line: &str) -> (Vec<PathBuf>, &str) {
    let parts = line
        .strip_prefix("left behind ")
        .and_then(|rest| rest.split_once(": "));
    match parts {
        Some((objects, cause)) => (objects.split(", ").map(PathBuf::from).collect(), cause),
        None => (Vec::new(), line),
    }
}

/// `create` of the victim.
pub(super) fn arguments<'a>(world: &'a World, cow: &'a Path) -> [&'a str; 4] {
    let text = |path: &'a Path| path.to_str().expect("ASCII");
    [
        "create",
        text(world.scene.image()),
        text(cow),
        world.victim(),
    ]
}

pub(super) fn with_cow<'a>(create: &[&'a str]) -> Vec<&'a str> {
    [create, &["--make-cow", "8M", "--reserve"]].concat()
}
