//! Watches for closes of device nodes (inotify).

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Watches some nodes for closes, by whatever process.
///
/// The event comes shortly before the device's own release (`fs/file_table.c`, `__fput`: `fsnotify_close` comes first).
/// The watch is on the inode: closes of another node with the same device number are not seen. A watch does not keep
/// the device open.
#[derive(Debug)]
pub(crate) struct Closes(Inotify);

impl Closes {
    pub(crate) fn of(nodes: &[PathBuf]) -> Result<Self, Errno> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut watched = Err(Errno::ENOENT);
        for node in nodes {
            // If one node is gone, the others are still watched.
            watched = match inotify.add_watch(node, AddWatchFlags::IN_CLOSE) {
                Ok(_) => Ok(()),
                Err(errno) => watched.map_err(|_| errno),
            };
        }
        watched.map(|()| Self(inotify))
    }

    /// Waits for a close, at most for `pause` (rounded up to a millisecond); returns true if there was one.
    pub(crate) fn wait(&self, pause: Duration) -> bool {
        let ms = i32::try_from(pause.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        // A signal ends the pause early. That does no harm: the device is looked at once more.
        let seen = poll(&mut polled, timeout).is_ok_and(|ready| ready > 0);
        while self.0.read_events().is_ok() {}
        seen
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_close_ends_the_wait_and_an_open_does_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let nodes = [PathBuf::from("/nowhere"), file.path().to_owned()];
        let holder = File::open(file.path()).expect("it opens");
        let watch = Closes::of(&nodes).expect("one of them is there");
        assert!(Closes::of(&nodes[..1]).is_err());
        let opened = File::open(file.path()).expect("it opens");
        assert!(!watch.wait(Duration::from_millis(5)));
        let begin = Instant::now();
        let seen = thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(20));
                drop((opened, holder));
            });
            watch.wait(Duration::from_secs(60))
        });
        assert!(seen && begin.elapsed() < Duration::from_secs(30));
        // Both closes at once are one, or two in a row; then there is no more.
        while watch.wait(Duration::from_millis(50)) {}
    }
}
