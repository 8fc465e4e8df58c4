//! Where a bench's samples come from, for its report.

use std::{env, fs};

/// Where the samples come from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) udev: bool,
    /// Whether the guest's clock counts instructions (`tests/vm/run bench` says so).
    pub(crate) counted: bool,
}

impl Origin {
    pub(crate) fn here() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let cpus = text("/proc/cpuinfo");
        let model = cpus.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split_once(": "));
        Self {
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            udev: fs::exists("/run/udev/control").unwrap_or(false),
            counted: env::var_os("DMSNAP_BENCH_COUNTED").is_some(),
        }
    }

    /// QEMU's own name for a CPU that it emulates.
    pub(crate) fn is_emulated(&self) -> bool {
        self.cpu.contains("TCG")
    }

    pub(crate) fn label(&self) -> &'static str {
        if self.counted {
            "Ratios from an emulated guest whose clock counts instructions, a nanosecond each, and skips idle waits: no \
             machine's times, and nearly no noise."
        } else if self.is_emulated() {
            "Ratios from an emulated guest: the milliseconds mean nothing elsewhere."
        } else {
            "Not emulated: the milliseconds are this machine's."
        }
    }
}
