//! `/dev/mapper/control` by `devicemapper`, whose only importer this is: it opens the node, and makes room for long
//! tables and parses them. Without the feature of its name `mapper_plain.rs` stands here.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use devicemapper::{DM, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::errno::Errno;

use crate::error;
use crate::kernel::seam::{DevId, MAPPER_CONTROL};

/// The node, open.
pub(crate) struct Control(DM);

impl Control {
    pub(crate) fn open() -> Result<Self, Errno> {
        DM::new().map(Self).map_err(|_| why_not_open())
    }

    /// The first line of an answer to `DM_TABLE_STATUS` of any length. Tables with many lines, or with a long one, are
    /// foreign.
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

/// `devicemapper` drops the errno of a failed open; asking again brings it back.
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
