// QK-norm (optional), rotary embedding and the write of keys and values into their pages, in one
// pass, and the backward pass.
//
// A fused row has H query heads, G key heads and G value heads of C bf16 (32, 64 or 128). C / 16
// lanes of a warp take a head: lane i has elements 8 i.. of its lower half and the same of its
// upper half, which are rotated in pairs. A head's sum: a thread's elements in order, its lanes in
// a tree.
#include "attention.h"

const int THREADS = 128;
// Rows of a block in the backward pass; each block leaves partial sums of the norms' gradients.
const int BACKWARD_ROWS = 16;
// Slot of a row whose key and value go nowhere.
const u32 NO_SLOT = 0xffffffffu;

// A thread's part of a head: of its lower and of its upper half.
struct Halves {
  float low[8], high[8];
};

DEV void load_half(float (&x)[8], const bf16* at) {
  U32x4 q = load16(at);
  UNROLL for (int e = 0; e < 4; e++) {
    x[2 * e] = low_bf16(q.v[e]);
    x[2 * e + 1] = high_bf16(q.v[e]);
  }
}

DEV void store_half(bf16* at, const float (&x)[8]) {
  U32x4 q;
  UNROLL for (int e = 0; e < 4; e++)
    q.v[e] = pack_bf16(x[2 * e], x[2 * e + 1]);
  store16(at, q);
}

DEV Halves load_halves(const bf16* head, int part, int c) {
  Halves x;
  load_half(x.low, head + part * 8);
  load_half(x.high, head + c / 2 + part * 8);
  return x;
}

DEV void store_halves(bf16* head, const Halves& x, int part, int c) {
  store_half(head + part * 8, x.low);
  store_half(head + c / 2 + part * 8, x.high);
}

// 8 floats of a table.
DEV void load_angles(float (&x)[8], const float* at) {
  UNROLL for (int half = 0; half < 2; half++) {
    U32x4 q = load_cached16(at + half * 4);
    UNROLL for (int e = 0; e < 4; e++)
      x[half * 4 + e] = float_of(q.v[e]);
  }
}

// Rotates by a position's angles; `direction` -1 rotates back.
DEV void rotate(Halves& x, const float* cos, const float* sin, float direction) {
  float c[8], s[8];
  load_angles(c, cos);
  load_angles(s, sin);
  UNROLL for (int e = 0; e < 8; e++) {
    float turn = s[e] * direction, p = x.low[e], q = x.high[e];
    x.low[e] = fma_f32(p, c[e], -(q * turn));
    x.high[e] = fma_f32(q, c[e], p * turn);
  }
}

// Sum over the lanes of a head.
DEV float head_sum(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step >>= 1) x = x + shuffle_xor(x, step);
  return x;
}

// 1 / rms of a head.
DEV float head_rstd(const Halves& x, int c, float eps) {
  float sum = 0.0f;
  UNROLL for (int e = 0; e < 8; e++)
    sum = fma_f32(x.low[e], x.low[e], sum);
  UNROLL for (int e = 0; e < 8; e++)
    sum = fma_f32(x.high[e], x.high[e], sum);
  return rsqrt_f32(div_f32(head_sum(sum, c / 16), (float)c) + eps);
}

// Queries, normed (with weights wq and wk, unless they are null) and rotated, into q[T][H C]; keys,
// likewise, and values into slot `slots[t]` (page 16 + place in it) of the pages [pages][G][16][C].
KERNEL(THREADS, rope_forward)
(const bf16* qkv_tq, const float* cos, const float* sin, const u32* positions, const u32* slots,
 const bf16* wq, const bf16* wk, float eps, bf16* q_thc, bf16* k_pages, bf16* v_pages, int num_rows,
 int num_heads, int num_kv_heads, int c) {
  int lanes = c / 16, heads = num_heads + 2 * num_kv_heads;
  u64 index = (u64)blockIdx.x * THREADS + threadIdx.x;
  int part = (int)(index % lanes);
  u64 item = index / lanes;
  // Threads past the end help with the sums.
  bool inside = item < (u64)num_rows * heads;
  if (!inside) item = 0;
  u64 row = item / heads;
  int head = (int)(item % heads);
  bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
  Halves x = load_halves(qkv_tq + item * c, part, c);
  if (wq != nullptr) {
    float rstd = head_rstd(x, c, eps);
    if (!is_value) {
      Halves w = load_halves(is_query ? wq : wk, part, c);
      UNROLL for (int e = 0; e < 8; e++) {
        x.low[e] = x.low[e] * rstd * w.low[e];
        x.high[e] = x.high[e] * rstd * w.high[e];
      }
    }
  }
  if (!inside) return;
  if (!is_value) {
    u64 at = (u64)positions[row] * (c / 2) + (PLANTED(rope_angle_index) ? 0 : part * 8);
    rotate(x, cos + at, sin + at, 1.0f);
  }
  if (is_query) return store_halves(q_thc + (row * num_heads + head) * c, x, part, c);
  u32 slot = slots[row];
  if (slot == NO_SLOT) return;
  int g = (head - num_heads) % num_kv_heads;
  bf16* to = is_value ? v_pages : k_pages;
  u32 place = PLANTED(rope_page_slot) ? slot % (PAGE / 2) : slot % PAGE;
  store_halves(to + (((u64)(slot / PAGE) * num_kv_heads + g) * PAGE + place) * c, x, part, c);
}
EXPORT(rope_forward)

// Gradients of queries and keys in dqkv[T][Q], rotated and normed, become those of the raw row.
// With norms, partial[0][block][C] and partial[1][block][C] get the sums of the gradients of wq and
// wk over the block's rows: a slot of C / 16 lanes adds its heads in order, then the slots in order
// (add_partials adds the blocks).
KERNEL(THREADS, rope_backward)
(bf16* dqkv_tq, const bf16* raw_tq, const float* cos, const float* sin, const u32* positions,
 const bf16* wq, const bf16* wk, float eps, float* partial, int num_rows, int num_heads,
 int num_kv_heads, int c) {
  SHARED(float, sums, 2 * THREADS * 16);
  int lanes = c / 16, slots = THREADS / lanes, heads = num_heads + num_kv_heads;
  int part = threadIdx.x % lanes, slot = threadIdx.x / lanes;
  int first = blockIdx.x * BACKWARD_ROWS;
  int rows = num_rows - first < BACKWARD_ROWS ? num_rows - first : BACKWARD_ROWS;
  Halves dw[2];
  UNROLL for (int e = 0; e < 8; e++)
    dw[0].low[e] = dw[0].high[e] = dw[1].low[e] = dw[1].high[e] = 0.0f;
  // All threads take as many steps, for the sums.
  for (int step = 0; step < rows * heads; step += slots) {
    int item = step + slot;
    bool inside = item < rows * heads;
    if (!inside) item = 0;
    u64 row = first + item / heads;
    int head = item % heads;
    bool is_query = head < num_heads;
    u64 at = (row * (heads + num_kv_heads) + head) * c;
    // A head belongs to one slot; nobody else reads it.
    Halves dx = {};
    if (inside) dx = load_halves(dqkv_tq + at, part, c);
    u64 angle = (u64)positions[row] * (c / 2) + part * 8;
    rotate(dx, cos + angle, sin + angle, PLANTED(rope_turns_on) ? 1.0f : -1.0f);
    if (wq != nullptr) {
      Halves x = load_halves(raw_tq + at, part, c);
      Halves w = load_halves(is_query ? wq : wk, part, c);
      float rstd = head_rstd(x, c, eps);
      if (inside) {
        UNROLL for (int kind = 0; kind < 2; kind++) {
          if (is_query != (kind == 0)) continue;
          UNROLL for (int e = 0; e < 8; e++) {
            dw[kind].low[e] = fma_f32(x.low[e] * rstd, dx.low[e], dw[kind].low[e]);
            dw[kind].high[e] = fma_f32(x.high[e] * rstd, dx.high[e], dw[kind].high[e]);
          }
        }
      }
      float mean = 0.0f;
      UNROLL for (int e = 0; e < 8; e++) {
        dx.low[e] *= w.low[e];
        dx.high[e] *= w.high[e];
        mean = fma_f32(dx.low[e], x.low[e], mean);
        mean = fma_f32(dx.high[e], x.high[e], mean);
      }
      mean = div_f32(head_sum(mean, lanes) * rstd * rstd, (float)c);
      UNROLL for (int e = 0; e < 8; e++) {
        dx.low[e] = rstd * (dx.low[e] - x.low[e] * mean);
        dx.high[e] = rstd * (dx.high[e] - x.high[e] * mean);
      }
    }
    if (inside) store_halves(dqkv_tq + at, dx, part, c);
  }
  if (wq == nullptr) return;
  UNROLL for (int kind = 0; kind < 2; kind++) {
    float* to = sums + (kind * slots + slot) * c + part * 8;
    UNROLL for (int e = 0; e < 8; e++) {
      to[e] = dw[kind].low[e];
      to[c / 2 + e] = dw[kind].high[e];
    }
  }
  if (!PLANTED(rope_no_barrier)) block_sync();
  for (int i = threadIdx.x; i < 2 * c; i += THREADS) {
    int kind = i / c, column = i % c;
    float sum = 0.0f;
    for (int s = 0; s < slots; s++) sum += sums[(kind * slots + s) * c + column];
    partial[((u64)kind * gridDim.x + blockIdx.x) * c + column] = sum;
  }
}
EXPORT(rope_backward)
