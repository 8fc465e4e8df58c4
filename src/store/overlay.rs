//! The changes of several stores, one laid over the other.

use super::extents::Extent;

/// A piece of a disk that was changed, and which of several COW files has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) extent: Extent,
    /// The place of the COW file.
    pub(crate) from: usize,
}

impl Piece {
    /// Cuts off what is before `at` in the origin, and returns that.
    fn cut(&mut self, at: u64) -> Self {
        let length = at - self.extent.origin_offset;
        let mut head = *self;
        head.extent.length = length;
        self.extent.origin_offset = at;
        self.extent.cow_offset += length;
        self.extent.length -= length;
        head
    }
}

/// Lays the changes of the COW file `from` over those below: what both have is of the upper one. All are in the order of
/// the origin, and none overlap.
pub(crate) fn overlay(below: Vec<Piece>, upper: Vec<Extent>, from: usize) -> Vec<Piece> {
    let mut all = Vec::with_capacity(below.len() + upper.len());
    let mut upper = upper
        .into_iter()
        .map(|extent| Piece { extent, from })
        .peekable();
    for mut piece in below {
        let end = piece.extent.origin_end();
        while let Some(over) = upper.peek().filter(|over| over.extent.origin_offset < end) {
            if over.extent.origin_offset > piece.extent.origin_offset {
                all.push(piece.cut(over.extent.origin_offset));
            }
            let covered = over.extent.origin_end();
            if covered >= end {
                // It may go on over what comes next.
                piece.extent.length = 0;
                break;
            }
            if covered > piece.extent.origin_offset {
                piece.cut(covered);
            }
            all.extend(upper.next());
        }
        if piece.extent.length > 0 {
            all.push(piece);
        }
    }
    all.extend(upper);
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// For each block of the disk which file has it, and where.
    fn map(pieces: &[Piece]) -> Vec<Option<(usize, u64)>> {
        let mut map = vec![None; 200];
        for piece in pieces {
            let extent = piece.extent;
            for nth in 0..extent.length {
                let at = usize::try_from(extent.origin_offset + nth).expect("small");
                map[at] = Some((piece.from, extent.cow_offset + nth));
            }
        }
        map
    }

    /// Extents of random gaps and lengths, in order.
    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0..6u64, 1..9u64), 0..14).prop_map(|gaps| {
            let mut at = 0;
            let extent = |(gap, length): (u64, u64)| {
                let origin_offset = at + gap;
                at = origin_offset + length;
                Extent {
                    origin_offset,
                    length,
                    cow_offset: 1000 + 3 * origin_offset,
                }
            };
            gaps.into_iter().map(extent).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_laid_over_the_rest_is_seen_and_the_rest_around_it(layers in prop::collection::vec(extents(), 1..5)) {
            let mut expected = vec![None; 200];
            let mut all = Vec::new();
            for (from, layer) in layers.into_iter().enumerate() {
                let own: Vec<_> = layer.iter().map(|extent| Piece { extent: *extent, from }).collect();
                for (at, found) in map(&own).into_iter().enumerate() {
                    expected[at] = found.or(expected[at]);
                }
                all = overlay(all, layer, from);
                let apart = |pair: &[Piece]| pair[0].extent.origin_end() <= pair[1].extent.origin_offset;
                prop_assert!(all.windows(2).all(apart), "{:?}", all);
                prop_assert!(all.iter().all(|piece| piece.extent.length > 0));
            }
            prop_assert_eq!(map(&all), expected);
        }
    }
}
