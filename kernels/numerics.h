// Elementary functions, reductions and random numbers: bit for bit those of src/compute/cpu/math.rs
// and src/base/rng.rs (tests/kernels/numerics.rs compares them). Included by prims.h.
#pragma once

// exp_f32's bits for x up to 88, which is not checked.
DEV float exp_below_88(float x) {
  const float shift = 12582912.0f;
  float shifted = fma_f32(x, 1.44269504088896340736f, shift);
  float n = shifted - shift;
  float r = fma_f32(n, -0.6933594f, x);
  r = fma_f32(n, 2.1219444e-4f, r);
  float p = 1.9875691e-4f;
  p = fma_f32(p, r, 1.3982e-3f);
  p = fma_f32(p, r, 8.333452e-3f);
  p = fma_f32(p, r, 4.1665796e-2f);
  p = fma_f32(p, r, 1.6666665e-1f);
  p = fma_f32(p, r, 0.5f);
  p = fma_f32(p * r, r, r) + 1.0f;
  // The lowest bits of `shifted` are n: 2^n without a conversion. Far below -87 it is nothing.
  float scale = float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : p * scale;
}

// e^x within 2 ulp for x in -87..88; below that 0, above that saturated.
DEV float exp_f32(float x) { return exp_below_88(x > 88.0f ? 88.0f : x); }

// Natural logarithm within 2 ulp for positive normal x.
DEV float ln_f32(float x) {
  u32 bits = bits_of(x);
  int exponent = (int)(bits - 0x3f3504f3u) >> 23;
  float m = float_of(bits - ((u32)exponent << 23));
  float e = (float)exponent;
  float f = m - 1.0f;
  float z = f * f;
  float p = 7.0376836e-2f;
  p = fma_f32(p, f, -1.151461e-1f);
  p = fma_f32(p, f, 1.1676999e-1f);
  p = fma_f32(p, f, -1.2420141e-1f);
  p = fma_f32(p, f, 1.4249323e-1f);
  p = fma_f32(p, f, -1.6668058e-1f);
  p = fma_f32(p, f, 2.0000715e-1f);
  p = fma_f32(p, f, -2.4999994e-1f);
  p = fma_f32(p, f, 3.333333e-1f);
  float y = f * z * p;
  y = fma_f32(e, -2.1219444e-4f, y);
  y = fma_f32(z, -0.5f, y);
  return fma_f32(e, 0.6933594f, f + y);
}

// silu(gate) up.
DEV float gated(float gate, float up) { return div_f32(gate, 1.0f + exp_f32(-gate)) * up; }

// 1 / sqrt(x), rounded twice as on the CPU.
DEV float rsqrt_f32(float x) { return div_f32(1.0f, sqrt_f32(x)); }

// Sum of all lanes, in every lane. A lane adds the lane 16 away, then 8, 4, 2 and 1: the tree of
// tree_sum, twice as wide.
DEV float warp_sum(float x SITE) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) x = x + shuffle_xor(x, lanes PASS);
  return x;
}

// Maximum of all lanes, in every lane.
DEV float warp_max(float x SITE) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) x = max_f32(x, shuffle_xor(x, lanes PASS));
  return x;
}

// Sum over a block of `warps` warps, in every thread; `scratch` has a float for each warp. Warps
// are added in order. The scratch may be reused after the block's next barrier.
template <int warps>
DEV float block_sum(float x, float* scratch SITE) {
  x = warp_sum(x PASS);
  if (warps == 1) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  if (!PLANTED(block_sum_no_barrier)) block_sync(PASS_ONLY);
  float sum = scratch[0];
  UNROLL for (int w = 1; w < warps; w++)
    sum += scratch[w];
  return sum;
}

// Philox4x32 with 10 rounds: four random words of a counter under a key.
DEV void philox(u32 (&ctr)[4], u32 key0, u32 key1) {
  UNROLL for (int round = 0; round < 10; round++) {
    u32 low0 = 0xd2511f53u * ctr[0], high0 = mul_high(0xd2511f53u, ctr[0]);
    u32 low1 = 0xcd9e8d57u * ctr[2], high1 = mul_high(0xcd9e8d57u, ctr[2]);
    ctr[0] = high1 ^ ctr[1] ^ key0;
    ctr[1] = low1;
    ctr[2] = high0 ^ ctr[3] ^ key1;
    ctr[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

// Uniform in the open interval (0, 1) from the upper 23 bits of a word.
DEV float open_unit(u32 word) { return ((float)(word >> 9) + 0.5f) * (1.0f / 8388608.0f); }

// Gumbel noise of a word.
DEV float gumbel(u32 word) { return -ln_f32(-ln_f32(open_unit(word))); }
