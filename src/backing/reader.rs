//! A COW file read through the seam.

use std::io::{self, Read, Seek, SeekFrom};

use nix::errno::Errno;

use super::Backing;
use crate::kernel::Host;

/// Reads a COW file through the seam.
pub(crate) struct Reader<'a, H: Host> {
    host: &'a H,
    cow: &'a Backing<'a, H::File>,
    at: u64,
}

impl<'a, H: Host> Reader<'a, H> {
    pub(crate) fn of(host: &'a H, cow: &'a Backing<'a, H::File>) -> Self {
        Self { host, cow, at: 0 }
    }
}

impl<H: Host> Read for Reader<'_, H> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Behind the last offset of any file there is nothing.
        let Ok(at) = usize::try_from(self.at) else {
            return Ok(0);
        };
        let length = self.host.read_at(&self.cow.file, buffer, at)?;
        self.at = self.at.saturating_add(length as u64);
        Ok(length)
    }
}

impl<H: Host> Seek for Reader<'_, H> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.cow.facts.size_bytes.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or(Errno::EINVAL)?;
        Ok(self.at)
    }
}
