//! Plans of attention: where rows stand, and who computes what. A plan is made on the host and uploaded; it never decides
//! a result's bits.

use crate::compute::launch::device::View;
use crate::compute::ops::{Heads, PAGE, Span};

/// Packed rows, or keys, of a block.
pub(super) const TILE_ROWS: usize = 64;
/// Packed rows of a block of `attention_hopper.cu`: two warpgroups of 64.
const WIDE_ROWS: usize = 128;
/// Keys of one online softmax.
pub const CHUNK: usize = 256;
/// Slot of a row whose key and value are not kept.
pub const NO_SLOT: u32 = u32::MAX;

pub(super) fn as_u32(n: usize) -> u32 {
    u32::try_from(n).expect("sizes of a model and a batch fit 32 bits")
}

/// Where rows stand: positions (rows of the angle tables) and slots (`page * 16 + place`, or [`NO_SLOT`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RopePlan {
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Slot of each row.
    pub slots: Vec<u32>,
}

impl RopePlan {
    /// The plan of a batch of `t` rows; rows outside all spans have position 0 and no slot.
    pub fn new(t: usize, spans: &[Span<'_>]) -> Self {
        let mut plan = RopePlan { positions: vec![0; t], slots: vec![NO_SLOT; t] };
        for span in spans {
            for i in 0..span.len {
                let pos = span.pos + i;
                plan.positions[span.row + i] = as_u32(pos);
                plan.slots[span.row + i] = span.pages[pos / PAGE] * PAGE as u32 + (pos % PAGE) as u32;
            }
        }
        plan
    }
}

/// Who computes what for many rows of each sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanPlan {
    /// Per sequence: first row, rows, first position, where its pages begin in `pages`.
    pub spans: Vec<[u32; 4]>,
    /// Tiles of 64 packed rows: (span, tile). Those with the most keys come first.
    pub row_tiles: Vec<[u32; 2]>,
    /// The same of 128 packed rows.
    pub wide_tiles: Vec<[u32; 2]>,
    /// Tiles of 64 keys: (span, tile). Those that most rows see come first.
    pub key_tiles: Vec<[u32; 2]>,
    /// Pages of all sequences.
    pub pages: Vec<u32>,
    /// Rows that the batch must have.
    pub num_rows: usize,
    /// Pages that the layer must have.
    pub num_pages: usize,
    /// Whether all sequences lie whole in the batch.
    pub(super) whole: bool,
}

impl SpanPlan {
    /// The plan of a batch. Spans do not share rows.
    pub fn new(heads: Heads, spans: &[Span<'_>]) -> Self {
        let mut plan = SpanPlan {
            spans: Vec::new(),
            row_tiles: Vec::new(),
            wide_tiles: Vec::new(),
            key_tiles: Vec::new(),
            pages: Vec::new(),
            num_rows: 0,
            num_pages: 0,
            whole: spans.iter().all(|s| s.pos == 0),
        };
        for (i, span) in spans.iter().enumerate() {
            let end = span.pos + span.len;
            let pages = &span.pages[..end.div_ceil(PAGE)];
            let at = as_u32(plan.pages.len());
            plan.spans.push([as_u32(span.row), as_u32(span.len), as_u32(span.pos), at]);
            plan.pages.extend_from_slice(pages);
            plan.num_rows = plan.num_rows.max(span.row + span.len);
            plan.num_pages = plan.num_pages.max(pages.iter().max().map_or(0, |p| *p as usize + 1));
            let packed = span.len * heads.group();
            plan.row_tiles.extend((0..packed.div_ceil(TILE_ROWS)).map(|t| [i as u32, as_u32(t)]));
            plan.wide_tiles.extend((0..packed.div_ceil(WIDE_ROWS)).map(|t| [i as u32, as_u32(t)]));
            if span.len > 0 {
                plan.key_tiles.extend((0..end.div_ceil(TILE_ROWS)).map(|t| [i as u32, as_u32(t)]));
            }
        }
        let spans = &plan.spans;
        let last_key = |[s, tile]: [u32; 2], rows: usize| {
            let [_, len, pos, _] = spans[s as usize];
            pos as usize + ((tile as usize + 1) * rows).div_ceil(heads.group()).min(len as usize)
        };
        plan.row_tiles.sort_by_key(|t| std::cmp::Reverse(last_key(*t, TILE_ROWS)));
        plan.wide_tiles.sort_by_key(|t| std::cmp::Reverse(last_key(*t, WIDE_ROWS)));
        plan.key_tiles.sort_by_key(|[s, tile]| {
            std::cmp::Reverse(
                spans[*s as usize][1] as usize - (*tile as usize * TILE_ROWS).min(spans[*s as usize][1] as usize),
            )
        });
        plan
    }

    /// All lists in one array, as they are uploaded.
    pub fn packed(&self) -> Vec<u32> {
        let tiles = [&self.row_tiles, &self.wide_tiles, &self.key_tiles].map(|t| t.as_flattened());
        [self.spans.as_flattened(), tiles[0], tiles[1], tiles[2], &self.pages].concat()
    }

    /// Addresses of spans, row tiles, wide tiles, key tiles and pages in the uploaded array.
    pub(super) fn parts(&self, packed: &View<'_, u32>) -> [u64; 5] {
        let tiles = [self.row_tiles.len(), self.wide_tiles.len(), self.key_tiles.len()];
        let lens = [4 * self.spans.len(), 2 * tiles[0], 2 * tiles[1], 2 * tiles[2], self.pages.len()];
        assert_eq!(packed.len(), lens.iter().sum::<usize>(), "the plan's own array");
        let mut from = 0;
        lens.map(|len| {
            let at = packed.part(from, len).at();
            from += len;
            at
        })
    }
}

/// One sequence that decodes a row: row s of the batch belongs to sequence s.
#[derive(Debug, Clone, Copy)]
pub struct DecodeSeq<'a> {
    /// Keys that the row sees, its own among them; 0 for a row that is only there to fill the batch.
    pub len: usize,
    /// The sequence's page table.
    pub pages: &'a [u32],
}

/// Chunks of sequences, those together that lie on the same pages.
struct ChunkGroups {
    /// Chunk of each group, and where its members end.
    groups: Vec<(u32, usize)>,
    /// Sequences, group after group.
    members: Vec<u32>,
}

impl ChunkGroups {
    fn new(sequences: &[DecodeSeq<'_>], num_pages: usize, share: bool) -> Self {
        const CHUNK_PAGES: usize = CHUNK / PAGE;
        const NONE: u32 = u32::MAX;
        let mut groups: Vec<(u32, usize)> = Vec::new();
        // Group of each chunk of each sequence, in order. A page is in one place of a sequence only, so a chunk's first
        // page tells which other chunk it can be; the rest is compared.
        let mut found: Vec<(u32, u32)> = Vec::new();
        let mut by_first_page: Vec<u32> = vec![NONE; if share { num_pages } else { 0 }];
        let mut pages_of: Vec<&[u32]> = Vec::new();
        for (s, sequence) in sequences.iter().enumerate() {
            for chunk in 0..sequence.len.div_ceil(CHUNK) {
                let mut group = as_u32(groups.len());
                if share && (chunk + 1) * CHUNK <= sequence.len {
                    let pages = &sequence.pages[chunk * CHUNK_PAGES..][..CHUNK_PAGES];
                    let known = &mut by_first_page[pages[0] as usize];
                    if *known == NONE {
                        *known = group;
                    } else if pages_of[*known as usize] == pages {
                        group = *known;
                    }
                }
                if group as usize == groups.len() {
                    groups.push((as_u32(chunk), 0));
                    pages_of
                        .push(sequence.pages.get(chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES).unwrap_or_default());
                }
                groups[group as usize].1 += 1;
                found.push((group, as_u32(s)));
            }
        }
        // From counts to where each group's members begin, then end.
        let mut begin = 0;
        for (_, count) in &mut groups {
            begin += std::mem::replace(count, begin);
        }
        let mut members = vec![0; found.len()];
        for (group, s) in found {
            let at = &mut groups[group as usize].1;
            members[*at] = s;
            *at += 1;
        }
        ChunkGroups { groups, members }
    }

    /// Chunk and members of each group.
    fn iter(&self) -> impl Iterator<Item = (u32, &[u32])> {
        self.groups.iter().enumerate().map(|(i, (chunk, end))| {
            let begin = if i == 0 { 0 } else { self.groups[i - 1].1 };
            (*chunk, &self.members[begin..*end])
        })
    }
}

/// Who computes which chunk of which sequence's keys. A chunk whose pages several sequences share (all of it, as the
/// prompt of several samples is) is read once for as many of them as fit a tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodePlan {
    /// Per sequence: keys, where its pages begin in `pages`.
    pub sequences: Vec<[u32; 2]>,
    /// Where each sequence's parts begin, and the end.
    pub starts: Vec<u32>,
    /// Chunks of one sequence: (sequence, chunk).
    pub own: Vec<[u32; 2]>,
    /// Shared chunks: (chunk, where its sequences begin in `members`, how many).
    pub shared: Vec<[u32; 3]>,
    /// Sequences of shared chunks.
    pub members: Vec<u32>,
    /// Pages of all sequences.
    pub pages: Vec<u32>,
    /// Pages that the layer must have.
    pub num_pages: usize,
}

impl DecodePlan {
    /// The plan of a batch; with `share` false no chunk is shared.
    pub fn new(heads: Heads, sequences: &[DecodeSeq<'_>], share: bool) -> Self {
        let num_pages = sequences.iter().map(|s| s.len.div_ceil(PAGE)).sum();
        let mut plan = DecodePlan {
            sequences: Vec::with_capacity(sequences.len()),
            starts: vec![0],
            own: Vec::new(),
            shared: Vec::new(),
            members: Vec::new(),
            pages: Vec::with_capacity(num_pages),
            num_pages: 0,
        };
        for (s, sequence) in sequences.iter().enumerate() {
            let pages = &sequence.pages[..sequence.len.div_ceil(PAGE)];
            plan.sequences.push([as_u32(sequence.len), as_u32(plan.pages.len())]);
            plan.pages.extend_from_slice(pages);
            plan.num_pages = plan.num_pages.max(pages.iter().max().map_or(0, |p| *p as usize + 1));
            plan.starts.push(plan.starts[s] + as_u32(sequence.len.div_ceil(CHUNK)));
        }
        let groups = ChunkGroups::new(sequences, plan.num_pages, share);
        for (chunk, members) in groups.iter() {
            for members in members.chunks(TILE_ROWS / heads.group()) {
                if let [s] = members {
                    plan.own.push([*s, chunk]);
                    continue;
                }
                plan.shared.push([chunk, as_u32(plan.members.len()), as_u32(members.len())]);
                plan.members.extend_from_slice(members);
            }
        }
        plan
    }

    /// Number of parts of all sequences.
    fn num_parts(&self) -> usize {
        self.starts.last().map_or(0, |n| *n as usize)
    }

    /// Floats of scratch: outputs, and maxima with sums, of all parts.
    pub fn scratch(&self, heads: Heads) -> (usize, usize) {
        let parts = self.num_parts() * heads.num_heads;
        (parts * heads.head_dim, parts * 2)
    }

    /// All lists in one array, as they are uploaded.
    pub fn packed(&self) -> Vec<u32> {
        let (own, shared) = (self.own.as_flattened(), self.shared.as_flattened());
        [self.sequences.as_flattened(), &self.starts, own, shared, &self.members, &self.pages].concat()
    }

    /// The plan's work, from the uploaded array.
    pub fn work<'a>(&self, packed: &View<'a, u32>) -> DecodeWork<'a> {
        let lens = [
            2 * self.sequences.len(),
            self.starts.len(),
            2 * self.own.len(),
            3 * self.shared.len(),
            self.members.len(),
            self.pages.len(),
        ];
        assert_eq!(packed.len(), lens.iter().sum::<usize>(), "the plan's own array");
        let mut from = 0;
        let [sequences, starts, own, shared, members, pages] = lens.map(|len| {
            from += len;
            packed.part(from - len, len)
        });
        let (num_parts, num_pages) = (self.num_parts(), self.num_pages);
        DecodeWork { sequences, starts, own, shared, members, pages, not_own: None, num_parts, num_pages }
    }
}

/// The lists of a plan on the device: a [`DecodePlan`]'s, or those of seats, where lists may be longer than what there is
/// to do.
#[derive(Clone, Copy)]
pub struct DecodeWork<'a> {
    /// As [`DecodePlan::sequences`], and so on.
    pub sequences: View<'a, u32>,
    /// Where each sequence's parts begin, at least.
    pub starts: View<'a, u32>,
    /// (sequence, chunk); chunks past a sequence's keys are passed over.
    pub own: View<'a, u32>,
    /// (chunk, where its sequences begin, how many); 0 sequences are passed over.
    pub shared: View<'a, u32>,
    /// Sequences of shared chunks.
    pub members: View<'a, u32>,
    /// Pages of all sequences.
    pub pages: View<'a, u32>,
    /// Per sequence: how many leading chunks of `own` are passed over, because they are in `shared`.
    pub not_own: Option<View<'a, u32>>,
    /// Number of parts that the scratch must have room for.
    pub num_parts: usize,
    /// Pages that the layer must have.
    pub num_pages: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { num_heads: 14, num_kv_heads: 2, head_dim: 64 };

    #[test]
    fn a_span_plan_covers_every_packed_row_and_key_once_longest_first() {
        let pages: Vec<u32> = (0..20).collect();
        let spans = [
            Span { row: 0, len: 10, pos: 0, pages: &pages[..1] },
            Span { row: 10, len: 0, pos: 0, pages: &[] },
            Span { row: 10, len: 130, pos: 5, pages: &pages[3..] },
        ];
        let plan = SpanPlan::new(HEADS, &spans);
        assert_eq!(plan.spans, [[0, 10, 0, 0], [10, 0, 0, 1], [10, 130, 5, 1]]);
        assert_eq!((plan.pages.len(), plan.num_rows, plan.num_pages), (1 + 9, 140, 12));
        let mut tiles = plan.row_tiles.clone();
        assert_eq!(tiles[0], [2, 14], "the last rows see the most keys");
        tiles.sort_unstable();
        let want: Vec<[u32; 2]> = (0..2).map(|t| [0, t]).chain((0..15).map(|t| [2, t])).collect();
        assert_eq!(tiles, want, "70 and 910 packed rows");
        let mut tiles = plan.wide_tiles.clone();
        assert_eq!(tiles[0], [2, 7]);
        tiles.sort_unstable();
        let want: Vec<[u32; 2]> = [[0, 0]].into_iter().chain((0..8).map(|t| [2, t])).collect();
        assert_eq!(tiles, want, "70 and 910 packed rows");
        let mut tiles = plan.key_tiles.clone();
        assert_eq!(tiles[0], [2, 0], "all rows see the first keys");
        tiles.sort_unstable();
        assert_eq!(tiles, [[0, 0], [2, 0], [2, 1], [2, 2]]);
        assert_eq!(plan.packed().len(), 12 + 2 * 17 + 2 * 9 + 2 * 4 + 10);
        assert!(!plan.whole);
    }

    #[test]
    fn a_decode_plan_shares_whole_chunks_only() {
        let prompt: Vec<u32> = (0..40).collect();
        let with = |own: u32| [&prompt[..], &[own, own + 1]].concat();
        let (a, b, c) = (with(100), with(200), with(300));
        let of = |pages, len| DecodeSeq { len, pages };
        let sequences = [of(&a, 650), of(&b, 660), of(&[], 0), of(&c, 511), of(&prompt, 512)];
        let plan = DecodePlan::new(HEADS, &sequences, true);
        assert_eq!(plan.starts, [0, 3, 6, 6, 8, 10]);
        // Chunk 0 for all four, chunk 1 for those that see all of it.
        assert_eq!(plan.shared, [[0, 0, 4], [1, 4, 3]]);
        assert_eq!(plan.members, [0, 1, 3, 4, 0, 1, 4]);
        assert_eq!(plan.own, [[0, 2], [1, 2], [3, 1]]);
        assert_eq!(plan.num_pages, 202, "what a sequence does not use yet does not count");
        assert_eq!(plan.scratch(HEADS), (10 * 14 * 64, 10 * 14 * 2));
        let alone = DecodePlan::new(HEADS, &sequences, false);
        assert_eq!((alone.own.len(), alone.shared.len(), &alone.starts), (10, 0, &plan.starts));
    }

    #[test]
    fn more_samples_than_a_tile_holds_take_several() {
        let prompt: Vec<u32> = (0..16).collect();
        let sequences = [DecodeSeq { len: 256, pages: &prompt }; 19];
        let plan = DecodePlan::new(HEADS, &sequences, true);
        assert_eq!(plan.shared, [[0, 0, 9], [0, 9, 9]]);
        assert_eq!(plan.own, [[18, 0]]);
        // The same first page alone is not enough.
        let mut other = prompt.clone();
        other[5] = 99;
        let of = |pages| DecodeSeq { len: 256, pages };
        let plan = DecodePlan::new(HEADS, &[of(&prompt), of(&other), of(&prompt)], true);
        assert_eq!((plan.shared, plan.members, plan.own), (vec![[0, 0, 2]], vec![0, 2], vec![[1, 0]]));
    }

    #[test]
    fn a_rope_plan_places_rows_in_their_pages() {
        let spans = [Span { row: 1, len: 3, pos: 15, pages: &[7, 2] }];
        let plan = RopePlan::new(5, &spans);
        assert_eq!(plan.positions, [0, 15, 16, 17, 0]);
        assert_eq!(plan.slots, [NO_SLOT, 7 * 16 + 15, 2 * 16, 2 * 16 + 1, NO_SLOT]);
    }
}
