//! Recognises an image and a COW file of which the merge of one into the other was cut off.

use crate::kernel::{FileFacts, FileKind};
use crate::store::Header;

/// One minute in nanoseconds: more than the kernel takes from writing chunks to the image to writing the COW file's
/// metadata about them.
const STEP_NS: i64 = 60_000_000_000;

/// True if a merge of this store that was cut off, by a kill or a power cut, can have left the image as it is.
///
/// The kernel goes on merging when the process is dead, so no process can note the image's last modification time. But
/// the kernel writes the COW file after each write to the image: an image whose modification time is before the merge's
/// beginning, or well after the COW file's, was changed by somebody else.
pub(crate) fn is_half_merged(origin: &FileFacts, cow: &FileFacts, header: &Header) -> bool {
    let Some(began) = header.origin else {
        return false;
    };
    let latest = match cow.kind {
        // A block device has no modification time of its content.
        FileKind::BlockDevice(_) => i64::MAX,
        _ => cow.mtime_ns.saturating_add(STEP_NS),
    };
    header.merging_into == Some(origin.id.inode)
        && origin.size_bytes == began.size_bytes
        && (began.mtime_ns..=latest).contains(&origin.mtime_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{ChunkSize, DeviceNumber, FileId, OriginIdentity};

    const SECOND: i64 = 1_000_000_000;

    fn file(inode: u64, seconds: i64) -> FileFacts {
        FileFacts {
            id: FileId {
                dev: DeviceNumber::at(8, 1),
                inode,
            },
            kind: FileKind::Regular,
            mode: 0o600,
            size_bytes: 4096,
            mtime_ns: seconds * SECOND,
            links: 1,
            read_only: false,
            has_blocks: true,
        }
    }

    fn header(merging_into: Option<u64>) -> Header {
        Header {
            valid: true,
            chunk: ChunkSize::DEFAULT,
            origin: Some(OriginIdentity {
                size_bytes: 4096,
                mtime_ns: 100 * SECOND,
            }),
            merging_into,
            content: None,
            chain: None,
        }
    }

    #[test]
    fn the_image_is_the_same_file_modified_by_nobody_but_the_merge() {
        let (cow, merging) = (file(2, 200), header(Some(1)));
        for (seconds, known) in [(99, false), (100, true), (201, true), (261, false)] {
            let known_now = is_half_merged(&file(1, seconds), &cow, &merging);
            assert_eq!(known_now, known, "modified at {seconds}");
        }
        assert!(!is_half_merged(&file(3, 150), &cow, &merging), "a copy");
        let mut longer = file(1, 150);
        longer.size_bytes += 512;
        assert!(!is_half_merged(&longer, &cow, &merging));
        assert!(!is_half_merged(&file(1, 150), &cow, &header(None)));
        let unmarked = Header {
            origin: None,
            ..merging
        };
        assert!(!is_half_merged(&file(1, 150), &cow, &unmarked));
    }

    #[test]
    fn a_cow_device_has_no_time_to_go_by() {
        let mut cow = file(2, 0);
        cow.kind = FileKind::BlockDevice(DeviceNumber::at(8, 2));
        assert!(is_half_merged(&file(1, 1000), &cow, &header(Some(1))));
        assert!(!is_half_merged(&file(1, 99), &cow, &header(Some(1))));
    }
}
