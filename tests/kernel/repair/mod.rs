//! What a killed process leaves half-way, made by dmsetup and losetup one verb at a time, and ended by `dmsnap repair`.
//!
//! V is a live snapshot, mounted and written all the while; B the layer that a checkpoint of it was making. Their uuids
//! are ours in form: it is by them that a repair knows which device is which.

mod states;
mod sweeps;

use std::path::{Path, PathBuf};
use std::process::Output;

use crate::common::fixtures::Losetup;
use crate::common::reading::dm_exists;
use crate::common::tools::finish;
use crate::common::{Scene, dmsnap, output, run};
use crate::facts::{Device, Stack};

/// A uuid as ours are, of a snapshot (`""`) or a layer (`"-layer"`), whose maker held that loop device.
fn uuid(device: &Path, suffix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static LAST: AtomicU32 = AtomicU32::new(0);
    let nth = LAST.fetch_add(1, Ordering::Relaxed);
    let device = device
        .to_str()
        .and_then(|path| path.strip_prefix("/dev/loop"));
    let number: u32 = device.and_then(|n| n.parse().ok()).expect("a loop device");
    format!(
        "DMSNAP-{:016x}{nth:016x}-1000000-1-{number:x}{suffix}",
        std::process::id()
    )
}

/// V, mounted, over an image with an ext4 file system.
struct Stage<'a> {
    stack: Stack<'a>,
    v: Device,
    c0: String,
    at: PathBuf,
}

impl<'a> Stage<'a> {
    fn over(scene: &'a Scene) -> Self {
        let mut stack = Stack::over(scene);
        let (_, c0) = stack.cow();
        let v = stack.device_of(&uuid(last_loop(&stack), ""));
        v.load(&stack.table(&stack.image, &c0));
        v.resume();
        let at = stack.mount(&v);
        Self { stack, v, c0, at }
    }

    /// Says what the repair of V printed behind its name.
    fn repair(&self) -> String {
        repair(&self.v.name)
    }

    fn is_interrupted(&self) -> bool {
        let listed = finish(dmsnap().args(["list", "--json"]));
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
        let all = listed.as_array().expect("an array");
        let ours = all
            .iter()
            .find(|entry| entry["name"] == self.v.name.as_str());
        ours.expect("it is listed")["interrupted"] == true
    }
}

fn last_loop<'a>(stack: &'a Stack<'_>) -> &'a Path {
    &stack.loops.last().expect("there is one").device
}

/// By its file too: another test may have the number next.
fn last_is_bound(stack: &Stack<'_>) -> bool {
    stack.loops.last().is_some_and(Losetup::is_bound)
}

fn repair(name: &str) -> String {
    let done = finish(dmsnap().args(["repair", name]));
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    text
}

/// The loop device is to go with its last user, as ours do.
fn let_go(device: &Path) {
    run!("losetup", "-d", device);
}

/// What a refused verb of dmsetup is asked for all the same.
fn try_verb(verb: &str, device: &Device) -> Output {
    output!("dmsetup", verb, &device.name)
}

fn is_gone(device: &Device) -> bool {
    !dm_exists(&device.name)
}
