// RMSNorm with residual add, and its backward pass.
//
// T rows of D (a multiple of 8, at most 5120) bf16. One block of 128 threads takes a row; thread t
// has elements 8 (t + 128 i).. in registers. Order of a row's sum: a thread's elements in order,
// the 32 lanes in a tree, the 4 warps in order: it depends on D alone.
#include "prims.h"

const int THREADS = 128;
const int WARPS = THREADS / 32;
// Eights of elements of a thread.
const int EIGHTS = 5;
// Rows of a block in the backward pass; each block leaves one partial sum of the weight's gradient.
const int BACKWARD_ROWS = 8;

// Elements 8 i.. of a row of d, zeros past its end.
DEV void load_eight(float (&x)[8], const bf16* row, int i, int d) {
  U32x4 q = {};
  if (i * 8 < d) q = load16(row + i * 8);
  UNROLL for (int e = 0; e < 4; e++) {
    x[2 * e] = low_bf16(q.v[e]);
    x[2 * e + 1] = high_bf16(q.v[e]);
  }
}

DEV void store_eight(bf16* row, const float (&x)[8], int i, int d) {
  if (i * 8 >= d) return;
  U32x4 q;
  UNROLL for (int e = 0; e < 4; e++)
    q.v[e] = pack_bf16(x[2 * e], x[2 * e + 1]);
  store16(row + i * 8, q);
}

template <bool add>
DEV void forward(bf16* x_td, const bf16* delta_td, const bf16* w_d, bf16* y_td, float* rstd_t,
                 int d, float eps) {
  SHARED(float, scratch, WARPS);
  u64 at = (u64)blockIdx.x * d;
  float x[EIGHTS][8];
  float sum = 0.0f;
  UNROLL for (int i = 0; i < EIGHTS; i++) {
    int eight = threadIdx.x + i * THREADS;
    if (i * THREADS * 8 >= d) break;
    load_eight(x[i], x_td + at, eight, d);
    if (add) {
      float delta[8];
      load_eight(delta, delta_td + at, eight, d);
      // The norm sees the stream as it is stored.
      UNROLL for (int e = 0; e < 8; e++)
        x[i][e] = to_f32(to_bf16(x[i][e] + delta[e]));
      store_eight(x_td + at, x[i], eight, d);
    }
    UNROLL for (int e = 0; e < 8; e++)
      sum = fma_f32(x[i][e], x[i][e], sum);
  }
  sum = block_sum<WARPS>(sum, scratch);
  float rstd = rsqrt_f32(div_f32(sum, (float)d) + eps);
  if (threadIdx.x == 0) rstd_t[blockIdx.x] = rstd;
  UNROLL for (int i = 0; i < EIGHTS; i++) {
    int eight = threadIdx.x + i * THREADS;
    if (i * THREADS * 8 >= d) break;
    float w[8], y[8];
    load_eight(w, w_d, PLANTED(rmsnorm_weight_index) ? 0 : eight, d);
    UNROLL for (int e = 0; e < 8; e++)
      y[e] = x[i][e] * rstd * w[e];
    store_eight(y_td + at, y, eight, d);
  }
}

// y = x / rms(x) * w; rstd keeps 1 / rms.
KERNEL(THREADS, rmsnorm_forward)
(const bf16* x_td, const bf16* w_d, bf16* y_td, float* rstd_t, int d, float eps) {
  forward<false>((bf16*)x_td, nullptr, w_d, y_td, rstd_t, d, eps);
}
EXPORT(rmsnorm_forward)

// x += delta, then as rmsnorm_forward.
KERNEL(THREADS, rmsnorm_add_forward)
(bf16* x_td, const bf16* delta_td, const bf16* w_d, bf16* y_td, float* rstd_t, int d, float eps) {
  forward<true>(x_td, delta_td, w_d, y_td, rstd_t, d, eps);
}
EXPORT(rmsnorm_add_forward)

// dx += gradient of the input; partial[block][d] = sum over the block's rows, in order, of
// dy x rstd (add_partials adds them to the weight's gradient).
KERNEL(THREADS, rmsnorm_backward)
(const bf16* x_td, const bf16* w_d, const float* rstd_t, const bf16* dy_td, bf16* dx_td,
 float* partial, int num_rows, int d) {
  SHARED(float, scratch, WARPS);
  int first = blockIdx.x * BACKWARD_ROWS;
  float dw[EIGHTS][8];
  UNROLL for (int i = 0; i < EIGHTS; i++) {
    UNROLL for (int e = 0; e < 8; e++)
      dw[i][e] = 0.0f;
  }
  for (int t = first; t < first + BACKWARD_ROWS && t < num_rows; t++) {
    u64 at = (u64)t * d;
    float rstd = rstd_t[t];
    float sum = 0.0f;
    UNROLL for (int i = 0; i < EIGHTS; i++) {
      int eight = threadIdx.x + i * THREADS;
      if (i * THREADS * 8 >= d) break;
      float x[8], dy[8], w[8];
      load_eight(x, x_td + at, eight, d);
      load_eight(dy, dy_td + at, eight, d);
      load_eight(w, w_d, eight, d);
      UNROLL for (int e = 0; e < 8; e++) {
        sum = fma_f32(dy[e] * w[e], x[e], sum);
        dw[i][e] = fma_f32(x[e] * rstd, dy[e], dw[i][e]);
      }
    }
    sum = block_sum<WARPS>(sum, scratch);
    float c = div_f32(sum * rstd * rstd, (float)d);
    UNROLL for (int i = 0; i < EIGHTS; i++) {
      int eight = threadIdx.x + i * THREADS;
      if (i * THREADS * 8 >= d) break;
      float x[8], dy[8], w[8], dx[8];
      load_eight(x, x_td + at, eight, d);
      load_eight(dy, dy_td + at, eight, d);
      load_eight(w, w_d, eight, d);
      load_eight(dx, dx_td + at, eight, d);
      UNROLL for (int e = 0; e < 8; e++)
        dx[e] += rstd * (dy[e] * w[e] - x[e] * c);
      store_eight(dx_td + at, dx, eight, d);
    }
    if (!PLANTED(rmsnorm_scratch_reuse)) block_sync();  // The scratch is free for the next row.
  }
  UNROLL for (int i = 0; i < EIGHTS; i++) {
    int column = (threadIdx.x + i * THREADS) * 8;
    if (column >= d) break;
    float* to = partial + (u64)blockIdx.x * d + column;
    store16(to, {bits_of(dw[i][0]), bits_of(dw[i][1]), bits_of(dw[i][2]), bits_of(dw[i][3])});
    store16(to + 4, {bits_of(dw[i][4]), bits_of(dw[i][5]), bits_of(dw[i][6]), bits_of(dw[i][7])});
  }
}
EXPORT(rmsnorm_backward)
