//! Opens `/dev/mapper/control` and reads long tables through the crate `devicemapper`, which no other file imports.
//! Without the feature `devicemapper`, `mapper_plain.rs` takes the place of this file.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use devicemapper::{DM, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::errno::Errno;

use crate::error;
use crate::kernel::seam::{DevId, MAPPER_CONTROL};

/// The open node.
pub(crate) struct Control(DM);

impl Control {
    pub(crate) fn open() -> Result<Self, Errno> {
        DM::new().map(Self).map_err(|_| why_not_open())
    }

    /// Returns the first line of an answer to `DM_TABLE_STATUS` of any length. Only other programs' tables have many
    /// lines or long ones.
    pub(crate) fn long_first_line(
        &self,
        id: DevId<'_>,
        flags: u32,
    ) -> Result<Option<(String, String)>, Errno> {
        let options = DmOptions::default().set_flags(DmFlags::from_bits_truncate(flags));
        let id = match id {
            DevId::Name(name) => {
                devicemapper::DevId::Name(DmName::new(name.as_str()).map_err(errno_of)?)
            }
            DevId::Uuid(uuid) => {
                devicemapper::DevId::Uuid(DmUuid::new(uuid.as_str()).map_err(errno_of)?)
            }
        };
        let (_, lines) = self.0.table_status(&id, options).map_err(errno_of)?;
        Ok(lines
            .into_iter()
            .next()
            .map(|(_, _, target, params)| (target, params)))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file().as_fd()
    }
}

/// Opens the node once more for the errno, which `devicemapper` drops when its open fails.
fn why_not_open() -> Errno {
    match File::open(MAPPER_CONTROL) {
        Err(found) => error::errno_of(&found),
        Ok(_) => Errno::EAGAIN,
    }
}

fn errno_of(error: DmError) -> Errno {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => *errno,
        _ => Errno::EPROTO,
    }
}
