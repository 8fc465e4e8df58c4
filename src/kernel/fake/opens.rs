//! What is open on the fake machine, and the locks that stand as long as it is.

use nix::errno::Errno;

use super::world::World;
use crate::base::DeviceNumber;

/// What an open file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    /// A file, by its inode.
    File(u64),
    /// The node of a loop device.
    Loop(u32),
    /// The node of a dm device.
    Mapped(DeviceNumber),
}

/// An open file: it goes, and its locks with it, when nobody has it any more.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) object: Object,
    /// Descriptors, and the loop device that is bound to it.
    users: usize,
    /// `flock`: whether it is an exclusive one.
    lock: Option<bool>,
    /// The lock of another kind, of a maker beside a probe.
    marked: bool,
}

impl World {
    /// Opens it once more; returns the number of the open file.
    pub(crate) fn open(&mut self, object: Object) -> u64 {
        self.next_open += 1;
        let open = Open {
            object,
            users: 1,
            lock: None,
            marked: false,
        };
        self.opens.insert(self.next_open, open);
        self.next_open
    }

    /// As a loop device does with its backing file.
    pub(super) fn share(&mut self, open: u64) {
        if let Some(open) = self.opens.get_mut(&open) {
            open.users += 1;
        }
    }

    pub(crate) fn close(&mut self, number: u64) {
        let Some(open) = self.opens.get_mut(&number) else {
            return;
        };
        open.users -= 1;
        if open.users == 0 {
            self.opens.remove(&number);
        }
    }

    /// The other open files of the same object.
    fn beside(&self, number: u64) -> impl Iterator<Item = &Open> {
        let object = self.opens[&number].object;
        let others = self
            .opens
            .iter()
            .filter(move |(other, _)| **other != number);
        others
            .map(|(_, open)| open)
            .filter(move |open| open.object == object)
    }

    /// `flock` without waiting; a lock that is held already becomes one of the new kind.
    pub(super) fn lock(&mut self, number: u64, exclusive: bool) -> Result<(), Errno> {
        let bars = |open: &Open| open.lock.is_some_and(|theirs| theirs || exclusive);
        if self.beside(number).any(bars) {
            return Err(Errno::EAGAIN);
        }
        if let Some(open) = self.opens.get_mut(&number) {
            open.lock = Some(exclusive);
        }
        Ok(())
    }

    pub(super) fn mark(&mut self, number: u64) -> Result<(), Errno> {
        if self.is_marked(number) {
            return Err(Errno::EAGAIN);
        }
        if let Some(open) = self.opens.get_mut(&number) {
            open.marked = true;
        }
        Ok(())
    }

    pub(super) fn is_marked(&self, number: u64) -> bool {
        self.beside(number).any(|open| open.marked)
    }

    /// How many have it open.
    pub(super) fn openers(&self, object: Object) -> usize {
        let all = self.opens.values();
        all.filter(|open| open.object == object).count()
    }
}
