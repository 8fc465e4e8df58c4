//! A digest of an image's content.

use std::fmt;
use std::str::FromStr;

/// The length in bytes of the longest digest.
const LONGEST: usize = 64;

/// A digest of an image's content that the caller knows, of 32 or 64 bytes, such as a SHA-256 or SHA-512; printed and
/// parsed as hexadecimal digits.
///
/// dmsnap computes none: it compares the digest that a COW file was made with to the one that is given later
/// ([`SnapshotOptions::digest`](crate::SnapshotOptions::digest)).
///
/// ```
/// use dmsnap::base::Digest;
///
/// let digest: Digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08".parse()?;
/// assert_eq!(digest.as_bytes().len(), 32);
/// # Ok::<(), dmsnap::base::InvalidDigest>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct Digest {
    bytes: [u8; LONGEST],
    long: bool,
}

/// The error for what is no digest: neither 32 nor 64 bytes, or not hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no digest: need 64 or 128 hexadecimal digits")]
#[non_exhaustive]
pub struct InvalidDigest {
    /// The text as given.
    pub text: String,
}

impl Digest {
    /// Returns the digest of 32 or 64 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        let length = if self.long { LONGEST } else { LONGEST / 2 };
        &self.bytes[..length]
    }

    /// Takes over 32 or 64 bytes; `None` for any other length.
    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [] => None,
            _ if bytes.len() == LONGEST => <[u8; 64]>::try_from(bytes).ok().map(Self::from),
            _ => <[u8; 32]>::try_from(bytes).ok().map(Self::from),
        }
    }
}

impl From<[u8; 32]> for Digest {
    fn from(short: [u8; 32]) -> Self {
        let mut bytes = [0; LONGEST];
        bytes[..short.len()].copy_from_slice(&short);
        Self { bytes, long: false }
    }
}

impl From<[u8; 64]> for Digest {
    fn from(bytes: [u8; 64]) -> Self {
        Self { bytes, long: true }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let value = |digit: &u8| -> Option<u8> { char::from(*digit).to_digit(16)?.try_into().ok() };
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some(value(high)? << 4 | value(low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes
            .as_deref()
            .and_then(Self::from_slice)
            .ok_or_else(|| InvalidDigest {
                text: text.to_owned(),
            })
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_survive_their_text_and_other_texts_are_none() {
        for digest in [Digest::from([0xa5; 32]), Digest::from([0x0f; 64])] {
            let text = digest.to_string();
            assert_eq!(text.len(), digest.as_bytes().len() * 2);
            assert_eq!(text.parse(), Ok(digest));
            assert_eq!(text.to_uppercase().parse(), Ok(digest));
            assert_eq!(Digest::from_slice(digest.as_bytes()), Some(digest));
        }
        assert_ne!(Digest::from([0; 32]), Digest::from([0; 64]));
        let hex = "0".repeat(64);
        for bad in [
            "",
            "0",
            "xy",
            &hex[1..],
            &format!("{hex}0"),
            &format!("+{}", &hex[1..]),
        ] {
            let error = bad.parse::<Digest>().expect_err("no digest");
            assert_eq!(error.text, bad);
        }
    }
}
