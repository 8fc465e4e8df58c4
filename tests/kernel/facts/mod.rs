//! What snapshots on other dm devices stand on, held against this kernel: losetup and dmsetup are the actors, one verb
//! at a time, so that a test can stop between any two of them.

mod cow_device;
pub(crate) mod handover;
mod linear_below;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use crate::common::filling::Direct;
use crate::common::reading::{dm_exists, dm_info, number};
use crate::common::scene::{Content, content};
use crate::common::{Losetup, Mounted, Scene, eventually, output, run};

/// More than the worst case for an image of 16 MiB.
const COW_BYTES: u64 = 24 << 20;

const CHUNK_BYTES: u64 = 4096;

/// A dm device of dmsetup's, addressed by number in the tables of others.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) number: String,
}

impl Device {
    pub(crate) fn node(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    pub(crate) fn load(&self, table: &str) {
        run!("dmsetup", "reload", &self.name, "--table", table);
    }

    fn load_read_only(&self, table: &str) {
        run!(
            "dmsetup",
            "reload",
            "--readonly",
            &self.name,
            "--table",
            table
        );
    }

    /// A table of several lines, which dmsetup takes from a file.
    fn load_lines(&self, scene: &Scene, lines: &[String]) {
        let file = scene.file(format!("{}.table", self.name), lines.join("\n") + "\n");
        run!("dmsetup", "reload", &self.name, file);
    }

    pub(crate) fn suspend(&self) {
        run!("dmsetup", "suspend", &self.name);
    }

    pub(crate) fn resume(&self) {
        run!("dmsetup", "resume", &self.name);
    }

    pub(crate) fn clear(&self) {
        run!("dmsetup", "clear", &self.name);
    }

    /// A probing udevd may have it open for a moment.
    pub(crate) fn remove(&self) {
        run!("dmsetup", "remove", "--retry", &self.name);
    }

    /// The errno's text, of a verb that fails.
    fn refusal(&self, verb: &str) -> String {
        errno_text(&output!("dmsetup", verb, &self.name))
    }

    /// What the status line says behind the target's name.
    pub(crate) fn status(&self) -> String {
        let line = run!("dmsetup", "status", "--noflush", &self.name);
        let mut words = line.splitn(4, ' ').skip(3);
        words.next().unwrap_or_default().to_owned()
    }

    /// Live table, inactive table, suspended, read-only or writable, as in `LIsw`; a dash where it is not so.
    pub(crate) fn attributes(&self) -> String {
        dm_info(&self.name, "attr")
    }

    pub(crate) fn open(&self) -> Direct {
        Direct::open(&self.node())
    }

    pub(crate) fn content(&self) -> Content {
        content(&self.node())
    }

    /// Reads its first bytes past the page cache.
    fn read_start(&self) -> Output {
        let node = format!("if={}", self.node().display());
        output!(
            "dd",
            node,
            "of=/dev/null",
            "bs=4096",
            "count=1",
            "iflag=direct"
        )
    }
}

/// What a failed command says of the kernel's answer: the text behind the last colon of its first line.
fn errno_text(done: &Output) -> String {
    assert!(!done.status.success(), "{done:?}");
    let stderr = String::from_utf8_lossy(&done.stderr);
    let line = stderr.lines().next().unwrap_or_default();
    line.rsplit(": ")
        .next()
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

/// Devices over one image, all of losetup and dmsetup, gone with this value whatever state they are in.
pub(crate) struct Stack<'a> {
    scene: &'a Scene,
    mounts: Vec<Mounted>,
    devices: Vec<Device>,
    pub(crate) loops: Vec<Losetup>,
    pub(crate) image: String,
    sectors: u64,
}

impl<'a> Stack<'a> {
    pub(crate) fn over(scene: &'a Scene) -> Self {
        let image = Losetup::attach_read_only(scene.image());
        let bytes = fs::metadata(scene.image()).expect("it is there").len();
        Self {
            scene,
            mounts: Vec::new(),
            devices: Vec::new(),
            image: number(&image.device),
            loops: vec![image],
            sectors: bytes / 512,
        }
    }

    /// A fresh COW file and the number of its loop device.
    pub(crate) fn cow(&mut self) -> (PathBuf, String) {
        let name = format!("{}.cow", self.scene.name());
        let file = self.scene.sparse(name, COW_BYTES);
        let attached = Losetup::attach(&file);
        let number = number(&attached.device);
        self.loops.push(attached);
        (file, number)
    }

    fn device(&mut self) -> Device {
        let name = self.scene.name();
        run!("dmsetup", "create", &name, "--notable");
        let number = dm_info(&name, "major,minor").replace(' ', "");
        let device = Device { name, number };
        self.devices.push(device.clone());
        device
    }

    /// A device with that uuid, and no node while it has no live table: as ours are between their steps.
    pub(crate) fn device_of(&mut self, uuid: &str) -> Device {
        let name = self.scene.name();
        run!(
            "dmsetup",
            "create",
            &name,
            "--notable",
            "--uuid",
            uuid,
            "--addnodeonresume"
        );
        let number = dm_info(&name, "major,minor").replace(' ', "");
        let device = Device { name, number };
        self.devices.push(device.clone());
        device
    }

    pub(crate) fn table(&self, origin: &str, cow: &str) -> String {
        format!("0 {} snapshot {origin} {cow} P 8", self.sectors)
    }

    pub(crate) fn snapshot(&mut self, origin: &str, cow: &str) -> Device {
        let device = self.device();
        device.load(&self.table(origin, cow));
        device.resume();
        device
    }

    /// A snapshot over a fresh COW file.
    pub(crate) fn fork(&mut self, origin: &Device) -> Device {
        let (_, cow) = self.cow();
        self.snapshot(&origin.number, &cow)
    }

    /// Steps 1 and 2 for a V that stands on `origin` and `cow`. Returns B, and the number of the new COW device.
    fn prepare(&mut self, v: &Device, origin: &str, cow: &str) -> (Device, String) {
        let (_, fresh) = self.cow();
        let b = self.device();
        b.load(&self.table(origin, cow));
        v.load(&self.table(&b.number, &fresh));
        (b, fresh)
    }

    /// The file of the last [`Self::cow`].
    pub(crate) fn last_cow(&self) -> &Path {
        &self.loops.last().expect("there is one").backing
    }

    /// Loads a table of the device's length that fails all I/O, and holds what the device is made of.
    pub(crate) fn park(&self, device: &Device, origin: &str, cow: &str) {
        let (end, held) = (self.sectors, 8);
        let lines = [
            format!("0 {end} error"),
            format!("{end} {held} linear {cow} 0"),
            format!("{} {held} linear {origin} 0", end + held),
        ];
        device.load_lines(self.scene, &lines);
    }

    pub(crate) fn mount(&mut self, device: &Device) -> PathBuf {
        let at = self.scene.path(format!("{}.mnt", device.name));
        let node = device.node();
        let node = node.to_str().expect("ASCII");
        self.mounts.push(Mounted::mount(["-t", "ext4", node], &at));
        at
    }

    pub(crate) fn unmount(&mut self, at: &Path) {
        self.mounts.retain(|mounted| mounted.at() != at);
    }
}

impl Drop for Stack<'_> {
    fn drop(&mut self) {
        // A test that failed half-way has left somebody suspended: inactive tables first, then the layers, which go
        // where nobody stands on them, and then the rest goes on.
        let verb =
            |verb: &str, device: &Device| output!("dmsetup", verb, &device.name).status.success();
        if std::thread::panicking() {
            for device in &self.devices {
                verb("clear", device);
            }
            self.devices.retain(|device| {
                let never_live = output!("dmsetup", "table", &device.name).stdout.is_empty();
                !(never_live && verb("remove", device))
            });
            for device in &self.devices {
                verb("resume", device);
            }
        }
        self.mounts.clear();
        // The upper ones go first, and a probing udevd lets go of the rest.
        eventually(Duration::from_secs(60), || {
            self.devices
                .retain(|device| !verb("remove", device) && dm_exists(&device.name));
            self.devices.is_empty()
        });
    }
}
