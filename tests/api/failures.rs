//! The chains that can be had without a device: paths that are none, and files that are none.

use dmsnap::base::LoopHandle;
use dmsnap::error::Retry;
use dmsnap::{ErrorKind, Handles, Teardown, WhenBusy, cleanup, remove};

use super::*;

#[test]
fn what_is_not_there_is_already_gone() {
    let nowhere = Path::new("/nowhere/dm-0");
    assert_eq!(remove(nowhere), Ok(Outcome::AlreadyGone));
    assert_eq!(
        Teardown::new().retry(Retry::ONCE).remove(nowhere),
        Ok(Outcome::AlreadyGone)
    );
    assert_eq!(
        Teardown::new().when_busy(WhenBusy::Defer).remove(nowhere),
        Ok(Outcome::AlreadyGone)
    );
    assert_eq!(cleanup(&Handles::default()), Ok(()));
    let mut handles = Handles::default();
    handles.device = Some(nowhere.to_owned());
    handles.cow_loop = Some(LoopHandle::at("/nowhere/loop0"));
    handles.origin_loop = Some(LoopHandle::at("/nowhere/loop1"));
    assert_eq!(cleanup(&handles), Ok(()));
}

#[test]
fn what_can_be_no_device_is_refused() {
    for (target, message) in [
        ("", r#"cannot name a device "": it is empty"#),
        (
            "..",
            r#"cannot name a device "..": it is reserved below /dev/mapper"#,
        ),
        ("/dev/null", r#""/dev/null" is not a block device"#),
    ] {
        let error = remove(target).expect_err(target);
        assert_eq!(chain(&error), message);
        assert_eq!(error.errno(), None);
    }
    let error = dmsnap::SnapshotOptions::new()
        .create("/nowhere/image", "/nowhere/cow", "vm/42")
        .expect_err("a bad name comes before everything else");
    assert_eq!(
        chain(&error),
        r#"cannot name a device "vm/42": it has the character '/' (allowed: 0-9 A-Z a-z # + - . : = @ _)"#
    );
}

#[test]
fn a_failure_names_step_object_and_cause_once() {
    let error = remove("/dev/null/dm-0").expect_err("no directory");
    assert_eq!(
        chain(&error),
        "cannot query /dev/null/dm-0: Not a directory (os error 20)"
    );
    assert_eq!(error.errno(), Some(20));
    assert_eq!(error.kind(), ErrorKind::Other);
}

#[test]
fn cleanup_goes_on_and_names_all_that_it_could_not_judge() {
    let mut handles = Handles::default();
    handles.device = Some("/dev/null".into());
    handles.cow_loop = Some(LoopHandle::at("/dev/zero"));
    handles.origin_loop = Some(LoopHandle::at("/dev/full"));
    let error = cleanup(&handles).expect_err("nothing of that is a device");
    assert_eq!(
        chain(&error),
        r#"left behind /dev/null, /dev/zero, /dev/full: "/dev/null" is not a block device"#
    );
    let reasons: Vec<_> = error
        .left()
        .iter()
        .map(|leftover| (leftover.object.to_string_lossy(), chain(&leftover.error)))
        .collect();
    let loops = ["/dev/zero", "/dev/full"].map(|path| {
        let reason = format!(
            "cannot inspect loop device {path}: Inappropriate ioctl for device (os error 25)"
        );
        (path, reason)
    });
    assert_eq!(reasons[0].1, r#""/dev/null" is not a block device"#);
    for (found, (path, reason)) in reasons[1..].iter().zip(&loops) {
        assert_eq!((found.0.as_ref(), &found.1), (*path, reason));
    }
}
