//! Merges that are cut off: by a kill, by removal, by SIGINT, by a power cut.

use std::fs;
use std::ops::ControlFlow;
use std::process::{Child, Stdio};
use std::time::Duration;

use dmsnap::error::Refusal;
use dmsnap::find::State;
use dmsnap::merge::{MergeOptions, MergeOutcome};
use dmsnap::teardown::Fate;
use dmsnap::{Error, ReapOptions, SnapshotOptions};

use super::{MANY, Pair, sectors};
use crate::common::tools::finish;
use crate::common::{TempSetting, dmsnap, eventually, output, run};

/// How many chunks are changed where only the order of things matters.
const SOME: u64 = 600;

/// No merge here takes longer, on the slowest guest.
const DEADLINE: Duration = Duration::from_secs(60);

impl Pair {
    /// `dmsnap merge`, once it has merged something and long before it has merged all.
    fn begin(&self, name: &str) -> Child {
        let mut command = dmsnap();
        command.args(["merge", "--json", "--name", name, "--origin"]);
        command.arg(&self.image).arg("--cow").arg(&self.cow);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let under_way = || {
            let left = left(name);
            left.is_some_and(|left| left < self.changed * 8 - 80)
        };
        assert!(eventually(DEADLINE, under_way), "the merge gets under way");
        child
    }

    /// The same, and then the process is killed.
    fn begin_and_kill(&self, name: &str) {
        let mut child = self.begin(name);
        let item = reap_one(name);
        assert_eq!(item, Fate::InProgress, "its process lives");
        child.kill().expect("our child can be killed");
        child.wait().expect("a child can be waited for");
    }
}

/// A merge that takes long: after its first two hundred chunks or so, kcopyd works for a hundredth of the time only.
/// The parameter is dm-snapshot's own.
fn slowly() -> TempSetting {
    TempSetting::set(
        "/sys/module/dm_snapshot/parameters/snapshot_copy_throttle",
        "1",
    )
}

/// How many sectors of data a merging device still has; `None` without such a device.
fn left(name: &str) -> Option<u64> {
    let status = output!("dmsetup", "status", name).stdout;
    let line = String::from_utf8_lossy(&status).into_owned();
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, _, "snapshot-merge", fill, metadata] = words[..] else {
        return None;
    };
    let allocated: u64 = fill.split_once('/')?.0.parse().ok()?;
    Some(allocated - metadata.parse::<u64>().ok()?)
}

fn reap_one(name: &str) -> Fate {
    let reaped = ReapOptions::new().reap(|_| false).expect("a sweep");
    let item = reaped.into_iter().find(|item| item.name == name);
    item.expect("it is swept").fate.expect("no failure")
}

#[test]
fn a_merge_whose_process_is_killed_goes_on_and_is_reaped_and_finished() {
    let pair = Pair::of_random_chunks(MANY);
    let (name, other) = (pair.scene.name(), pair.other_cow());
    let slow = slowly();
    pair.begin_and_kill(&name);
    let info = dmsnap::status(&name).expect("the kernel goes on");
    assert!(info.merging && info.state == State::Live, "{info:?}");
    let begun = left(&name).expect("it merges");
    let goes_on = || left(&name).is_some_and(|left| left < begun);
    assert!(eventually(DEADLINE, goes_on), "without its process");
    let in_use = Refusal::OriginInUse {
        path: pair.image.clone(),
    };
    assert_eq!(pair.merge(), Err(Error::Refused(in_use)));

    assert_eq!(reap_one(&name), Fate::Removed);
    pair.scene.assert_clean();
    drop(slow);
    pair.assert_refused(&other);
    let MergeOutcome::Complete { merged_bytes } = pair.finish() else {
        panic!("finish says so");
    };
    let whole = MANY * 8 * 512;
    println!("killed, reaped, {merged_bytes} of {whole} bytes were left");
    assert!(
        (1..whole).contains(&merged_bytes),
        "half-way: {merged_bytes}"
    );
    pair.assert_refused(&other);
}

#[test]
fn a_merge_whose_process_is_killed_shows_the_same_disk_half_way_and_at_its_end() {
    let pair = Pair::of_random_chunks(SOME);
    let name = pair.scene.name();
    let slow = slowly();
    pair.begin_and_kill(&name);
    assert_eq!(reap_one(&name), Fate::Removed);
    pair.assert_snapshot(&SnapshotOptions::new());
    // That snapshot has tied the two together again; now the kernel is left to finish by itself.
    pair.begin_and_kill(&name);
    drop(slow);
    assert!(eventually(DEADLINE, || left(&name) == Some(0)));
    let events = run!(
        "dmsetup",
        "info",
        "-c",
        "--noheadings",
        "-o",
        "events",
        &name
    );
    assert_eq!(events.trim(), "0", "the end of a merge raises no event");
    assert_eq!(reap_one(&name), Fate::Removed);
    pair.assert_image();
    pair.assert_snapshot(&SnapshotOptions::new());
    assert_eq!(pair.finish(), MergeOutcome::Complete { merged_bytes: 0 });
}

#[test]
fn a_merge_whose_device_is_removed_half_way_loses_nothing() {
    let pair = Pair::of_random_chunks(SOME);
    let name = pair.scene.name();
    let slow = slowly();
    let merged = MergeOptions::new()
        .name(&name)
        .merge(&pair.image, &pair.cow, |progress| {
            if progress.done_bytes > sectors(SOME / 10).count() * 512 {
                dmsnap::remove(&name).map(drop).expect("nobody has it open");
            }
            ControlFlow::Continue(())
        });
    drop(slow);
    let Ok(MergeOutcome::Stopped {
        merged_bytes,
        left_bytes,
    }) = merged
    else {
        panic!("{merged:?}");
    };
    assert_eq!(merged_bytes + left_bytes, SOME * 8 * 512);
    assert!(left_bytes > 0, "half-way");
    pair.scene.assert_clean();
    pair.assert_snapshot(&SnapshotOptions::new());
    assert_eq!(
        pair.finish(),
        MergeOutcome::Complete {
            merged_bytes: left_bytes
        }
    );
}

#[test]
fn sigint_stops_the_command_which_then_goes_on() {
    let pair = Pair::of_random_chunks(SOME);
    let name = pair.scene.name();
    let slow = slowly();
    let child = pair.begin(&name);
    run!("kill", "-INT", child.id().to_string());
    let done = child.wait_with_output().expect("it ends");
    drop(slow);
    assert_eq!(done.status.code(), Some(130), "{done:?}");
    let json = |bytes: &[u8]| -> serde_json::Value {
        serde_json::from_slice(bytes).expect("JSON on stdout")
    };
    let stopped = json(&done.stdout);
    let left = stopped["left_bytes"].as_u64().expect("a number");
    assert_eq!(stopped["outcome"], "stopped");
    assert!(left > 0, "half-way");
    let complaint = format!("dmsnap: stopped, {left} bytes are left: the same command goes on\n");
    assert_eq!(String::from_utf8_lossy(&done.stderr), complaint);
    pair.scene.assert_clean();

    let mut again = dmsnap();
    again.args(["merge", "--json", "--origin"]).arg(&pair.image);
    let done = finish(again.arg("--cow").arg(&pair.cow));
    assert!(done.status.success(), "{done:?}");
    let complete = json(&done.stdout);
    assert_eq!(
        complete,
        serde_json::json!({ "outcome": "complete", "merged_bytes": left })
    );
    assert!(
        done.stderr.is_empty(),
        "no bar without a terminal: {done:?}"
    );
    pair.assert_image();
}

#[test]
fn an_image_that_is_ahead_of_the_store_merges_to_the_same() {
    const TENTH: u64 = SOME / 10;
    const FIFTH: u64 = SOME / 5;
    let pair = Pair::of_random_chunks(SOME);
    let name = pair.scene.name();
    let copies = [pair.scene.path("cut.cow"), pair.scene.path("cut.img")];
    let (cow, image) = (&copies[0], &copies[1]);
    let slow = slowly();
    let mut cut = 0;
    let merged = MergeOptions::new()
        .name(&name)
        .merge(&pair.image, &pair.cow, |progress| {
            // Suspended, the kernel stops between two stretches.
            let (from, to) = match (cut, progress.done_bytes / 4096) {
                (0, TENTH..) => (&pair.cow, cow),
                (1, FIFTH..) => (&pair.image, image),
                (2, _) => return ControlFlow::Break(()),
                _ => return ControlFlow::Continue(()),
            };
            run!("dmsetup", "suspend", &name);
            fs::copy(from, to).expect("room for a copy");
            run!("dmsetup", "resume", "--noudevsync", &name);
            cut += 1;
            ControlFlow::Continue(())
        });
    drop(slow);
    assert!(
        matches!(merged, Ok(MergeOutcome::Stopped { .. })),
        "{merged:?}"
    );
    let any = |merge: &mut MergeOptions| merge.merge(image, cow, |_| ControlFlow::Continue(()));
    let refused = any(&mut MergeOptions::new());
    assert!(
        matches!(refused, Err(Error::Refused(Refusal::OriginChanged { .. }))),
        "copies have other inodes: {refused:?}"
    );
    any(MergeOptions::new().any_origin(true))
        .map(drop)
        .expect("it goes on");
    assert!(fs::read(image).expect("readable") == pair.shown);
    let _ = pair.finish();
}
