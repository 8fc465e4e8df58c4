//! How well a p50, or a ratio of two, is known.

use std::time::Duration;

use super::{percentile, ratio};

/// What was seen, and where 95 of 100 such runs would have it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Interval {
    pub(crate) seen: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

const RESAMPLES: usize = 400;

impl Interval {
    pub(crate) fn exact(seen: f64) -> Self {
        Self {
            seen,
            low: seen,
            high: seen,
        }
    }

    /// Of the ratio of two p50s, whose samples of one place are of one round: by the bootstrap, rounds drawn whole. The
    /// draws are the same ones in every run.
    pub(crate) fn of_p50s(one: &[Duration], other: &[Duration]) -> Option<Self> {
        let rounds = one.len().min(other.len());
        if rounds == 0 {
            return None;
        }
        let p50_of = |samples: &[Duration], drawn: &[usize]| {
            let drawn: Vec<_> = drawn.iter().map(|nth| samples[*nth]).collect();
            percentile(&drawn, 50)
        };
        let of = |drawn: &[usize]| ratio(p50_of(one, drawn), p50_of(other, drawn));
        let mut draws = Draws(1);
        let mut ratios: Vec<_> = (0..RESAMPLES)
            .map(|_| {
                let drawn: Vec<_> = (0..rounds).map(|_| draws.below(rounds)).collect();
                of(&drawn)
            })
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        Some(Self {
            seen: of(&(0..rounds).collect::<Vec<_>>()),
            low: ratios[RESAMPLES / 40],
            high: ratios[RESAMPLES - 1 - RESAMPLES / 40],
        })
    }
}

/// Numbers that look random: splitmix64.
struct Draws(u64);

impl Draws {
    fn below(&mut self, count: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % (count as u64)).unwrap_or_default()
    }
}
