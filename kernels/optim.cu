// Global gradient norm, clip factor and AdamW.
//
// A weight is a bf16 and a 16-bit tail that together are one f32, the master (join_master): bf16 is
// the f32 rounded to nearest, and products read it alone. Sums of squares are f64 over fixed blocks
// of a parameter; the order depends on the parameters' sizes alone. The clip factor stays on the
// device.
#include "prims.h"

const int NORM_THREADS = 256;
// Elements of a block of norm_partials.
const int NORM_BLOCK = 32768;
const int MERGE_THREADS = 1024;
const int UPDATE_THREADS = 256;

// What clip_factor leaves behind.
struct alignas(16) ClipState {
  double norm;  // Global norm of the gradient.
  float scale;  // Factor that clips it.
  u32 broken;   // 1 when the norm is not finite.
};

// Constants of a step (AdamW in ops.rs, corrections applied).
struct AdamStep {
  float rate, keep, beta1, rest1, beta2, rest2, correction2, eps;
};

// Key and upper words of the counter of a parameter's noise.
struct RoundNoise {
  u32 key0, key1, stream, step_low, step_high;
};

// Sum over the block in a tree of halves, in thread 0.
template <int threads>
DEV double tree_sum(double x, double* sums) {
  const int t = threadIdx.x;
  sums[t] = x;
  for (int width = threads / 2; width > 0; width >>= 1) {
    if (!PLANTED(norm_no_barrier)) block_sync();
    if (t < width) sums[t] += sums[t + width];
  }
  return t == 0 ? sums[0] : 0.0;
}

// partial[b] = sum of the squares of elements NORM_BLOCK b.. of g (n is a multiple of 8).
KERNEL(NORM_THREADS, norm_partials)
(const float* g, double* partial, u64 n) {
  SHARED(double, sums, NORM_THREADS);
  u64 first = (u64)blockIdx.x * NORM_BLOCK;
  double sum = 0.0;
  for (int i = threadIdx.x * 4; i < NORM_BLOCK; i += NORM_THREADS * 4) {
    if (first + i >= n) break;
    U32x4 q = load_const16(g + first + i);
    UNROLL for (int e = 0; e < 4; e++) {
      double x = float_of(q.v[e]);
      sum = fma_f64(x, x, sum);
    }
  }
  sum = tree_sum<NORM_THREADS>(sum, sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
EXPORT(norm_partials)

// Norm and clip factor from all parameters' partial sums; one block. `max_norm` 0 does not clip.
KERNEL(MERGE_THREADS, clip_factor)
(const double* partial, ClipState* clip, int num_partials, float max_norm) {
  SHARED(double, sums, MERGE_THREADS);
  double sum = 0.0;
  for (int i = threadIdx.x; i < num_partials; i += MERGE_THREADS) sum += partial[i];
  sum = tree_sum<MERGE_THREADS>(sum, sums);
  if (threadIdx.x != 0) return;
  double norm = sqrt_f64(sum), most = max_norm;
  bool finite = norm - norm == 0.0;
  bool clips = finite && most > 0.0 && norm > most;
  clip->norm = norm;
  clip->scale = clips ? (float)(most / (norm + 1e-6)) : 1.0f;
  clip->broken = finite || PLANTED(clip_no_flag) ? 0 : 1;
}
EXPORT(clip_factor)

// The f32 of a weight. Its upper half was rounded up when the tail is at least one half.
DEV float join_master(u32 bf, u32 tail) {
  u32 carry = PLANTED(adamw_no_carry) ? 0 : tail >> 15;
  return float_of(((bf - carry) & 0xffff) << 16 | tail);
}

// The two parts of an f32: nearest bf16 (ties away from zero) and the lower 16 bits.
DEV u32 master_bf16(float x) { return (bits_of(x) + 0x8000) >> 16; }
DEV u32 master_tail(float x) { return bits_of(x) & 0xffff; }

// Element e of 8 halves of words.
DEV u32 half_of(const U32x4& q, int e) { return e % 2 ? q.v[e / 2] >> 16 : q.v[e / 2] & 0xffff; }

// x as bf16, up with the probability of what is cut off; `noise` has 16 random bits.
DEV u32 round_by_chance(float x, u32 noise) { return (bits_of(x) + noise) >> 16; }

// 8 times 16 random bits for elements 8 `eight`.. of a moment (0 or 1).
DEV U32x4 moment_noise(const RoundNoise& noise, u64 eight, u32 moment) {
  u32 words[4] = {(u32)eight, noise.stream + (PLANTED(adamw_same_noise) ? 0 : moment),
                  noise.step_low, noise.step_high};
  philox(words, noise.key0, noise.key1);
  return {words[0], words[1], words[2], words[3]};
}

DEV void load_f32x8(float (&x)[8], const float* p) {
  U32x4 a = load16(p), b = load16(p + 4);
  UNROLL for (int e = 0; e < 4; e++) {
    x[e] = float_of(a.v[e]);
    x[e + 4] = float_of(b.v[e]);
  }
}

DEV void store_f32x8(float* p, const float (&x)[8]) {
  store16(p, {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
  store16(p + 4, {bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])});
}

DEV void load_moments(float (&x)[8], const float* p) { load_f32x8(x, p); }
DEV void load_moments(float (&x)[8], const bf16* p) {
  U32x4 q = load16(p);
  UNROLL for (int e = 0; e < 8; e++)
    x[e] = float_of(half_of(q, e) << 16);
}

DEV void store_moments(float* p, const float (&x)[8], const RoundNoise&, u64, u32) {
  store_f32x8(p, x);
}
DEV void store_moments(bf16* p, const float (&x)[8], const RoundNoise& noise, u64 eight,
                       u32 moment) {
  U32x4 random = moment_noise(noise, eight, moment), q;
  UNROLL for (int e = 0; e < 4; e++) {
    q.v[e] = round_by_chance(x[2 * e], half_of(random, 2 * e)) |
             round_by_chance(x[2 * e + 1], half_of(random, 2 * e + 1)) << 16;
  }
  store16(p, q);
}

// One step of 8 elements; the gradient is zero afterwards. A broken clip state changes nothing
// else.
template <class Moment>
DEV void update(bf16* w, u16* tail, float* g, Moment* m_out, Moment* v_out, const ClipState* clip,
                const AdamStep& step, const RoundNoise& noise, u64 n) {
  u64 eight = (u64)blockIdx.x * UPDATE_THREADS + threadIdx.x, at = eight * 8;
  if (at >= n) return;
  float scale = clip->scale;
  if (!clip->broken) {
    float grad[8], m[8], v[8];
    load_f32x8(grad, g + at);
    load_moments(m, m_out + at);
    load_moments(v, v_out + at);
    U32x4 high = load16(w + at), low = load16(tail + at);
    u32 bf[8], rest[8];
    UNROLL for (int e = 0; e < 8; e++) {
      float d = grad[e] * scale;
      m[e] = step.beta1 * m[e] + step.rest1 * d;
      v[e] = step.beta2 * v[e] + step.rest2 * d * d;
      float p = join_master(half_of(high, e), half_of(low, e));
      float root = div_f32(sqrt_f32(v[e]), step.correction2) + step.eps;
      p = p * step.keep - div_f32(step.rate * m[e], root);
      bf[e] = master_bf16(p);
      rest[e] = master_tail(p);
    }
    UNROLL for (int e = 0; e < 4; e++) {
      high.v[e] = bf[2 * e] | bf[2 * e + 1] << 16;
      low.v[e] = rest[2 * e] | rest[2 * e + 1] << 16;
    }
    store16(w + at, high);
    store16(tail + at, low);
    store_moments(m_out + at, m, noise, eight, 0);
    store_moments(v_out + at, v, noise, eight, 1);
  }
  if (PLANTED(adamw_keeps_gradient)) return;
  store16(g + at, {});
  store16(g + at + 4, {});
}

// AdamW with f32 moments.
KERNEL(UPDATE_THREADS, adamw_f32)
(bf16* w, u16* tail, float* g, float* m, float* v, const ClipState* clip, AdamStep step, u64 n) {
  update(w, tail, g, m, v, clip, step, RoundNoise{}, n);
}
EXPORT(adamw_f32)

// AdamW with bf16 moments, rounded stochastically.
KERNEL(UPDATE_THREADS, adamw_bf16)
(bf16* w, u16* tail, float* g, bf16* m, bf16* v, const ClipState* clip, AdamStep step,
 RoundNoise noise, u64 n) {
  update(w, tail, g, m, v, clip, step, noise, n);
}
EXPORT(adamw_bf16)
