//! Things made by others' tools that go away with the value, also when a test fails half-way.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{eventually, output, run};

/// A dm device that is not ours, made by dmsetup.
pub(crate) struct Foreign {
    name: String,
}

impl Foreign {
    pub(crate) fn create(name: &str, table: &str) -> Self {
        run!("dmsetup", "create", name, "--table", table);
        Self {
            name: name.to_owned(),
        }
    }

    /// A device that reads zeroes.
    pub(crate) fn zero(name: &str) -> Self {
        Self::create(name, "0 2048 zero")
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        output!("dmsetup", "remove", "--retry", &self.name);
    }
}

/// A loop device that is not ours, made by losetup, without autoclear.
pub(crate) struct Losetup {
    pub(crate) device: PathBuf,
    pub(crate) backing: PathBuf,
}

impl Losetup {
    pub(crate) fn attach(backing: &Path) -> Self {
        let device = run!("losetup", "-f", "--show", backing);
        Self::of(device.into(), backing)
    }

    pub(crate) fn attach_read_only(backing: &Path) -> Self {
        let device = run!("losetup", "-r", "-f", "--show", backing);
        Self::of(device.into(), backing)
    }

    /// To that very device.
    pub(crate) fn attach_at(device: &Path, backing: &Path) -> Self {
        run!("losetup", device, backing);
        Self::of(device.to_owned(), backing)
    }

    fn of(device: PathBuf, backing: &Path) -> Self {
        let backing = fs::canonicalize(backing).expect("the backing file is there");
        Self { device, backing }
    }

    pub(crate) fn is_bound(&self) -> bool {
        super::reading::loop_at(&self.device).is_some_and(|bound| bound.backing == self.backing)
    }
}

impl Drop for Losetup {
    fn drop(&mut self) {
        if self.is_bound() {
            output!("losetup", "-d", &self.device);
        }
    }
}

/// A mounted file system.
pub(crate) struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// `mount ARGUMENTS... at`, where `at` is made if it is not there.
    pub(crate) fn mount<const N: usize>(arguments: [&str; N], at: &Path) -> Self {
        fs::create_dir_all(at).expect("a mount point");
        let mut command = std::process::Command::new("mount");
        command.args(arguments).arg(at);
        super::tools::success(&mut command);
        Self { at: at.to_owned() }
    }

    /// A file under another path.
    pub(crate) fn bind(file: &Path, at: &Path) -> Self {
        run!("mount", "--bind", file, at);
        Self { at: at.to_owned() }
    }

    pub(crate) fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        eventually(Duration::from_secs(60), || {
            output!("umount", &self.at).status.success()
        });
    }
}

/// A file below /proc or /sys with another content for a while.
pub(crate) struct TempSetting {
    file: PathBuf,
    before: Vec<u8>,
}

impl TempSetting {
    pub(crate) fn set(file: impl Into<PathBuf>, value: &str) -> Self {
        let file = file.into();
        let before = fs::read(&file).expect("a readable setting");
        fs::write(&file, value).expect("a writable setting");
        Self { file, before }
    }
}

impl Drop for TempSetting {
    fn drop(&mut self) {
        let restored = fs::write(&self.file, &self.before);
        if !std::thread::panicking() {
            restored.expect("the setting can be restored");
        }
    }
}
