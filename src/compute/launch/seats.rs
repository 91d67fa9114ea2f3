//! Seats: sequences that decode on the device without the host between their steps (`seats.cu`). Where each stands, its
//! page table, its noise and what ends it lie on the device; a step's launches are the same as long as its [`Shape`] is.

use std::collections::BTreeMap;

use bytemuck::{Pod, Zeroable};

use crate::compute::launch::attention::{CHUNK, DecodeWork, NO_SLOT};
use crate::compute::launch::attention_plan::{TILE_ROWS, as_u32};
use crate::compute::launch::device::{Buf, Device, Element, Entry, Shape as Grid, View, args};
use crate::compute::launch::head::{DrawnRow, HeadRow};
use crate::compute::ops::{Heads, MAX_STOPS, PAGE, Seat};
use crate::error::Result;

/// Threads of the kernels.
const THREADS: usize = 128;
/// Rows up to which batches double; larger ones grow by as many.
const FINE_ROWS: usize = 64;
/// Fewest rows of a batch, and fewest shared chunks when there are any.
const LEAST: usize = 8;

/// What the launches of a step depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows: seats that compute, empty ones among them.
    pub rows: usize,
    /// Chunks of keys of each, at most.
    pub chunks: usize,
    /// Shared chunks, at most.
    pub shared: usize,
    /// Whether a seat has top-k or top-p.
    pub keeps: bool,
}

/// Rows of the batch that `seats` seats take.
pub fn padded_rows(seats: usize) -> usize {
    if seats <= FINE_ROWS { seats.next_power_of_two().max(LEAST) } else { seats.next_multiple_of(FINE_ROWS) }
}

/// A seat as `take_seats` reads it.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(16))]
struct SeatRow {
    head: HeadRow,
    token: u32,
    left: u32,
    unused: [u32; 2],
    stops: [u32; MAX_STOPS],
}

impl Element for SeatRow {}

impl SeatRow {
    fn new(seat: &Seat<'_>) -> Self {
        let mut stops = [u32::MAX; MAX_STOPS];
        stops.iter_mut().zip(seat.stop).for_each(|(to, token)| *to = *token);
        let head = HeadRow::draw(as_u32(seat.seat), &seat.draw, as_u32(seat.pos + 1));
        SeatRow { head, token: seat.token, left: as_u32(seat.left), unused: [0; 2], stops }
    }
}

/// What lies on the device. S seats, tables of P pages.
pub struct SeatState {
    capacity: usize,
    stride: usize,
    group: usize,
    num_pages: usize,
    num_shared: usize,
    keeps: bool,
    /// Newest token of each seat, `[S]`.
    pub tokens: Buf<u32>,
    /// Its position, `[S]`.
    pub positions: Buf<u32>,
    /// Slot of its key and value, `[S]`.
    pub slots: Buf<u32>,
    /// What is asked of the head, `[S]`.
    pub rows: Buf<HeadRow>,
    sequences: Buf<u32>,
    left: Buf<u32>,
    stops: Buf<u32>,
    tables: Buf<u32>,
    /// Leading shared chunks of each seat, members of shared chunks, shared chunks.
    sharing: Buf<u32>,
    /// By number of chunks: where parts begin, and every chunk of every seat.
    lists: BTreeMap<usize, Buf<u32>>,
}

impl SeatState {
    /// Empty seats, at least `capacity`, for sequences of at most `max_tokens`.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn new(device: &Device, heads: Heads, capacity: usize, max_tokens: usize) -> Result<Self> {
        let capacity = padded_rows(capacity);
        let stride = max_tokens.div_ceil(PAGE);
        let max_shared = capacity / 2 * max_tokens.div_ceil(CHUNK);
        Ok(SeatState {
            capacity,
            stride,
            group: heads.group(),
            num_pages: 0,
            num_shared: 0,
            keeps: false,
            tokens: device.zeros(capacity)?,
            positions: device.zeros(capacity)?,
            slots: device.upload(&vec![NO_SLOT; capacity])?,
            rows: device.upload(&(0..capacity).map(|s| HeadRow::logits(as_u32(s))).collect::<Vec<_>>())?,
            sequences: device.zeros(2 * capacity)?,
            left: device.zeros(capacity)?,
            stops: device.zeros(MAX_STOPS * capacity)?,
            tables: device.zeros(capacity * stride)?,
            sharing: device.zeros(2 * capacity + 3 * max_shared)?,
            lists: BTreeMap::new(),
        })
    }

    /// Number of seats.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Most chunks of a seat's keys.
    pub fn max_chunks(&self) -> usize {
        (self.stride * PAGE).div_ceil(CHUNK)
    }

    /// Seats sequences, each in a seat that is empty or whose sequence has ended. `prefixes` are seats with the whole
    /// pages that they share with others: all that are taken, the new ones among them. Where all are new, those seated
    /// before have ended or are seated anew, and every other seat is emptied.
    ///
    /// # Errors
    /// When the device fails.
    pub fn take(&mut self, device: &Device, seats: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> Result<()> {
        let (mut rows, mut tables) = (Vec::with_capacity(seats.len()), vec![0; seats.len() * self.stride]);
        for (seat, table) in seats.iter().zip(tables.chunks_exact_mut(self.stride)) {
            assert!(seat.seat < self.capacity && seat.left > 0, "an empty seat, and something to draw");
            assert!(seat.stop.len() <= MAX_STOPS, "a seat knows all that ends it");
            assert!((seat.pos + seat.left).div_ceil(PAGE) <= seat.pages.len(), "pages for the longest course");
            table[..seat.pages.len()].copy_from_slice(seat.pages);
            self.num_pages = seat.pages.iter().fold(self.num_pages, |n, p| n.max(*p as usize + 1));
            rows.push(SeatRow::new(seat));
        }
        let all_new = seats.len() == prefixes.len();
        self.keeps = (self.keeps && !all_new) || seats.iter().any(|s| !s.draw.is_full());
        if all_new {
            device.clear(&mut self.left.view_mut())?;
            device.clear(&mut self.sequences.view_mut())?;
            device.write(&mut self.slots.view_mut(), &vec![NO_SLOT; self.capacity])?;
        }
        let (rows, tables) = (device.upload(&rows)?, device.upload(&tables)?);
        let SeatState { tokens, positions, slots, sequences, rows: heads, left, stops, tables: to, .. } = self;
        let (t, p, s, q) = (tokens.view().at(), positions.view().at(), slots.view().at(), sequences.view().at());
        let (h, l, e, to) = (heads.view().at(), left.view().at(), stops.view().at(), to.view().at());
        let stride = as_u32(self.stride) as i32;
        let args = args![rows.view().at(), tables.view().at(), t, p, s, q, h, l, e, to, stride];
        let grid = Grid::new((as_u32(seats.len()), 1, 1), THREADS as u32);
        // SAFETY: a block per arrival; seats and tables are inside the arrays, as asserted.
        unsafe { device.launch(Entry { file: "seats", name: "take_seats" }, grid, args)? };
        let sharing = Sharing::new(self.group, self.capacity, prefixes);
        let num_shared = sharing.items.len();
        let padded = if num_shared == 0 { 0 } else { num_shared.next_power_of_two().max(LEAST) };
        self.num_shared = padded.min((self.sharing.len() - 2 * self.capacity) / 3);
        let packed = sharing.packed(self.capacity, self.num_shared);
        device.write(&mut self.sharing.view_mut().part(0, packed.len()), &packed)
    }

    /// The shape of a step of the first `seats` seats, none with more than `longest` keys; its lists are made.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn shape(&mut self, device: &Device, seats: usize, longest: usize) -> Result<Shape> {
        assert!(seats <= self.capacity && longest <= self.stride * PAGE, "{seats} seats of {longest} keys");
        let chunks = longest.div_ceil(CHUNK).next_power_of_two().min(self.max_chunks());
        if !self.lists.contains_key(&chunks) {
            let starts = (0..self.capacity).map(|s| as_u32(s * chunks));
            let own = (0..self.capacity * chunks).flat_map(|i| [as_u32(i / chunks), as_u32(i % chunks)]);
            self.lists.insert(chunks, device.upload(&starts.chain(own).collect::<Vec<u32>>())?);
        }
        Ok(Shape { rows: padded_rows(seats).min(self.capacity), chunks, shared: self.num_shared, keeps: self.keeps })
    }

    /// Attention's work in a step of a shape that [`SeatState::shape`] gave.
    pub fn work(&self, shape: Shape) -> DecodeWork<'_> {
        let lists = self.lists.get(&shape.chunks).expect("the shape's lists are made").view();
        let sharing = self.sharing.view();
        DecodeWork {
            sequences: self.sequences.view().part(0, 2 * shape.rows),
            starts: lists.part(0, shape.rows),
            own: lists.part(self.capacity, 2 * shape.rows * shape.chunks),
            shared: sharing.part(2 * self.capacity, 3 * shape.shared),
            members: sharing.part(self.capacity, self.capacity),
            pages: self.tables.view(),
            not_own: Some(sharing.part(0, shape.rows)),
            num_parts: shape.rows * shape.chunks,
            num_pages: self.num_pages,
        }
    }

    /// Moves the first seats on to the tokens that they have drawn; those that it ends are empty then.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn advance(&self, device: &Device, drawn: &View<'_, DrawnRow>) -> Result<()> {
        let count = drawn.len();
        assert!(count <= self.capacity, "{count} of {} seats", self.capacity);
        let (t, p, s) = (self.tokens.view().at(), self.positions.view().at(), self.slots.view().at());
        let (q, h, l) = (self.sequences.view().at(), self.rows.view().at(), self.left.view().at());
        let (e, tables) = (self.stops.view().at(), self.tables.view().at());
        let args = args![drawn.at(), t, p, s, q, h, l, e, tables, count as i32, as_u32(self.stride) as i32];
        let grid = Grid::new((as_u32(count.div_ceil(THREADS)), 1, 1), THREADS as u32);
        // SAFETY: threads past the last seat return; tables have pages for each sequence's longest course.
        unsafe { device.launch(Entry { file: "seats", name: "next_tokens" }, grid, args) }
    }
}

/// Which seats read which leading chunks together.
struct Sharing {
    /// Seats whose leading chunks are shared, and how many.
    leading: Vec<(u32, u32)>,
    members: Vec<u32>,
    /// (chunk, where its members begin, how many).
    items: Vec<[u32; 3]>,
}

impl Sharing {
    fn new(group: usize, capacity: usize, prefixes: &[(usize, &[u32])]) -> Self {
        const CHUNK_PAGES: usize = CHUNK / PAGE;
        // Pages are held by one prompt each: the first tells which.
        let mut order: Vec<(u32, u32, usize)> = prefixes
            .iter()
            .filter(|(_, pages)| pages.len() >= CHUNK_PAGES)
            .map(|(seat, pages)| (pages[0], as_u32(*seat), pages.len() / CHUNK_PAGES))
            .collect();
        order.sort_unstable();
        let mut sharing = Sharing { leading: Vec::new(), members: Vec::with_capacity(capacity), items: Vec::new() };
        for family in order.chunk_by(|a, b| a.0 == b.0) {
            for members in family.chunks(TILE_ROWS / group).filter(|m| m.len() > 1) {
                let (begin, chunks) = (as_u32(sharing.members.len()), members[0].2);
                sharing.members.extend(members.iter().map(|(_, seat, _)| *seat));
                sharing.leading.extend(members.iter().map(|(_, seat, _)| (*seat, as_u32(chunks))));
                sharing.items.extend((0..chunks).map(|c| [as_u32(c), begin, as_u32(members.len())]));
            }
        }
        sharing
    }

    fn packed(&self, capacity: usize, num_items: usize) -> Vec<u32> {
        let mut packed = vec![0; 2 * capacity + 3 * num_items];
        self.leading.iter().for_each(|(seat, chunks)| packed[*seat as usize] = *chunks);
        packed[capacity..][..self.members.len()].copy_from_slice(&self.members);
        packed[2 * capacity..][..3 * self.items.len()].copy_from_slice(self.items.as_flattened());
        packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_padded_to_few_sizes() {
        assert_eq!([1, 8, 9, 33, 64, 65, 128, 200].map(padded_rows), [8, 8, 16, 64, 64, 128, 128, 256]);
    }

    #[test]
    fn seats_of_one_prompt_share_its_whole_chunks() {
        let (long, short): (Vec<u32>, Vec<u32>) = ((0..40).collect(), (100..115).collect());
        let prefixes = [(0, &long[..]), (5, &long[..]), (2, &short[..]), (3, &short[..]), (7, &long[..])];
        let sharing = Sharing::new(24, 8, &prefixes);
        // Two of 24 heads fill a tile; the third is left alone, and 15 pages are no chunk.
        assert_eq!(sharing.members, [0, 5]);
        assert_eq!(sharing.items, [[0, 0, 2], [1, 0, 2]]);
        let packed = sharing.packed(8, 3);
        assert_eq!(packed[..8], [2, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(packed[16..], [0, 0, 2, 1, 0, 2, 0, 0, 0]);
    }
}
