// Sequences that decode without the host between their steps: each has a seat, row s of the batch
// being seat s, and what a step reads of it lies on the device. `take_seats` puts sequences into
// seats; `next_tokens`, the last kernel of a step, moves each to the token it has drawn, or empties
// its seat when that token ends it. An empty seat has no keys and no slot: it computes, but leaves
// nothing.
#include "head.h"

const int THREADS = 128;
const u32 PAGE = 16;
const u32 NO_SLOT = ~0u;
// Stop tokens of a seat; further ones end a sequence only when the host has seen them.
const int STOPS = 16;

// A sequence that sits down.
struct alignas(16) Seat {
  HeadRow head;  // row: the seat; position: of the token to be drawn next.
  u32 token;     // Newest token.
  u32 left;      // Tokens that may still be drawn.
  u32 unused[2];
  u32 stops[STOPS];  // ~0: none.
};

// Tables have `stride` pages; sequences[s] = (keys that the step's row sees, s * stride).
KERNEL(THREADS, take_seats)
(const Seat* seats, const u32* new_tables, u32* tokens, u32* positions, u32* slots, u32* sequences,
 HeadRow* rows, u32* left, u32* stops, u32* tables, int stride) {
  const Seat& seat = seats[blockIdx.x];
  const u32* from = new_tables + (u64)blockIdx.x * stride;
  const u32 s = seat.head.row, position = seat.head.position - 1;
  u32* table = tables + (u64)s * stride;
  for (int i = threadIdx.x; i < stride; i += THREADS) table[i] = from[i];
  if (threadIdx.x < STOPS) stops[s * STOPS + threadIdx.x] = seat.stops[threadIdx.x];
  if (threadIdx.x != 0) return;
  tokens[s] = seat.token;
  positions[s] = position;
  slots[s] = from[position / PAGE] * PAGE + position % PAGE;
  sequences[2 * s] = position + 1;
  sequences[2 * s + 1] = s * stride;
  rows[s] = seat.head;
  left[s] = seat.left;
}
EXPORT(take_seats)

KERNEL(THREADS, next_tokens)
(const DrawnRow* drawn, u32* tokens, u32* positions, u32* slots, u32* sequences, HeadRow* rows,
 u32* left, const u32* stops, const u32* tables, int count, int stride) {
  const u32 s = blockIdx.x * THREADS + threadIdx.x;
  if (s >= count || left[s] == 0) return;
  const u32 token = drawn[s].token, more = left[s] - 1;
  bool ends = more == 0;
  for (int i = 0; i < STOPS; i++) ends |= stops[s * STOPS + i] == token;
  if (ends && !PLANTED(seats_never_end)) {
    left[s] = 0;
    slots[s] = NO_SLOT;
    sequences[2 * s] = 0;
    return;
  }
  const u32 position = positions[s] + 1;
  tokens[s] = token;
  left[s] = more;
  positions[s] = position;
  slots[s] = tables[(u64)s * stride + position / PAGE] * PAGE + position % PAGE;
  sequences[2 * s] = position + 1;
  rows[s].position = PLANTED(seats_same_noise) ? position : position + 1;
}
EXPORT(next_tokens)
