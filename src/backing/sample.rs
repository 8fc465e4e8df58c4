//! Computes a fingerprint of an image, for images whose modification time is no evidence.

use super::Backing;
use crate::call::ask;
use crate::error::{Result, Step};
use crate::kernel::Files;

/// How many bytes are read at each place.
const BLOCK: usize = 16 << 10;

/// Computes FNV-1a (128 bits, eight bytes at a time) over the image's size, its head, its tail and two blocks between.
/// The head has a file system's superblock and descriptors. Unlike a digest of everything, equal fingerprints are no
/// proof that two images are equal.
pub(super) fn sample<H: Files>(host: &H, image: &Backing<'_, H::File>) -> Result<u128> {
    let bytes = image.facts.size_bytes;
    let mut sum = word(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, bytes);
    let block = BLOCK as u64;
    let whole = bytes <= 4 * block;
    let (places, length) = if whole {
        (vec![0], 4 * BLOCK)
    } else {
        let third = bytes / 3 / 4096 * 4096;
        (vec![0, third, 2 * third, bytes - block], BLOCK)
    };
    let mut buffer = vec![0; length];
    for place in places {
        let at = usize::try_from(place).unwrap_or(usize::MAX);
        let read = || host.read_at(&image.file, &mut buffer, at);
        let got = ask(Step::ReadFile, image.path, read)?;
        for bytes in buffer[..got].chunks(8) {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            sum = word(sum, u64::from_le_bytes(eight));
        }
    }
    Ok(sum)
}

fn word(sum: u128, word: u64) -> u128 {
    (sum ^ u128::from(word)).wrapping_mul(0x0100_0000_0000_0000_0000_013b)
}
