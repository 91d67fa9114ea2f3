// Probe: what numerics.h gives, for comparison with the CPU's functions. Not part of the product.
#include "prims.h"

// out[0..4n]: exp, ln, reciprocal square root and (up to 88) the unchecked exp of x; words[4 i..]:
// philox of counter (i, 1, 2, 3).
KERNEL(64, probe_numerics)
(const float* x, float* out, u32* words, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i >= n) return;
  out[i] = exp_f32(x[i]);
  out[n + i] = ln_f32(x[i] < 0.0f ? -x[i] : x[i]);
  out[2 * n + i] = rsqrt_f32(x[i] < 0.0f ? -x[i] : x[i]);
  out[3 * n + i] = exp_below_88(x[i] > 88.0f ? 88.0f : x[i]);
  u32 ctr[4] = {(u32)i, 1, 2, 3};
  philox(ctr, 4, 5);
  for (int w = 0; w < 4; w++) words[4 * i + w] = ctr[w];
}
EXPORT(probe_numerics)
