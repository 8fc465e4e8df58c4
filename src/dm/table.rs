//! Parses and prints the lines of dm tables, as the kernel reads and prints them.

use std::fmt;
use std::str::FromStr;

use crate::base::{ChunkSize, DeviceNumber, Sectors, Store};

/// One line of a dm table: `<start> <length> <target> <params>`.
///
/// ```
/// use dmsnap::dm::TargetLine;
///
/// let line: TargetLine = "0 2097152 snapshot 7:0 7:1 P 8".parse()?;
/// assert_eq!(line.to_string(), "0 2097152 snapshot 7:0 7:1 P 8");
/// # Ok::<(), dmsnap::dm::TableError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetLine {
    /// The first sector of the dm device that the line maps.
    pub start: Sectors,
    /// How many sectors it maps.
    pub length: Sectors,
    /// What it maps them to.
    pub target: Target,
}

/// The target of a table line: what it maps its sectors to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// `snapshot`: reads the origin where nothing was written, and keeps writes on the COW device.
    Snapshot(SnapshotParams),
    /// `snapshot-merge`: folds the exceptions back into the origin.
    SnapshotMerge(SnapshotParams),
    /// `linear`: maps to a range of another device.
    Linear {
        /// The other device.
        device: DeviceNumber,
        /// Its first sector.
        offset: Sectors,
    },
    /// `zero`: reads zeroes and drops writes.
    Zero,
    /// `error`: fails all I/O.
    Error,
}

/// The parameters of the `snapshot` and `snapshot-merge` targets.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct SnapshotParams {
    /// The device that is read where nothing was written.
    pub origin: DeviceNumber,
    /// The device that takes the writes.
    pub cow: DeviceNumber,
    /// The kind of exception store.
    pub store: Store,
    /// The chunk size, the unit of copying.
    #[cfg_attr(feature = "serde", serde(rename = "chunk_sectors"))]
    pub chunk: ChunkSize,
    /// How discards are handled: the optional features behind the chunk size.
    pub discard: Discard,
}

/// What the snapshot target does with a discard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Discard {
    /// It fails with EOPNOTSUPP, as the snapshot target's default is.
    #[default]
    Unsupported,
    /// `discard_zeroes_cow`: a written chunk that is discarded whole reads as zeroes, and the COW file gets its
    /// space back. A discard of a chunk that was never written does nothing: it goes on reading the origin.
    ZeroesCow,
    /// `discard_zeroes_cow discard_passdown_origin`: the discard also goes on to the origin. dmsnap never makes such a
    /// table, it only reads those of other programs: a discard punches holes into an image that others share. Over a
    /// read-only origin, such as dmsnap's, every discard takes effect on the COW file and still fails with EIO.
    Passdown,
}

impl SnapshotParams {
    /// Makes the parameters without optional features, of which [`discard`](Self::discard) is one.
    #[must_use]
    pub const fn new(
        origin: DeviceNumber,
        cow: DeviceNumber,
        store: Store,
        chunk: ChunkSize,
    ) -> Self {
        Self {
            origin,
            cow,
            store,
            chunk,
            discard: Discard::Unsupported,
        }
    }
}

impl Target {
    /// Returns the target's name, as the kernel spells it.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Snapshot(_) => "snapshot",
            Self::SnapshotMerge(_) => "snapshot-merge",
            Self::Linear { .. } => "linear",
            Self::Zero => "zero",
            Self::Error => "error",
        }
    }

    /// Returns the parameters: the text behind the target's name.
    #[must_use]
    pub fn params(&self) -> String {
        match self {
            Self::Snapshot(params) | Self::SnapshotMerge(params) => params.to_string(),
            Self::Linear { device, offset } => format!("{device} {offset}"),
            Self::Zero | Self::Error => String::new(),
        }
    }

    /// Reads a target's name and the text behind it, as a status or table query returns them.
    ///
    /// # Errors
    ///
    /// [`TableError`] names the part that is missing, unknown or malformed.
    pub fn parse(kind: &str, params: &str) -> Result<Self, TableError> {
        let mut words = Words(params.split_ascii_whitespace());
        let target = match kind {
            "snapshot" => Self::Snapshot(SnapshotParams::parse(&mut words)?),
            "snapshot-merge" => Self::SnapshotMerge(SnapshotParams::parse(&mut words)?),
            "linear" => Self::Linear {
                device: words.device("device")?,
                offset: words.sectors("offset")?,
            },
            "zero" => Self::Zero,
            "error" => Self::Error,
            other => return Err(TableError::bad("target", other)),
        };
        match words.0.next() {
            None => Ok(target),
            Some(extra) => Err(TableError::bad("parameter", extra)),
        }
    }
}

impl SnapshotParams {
    /// Reads only the origin and the COW device of a snapshot's line; `None` for another target's.
    ///
    /// This also reads the table that waits for another table's exceptions, and the one that has given them away, which
    /// [`Target::parse`] refuses: their chunk size is 0 (`snapshot_ctr` and `__handover_exceptions`,
    /// `drivers/md/dm-snap.c`).
    pub(crate) fn devices(kind: &str, params: &str) -> Option<[DeviceNumber; 2]> {
        let mut words = params.split_ascii_whitespace();
        let mut number = || words.next()?.parse().ok();
        let is_snapshot = ["snapshot", "snapshot-merge"].contains(&kind);
        let devices = [number()?, number()?];
        is_snapshot.then_some(devices)
    }

    fn parse(words: &mut Words<'_>) -> Result<Self, TableError> {
        let origin = words.device("origin")?;
        let cow = words.device("COW device")?;
        let store = match words.next("store")? {
            "P" => Store::Persistent,
            "PO" => Store::PersistentOverflow,
            "N" => Store::Transient,
            other => return Err(TableError::bad("store", other)),
        };
        let chunk = words.number("chunk size")?;
        let chunk =
            ChunkSize::new(chunk).map_err(|_| TableError::bad("chunk size", &chunk.to_string()))?;
        let features: Vec<_> = words.0.by_ref().collect();
        let discard = match features[..] {
            [] | ["0"] => Discard::Unsupported,
            ["1", "discard_zeroes_cow"] => Discard::ZeroesCow,
            ["2", "discard_zeroes_cow", "discard_passdown_origin"]
            | ["2", "discard_passdown_origin", "discard_zeroes_cow"] => Discard::Passdown,
            _ => return Err(TableError::bad("feature list", &features.join(" "))),
        };
        Ok(Self {
            origin,
            cow,
            store,
            chunk,
            discard,
        })
    }
}

impl fmt::Display for SnapshotParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}",
            self.origin,
            self.cow,
            self.store.letters(),
            self.chunk
        )?;
        f.write_str(match self.discard {
            Discard::Unsupported => "",
            Discard::ZeroesCow => " 1 discard_zeroes_cow",
            Discard::Passdown => " 2 discard_zeroes_cow discard_passdown_origin",
        })
    }
}

impl fmt::Display for TargetLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.start, self.length, self.target.kind())?;
        match self.target.params().as_str() {
            "" => Ok(()),
            params => write!(f, " {params}"),
        }
    }
}

impl FromStr for TargetLine {
    type Err = TableError;

    fn from_str(line: &str) -> Result<Self, TableError> {
        let mut words = Words(line.split_ascii_whitespace());
        let start = words.sectors("start")?;
        let length = words.sectors("length")?;
        let kind = words.next("target")?;
        let params: Vec<_> = words.0.collect();
        Ok(Self {
            start,
            length,
            target: Target::parse(kind, &params.join(" "))?,
        })
    }
}

/// Why a text is no table line, or one with a target or parameters that dmsnap does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The line ends too early.
    #[error("table line has no {part}")]
    Missing {
        /// The part that should come next.
        part: &'static str,
    },
    /// The line has a word that cannot stand where it does.
    #[error("table line has a bad {part}: {text:?}")]
    Bad {
        /// The part that the word should be.
        part: &'static str,
        /// The word that is there.
        text: String,
    },
}

impl TableError {
    fn bad(part: &'static str, text: &str) -> Self {
        Self::Bad {
            part,
            text: text.to_owned(),
        }
    }
}

/// Takes the words of a line one by one, and names them in errors.
struct Words<'a>(std::str::SplitAsciiWhitespace<'a>);

impl<'a> Words<'a> {
    fn next(&mut self, part: &'static str) -> Result<&'a str, TableError> {
        self.0.next().ok_or(TableError::Missing { part })
    }

    fn number(&mut self, part: &'static str) -> Result<u64, TableError> {
        let word = self.next(part)?;
        let plain = word.bytes().all(|byte| byte.is_ascii_digit());
        plain
            .then(|| word.parse().ok())
            .flatten()
            .ok_or_else(|| TableError::bad(part, word))
    }

    fn sectors(&mut self, part: &'static str) -> Result<Sectors, TableError> {
        self.number(part).map(Sectors::new)
    }

    fn device(&mut self, part: &'static str) -> Result<DeviceNumber, TableError> {
        let word = self.next(part)?;
        word.parse().map_err(|_| TableError::bad(part, word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_print_as_the_kernel_prints_them_and_read_back() {
        for line in [
            "0 2097152 snapshot 7:0 7:1 P 8",
            "0 16 snapshot 7:10 7:300 PO 2097152",
            "0 16 snapshot 7:0 7:1 N 32 1 discard_zeroes_cow",
            "0 16 snapshot 7:0 7:1 P 8 2 discard_zeroes_cow discard_passdown_origin",
            "0 16 snapshot-merge 7:0 7:1 P 8",
            "16 8 linear 7:0 2048",
            "0 1 zero",
            "0 1 error",
        ] {
            let parsed: TargetLine = line
                .parse()
                .unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(parsed.to_string(), line);
        }
    }

    #[test]
    fn malformed_lines_name_the_part() {
        for (line, message) in [
            ("", "table line has no start"),
            ("0", "table line has no length"),
            ("0 8", "table line has no target"),
            ("x 8 zero", "table line has a bad start: \"x\""),
            ("+0 8 zero", "table line has a bad start: \"+0\""),
            ("0 8 crypt 1", "table line has a bad target: \"crypt\""),
            ("0 8 snapshot", "table line has no origin"),
            (
                "0 8 snapshot 7:0 /dev/loop1 P 8",
                "table line has a bad COW device: \"/dev/loop1\"",
            ),
            (
                "0 8 snapshot 7:0 7:1 X 8",
                "table line has a bad store: \"X\"",
            ),
            (
                "0 8 snapshot 7:0 7:1 P 3",
                "table line has a bad chunk size: \"3\"",
            ),
            (
                "0 8 snapshot 7:0 7:1 P 8 1 magic",
                "table line has a bad feature list: \"1 magic\"",
            ),
            ("0 8 zero 1", "table line has a bad parameter: \"1\""),
        ] {
            assert_eq!(
                line.parse::<TargetLine>().expect_err(line).to_string(),
                message
            );
        }
    }
}
