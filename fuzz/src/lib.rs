//! What is demanded of the readers: no panic on any bytes, and what is printed or written reads back as it was.
//!
//! Each function is the body of the fuzz target of its name. A demand that is not met is a panic.

pub mod made_store;
mod store;

use std::fmt::{Debug, Display};
use std::path::Path;
use std::str::FromStr;

use dmsnap::base::{DeviceName, DeviceNumber, DeviceUuid, Sectors};
use dmsnap::dm::{Discard, SnapshotParams, SnapshotStatus, Target, TargetLine, Usage};
use dmsnap::{ChunkSize, Handles, Store};

pub use store::{store_damage, store_reader};

/// The body of a fuzz target.
pub type Body = fn(&[u8]);

/// Every target's name and body.
pub const TARGETS: [(&str, Body); 6] = [
    ("table_line", table_line),
    ("status_line", status_line),
    ("device_name", device_name),
    ("handles_json", handles_json),
    ("store_reader", store_reader),
    ("store_damage", store_damage),
];

/// Lines of a dm table: read from the bytes as text, and made from the bytes as numbers.
///
/// # Panics
///
/// When a demand is not met, as everything here.
pub fn table_line(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        match text.parse::<TargetLine>() {
            Ok(line) => check_line(&line),
            Err(error) => check_message(&error),
        }
        let (kind, params) = text.split_once(' ').unwrap_or((text, ""));
        match Target::parse(kind, params) {
            Ok(target) => {
                assert_eq!(target.kind(), kind);
                assert_eq!(Target::parse(kind, &target.params()), Ok(target));
            }
            Err(error) => check_message(&error),
        }
    }
    check_line(&made_line(&mut Numbers(data)));
}

fn check_line(line: &TargetLine) {
    let text = line.to_string();
    reads_back(line);
    assert!(text.is_ascii() && text == text.trim(), "{text:?}");
    assert!(!text.contains("  ") && !text.contains('\n'), "{text:?}");
    let (kind, params) = (line.target.kind(), line.target.params());
    assert_eq!(Target::parse(kind, &params).as_ref(), Ok(&line.target));
}

/// Any line that the types allow.
fn made_line(numbers: &mut Numbers<'_>) -> TargetLine {
    TargetLine {
        start: Sectors::new(numbers.next()),
        length: Sectors::new(numbers.next()),
        target: match numbers.next() % 5 {
            0 => Target::Zero,
            1 => Target::Error,
            2 => Target::Linear {
                device: numbers.device(),
                offset: Sectors::new(numbers.next()),
            },
            3 => Target::SnapshotMerge(made_params(numbers)),
            _ => Target::Snapshot(made_params(numbers)),
        },
    }
}

fn made_params(numbers: &mut Numbers<'_>) -> SnapshotParams {
    let stores = [
        Store::Persistent,
        Store::PersistentOverflow,
        Store::Transient,
    ];
    let discards = [Discard::Unsupported, Discard::ZeroesCow, Discard::Passdown];
    let mut params = SnapshotParams::new(
        numbers.device(),
        numbers.device(),
        stores[numbers.below(3)],
        ChunkSize::new(1 << numbers.below(22)).expect("a power of two up to 2^21"),
    );
    params.discard = discards[numbers.below(3)];
    params
}

/// The status line of a snapshot.
///
/// # Panics
///
/// When a demand is not met.
pub fn status_line(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let Ok(status) = text.parse::<SnapshotStatus>();
        reads_back(&status);
        if let SnapshotStatus::Unknown(kept) = &status {
            assert_eq!(kept, text.trim(), "what is not understood stays readable");
        }
    }
    let mut numbers = Numbers(data);
    reads_back(&SnapshotStatus::Usage(Usage {
        allocated: Sectors::new(numbers.next()),
        total: Sectors::new(numbers.next()),
        metadata: Sectors::new(numbers.next()),
    }));
}

/// Names, uuids, device numbers and chunk sizes.
///
/// # Panics
///
/// When a demand is not met.
pub fn device_name(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        match DeviceName::new(text) {
            Ok(name) => {
                assert_eq!(name.as_str(), text);
                assert!((1..=127).contains(&text.len()));
                assert_eq!(name.mapper_path().parent(), Some(Path::new("/dev/mapper")));
                assert_eq!(name.mapper_path().file_name(), Some(text.as_ref()));
                reads_back(&name);
            }
            Err(error) => check_message(&error),
        }
        match DeviceUuid::new(text) {
            Ok(uuid) => {
                assert_eq!(uuid.as_str(), text);
                assert!(text.starts_with(DeviceUuid::PREFIX) && text.len() <= 128);
                let _ = uuid.origin();
                reads_back(&uuid);
            }
            Err(error) => check_message(&error),
        }
        match text.parse::<DeviceNumber>() {
            Ok(number) => {
                reads_back(&number);
                assert_eq!(DeviceNumber::from_dev_t(number.to_dev_t()), number);
            }
            Err(error) => check_message(&error),
        }
    }
    let mut numbers = Numbers(data);
    reads_back(&numbers.device());
    // Bits beyond the kernel's bounds are dropped once.
    let number = DeviceNumber::from_dev_t(numbers.next());
    assert_eq!(DeviceNumber::from_dev_t(number.to_dev_t()), number);
    assert_eq!(
        DeviceNumber::new(number.major(), number.minor()),
        Ok(number)
    );
    let sectors = numbers.next();
    match ChunkSize::new(sectors) {
        Ok(chunk) => assert_eq!((u64::from(chunk), sectors.count_ones()), (sectors, 1)),
        Err(error) => assert_eq!(error.sectors, sectors),
    }
}

/// Handles as callers' databases hold them.
///
/// # Panics
///
/// When a demand is not met.
pub fn handles_json(data: &[u8]) {
    match serde_json::from_slice::<Handles>(data) {
        Ok(handles) => {
            let text = serde_json::to_string(&handles).expect("what came from JSON goes there");
            let again: Handles = serde_json::from_str(&text).expect("what was written reads back");
            assert_eq!(again, handles);
        }
        Err(error) => check_message(&error),
    }
}

/// parse(print(value)) == value
fn reads_back<T: Display + Debug + FromStr<Err: Debug> + PartialEq>(value: &T) {
    let text = value.to_string();
    assert_eq!(&text.parse::<T>().expect("what was printed"), value);
}

/// A message is one line that a terminal survives, whatever it quotes.
fn check_message(error: &impl Display) {
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
}

/// Numbers taken from bytes, eight a number; zeroes when they are used up.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> u64 {
        let (taken, rest) = self.0.split_at(self.0.len().min(8));
        self.0 = rest;
        taken
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    /// Two bytes.
    fn short(&mut self) -> u16 {
        let (taken, rest) = self.0.split_at(self.0.len().min(2));
        self.0 = rest;
        taken
            .iter()
            .fold(0, |sum, byte| sum << 8 | u16::from(*byte))
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }

    /// Within the kernel's 12 bits of major and 20 of minor.
    fn device(&mut self) -> DeviceNumber {
        let bits = self.next();
        let low = |bits: u64| u32::try_from(bits).expect("masked");
        DeviceNumber::new(low(bits >> 20 & 0xfff), low(bits & 0xf_ffff)).expect("within bounds")
    }
}
