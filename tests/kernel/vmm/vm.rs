//! VMs whose root disk is a device of ours. What they are, and where their files come from, is in tests/vm/vmm.sh.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::run;

/// No VM takes that long for an order, or for its boot, on the slowest machine: an emulator in an emulator.
const DEADLINE: Duration = Duration::from_secs(540);

/// How a VMM has the disk open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vmm {
    /// QEMU with Debian's kernel of the guest's own series, restored from a saved state; `cache=` of its drive.
    Qemu(&'static str),
    /// User-mode Linux, whose writes to the disk are synchronous or not.
    Uml { synchronous: bool },
}

/// A VM that runs. It is killed with the value.
pub(crate) struct Vm {
    what: String,
    child: Child,
    orders: ChildStdin,
    lines: mpsc::Receiver<String>,
    /// All that it said, for who asks why it failed.
    said: Vec<String>,
    /// Where user-mode Linux keeps its pid and its memory.
    _dir: tempfile::TempDir,
}

/// A file that tests/vm/vmm.sh brought into the guest.
pub(crate) fn brought(name: &str) -> PathBuf {
    let here = std::env::current_dir().expect("there is one");
    let file = here.join(name);
    let there = fs::exists(&file).expect("it can be looked for");
    assert!(
        there,
        "no {name} here: `tests/vm/run exec --vmm`, `vmm` and `test` bring it"
    );
    file
}

/// QEMU, where its parts are.
pub(crate) fn qemu() -> Command {
    let program = brought("qemu-system-x86_64");
    let here = program.parent().expect("a file in a directory");
    let mut command = Command::new(&program);
    command.env("QEMU_MODULE_DIR", here).arg("-L").arg(here);
    command
}

impl Vm {
    /// Boots a VM from a block device, and waits until its init asks for orders.
    pub(crate) fn boot(vmm: Vmm, device: &Path) -> Self {
        let mut vm = Self::start(vmm, device);
        vm.up(vmm);
        vm
    }

    /// Starts it, without waiting. [`Self::up`] does.
    pub(crate) fn start(vmm: Vmm, device: &Path) -> Self {
        // The kernel's own node, as a VMM that was given a resolved path.
        let device = fs::canonicalize(device).expect("the device has a node");
        let device = device.to_str().expect("ASCII");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = match vmm {
            Vmm::Qemu(cache) => {
                let machine = fs::read_to_string(brought("vmm-machine")).expect("readable");
                let state = brought("vmm-state");
                let mut command = qemu();
                command.args(machine.split_whitespace());
                command.args(["-serial", "stdio", "-device", "virtio-blk-pci,drive=disk"]);
                command.arg("-incoming");
                command.arg(format!("exec:cat {}", state.display()));
                command.arg("-drive").arg(format!(
                    "if=none,id=disk,file={device},format=raw,cache={cache},discard=unmap"
                ));
                command
            }
            Vmm::Uml { synchronous } => {
                let mut command = Command::new(brought("linux.uml"));
                command.env("TMPDIR", dir.path());
                let disk = if synchronous { "ubd0s" } else { "ubd0" };
                command.arg(format!("{disk}={device}"));
                command.arg(format!("uml_dir={}", dir.path().display()));
                // Their speed tests, and a process for each of 512 terminals, take longer than the rest of the boot.
                let slow = "raid6_select_algo,calibrate_xor_blocks,init_btrfs_fs";
                command.arg(format!("initcall_blacklist={slow}"));
                command.args(["mem=64M", "root=/dev/ubda", "rootfstype=ext4", "rw"]);
                command.args(["init=/init", "con=null", "con0=fd:0,fd:1", "panic=-1"]);
                command.args(["lpj=4000000", "quiet", "pty.legacy_count=0"]);
                command
            }
        };
        // User-mode Linux is several processes, which only a signal to all of them ends.
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let what = format!("{vmm:?} on {device}");
        let mut child = command.spawn().expect("a VMM starts");
        let orders = child.stdin.take().expect("it is piped");
        let output = child.stdout.take().expect("it is piped");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // The kernel of a VM says what it likes between the lines, in any encoding.
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                if sender.send(line.trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        Self {
            what,
            child,
            orders,
            lines,
            said: Vec::new(),
            _dir: dir,
        }
    }

    /// Waits until its init asks for orders.
    pub(crate) fn up(&mut self, vmm: Vmm) {
        if matches!(vmm, Vmm::Qemu(_)) {
            // The saved VM waits for a line, to go on into its disk. What the UART has when it is restored may be lost.
            self.tell("\n\ngo");
        }
        self.answer("up");
    }

    /// The pid of the VMM, by which its process group is known too.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order, and returns what comes after `VM <answer> ` in the answer.
    pub(crate) fn order(&mut self, order: &str, answer: &str) -> String {
        self.tell(order);
        self.answer(answer)
    }

    pub(crate) fn tell(&mut self, order: &str) {
        let line = format!("{order}\n");
        let told = self.orders.write_all(line.as_bytes());
        told.unwrap_or_else(|error| panic!("{}: cannot be told {order}: {error}", self.what));
    }

    /// Waits for `VM <answer>`. Whatever else its init says first is a failure.
    pub(crate) fn answer(&mut self, answer: &str) -> String {
        let line = self.line();
        let rest = line
            .strip_prefix(answer)
            .unwrap_or_else(|| panic!("{}: {line:?}, and not {answer:?}", self.what));
        rest.trim_start().to_owned()
    }

    /// The next line of its init, without the `VM ` before it.
    fn line(&mut self) -> String {
        let until = Instant::now() + DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{}: silent; before: {:#?}", self.what, self.said)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.try_wait();
                    panic!("{}: ended {status:?}: {:#?}", self.what, self.said)
                }
            };
            let answer = line.strip_prefix("VM ").map(str::to_owned);
            self.said.push(line);
            if let Some(answer) = answer {
                return answer;
            }
        }
    }

    /// The MD5 of one of its files, as it reads it from its disk.
    pub(crate) fn sum(&mut self, path: &str) -> String {
        self.order("drop", "dropped");
        let answer = self.order(&format!("sum {path}"), "sum");
        let (sum, of) = answer.split_once(' ').expect("a sum and a path");
        assert_eq!(of, path);
        sum.to_owned()
    }

    /// Writes so many blocks of 64 KiB of its own to a new file, through to the disk.
    pub(crate) fn fill(&mut self, path: &str, blocks: u32) {
        self.order(&format!("fill {path} {blocks}"), "filled");
    }

    /// Shuts it down, the file system first, and returns when the VMM has exited.
    pub(crate) fn shut_down(mut self, order: &str) {
        self.order(order, "ends");
        let status = self.exited();
        // User-mode Linux aborts in one of some 25 of its exits, with nothing of ours beneath it, when its kernel has halted.
        let halted = self.said.iter().any(|line| line == "reboot: System halted");
        assert!(
            status.success() || halted,
            "{}: {status}: {:#?}",
            self.what,
            self.said
        );
    }

    /// Waits for the VMM's exit.
    pub(crate) fn exited(&mut self) -> ExitStatus {
        // Its output ends with the last of its processes.
        let until = Instant::now() + DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{}: does not exit: {:#?}", self.what, self.said)
                }
            }
        }
        self.child.wait().expect("it is a child of ours")
    }

    /// SIGKILL to all of its processes.
    pub(crate) fn kill(&mut self) {
        run!("kill", "-KILL", format!("-{}", self.pid()));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let group = format!("-{}", self.pid());
            let _ = Command::new("kill").args(["-KILL", &group]).status();
            let _ = self.child.wait();
        }
    }
}
