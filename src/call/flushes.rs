//! Whether a dm device ends its guest's flushes: a setting of its live table, which a swap of tables resets.

use std::path::Path;

use super::ask;
use crate::base::DeviceNumber;
use crate::error::{Result, Step};
use crate::kernel::Host;

/// Has the flushes end at the dm device. A table that is swapped in resets that (`dm_table_set_restrictions`,
/// drivers/md/dm-table.c), so it is set behind each resume of one.
pub(crate) fn end_flushes<H: Host>(host: &H, number: DeviceNumber, mapper: &Path) -> Result<()> {
    ask(Step::EndFlushes, mapper, || host.end_flushes(number))
}

/// True if the dm device has been set to end its guest's flushes, which is to be set again for its next table.
///
/// Over a COW device that ends them itself it is not known who wanted that: 6.1 shows the COW device's setting at the
/// dm device. The next COW device may take flushes, so they are let through then.
pub(crate) fn ends_flushes<H: Host>(host: &H, number: DeviceNumber, cow: DeviceNumber) -> bool {
    host.ends_flushes(number) && !host.ends_flushes(cow)
}
