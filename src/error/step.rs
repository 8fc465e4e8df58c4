//! What is asked of the kernel, one step at a time.

use std::fmt;

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $text:literal,)*) => {
        /// One thing asked of the kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "kebab-case"))]
        #[non_exhaustive]
        pub enum Step {
            $($(#[$doc])* $step,)*
        }

        impl Step {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$step),*];
        }

        impl fmt::Display for Step {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$step => $text,)* })
            }
        }
    };
}

steps! {
    /// `open` of the origin image, the COW file or a dm device.
    OpenFile = "open",
    /// `open` with `O_CREAT | O_EXCL` of the COW file or an export, or `memfd_create`.
    MakeFile = "make",
    /// `renameat2` of a pool's COW file.
    MoveFile = "move",
    /// `ftruncate` or `fallocate` of the COW file, new or longer than it was.
    SizeFile = "set aside space for",
    /// `fstat` or `stat` of the origin image, the COW file or a device node, or `BLKROGET`.
    InspectFile = "inspect",
    /// `FS_IOC_MEASURE_VERITY` of the origin image.
    MeasureFile = "measure",
    /// `flock` of the origin image or the COW file.
    LockFile = "lock",
    /// `pread` of the COW file or the origin image.
    ReadFile = "read",
    /// `fallocate` with `FALLOC_FL_PUNCH_HOLE` behind the end of the COW file, where it changes nothing.
    PunchHole = "punch a hole into",
    /// `lseek` with `SEEK_DATA` or `SEEK_HOLE` in the origin image.
    FindData = "find the data of",
    /// `pwrite` or `ftruncate` of an export.
    WriteFile = "write",
    /// `fsync` of the origin image, the COW file, an export, its directory, or a dm device.
    SyncFile = "sync",
    /// `pwrite` of the mark that ties the COW file to its origin.
    MarkFile = "mark",
    /// `futimens` of the origin image.
    DateFile = "set the modification time of",
    /// `open` of `/dev/loop-control`.
    OpenLoopControl = "open loop control",
    /// `LOOP_CTL_GET_FREE`.
    FindLoop = "find a free loop device through",
    /// `LOOP_CTL_ADD`.
    AddLoop = "add a loop device through",
    /// `open` of a loop device.
    OpenLoop = "open loop device",
    /// `flock` of a loop device's node.
    LockLoop = "lock loop device",
    /// `LOOP_CONFIGURE`.
    AttachLoop = "attach",
    /// `flock` of a loop device's node, to learn whether somebody else has it.
    TestLock = "test the lock of",
    /// `BLKGETDISKSEQ` of a loop device.
    ReadDiskseq = "read the disk sequence number of",
    /// `LOOP_GET_STATUS64` or `fstat` of a loop device, or its backing file's path in sysfs.
    InspectLoop = "inspect loop device",
    /// `BLKGETSIZE64` or `BLKSSZGET`.
    SizeLoop = "read the size of",
    /// `LOOP_SET_CAPACITY`.
    ResizeLoop = "resize loop device",
    /// `LOOP_CLR_FD`.
    DetachLoop = "detach",
    /// `open` of `/dev/mapper/control`.
    OpenMapper = "open device-mapper control",
    /// `DM_GET_TARGET_VERSION`.
    TargetVersion = "find the snapshot target through",
    /// `DM_DEV_CREATE`.
    Create = "create",
    /// `DM_TABLE_LOAD`.
    Load = "load the table of",
    /// `DM_TABLE_CLEAR`.
    Clear = "clear the inactive table of",
    /// `DM_DEV_SUSPEND` with `DM_SUSPEND_FLAG`.
    Suspend = "suspend",
    /// `DM_DEV_SUSPEND` without its flag.
    Resume = "resume",
    /// `write` to a dm device's `queue/write_cache` in sysfs.
    EndFlushes = "end the flushes of",
    /// What the kernel's snapshot-merge target does by itself once it is resumed.
    Merge = "merge by",
    /// `DM_DEV_RENAME`.
    Rename = "rename",
    /// `DM_DEV_RENAME` with `DM_UUID_FLAG`.
    SetUuid = "give a uuid to",
    /// `DM_DEV_REMOVE`.
    Remove = "remove",
    /// `DM_DEV_STATUS`.
    Query = "query",
    /// `DM_TABLE_STATUS`, for the status or the table.
    Status = "read the status of",
    /// `DM_DEV_ARM_POLL`.
    ArmPoll = "watch for events through",
    /// `DM_LIST_DEVICES`.
    List = "list the devices of",
    /// Making `/dev/mapper/<name>`, or giving an export its name.
    Link = "make",
    /// Starting one of a pool's threads.
    StartThread = "start the thread",
    /// Removing `/dev/mapper/<name>`, the COW file that was made, or an export's temporary file.
    Unlink = "unlink",
    /// `getrandom`, for a uuid.
    Random = "draw a uuid for",
}
