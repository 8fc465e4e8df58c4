//! A scripted machine: it keeps loop and dm devices in memory as the kernel does, and fails the calls it is told to.
//!
//! What it proves is the order of steps and their undoing, for every step that can fail. What the kernel itself
//! does is proved in tests/kernel.

mod clock;
mod files;
mod loops;
mod mapped;
mod mapper;
mod opens;
#[cfg(test)]
mod tests;
pub(crate) mod world;

use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use opens::Object;
use world::{ScriptDevice, World};

use crate::dm::Address;
use crate::error::Step;
use crate::kernel::LoopNumbers;

/// Whether the call made as `Step`, the n-th of all (from 1), is to fail, and how.
type Fault = Box<dyn Fn(Step, usize) -> Option<Errno> + Send + Sync>;

/// What threads share, borrowed as from a `RefCell`.
#[derive(Default)]
pub(crate) struct Shared<T>(RwLock<T>);

impl<T> Shared<T> {
    pub(crate) fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().expect("no panic while it was borrowed")
    }

    pub(crate) fn borrow_mut(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().expect("no panic while it was borrowed")
    }
}

impl<T: Default> Shared<T> {
    pub(crate) fn take(&self) -> T {
        std::mem::take(&mut *self.borrow_mut())
    }
}

pub(crate) struct Script {
    fault: Shared<Fault>,
    /// Every call so far, in order.
    pub(crate) calls: Shared<Vec<Step>>,
    pub(crate) world: Arc<Shared<World>>,
    numbers: Mutex<LoopNumbers>,
}

/// An open file, or an open node of a dm device.
pub(crate) struct ScriptFile(Opened);

/// An open loop device.
pub(crate) struct ScriptLoop {
    opened: Opened,
    number: u32,
}

/// A descriptor.
struct Opened {
    world: Arc<Shared<World>>,
    open: u64,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut world = self.world.borrow_mut();
        world.close(self.open);
        world.settle();
    }
}

impl Script {
    pub(crate) fn new(
        fault: impl Fn(Step, usize) -> Option<Errno> + Send + Sync + 'static,
    ) -> Self {
        Self {
            fault: Shared(RwLock::new(Box::new(fault))),
            calls: Shared::default(),
            world: Arc::default(),
            numbers: Mutex::new(LoopNumbers::new()),
        }
    }

    /// From now on, faults are these, and calls are counted from 1 again.
    pub(crate) fn restart(
        &self,
        fault: impl Fn(Step, usize) -> Option<Errno> + Send + Sync + 'static,
    ) {
        *self.fault.borrow_mut() = Box::new(fault);
        self.calls.borrow_mut().clear();
    }

    fn call(&self, step: Step) -> Result<(), Errno> {
        self.calls.borrow_mut().push(step);
        let nth = self.calls.borrow().len();
        (self.fault.borrow())(step, nth).map_or(Ok(()), Err)
    }

    fn find(&self, address: Address<'_>) -> Result<String, Errno> {
        let world = self.world.borrow();
        let fits = |uuid: &str, device: &ScriptDevice| match address {
            Address::Name(name) => device.name == name,
            Address::Uuid(wanted) => uuid == wanted,
            Address::Number(number) => device.number == number,
        };
        let found = world
            .devices
            .iter()
            .find(|(uuid, device)| fits(uuid, device));
        found.map(|(uuid, _)| uuid.clone()).ok_or(Errno::ENXIO)
    }

    fn opened(&self, object: Object) -> Opened {
        Opened {
            world: Arc::clone(&self.world),
            open: self.world.borrow_mut().open(object),
        }
    }
}
