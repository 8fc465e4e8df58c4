//! Tests on a real kernel: root, loop devices, device-mapper.
//!
//! A run states its kernel, `DMSNAP_TEST_KERNEL=6.12`, and every test fails on any other, or without it: nobody runs
//! them by accident, and a run that says 5.10 was on 5.10. Nothing is ever skipped. `DMSNAP_TEST_UDEV=1` says that
//! udevd runs.
//!
//! Every test plays in a [`common::Scene`], whose end asserts that nothing is left and that the image is unchanged. None
//! asserts how long something takes: that is for the benches. [`side_by_side`] runs them a process each.

#![allow(
    clippy::print_stdout,
    reason = "the messages that a user would see are part of the report"
)]

mod common;

mod bad_cow;
mod bad_host;
mod bad_input;
mod bad_names;
mod cases;
mod cases_down;
mod checkpoint;
mod cli;
mod concurrency;
mod discard;
mod documented;
mod durability;
mod export;
mod facts;
mod fleet;
mod foreign;
mod growth;
mod handles;
mod kernel_facts;
mod lifecycle;
mod made_cow;
mod merge;
mod origin;
mod pool;
mod proof;
mod reaction;
mod repair;
mod side_by_side;
mod sizes;
mod stack;
mod stores;
mod strace;
mod teardown;
mod timings;
mod tree;
mod udev;
mod vmm;
mod watch;
mod witness;

#[test]
fn side_by_side() {
    side_by_side::begin();
}
