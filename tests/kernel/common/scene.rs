//! The scene of a test: a directory, an image, a name prefix; and at its end, the assertion that nothing is left.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dmsnap::find::SnapshotInfo;
use dmsnap::{Snapshot, SnapshotOptions};
use tempfile::TempDir;

use super::{eventually, guard, output, reading, run, settle};

/// What the names of all dm devices of ours begin with.
pub(crate) const PREFIX: &str = "dmsnap-test-";

/// Set for a test that runs while others do.
pub(crate) const BESIDE_OTHERS: &str = "DMSNAP_TEST_BESIDE_OTHERS";

/// What the names of this process's dm devices begin with.
pub(crate) fn prefix() -> String {
    format!("{PREFIX}{}-", std::process::id())
}

/// Whether this test answers for a dm device of that name, or a link: for all of them unless others run beside it.
fn answers_for(name: &str) -> bool {
    std::env::var_os(BESIDE_OTHERS).is_none() || name.contains(&prefix())
}

/// Size of the image of an ordinary scene.
pub(crate) const IMAGE_BYTES: u64 = 4 << 20;

/// Size of an ordinary COW file: more than the worst case for [`IMAGE_BYTES`].
pub(crate) const COW_BYTES: u64 = 8 << 20;

/// File descriptors belong to the whole process, so its scenes play one after the other whatever `--test-threads` says.
static TURN: Mutex<()> = Mutex::new(());

/// A directory with an image, and what must be as before when the test ends.
pub(crate) struct Scene {
    dir: TempDir,
    image: PathBuf,
    before: Content,
    descriptors: usize,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    /// Over an image of [`IMAGE_BYTES`] in which no two chunks are alike.
    pub(crate) fn new() -> Self {
        Self::over(|image| patterned(image, IMAGE_BYTES))
    }

    /// Over an image with an ext4 file system of 16 MiB.
    pub(crate) fn ext4() -> Self {
        Self::over(|image| ext4(image, 16 << 20))
    }

    /// Over an image that `make` writes to the path it is given.
    pub(crate) fn over(make: impl FnOnce(&Path)) -> Self {
        guard();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        settle();
        let dir = TempDir::with_prefix(PREFIX).expect("a temporary directory");
        // Other users are to be refused what they ask for, not the way there.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("it is ours");
        let image = dir.path().join("origin.img");
        make(&image);
        // The library keeps its two control nodes open from the first use on; let that be before the count.
        let missing = dir.path().join("no such file");
        SnapshotOptions::new()
            .create(&missing, &missing, "dmsnap-test-warm-up")
            .expect_err("there is no such file");
        Self {
            before: content(&image),
            descriptors: descriptors(),
            _turn: turn,
            dir,
            image,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir().join(name)
    }

    /// A new, sparse COW file of [`COW_BYTES`].
    pub(crate) fn cow(&self, name: impl AsRef<Path>) -> PathBuf {
        self.sparse(name, COW_BYTES)
    }

    pub(crate) fn sparse(&self, name: impl AsRef<Path>, bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create_new(&path).expect("a new file");
        file.set_len(bytes).expect("room for a sparse file");
        path
    }

    pub(crate) fn file(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("room for a file");
        path
    }

    /// A dm name that nobody has had: a udevd that lags behind unlinks aliases by name, whoever has the name by then.
    pub(crate) fn name(&self) -> String {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let nth = LAST.fetch_add(1, Ordering::Relaxed);
        format!("{}{nth}", prefix())
    }

    /// An ordinary snapshot, on a COW file of its own.
    pub(crate) fn snapshot(&self) -> Snapshot {
        self.snapshot_with(&SnapshotOptions::new())
    }

    pub(crate) fn snapshot_with(&self, options: &SnapshotOptions) -> Snapshot {
        let name = self.name();
        let cow = self.cow(format!("{name}.cow"));
        options
            .create(self.image(), cow, &name)
            .expect("a snapshot")
    }

    /// What is there that no finished test leaves.
    pub(crate) fn residue(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut note = |what: &str, which: String| found.push(format!("{what} {which}"));
        for name in reading::dm_listed() {
            if name.starts_with(PREFIX) && answers_for(&name) {
                note("dm device", name);
            }
        }
        match dmsnap::list() {
            Ok(listed) => {
                let ours = |entry: &dmsnap::Result<SnapshotInfo>| match entry {
                    Ok(info) => answers_for(&info.name),
                    Err(error) => answers_for(&error.to_string()),
                };
                let ours = listed.into_iter().filter(ours);
                ours.for_each(|entry| note("listed", format!("{entry:?}")));
            }
            Err(error) => note("cannot list", error.to_string()),
        }
        for device in reading::loops_below(self.dir()) {
            note("loop device", format!("{device:?}"));
        }
        for entry in fs::read_dir("/dev/mapper")
            .expect("/dev/mapper is there")
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(PREFIX) && answers_for(&name) {
                note("alias", name);
            }
        }
        found
    }

    /// Nothing is left, at once or very soon: udevd may hold a loop device for a moment, and a deferred removal
    /// lets go of them a little after the dm device is gone.
    pub(crate) fn assert_clean(&self) {
        if !eventually(Duration::from_secs(60), || self.residue().is_empty()) {
            let found = self.residue();
            // Or the next test would find it too.
            self.sweep();
            panic!("left behind: {found:#?}");
        }
    }

    fn assert_as_before(&self) {
        self.assert_clean();
        let by_dmsetup = reading::dm_names();
        let ours = |name: &String| name.starts_with(PREFIX) && answers_for(name);
        let ours = by_dmsetup.iter().any(ours);
        assert!(!ours, "left behind, says dmsetup: {by_dmsetup:#?}");
        assert!(content(&self.image) == self.before, "the image has changed");
        assert_eq!(
            descriptors(),
            self.descriptors,
            "file descriptors leaked: {:#?}",
            open_files()
        );
    }

    /// Clears the stage for the next test, after a failure.
    fn sweep(&self) {
        for mount in reading::mounts_below(self.dir()) {
            output!("umount", "-l", mount);
        }
        for name in reading::dm_names() {
            let ours = name.starts_with(PREFIX) || name.starts_with("dmsnap-pool-");
            if ours && answers_for(&name) {
                output!("dmsetup", "remove", "--force", "--noudevsync", &name);
            }
        }
        for device in reading::loops_below(self.dir()) {
            output!("losetup", "-d", device.device);
        }
        for entry in fs::read_dir("/dev/mapper").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(PREFIX) && answers_for(&name) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.sweep();
        } else {
            self.assert_as_before();
        }
    }
}

/// Content in which every 4 KiB say where they are.
pub(crate) fn patterned(path: &Path, bytes: u64) {
    let mut file = File::create(path).expect("a new file");
    let mut left = bytes;
    for nth in 0u64.. {
        if left == 0 {
            break;
        }
        let chunk = nth.to_le_bytes().repeat(512);
        let length = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
        file.write_all(&chunk[..length]).expect("room for an image");
        left -= length as u64;
    }
}

/// A file with an ext4 file system.
pub(crate) fn ext4(path: &Path, bytes: u64) {
    let file = File::create(path).expect("a new file");
    file.set_len(bytes).expect("room for a sparse file");
    run!("mke2fs", "-q", "-t", "ext4", path);
}

/// Every byte of a file or a device: comparing them is faster than summing them up, without optimisation and under
/// emulation.
#[derive(PartialEq, Eq)]
pub(crate) struct Content(Vec<u8>);

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

pub(crate) fn content(path: &Path) -> Content {
    Content(fs::read(path).expect("a readable file"))
}

fn descriptors() -> usize {
    open_files().len()
}

fn open_files() -> Vec<PathBuf> {
    let own = fs::read_dir("/proc/self/fd").expect("/proc is mounted");
    let targets = own
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    // The descriptor that reads the directory is among them, and no more.
    targets
        .filter(|target| target.file_name() != Some(OsStr::new("fd")))
        .collect()
}
