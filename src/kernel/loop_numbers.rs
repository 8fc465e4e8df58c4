//! Chooses the loop device to try next. Nothing here makes a system call.
//!
//! `LOOP_CTL_GET_FREE` walks the loop devices from the first to the first free one (`loop_control_get_free`,
//! `drivers/block/loop.c`), so that with thousands attached it takes longer than all else that a create asks of the
//! loop driver. From [`MANY`] on, a process that makes or removes many disks chooses a number itself.

use std::collections::BTreeSet;

/// Below this number asking the kernel takes no time that shows in a create.
const MANY: u32 = 64;

/// How many devices are made before the kernel is asked again whether one below is free: what others detach is used
/// again, and the number of loop devices does not grow for ever.
const UNASKED: u32 = 16;

/// How often the kernel is asked before a number above is tried: at first, as a process that makes one disk has nothing
/// of it, and after there was such a device already.
const FIRST: u32 = 4;
const TAKEN: u32 = 64;

/// How many detached devices are kept in mind.
const KEPT: usize = 4096;

/// What this process knows of the loop devices' numbers. All of it may be out of date: attaching a file to the device tells.
#[derive(Debug)]
pub(crate) struct LoopNumbers {
    /// Devices that were seen to be detached, from [`MANY`] on.
    freed: BTreeSet<u32>,
    /// The highest number that the kernel has named or that was made here.
    top: Option<u32>,
    /// How many more devices may be made above `top`.
    unasked: u32,
    /// How often the kernel is still to be asked.
    wary: u32,
}

/// Which loop device to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoopChoice {
    /// This one, which was seen to be detached.
    Freed(u32),
    /// This one, which is to be made first (`LOOP_CTL_ADD`).
    New(u32),
    /// The one that the kernel names (`LOOP_CTL_GET_FREE`).
    Named,
}

impl LoopNumbers {
    pub(crate) const fn new() -> Self {
        Self {
            freed: BTreeSet::new(),
            top: None,
            unasked: 0,
            wary: FIRST,
        }
    }

    /// Chooses the device to try. No two calls choose the same freed or new one.
    pub(crate) fn choose(&mut self) -> LoopChoice {
        if let Some(number) = self.freed.pop_first() {
            return LoopChoice::Freed(number);
        }
        match self.top {
            Some(top) if self.unasked > 0 => {
                self.unasked -= 1;
                self.top = Some(top + 1);
                LoopChoice::New(top + 1)
            }
            _ => LoopChoice::Named,
        }
    }

    /// Notes what the kernel has named. A number above all others before says that none below is free.
    pub(crate) fn named(&mut self, number: u32) {
        if number < MANY {
            return;
        }
        self.wary = self.wary.saturating_sub(1);
        if self.top.is_none_or(|top| number > top) {
            self.top = Some(number);
            self.unasked = if self.wary == 0 { UNASKED } else { 0 };
        }
    }

    /// Notes that there was a device of the number that was to be new.
    pub(crate) fn was_there(&mut self) {
        (self.unasked, self.wary) = (0, TAKEN);
    }

    /// Notes that a freed device was another process's: so may be the rest of them.
    pub(crate) fn was_taken(&mut self) {
        self.freed.clear();
    }

    /// Notes that the device was seen to be detached.
    pub(crate) fn free(&mut self, number: u32) {
        if number >= MANY && self.freed.len() < KEPT {
            self.freed.insert(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that was told the numbers from `first` on, each above the one before.
    fn told(first: u32, count: u32) -> LoopNumbers {
        let mut numbers = LoopNumbers::new();
        for number in first..first + count {
            assert_eq!(numbers.choose(), LoopChoice::Named);
            numbers.named(number);
        }
        numbers
    }

    #[test]
    fn with_few_devices_the_kernel_is_always_asked() {
        let mut numbers = told(0, MANY);
        numbers.free(MANY - 1);
        assert_eq!(numbers.choose(), LoopChoice::Named);
    }

    #[test]
    fn with_many_the_next_ones_are_made_and_the_kernel_is_asked_now_and_then() {
        let mut numbers = told(MANY, FIRST);
        let last = MANY + FIRST - 1;
        for nth in 1..=UNASKED {
            assert_eq!(numbers.choose(), LoopChoice::New(last + nth));
        }
        assert_eq!(numbers.choose(), LoopChoice::Named);
        // None is free.
        numbers.named(last + UNASKED + 1);
        assert_eq!(numbers.choose(), LoopChoice::New(last + UNASKED + 2));
    }

    #[test]
    fn while_others_are_free_below_no_more_are_made() {
        let mut numbers = told(MANY, FIRST);
        while numbers.choose() != LoopChoice::Named {}
        for hole in [0, MANY + 1, MANY + 2] {
            numbers.named(hole);
            assert_eq!(numbers.choose(), LoopChoice::Named, "after {hole}");
        }
        let above = MANY + FIRST + UNASKED;
        numbers.named(above);
        assert_eq!(numbers.choose(), LoopChoice::New(above + 1));
    }

    #[test]
    fn what_was_detached_here_comes_first_unless_others_take_it() {
        let mut numbers = told(MANY, 1);
        for number in [900, 700, 700, 800] {
            numbers.free(number);
        }
        assert_eq!(numbers.choose(), LoopChoice::Freed(700));
        assert_eq!(numbers.choose(), LoopChoice::Freed(800));
        numbers.was_taken();
        assert_eq!(numbers.choose(), LoopChoice::Named);
        (0..10_000).for_each(|number| numbers.free(number));
        assert_eq!(numbers.freed.len(), KEPT);
    }

    #[test]
    fn where_there_are_devices_above_already_the_kernel_is_asked() {
        let mut numbers = told(MANY, FIRST);
        assert!(matches!(numbers.choose(), LoopChoice::New(_)));
        numbers.was_there();
        for number in 1000..1000 + TAKEN {
            assert_eq!(numbers.choose(), LoopChoice::Named);
            numbers.named(number);
        }
        assert_eq!(numbers.choose(), LoopChoice::New(1000 + TAKEN));
    }
}
