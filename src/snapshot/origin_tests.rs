//! Shared images.

use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::create::create_on;
use super::origin::CROWD;
use super::{SnapshotOptions, open_origin};
use crate::backing::CowOptions;
use crate::base::DeviceName;
use crate::error::Step;
use crate::kernel::fake::Script;

#[test]
fn an_image_that_a_crowd_stands_on_gets_another_loop_device() {
    let script = Script::new(|_, _| None);
    let options = SnapshotOptions::new();
    let open = || open_origin(&script, Path::new("/image"), &options.cow).expect("nothing fails");
    let first = open();
    let make = |nth: usize| {
        let name = DeviceName::new(format!("vm-{nth}")).expect("a name");
        let cow = PathBuf::from(format!("/cow-{nth}"));
        create_on(&script, &options, &first, &cow, &name).expect("nothing fails")
    };
    (1..CROWD).for_each(|nth| drop(make(nth)));
    assert_eq!(open().device.number, first.device.number);
    drop(make(CROWD));
    assert_ne!(open().device.number, first.device.number);
}

#[test]
fn an_image_whose_file_system_cannot_sync_is_an_origin_all_the_same() {
    for errno in [Errno::EINVAL, Errno::EIO] {
        let script = Script::new(move |step, _| (step == Step::SyncFile).then_some(errno));
        let opened = open_origin(&script, Path::new("/image"), &CowOptions::default());
        assert_eq!(opened.is_ok(), errno == Errno::EINVAL, "{errno}");
    }
}
