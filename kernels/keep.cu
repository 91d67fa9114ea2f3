// Top-k and top-p: tokens drawn from rows of whole logits, among the likeliest alone.
//
// A row keeps the tokens whose z, the logit times the row's inverse temperature, is not below a
// floor: the greatest z of which there are top_k tokens at or above it, or these have top_p of the
// probability; equals are kept together. Its bits are found from the highest down: in each pass
// every thread takes its tokens in order, then lanes in a tree, then the 16 warps in order.
#include "head.h"

const int THREADS = 512;
const int WARPS = THREADS / 32;

// Numbers in the order of the floats that they come from; both zeros are one.
DEV u32 in_order(float z) {
  u32 bits = bits_of(z + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The floor of a row in that order; scratch has 2 WARPS floats.
DEV u32 find_floor(const float* logits, const HeadRow& row, float log_sum, int v, float* scratch) {
  u32 floor = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const u32 at = floor | 1u << bit;
    float count = 0.0f, mass = 0.0f;
    for (int i = threadIdx.x; i < v; i += THREADS) {
      float z = logits[i] * row.inv_temperature;
      if (in_order(z) < at) continue;
      count += 1.0f;
      mass += exp_f32(z - log_sum);
    }
    // Either sum's barrier frees the scratch of the other.
    count = block_sum<WARPS>(count, scratch);
    mass = block_sum<WARPS>(mass, scratch + WARPS);
    bool by_count = row.top_k > 0 && count >= (float)row.top_k;
    bool by_mass = row.top_p < 1.0f && mass >= row.top_p;
    if (PLANTED(keep_either) ? by_count : by_count || by_mass) floor = at;
  }
  return floor;
}

// Draws again where a row keeps few tokens, one block a row; drawn[T] has what `head_draw` gave.
KERNEL(THREADS, draw_kept)
(const float* logits_tv, const HeadRow* rows, DrawnRow* drawn, int v, u32 key0, u32 key1) {
  SHARED(float, scratch, 2 * WARPS);
  SHARED(float, scores, WARPS);
  SHARED(float, zs, WARPS);
  SHARED(u32, tokens, WARPS);
  const HeadRow row = rows[blockIdx.x];
  if (row.greedy != 0 || (row.top_k == 0 && row.top_p >= 1.0f)) return;
  const float* logits = logits_tv + (u64)blockIdx.x * v;
  const float log_sum = drawn[blockIdx.x].log_sum;
  const u32 floor = find_floor(logits, row, log_sum, v, scratch);
  Best best = {float_of(0xff800000u), 0.0f, 0u};
  for (int i = threadIdx.x; i * 4 < v; i += THREADS) {
    u32 noise[4] = {(u32)i, row.position, row.seq_low, row.seq_high};
    philox(noise, key0, key1);
    UNROLL for (int e = 0; e < 4; e++) {
      if (i * 4 + e >= v) continue;
      float z = logits[i * 4 + e] * row.inv_temperature;
      u32 at = in_order(z);
      if (at > floor || (at == floor && !PLANTED(keep_no_equals)))
        best = better(best, {z + gumbel(noise[e]), z, (u32)(i * 4 + e)});
    }
  }
  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) {
    scores[threadIdx.x / 32] = best.score;
    tokens[threadIdx.x / 32] = best.token;
    zs[threadIdx.x / 32] = best.z;
  }
  if (!PLANTED(keep_no_barrier)) block_sync();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; w++) best = better(best, {scores[w], zs[w], tokens[w]});
  drawn[blockIdx.x].token = best.token;
  drawn[blockIdx.x].logprob = best.z - log_sum;
}
EXPORT(draw_kept)
