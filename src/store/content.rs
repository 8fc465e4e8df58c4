//! The mark that says what an origin holds, in a store's header behind the mark that names the origin.

use super::header::fnv;
use crate::base::{Digest, OriginIdentity};

/// What is known of an origin's content. What a store's mark has of it is held against what can be known of the image
/// that is there now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    /// A fingerprint of some blocks.
    pub(crate) sample: Option<u128>,
    /// A digest of everything.
    pub(crate) digest: Option<(DigestOf, Digest)>,
}

/// Whose digest it is: only two of one kind say anything about each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DigestOf {
    /// The caller gave it.
    Caller,
    /// The kernel measured it (fs-verity), by the hash algorithm of that number.
    Verity(u16),
}

impl DigestOf {
    const fn fields(self) -> [u8; 4] {
        match self {
            Self::Caller => [1, 0, 0, 0],
            Self::Verity(algorithm) => {
                let [low, high] = algorithm.to_le_bytes();
                [2, 0, low, high]
            }
        }
    }

    fn read(fields: [u8; 4]) -> Option<Self> {
        match fields {
            [1, 0, 0, 0] => Some(Self::Caller),
            [2, 0, low, high] => Some(Self::Verity(u16::from_le_bytes([low, high]))),
            _ => None,
        }
    }
}

impl Content {
    /// Returns the same with the caller's digest, if there is one.
    pub(crate) fn with(self, given: Option<Digest>) -> Self {
        let given = given.map(|digest| (DigestOf::Caller, digest));
        Self {
            digest: given.or(self.digest),
            ..self
        }
    }

    /// True if it is the content of the same image; `None` if the two have nothing in common by which to tell. A digest
    /// tells more than a fingerprint, so that is not asked where there are two digests of one kind.
    pub(crate) fn is_that_of(&self, other: &Self) -> Option<bool> {
        self.has_digest_of(other).or_else(|| {
            let samples = self.sample.zip(other.sample);
            samples.map(|(ours, theirs)| ours == theirs)
        })
    }

    /// The same by the digests alone.
    pub(crate) fn has_digest_of(&self, other: &Self) -> Option<bool> {
        let ((of, ours), (other_of, theirs)) = self.digest.zip(other.digest)?;
        let comparable = of == other_of && ours.as_bytes().len() == theirs.as_bytes().len();
        comparable.then_some(ours == theirs)
    }
}

/// The offset in bytes of the mark.
pub(crate) const CONTENT_AT: usize = 256;

/// What it begins with. The fingerprint follows, 128 bits; whose digest it has (0 for none), 16 bits; by which algorithm,
/// 16 bits; the digest's length in bytes; 1 if there is no fingerprint; 2 bytes of zeroes; the digest, 64 bytes; a checksum.
/// Earlier marks had zeroes between the fingerprint and the checksum.
const CONTENT: [u8; 16] = *b"dmsnap content 1";

/// The length of the mark in bytes.
pub(crate) const CONTENT_BYTES: usize = 112;

const FIELDS_AT: usize = 32;
const DIGEST_AT: usize = 40;

/// Makes the mark with the origin's content, for origins whose modification time is no evidence. It is valid only
/// together with the first mark: once that names another origin, as after a merge, this one counts no more.
pub(crate) fn content(origin: OriginIdentity, content: Content) -> [u8; CONTENT_BYTES] {
    let mut mark = [0; CONTENT_BYTES];
    mark[..16].copy_from_slice(&CONTENT);
    match content.sample {
        Some(sample) => mark[16..32].copy_from_slice(&sample.to_le_bytes()),
        None => mark[FIELDS_AT + 5] = 1,
    }
    if let Some((of, digest)) = content.digest {
        let bytes = digest.as_bytes();
        mark[FIELDS_AT..FIELDS_AT + 4].copy_from_slice(&of.fields());
        mark[FIELDS_AT + 4] = u8::try_from(bytes.len()).unwrap_or_default();
        mark[DIGEST_AT..DIGEST_AT + bytes.len()].copy_from_slice(bytes);
    }
    let sum = sum(&mark[..CONTENT_BYTES - 8], origin);
    mark[CONTENT_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
    mark
}

/// Computes the checksum of the mark and of the origin that it is valid for.
fn sum(mark: &[u8], origin: OriginIdentity) -> u64 {
    let (size, mtime) = (
        origin.size_bytes.to_le_bytes(),
        origin.mtime_ns.to_le_bytes(),
    );
    fnv(mark.iter().chain(&size).chain(&mtime))
}

/// Reads the mark of a store that was made over `origin`; `None` where there is none, or one of another origin's.
pub(super) fn read(start: &[u8], origin: OriginIdentity) -> Option<Content> {
    let mark = start.get(CONTENT_AT..CONTENT_AT + CONTENT_BYTES)?;
    let sample = mark.strip_prefix(&CONTENT)?.first_chunk()?;
    let &[fields @ .., length, no_sample] = mark[FIELDS_AT..].first_chunk::<6>()?;
    let digest = mark[DIGEST_AT..].get(..usize::from(length));
    let digest = digest.and_then(Digest::from_slice);
    let found = Content {
        sample: (no_sample == 0).then_some(u128::from_le_bytes(*sample)),
        digest: DigestOf::read(fields).zip(digest),
    };
    (mark == content(origin, found)).then_some(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents() -> impl Strategy<Value = Content> {
        let of = prop_oneof![
            Just(DigestOf::Caller),
            any::<u16>().prop_map(DigestOf::Verity)
        ];
        let digest = prop_oneof![
            any::<[u8; 32]>().prop_map(Digest::from),
            prop::collection::vec(any::<u8>(), 64)
                .prop_map(|bytes| Digest::from_slice(&bytes).expect("64 bytes")),
        ];
        let digest = prop::option::of((of, digest));
        (prop::option::of(any::<u128>()), digest)
            .prop_map(|(sample, digest)| Content { sample, digest })
    }

    fn origins() -> impl Strategy<Value = OriginIdentity> {
        (any::<u64>(), any::<i64>()).prop_map(|(size_bytes, mtime_ns)| OriginIdentity {
            size_bytes,
            mtime_ns,
        })
    }

    fn start(mark: &[u8]) -> Vec<u8> {
        let mut start = vec![0; 512];
        start[CONTENT_AT..CONTENT_AT + mark.len()].copy_from_slice(mark);
        start
    }

    proptest! {
        #[test]
        fn a_mark_is_read_as_it_was_made_and_none_with_a_changed_byte(
            known in contents(), origin in origins(), at in 0..CONTENT_BYTES, bit in 0u8..8,
        ) {
            let mut mark = content(origin, known);
            prop_assert_eq!(read(&start(&mark), origin), Some(known));
            let other = OriginIdentity { mtime_ns: !origin.mtime_ns, ..origin };
            prop_assert_eq!(read(&start(&mark), other), None);
            mark[at] ^= 1u8 << bit;
            prop_assert_eq!(read(&start(&mark), origin), None);
        }

        /// As marks were before they had digests.
        #[test]
        fn an_old_mark_is_read_as_a_fingerprint(sample in any::<u128>(), origin in origins()) {
            let mut mark = [0; CONTENT_BYTES];
            mark[..16].copy_from_slice(b"dmsnap content 1");
            mark[16..32].copy_from_slice(&sample.to_le_bytes());
            let mut sum = 0xcbf2_9ce4_8422_2325_u64;
            let (size, mtime) = (origin.size_bytes.to_le_bytes(), origin.mtime_ns.to_le_bytes());
            for byte in mark[..104].iter().chain(&size).chain(&mtime) {
                sum = (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            }
            mark[104..].copy_from_slice(&sum.to_le_bytes());
            let found = Content { sample: Some(sample), digest: None };
            prop_assert_eq!(read(&start(&mark), origin), Some(found));
        }

        #[test]
        fn no_bytes_are_too_odd_to_read(bytes in prop::collection::vec(any::<u8>(), 0..512), origin in origins()) {
            let _ = read(&bytes, origin);
        }
    }

    #[test]
    fn digests_of_one_kind_decide_and_fingerprints_where_there_are_none() {
        let (a, b) = (Digest::from([1; 32]), Digest::from([2; 32]));
        let of = |sample, of: Option<(DigestOf, Digest)>| Content { sample, digest: of };
        let caller = |digest| Some((DigestOf::Caller, digest));
        let verity = |algorithm, digest| Some((DigestOf::Verity(algorithm), digest));
        for (one, other, same) in [
            (of(Some(1), caller(a)), of(Some(2), caller(a)), Some(true)),
            (of(Some(1), caller(a)), of(Some(1), caller(b)), Some(false)),
            (
                of(Some(1), caller(a)),
                of(Some(1), verity(1, a)),
                Some(true),
            ),
            (of(None, caller(a)), of(Some(1), verity(1, a)), None),
            (of(None, verity(1, a)), of(None, verity(1, a)), Some(true)),
            (of(None, verity(1, a)), of(None, verity(2, a)), None),
            (of(Some(1), verity(1, a)), of(Some(2), None), Some(false)),
            (
                of(None, caller(a)),
                of(None, caller(Digest::from([1; 64]))),
                None,
            ),
            (Content::default(), of(Some(1), None), None),
        ] {
            assert_eq!(one.is_that_of(&other), same, "{one:?} {other:?}");
            assert_eq!(other.is_that_of(&one), same, "{other:?} {one:?}");
        }
    }
}
