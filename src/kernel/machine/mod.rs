//! The real machine behind the seam.

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

use std::sync::OnceLock;
use std::time::Instant;

use loop_device::LoopControl;
pub(crate) use loop_device::LoopDevice;
use mapper::Mapper;
use nix::errno::Errno;

/// The machine we run on. Its two control nodes are opened on first use and stay open with the process.
#[derive(Debug)]
pub(crate) struct Machine {
    loops: OnceLock<LoopControl>,
    mapper: OnceLock<Mapper>,
    start: OnceLock<Instant>,
}

/// The one machine.
pub(crate) static MACHINE: Machine = Machine {
    loops: OnceLock::new(),
    mapper: OnceLock::new(),
    start: OnceLock::new(),
};

/// What a control node's methods need, opened if it is not yet. A failed open is tried again by the next call.
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
