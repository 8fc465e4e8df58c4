//! SIGINT and SIGTERM, for commands that have something to put in order first, and the progress bar that they end.

use std::io;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

const ENDING: [i32; 2] = [SIGINT, SIGTERM];

/// A job that is shown as a bar on stderr, if that is a terminal, and that a signal breaks off.
#[derive(Debug)]
pub(crate) struct Job {
    bar: ProgressBar,
    came: Arc<AtomicUsize>,
}

impl Job {
    /// From now on the signals are only noted. A second one ends the process at once.
    pub(crate) fn begin() -> io::Result<Self> {
        let came = Arc::new(AtomicUsize::new(0));
        for signal in ENDING {
            let (number, again) = (signal.unsigned_abs() as usize, Arc::default());
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&again))?;
            signal_hook::flag::register(signal, again)?;
            signal_hook::flag::register_usize(signal, Arc::clone(&came), number)?;
        }
        let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(0).with_style(style);
        Ok(Self { bar, came })
    }

    /// Shows how far it is, in bytes; breaks off once a signal came.
    pub(crate) fn shows(&self, done: u64, total: u64) -> ControlFlow<()> {
        self.bar.set_length(total);
        self.bar.set_position(done);
        match self.signal() {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }

    /// The number of the signal that came, or 0.
    pub(crate) fn signal(&self) -> u8 {
        u8::try_from(self.came.load(Ordering::Relaxed)).unwrap_or(0)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Has the signals make a descriptor readable instead of ending the process.
pub(crate) fn readable() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in ENDING {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}
