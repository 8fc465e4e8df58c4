//! Opens `/dev/mapper/control` and reads long tables without the crate `devicemapper`, by the same calls as
//! `mapper_crate.rs`.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::mapper::TABLE_STATUS;
use crate::dm::HEAD_BYTES;
use crate::dm::{Message, message};
use crate::error::errno_of;
use crate::kernel::seam::{DevId, MAPPER_CONTROL};
use crate::kernel::sys;

/// The open node.
pub(crate) struct Control(File);

impl Control {
    pub(crate) fn open() -> Result<Self, Errno> {
        let opened = File::open(MAPPER_CONTROL);
        opened.map(Self).map_err(|error| errno_of(&error))
    }

    /// Returns the first line of an answer to `DM_TABLE_STATUS` of any length. Only other programs' tables have many
    /// lines or long ones.
    pub(crate) fn long_first_line(
        &self,
        id: DevId<'_>,
        flags: u32,
    ) -> Result<Option<(String, String)>, Errno> {
        let mut room = 16 << 10;
        loop {
            let buffer = vec![0; HEAD_BYTES + room];
            let message = Message::new(buffer).with_flags(flags);
            let mut message = message.with_address(id.into());
            sys::dm_ioctl(self.as_fd(), TABLE_STATUS, message.bytes_mut())?;
            if message.flags() & message::BUFFER_FULL == 0 {
                return Ok(message::first_line(message.payload()));
            }
            room *= 4;
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
