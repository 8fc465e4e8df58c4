//! The COW files of a stack, put in order by what their marks say.

use std::path::Path;

use crate::error::LayerRefusal;
use crate::store::Chain;

/// How many layers a stack may have, unless more are asked for: a read may go through all of them.
pub(crate) const DEEPEST: u32 = 32;

/// A COW file and its place: what it was frozen as, and what it was made over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a Path,
    pub(crate) chain: Chain,
}

/// What a stack is to stand on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ground<'a> {
    pub(crate) path: &'a Path,
    /// The id of the layer that it is; 0 for an image.
    pub(crate) id: u128,
}

/// The order of the files from the bottom up, as indices: each was made over the one before. Without a `ground`, the
/// lowest may stand on anything.
///
/// It must be one stack, and all of it: what is missing, given twice or of another stack is refused by its name.
pub(crate) fn in_order(
    places: &[Place<'_>],
    ground: Option<Ground<'_>>,
) -> Result<Vec<usize>, LayerRefusal> {
    apart(places)?;
    let is_given = |id: u128| id != 0 && places.iter().any(|place| place.chain.id == id);
    let without = |place: &&Place<'_>| !is_given(place.chain.parent);
    let stands_on = |ground: &Ground<'_>, place: &Place<'_>| place.chain.parent == ground.id;
    let lowest = match ground {
        Some(ground) => places.iter().find(|place| stands_on(&ground, place)),
        None => places
            .iter()
            .filter(without)
            .min_by_key(|place| place.chain.depth),
    };
    let orphan = |place: &&Place<'_>| {
        without(place) && !lowest.is_some_and(|lowest| std::ptr::eq(lowest, *place))
    };
    if let Some(orphan) = places.iter().find(orphan) {
        return Err(missing(orphan, ground));
    }
    let is_ground = |place: &&Place<'_>| {
        ground.is_some_and(|ground| ground.id != 0 && ground.id == place.chain.id)
    };
    if let Some(place) = places.iter().find(is_ground) {
        return Err(foreign(place, ground));
    }
    let mut order = Vec::with_capacity(places.len());
    let mut next = lowest.map(|lowest| lowest.chain.parent);
    while let Some(parent) = next {
        let above = places.iter().position(|place| place.chain.parent == parent);
        let Some(above) = above.filter(|above| !order.contains(above)) else {
            break;
        };
        order.push(above);
        next = Some(places[above].chain.id).filter(|id| *id != 0);
    }
    match (0..places.len()).find(|index| !order.contains(index)) {
        Some(index) => Err(foreign(&places[index], ground)),
        None => Ok(order),
    }
}

/// Refuses two files with one id, and two that were made over the same.
fn apart(places: &[Place<'_>]) -> Result<(), LayerRefusal> {
    for (nth, one) in places.iter().enumerate() {
        for other in &places[nth + 1..] {
            let (first, second) = (one.path.to_owned(), other.path.to_owned());
            if one.chain.id != 0 && one.chain.id == other.chain.id {
                return Err(LayerRefusal::Twice { first, second });
            }
            if one.chain.parent == other.chain.parent {
                return Err(LayerRefusal::Apart { first, second });
            }
        }
    }
    Ok(())
}

/// The layer under this file is not there; or it stands on an image, where a layer is its ground.
fn missing(place: &Place<'_>, ground: Option<Ground<'_>>) -> LayerRefusal {
    match place.chain.parent {
        0 => foreign(place, ground),
        _ => LayerRefusal::Missing {
            cow: place.path.to_owned(),
        },
    }
}

fn foreign(place: &Place<'_>, ground: Option<Ground<'_>>) -> LayerRefusal {
    LayerRefusal::Foreign {
        cow: place.path.to_owned(),
        origin: ground.map_or(place.path, |ground| ground.path).to_owned(),
    }
}

/// Refuses a stack that is too deep; `below` layers are under the `files`.
pub(crate) fn shallow(files: usize, below: u32, any_depth: bool) -> Result<(), LayerRefusal> {
    let layers = u32::try_from(files)
        .unwrap_or(u32::MAX)
        .saturating_add(below);
    match layers > DEEPEST && !any_depth {
        true => Err(LayerRefusal::TooDeep {
            layers,
            most: DEEPEST,
        }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

    fn places<const N: usize>(ids: [(u128, u128); N]) -> Vec<Place<'static>> {
        let place = |(path, (parent, id)): (&'static str, (u128, u128))| Place {
            path: Path::new(path),
            chain: Chain {
                id,
                parent,
                depth: u32::try_from(parent).unwrap_or(0),
                frozen: id != 0,
            },
        };
        NAMES.into_iter().zip(ids).map(place).collect()
    }

    fn image() -> Option<Ground<'static>> {
        ground(0)
    }

    fn ground(id: u128) -> Option<Ground<'static>> {
        let path = Path::new("ground");
        Some(Ground { path, id })
    }

    /// The variant and the files that it names.
    fn refused(ids: &[(u128, u128)], ground: Option<Ground<'_>>) -> String {
        let mut padded = [(0, 0); 5];
        padded[..ids.len()].copy_from_slice(ids);
        let mut given = places(padded);
        given.truncate(ids.len());
        match in_order(&given, ground).expect_err("no stack") {
            LayerRefusal::Twice { first, second } => format!("twice {first:?} {second:?}"),
            LayerRefusal::Apart { first, second } => format!("apart {first:?} {second:?}"),
            LayerRefusal::Missing { cow } => format!("missing under {cow:?}"),
            LayerRefusal::Foreign { cow, .. } => format!("foreign {cow:?}"),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn files_in_any_order_come_into_that_of_their_marks() {
        let stack = [(0, 1), (1, 2), (2, 3), (3, 0)];
        for turn in 0..4 {
            let mut turned = stack;
            turned.rotate_left(turn);
            for swapped in [false, true] {
                if swapped {
                    turned.swap(0, 2);
                }
                let found = in_order(&places(turned), image()).expect("a stack");
                let ids: Vec<_> = found.iter().map(|index| turned[*index]).collect();
                assert_eq!(ids, stack);
            }
        }
        assert_eq!(in_order(&places([(7, 8)]), ground(7)), Ok(vec![0]));
        assert_eq!(in_order(&places([(8, 9), (7, 8)]), None), Ok(vec![1, 0]));
        assert_eq!(in_order(&places([(0, 0)]), None), Ok(vec![0]));
        assert_eq!(in_order(&[], image()), Ok(vec![]));
    }

    #[test]
    fn what_is_no_stack_is_refused_by_the_name_of_a_file() {
        for (ids, on, said) in [
            (&[(0, 1), (2, 3)][..], image(), r#"missing under "b""#),
            (&[(1, 2), (2, 3)], image(), r#"missing under "a""#),
            (&[(1, 2), (2, 3), (5, 6)], None, r#"missing under "c""#),
            (&[(0, 1), (1, 2)], ground(7), r#"foreign "a""#),
            (&[(0, 1), (7, 8)], ground(7), r#"foreign "a""#),
            (&[(7, 8), (0, 1)], None, r#"missing under "a""#),
            (&[(0, 1), (1, 2), (0, 3)], image(), r#"apart "a" "c""#),
            (&[(0, 1), (1, 2), (1, 0)], image(), r#"apart "b" "c""#),
            (&[(0, 1), (5, 1)], image(), r#"twice "a" "b""#),
            (&[(0, 1), (0, 1)], image(), r#"twice "a" "b""#),
            (&[(2, 1), (1, 2)], image(), r#"foreign "a""#),
            (&[(2, 1), (1, 2), (0, 3)], image(), r#"foreign "a""#),
            (&[(2, 1), (1, 2)], None, r#"foreign "a""#),
            (&[(1, 1)], None, r#"foreign "a""#),
            (&[(1, 1)], ground(1), r#"foreign "a""#),
            (&[(2, 1), (1, 2)], ground(2), r#"foreign "b""#),
            (&[(7, 8), (6, 7)], ground(7), r#"missing under "b""#),
        ] {
            assert_eq!(refused(ids, on), said, "{ids:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the marks say: an order in which each stands on the one before, or a refusal.
        #[test]
        fn marks_of_any_kind_make_a_stack_or_are_refused(
            ids in prop::array::uniform5((0..6u128, 0..6u128)),
            count in 1..=5usize,
            on in prop::option::of(0..6u128),
        ) {
            let mut given = places(ids);
            given.truncate(count);
            if let Ok(order) = in_order(&given, on.and_then(ground)) {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                prop_assert!(sorted.into_iter().eq(0..count));
                let mut under = on.unwrap_or(given[order[0]].chain.parent);
                for (nth, index) in order.into_iter().enumerate() {
                    prop_assert!(given[index].chain.parent == under && (nth == 0 || under != 0));
                    under = given[index].chain.id;
                }
            }
        }
    }

    #[test]
    fn a_stack_has_as_many_layers_as_are_sensible_unless_more_are_asked_for() {
        assert_eq!(shallow(30, 2, false), Ok(()));
        assert_eq!(shallow(33, 0, true), Ok(()));
        let (layers, most) = (33, 32);
        let refusal = LayerRefusal::TooDeep { layers, most };
        assert_eq!(shallow(31, 2, false), Err(refusal));
    }
}
