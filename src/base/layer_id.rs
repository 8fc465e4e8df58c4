//! The id of a layer.

use std::fmt;
use std::str::FromStr;

/// The id of a layer: 32 hexadecimal digits, which its COW file's mark has, and the uuid of its dm device too
/// ([`DeviceUuid::layer_id`](super::DeviceUuid::layer_id)).
///
/// It stays the same when the layer's device goes and is put together again, also on another host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct LayerId(u128);

/// The error for what is no layer's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no layer's id: need 32 hexadecimal digits, not all of them 0")]
#[non_exhaustive]
pub struct InvalidLayerId {
    /// The text as given.
    pub text: String,
}

impl LayerId {
    /// Takes over the number; `None` for 0, which stands for an image.
    pub(crate) const fn new(id: u128) -> Option<Self> {
        match id {
            0 => None,
            id => Some(Self(id)),
        }
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerId({self})")
    }
}

impl FromStr for LayerId {
    type Err = InvalidLayerId;

    fn from_str(text: &str) -> Result<Self, InvalidLayerId> {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let id = (digits && text.len() == 32)
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten();
        id.and_then(Self::new).ok_or_else(|| InvalidLayerId {
            text: text.to_owned(),
        })
    }
}

impl TryFrom<String> for LayerId {
    type Error = InvalidLayerId;

    fn try_from(text: String) -> Result<Self, InvalidLayerId> {
        text.parse()
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_text_and_other_texts_are_none() {
        for id in [1, 0x0123_4567_89ab_cdef, u128::MAX] {
            let id = LayerId::new(id).expect("not 0");
            assert_eq!(id.to_string().parse(), Ok(id));
            assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        }
        let digits = "1".repeat(32);
        for bad in [
            "",
            &digits[1..],
            &format!("{digits}1"),
            &format!("+{}", &digits[1..]),
            &"0".repeat(32),
            &"x".repeat(32),
        ] {
            let error = bad.parse::<LayerId>().expect_err("no id");
            assert_eq!(error.text, bad);
        }
    }
}
