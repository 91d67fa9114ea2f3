// Sums over rows in a fixed order: columns of a matrix (the gradient of a bias) and partial sums.
//
// The order depends on the number of rows alone: blocks of rows in order, then their partial sums
// in PARTIAL_GROUPS interleaved groups, then the groups in order.
#include "prims.h"

const int THREADS = 128;
// Rows that one block of column_sums adds.
const int SUM_ROWS = 64;
const int PARTIAL_GROUPS = 16;

// partial[b][n] = sum of rows 64 b.. of dy in order. A thread has 8 of the n columns (a multiple of
// 8).
KERNEL(THREADS, column_sums)
(const bf16* dy_tn, float* partial, int num_rows, int n) {
  int column = (blockIdx.x * THREADS + threadIdx.x) * 8;
  if (column >= n) return;
  int first = blockIdx.y * SUM_ROWS;
  int end = first + SUM_ROWS + (PLANTED(reduce_row_overlap) ? 1 : 0);
  float sum[8];
  UNROLL for (int e = 0; e < 8; e++)
    sum[e] = 0.0f;
  for (int t = first; t < end && t < num_rows; t++) {
    U32x4 q = load_const16(dy_tn + (u64)t * n + column);
    UNROLL for (int e = 0; e < 4; e++) {
      sum[2 * e] += low_bf16(q.v[e]);
      sum[2 * e + 1] += high_bf16(q.v[e]);
    }
  }
  float* to = partial + (u64)blockIdx.y * n + column;
  UNROLL for (int e = 0; e < 8; e++)
    to[e] = sum[e];
}
EXPORT(column_sums)

// out[n] += sum over b of partial[b][n]. A block has 32 columns and 16 groups; group g adds the
// sums g, g + 16, g + 32 and so on, in order.
KERNEL(32 * PARTIAL_GROUPS, add_partials)
(const float* partial, float* out, int num_partials, int n) {
  SHARED(float, sums, 32 * PARTIAL_GROUPS);
  int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  int column = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (column < n) {
    for (int b = group; b < num_partials; b += PARTIAL_GROUPS) sum += partial[(u64)b * n + column];
  }
  sums[threadIdx.x] = sum;
  if (!PLANTED(reduce_no_barrier)) block_sync();
  if (group != 0 || column >= n) return;
  for (int g = 1; g < PARTIAL_GROUPS; g++) sum += sums[g * 32 + lane];
  out[column] += sum;
}
EXPORT(add_partials)
