//! Translates a request into the spans of the pool that answer it.
//!
//! Every entry is checked against the layout and the offer's block list, so the spans hold bytes of offered blocks only
//! (promise 7). No I/O.

use kvferry_proto::{Contents, Group, GroupId, OfferGroup, PoolLayout};

use super::frames::{Entry, MAX_BLOCKS, MAX_PIECES};
use crate::memory::Span;

/// A request that names blocks outside of the offer or the pool, or too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OutOfBounds;

/// Fills `spans` with the requested pieces, neighbours merged, and returns the number of their bytes. `entries` holds the
/// entries' bytes. Adds the blocks that were looked up to `blocks`, also if the request is refused.
pub(super) fn gather(
    layout: &PoolLayout,
    offered: &Contents,
    entries: &[u8],
    spans: &mut Vec<Span>,
    blocks: &mut u64,
) -> Result<u64, OutOfBounds> {
    spans.clear();
    let most = blocks.saturating_add(MAX_BLOCKS);
    let (entries, rest) = entries.as_chunks::<{ Entry::LEN }>();
    if !rest.is_empty() {
        return Err(OutOfBounds);
    }
    let mut total = 0u64;
    let mut found: Option<(&Group, &OfferGroup)> = None;
    for bytes in entries {
        let e = Entry::decode(bytes).map_err(|_| OutOfBounds)?;
        let id = GroupId(e.group);
        // Nearly always the previous entry's group.
        let (group, offer) = match found.filter(|f| f.0.id == id) {
            Some(f) => f,
            None => layout.group(id).zip(offered.groups.iter().find(|o| o.group == id)).ok_or(OutOfBounds)?,
        };
        found = Some((group, offer));
        let region = group.regions.get(usize::from(e.region)).ok_or(OutOfBounds)?;
        if e.piece == 0 || e.within.checked_add(e.piece).is_none_or(|end| end > region.block_bytes) {
            return Err(OutOfBounds);
        }
        let first = e.position.checked_sub(offer.first_position).ok_or(OutOfBounds)? as usize;
        let end = first.checked_add(e.blocks as usize).ok_or(OutOfBounds)?;
        let ids = offer.blocks.get(first..end).filter(|ids| !ids.is_empty()).ok_or(OutOfBounds)?;
        // The prefill still writes what is above the mark.
        if !offered.is_readable(group.block_tokens, e.position.saturating_add(e.blocks - 1)) {
            return Err(OutOfBounds);
        }
        if blocks.saturating_add(ids.len() as u64) > most {
            return Err(OutOfBounds);
        }
        *blocks += ids.len() as u64;
        for id in ids {
            // Refuse a null block, and a block outside of the pool.
            let id = id.filter(|id| id.0 < group.blocks).ok_or(OutOfBounds)?;
            let offset = region.block_offset(id.0) + e.within;
            let full = spans.len() >= MAX_PIECES;
            match spans.last_mut() {
                Some(s) if s.segment == region.segment && s.offset + s.len == offset => s.len += e.piece,
                _ if full => return Err(OutOfBounds),
                _ => spans.push(Span { segment: region.segment, offset, len: e.piece }),
            }
        }
        // Checked: 2^20 pieces of 2^56 bytes would overflow.
        total = e.piece.checked_mul(ids.len() as u64).and_then(|n| total.checked_add(n)).ok_or(OutOfBounds)?;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_proto::BlockId;
    use proptest::prelude::*;

    const BLOCK: u64 = 64;

    fn setting() -> (PoolLayout, Contents) {
        let blocks = [Some(3), Some(4), None, Some(9), Some(9), Some(10)].map(|b| b.map(BlockId)).to_vec();
        let groups = vec![OfferGroup { group: GroupId(0), first_position: 100, blocks }];
        (PoolLayout::uniform(10, 2, BLOCK, 16), Contents { groups, complete: true, ..Contents::default() })
    }

    fn ask(entries: &[Entry]) -> Result<(u64, Vec<Span>), OutOfBounds> {
        let (layout, offered) = setting();
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.encode()).collect();
        let mut spans = Vec::new();
        gather(&layout, &offered, &bytes, &mut spans, &mut 0).map(|total| (total, spans))
    }

    const GOOD: Entry = Entry { group: 0, region: 0, position: 100, blocks: 2, within: 0, piece: BLOCK };

    #[test]
    fn nothing_above_the_mark_of_an_open_offer_is_sent() {
        let (layout, mut offered) = setting();
        // The blocks have 16 tokens: position 100 is computed but for its last token.
        let mut read = |tokens, entry: Entry| {
            offered = Contents { tokens, whole: 5000, complete: false, ..offered.clone() };
            gather(&layout, &offered, &entry.encode(), &mut Vec::new(), &mut 0).is_ok()
        };
        let one = Entry { blocks: 1, ..GOOD };
        assert!(!read(101 * 16 - 1, one) && read(101 * 16, one));
        assert!(!read(102 * 16 - 1, GOOD) && read(102 * 16, GOOD));
    }

    #[test]
    fn neighbours_become_one_span_and_others_do_not() {
        let span = |offset, len| Span { segment: 0, offset, len };
        assert_eq!(ask(&[GOOD]), Ok((128, vec![span(192, 128)])));
        let part = Entry { within: 8, piece: 16, ..GOOD };
        assert_eq!(ask(&[part]), Ok((32, vec![span(200, 16), span(264, 16)])));
        let (a, b) = (Entry { piece: 16, blocks: 1, ..GOOD }, Entry { within: 16, piece: 8, blocks: 1, ..GOOD });
        assert_eq!(ask(&[a, b]), Ok((24, vec![span(192, 24)])), "also across entries");
        let far = Entry { position: 103, region: 1, ..GOOD };
        assert_eq!(ask(&[GOOD, far]), Ok((256, vec![span(192, 128), span(1216, 64), span(1216, 64)])));
    }

    #[test]
    fn blocks_that_were_not_offered_are_out_of_bounds() {
        for bad in [
            Entry { group: 1, ..GOOD },
            Entry { region: 2, ..GOOD },
            Entry { position: 99, ..GOOD },
            Entry { position: 101, ..GOOD },
            Entry { position: 102, blocks: 1, ..GOOD },
            Entry { position: 105, blocks: 1, ..GOOD },
            Entry { position: 106, blocks: 1, ..GOOD },
            Entry { position: u32::MAX, blocks: u32::MAX, ..GOOD },
            Entry { blocks: 0, ..GOOD },
            Entry { piece: 0, ..GOOD },
            Entry { piece: BLOCK + 1, ..GOOD },
            Entry { within: 1, ..GOOD },
            Entry { within: u64::MAX, piece: 2, ..GOOD },
        ] {
            assert_eq!(ask(&[GOOD, bad]), Err(OutOfBounds), "{bad:?}");
        }
    }

    #[test]
    fn a_small_request_cannot_name_a_million_pieces() {
        let piece = Entry { piece: 8, ..GOOD };
        assert_eq!(ask(&vec![piece; MAX_PIECES / 2]).unwrap().1.len(), MAX_PIECES);
        assert_eq!(ask(&vec![piece; MAX_PIECES / 2 + 1]), Err(OutOfBounds));
        assert_eq!(ask(&vec![GOOD; MAX_BLOCKS as usize / 2 + 1]), Err(OutOfBounds));
    }

    proptest! {
        #[test]
        fn no_request_reaches_a_byte_that_was_not_offered(
            entries in proptest::collection::vec(
                (0u16..2, 0u16..3, 98u32..108, 0u32..4, 0u64..66, 0u64..66), 1..6)
        ) {
            let entries: Vec<_> = entries.into_iter().map(|(group, region, position, blocks, within, piece)| {
                Entry { group, region, position, blocks, within, piece }
            }).collect();
            if let Ok((total, spans)) = ask(&entries) {
                prop_assert_eq!(total, spans.iter().map(|s| s.len).sum::<u64>());
                for s in spans {
                    for byte in s.offset..s.offset + s.len {
                        prop_assert!([3, 4, 9].contains(&(byte % 640 / BLOCK)) && byte < 1280, "{}", byte);
                    }
                }
            }
        }
    }
}
