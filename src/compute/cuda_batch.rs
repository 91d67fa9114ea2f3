//! Batches on a GPU: of tokens that the host has, or of seats, whose sequences decode without it. Steps of seats are
//! recorded as graphs, one for each [`Shape`], and two of them may be on their way: the host takes in the draws of one
//! while the next runs.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::compute::launch::attention::{DecodePlan, DecodeWork, SpanPlan};
use crate::compute::launch::device::{Buf, Device, View, ViewMut};
use crate::compute::launch::graph::{Graph, Pinned};
use crate::compute::launch::head::{DrawnRow, HeadRow, HeadScratch};
use crate::compute::launch::mark::Mark;
use crate::compute::launch::seats::{SeatState, Shape};
use crate::compute::ops::{Drawn, Heads, Seat};
use crate::error::Result;

/// Steps of seats that may be on their way at once.
const FLIGHTS: usize = 2;

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A batch on the device.
pub enum CudaBatch {
    /// Tokens of the host's. Sequences that decode one token come first; the others follow.
    Given(Box<Given>),
    /// The first seats.
    Seated(Box<Seated>),
}

/// A batch whose tokens the host has.
pub struct Given {
    pub(super) tokens: Vec<u32>,
    pub(super) token_ids: Buf<u32>,
    pub(super) positions: Buf<u32>,
    pub(super) slots: Buf<u32>,
    pub(super) decode: Option<Decode>,
    pub(super) spans: Option<(SpanPlan, Buf<u32>)>,
}

pub(super) struct Decode {
    pub(super) plan: DecodePlan,
    pub(super) packed: Buf<u32>,
    pub(super) parts: Mutex<Parts>,
}

/// Outputs, and maxima with sums, of chunks.
type Parts = (Buf<f32>, Buf<f32>);

/// A batch of seats: a step's shape, and what lies on the device.
pub struct Seated {
    state: SeatState,
    shape: Shape,
    parts: Mutex<Parts>,
}

/// Seats, the graphs of their steps, and draws on their way to the host.
pub struct CudaSeats {
    batch: CudaBatch,
    scratch: HeadScratch,
    drawn: Buf<DrawnRow>,
    /// By shape and seed; none for one that has been run but not recorded.
    graphs: HashMap<(Shape, u64), Option<Graph>>,
    arrivals: [Pinned<DrawnRow>; FLIGHTS],
    /// Where steps begin and end: of those on their way and the one before.
    marks: [Option<[Mark; 2]>; FLIGHTS + 1],
    begun: bool,
    launched: usize,
    landed: usize,
}

impl CudaBatch {
    fn seated_mut(&mut self) -> &mut Seated {
        let CudaBatch::Seated(seated) = self else { unreachable!("seats have a batch of seats") };
        seated
    }

    fn seated(&self) -> &Seated {
        let CudaBatch::Seated(seated) = self else { unreachable!("seats have a batch of seats") };
        seated
    }

    pub(super) fn given(&self) -> &Given {
        let CudaBatch::Given(given) = self else { unreachable!("only batches of the host's are trained on") };
        given
    }

    pub(super) fn token_ids(&self) -> View<'_, u32> {
        match self {
            CudaBatch::Given(b) => b.token_ids.view(),
            CudaBatch::Seated(b) => b.state.tokens.view().part(0, b.shape.rows),
        }
    }

    pub(super) fn positions(&self) -> View<'_, u32> {
        match self {
            CudaBatch::Given(b) => b.positions.view(),
            CudaBatch::Seated(b) => b.state.positions.view().part(0, b.shape.rows),
        }
    }

    pub(super) fn slots(&self) -> View<'_, u32> {
        match self {
            CudaBatch::Given(b) => b.slots.view(),
            CudaBatch::Seated(b) => b.state.slots.view().part(0, b.shape.rows),
        }
    }

    /// Rows that decode one token each, and scratch for their parts.
    pub(super) fn decode(&self) -> Option<(DecodeWork<'_>, &Mutex<Parts>)> {
        match self {
            CudaBatch::Given(b) => b.decode.as_ref().map(|d| (d.plan.work(&d.packed.view()), &d.parts)),
            CudaBatch::Seated(b) => Some((b.state.work(b.shape), &b.parts)),
        }
    }

    /// Whether rows may have top-k or top-p: known of seats.
    pub(super) fn keeps(&self) -> bool {
        matches!(self, CudaBatch::Seated(b) if b.shape.keeps)
    }

    pub(super) fn spans(&self) -> Option<(&SpanPlan, View<'_, u32>)> {
        match self {
            CudaBatch::Given(b) => b.spans.as_ref().map(|(plan, packed)| (plan, packed.view())),
            CudaBatch::Seated(_) => None,
        }
    }
}

impl CudaSeats {
    pub(super) fn new(device: &Device, heads: Heads, v: usize, capacity: usize, max_tokens: usize) -> Result<Self> {
        let shape = Shape::default();
        let state = SeatState::new(device, heads, capacity, max_tokens)?;
        let (capacity, parts) = (state.capacity(), state.capacity() * state.max_chunks() * heads.num_heads);
        let parts = Mutex::new((device.alloc(parts * heads.head_dim)?, device.alloc(parts * 2)?));
        Ok(CudaSeats {
            batch: CudaBatch::Seated(Box::new(Seated { state, shape, parts })),
            scratch: HeadScratch::new(device, capacity, v, true)?,
            drawn: device.alloc(capacity)?,
            graphs: HashMap::new(),
            arrivals: [Pinned::new(device, capacity)?, Pinned::new(device, capacity)?],
            marks: [const { None }; FLIGHTS + 1],
            begun: false,
            launched: 0,
            landed: 0,
        })
    }

    /// The next step's work begins here, if it has not begun: prompts may come before it.
    pub(super) fn begin(&mut self, device: &Device) -> Result<()> {
        if std::mem::replace(&mut self.begun, true) {
            return Ok(());
        }
        let marks = &mut self.marks[self.launched % (FLIGHTS + 1)];
        match marks {
            Some([begin, _]) => begin.again()?,
            None => *marks = Some([device.mark()?, device.mark()?]),
        }
        Ok(())
    }

    pub(super) fn take(&mut self, device: &Device, new: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> Result<()> {
        self.batch.seated_mut().state.take(device, new, prefixes)
    }

    /// A step: `draw` leaves what the rows draw, and is recorded where `graphs` are wanted.
    pub(super) fn step(
        &mut self,
        device: &Device,
        graphs: bool,
        seed: u64,
        (count, longest): (usize, usize),
        draw: impl FnOnce(&CudaBatch, View<'_, HeadRow>, &mut HeadScratch, &mut ViewMut<'_, DrawnRow>) -> Result<()>,
    ) -> Result<()> {
        assert!(self.launched - self.landed < FLIGHTS, "draws are asked for in time");
        let CudaSeats { batch, scratch, drawn, .. } = self;
        let seated = batch.seated_mut();
        let shape = seated.state.shape(device, count, longest)?;
        seated.shape = shape;
        // Graphs know where it lies.
        if shape.keeps {
            scratch.hold_logits(device)?;
        }
        let (batch, state) = (&*batch, &batch.seated().state);
        let mut drawn = drawn.view_mut();
        let mut drawn = drawn.part(0, shape.rows);
        let step = || {
            draw(batch, state.rows.view().part(0, shape.rows), scratch, &mut drawn)?;
            state.advance(device, &drawn.as_view())
        };
        // The first step of a shape loads what its kernels need; the second is recorded.
        match self.graphs.get(&(shape, seed)) {
            None => {
                step()?;
                self.graphs.insert((shape, seed), None);
            }
            Some(None) if graphs => {
                let graph = device.record(step)?;
                graph.launch()?;
                self.graphs.insert((shape, seed), Some(graph));
            }
            Some(None) => step()?,
            Some(Some(graph)) => graph.launch()?,
        }
        self.arrivals[self.launched % FLIGHTS].fetch(&self.drawn.view().part(0, shape.rows))?;
        if let Some([_, end]) = &self.marks[self.launched % (FLIGHTS + 1)] {
            end.again()?;
        }
        self.begun = false;
        self.launched += 1;
        Ok(())
    }

    /// What the first seats drew in the earliest step that was not asked for, and the seconds between the end of the step
    /// before and its begin: the device had nothing to do.
    pub(super) fn drew(&mut self, count: usize) -> Result<(Vec<Drawn>, f64)> {
        assert!(self.landed < self.launched, "a step is on its way");
        let arrived = self.arrivals[self.landed % FLIGHTS].wait(count)?;
        let drawn = arrived.iter().copied().map(Drawn::from).collect();
        let marks = |step: usize| self.marks[step % (FLIGHTS + 1)].as_ref();
        let idle_s = match (self.landed.checked_sub(1).and_then(marks), marks(self.landed)) {
            (Some([_, end]), Some([begin, _])) => begin.seconds_since(end)?,
            _ => 0.0,
        };
        self.landed += 1;
        Ok((drawn, idle_s))
    }
}
