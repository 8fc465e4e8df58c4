//! What the tests share: the scene they play in, tools that are not ours, and readings that do not trust the library.

pub(crate) mod filling;
pub(crate) mod fixtures;
pub(crate) mod reading;
pub(crate) mod rows;
pub(crate) mod scene;
pub(crate) mod tools;

use std::fs;

pub(crate) use fixtures::{Foreign, Losetup, Mounted, TempSetting};
pub(crate) use scene::{PREFIX, Scene};
pub(crate) use tools::{chain, dmsnap, dmsnap_under, eventually, output, run};

/// The kernel that the run was meant for.
pub(crate) fn stated_kernel() -> String {
    std::env::var("DMSNAP_TEST_KERNEL").expect(
        "these tests make real devices: state the kernel that they are meant for, DMSNAP_TEST_KERNEL=6.12",
    )
}

/// Fails unless the run was meant for this kernel.
pub(crate) fn guard() {
    let stated = stated_kernel();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let same = release
        .strip_prefix(&stated)
        .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()));
    assert!(
        same && !stated.is_empty(),
        "DMSNAP_TEST_KERNEL={stated}, and this is {release}"
    );
    assert_eq!(
        udev(),
        fs::exists("/run/udev/control").expect("/run can be read"),
        "DMSNAP_TEST_UDEV=1 says that udevd runs"
    );
}

/// Whether udevd runs.
pub(crate) fn udev() -> bool {
    std::env::var_os("DMSNAP_TEST_UDEV").is_some_and(|value| value == "1")
}

/// Waits until udevd, if there is one, has seen all that there is. Some hundred snapshots give it work for minutes, and
/// `udevadm settle` may take twice its timeout: once for udevd's answer, once for its queue.
pub(crate) fn settle() {
    let settled = || {
        output!("udevadm", "settle", "--timeout=25")
            .status
            .success()
    };
    let well = !udev() || (0..16).any(|_| settled());
    assert!(well, "udevd does not settle");
}
