//! The seam's implementation on the real kernel.

mod alias;
mod clock;
mod closes;
mod dm;
mod files;
mod holders;
#[cfg_attr(not(feature = "loopdev"), path = "loop_plain.rs")]
mod loop_crate;
mod loop_device;
mod loops;
mod mapper;
#[cfg_attr(not(feature = "devicemapper"), path = "mapper_plain.rs")]
mod mapper_crate;
mod nodes;

use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use loop_device::LoopControl;
pub(crate) use loop_device::LoopDevice;
use mapper::Mapper;
use nix::errno::Errno;

use super::LoopNumbers;

/// The machine that the process runs on. Its two control nodes are opened on first use and stay open with the process.
#[derive(Debug)]
pub(crate) struct Machine {
    loops: OnceLock<LoopControl>,
    numbers: Mutex<LoopNumbers>,
    mapper: OnceLock<Mapper>,
    start: OnceLock<Instant>,
}

/// The [`Machine`] of this process.
pub(crate) static MACHINE: Machine = Machine {
    loops: OnceLock::new(),
    numbers: Mutex::new(LoopNumbers::new()),
    mapper: OnceLock::new(),
    start: OnceLock::new(),
};

/// Opens a control node on first use and returns it. If that fails, the next call tries it again.
fn opened<T>(cell: &OnceLock<T>, open: impl FnOnce() -> Result<T, Errno>) -> Result<&T, Errno> {
    match cell.get() {
        Some(control) => Ok(control),
        None => {
            let control = open()?;
            Ok(cell.get_or_init(|| control))
        }
    }
}

impl Machine {
    fn loops(&self) -> Result<&LoopControl, Errno> {
        opened(&self.loops, LoopControl::open)
    }

    fn mapper(&self) -> Result<&Mapper, Errno> {
        opened(&self.mapper, Mapper::open)
    }
}
