// Rows of the embedding, and the gradient of its table.
//
// T tokens, rows of D (a multiple of 8) bf16; the table's gradient is f32. The backward pass gets
// the rows sorted by token (launch/rows.rs: EmbedPlan) and adds each token's rows in their order:
// no atomics, and one order.
#include "prims.h"

const int THREADS = 128;

// out[t] = table[tokens[t]].
KERNEL(THREADS, embed_forward)
(const u32* tokens, const bf16* table_vd, bf16* out_td, int d) {
  const bf16* from = table_vd + (u64)tokens[blockIdx.x] * d;
  bf16* to = out_td + (u64)blockIdx.x * d;
  for (int i = threadIdx.x * 8; i < d; i += THREADS * 8) store16(to + i, load_cached16(from + i));
}
EXPORT(embed_forward)

// dtable[ids[u]] += rows[starts[u]..starts[u + 1]] of dx, in order. Block (u, c): columns 256 c...
KERNEL(THREADS, embed_backward)
(const u32* ids, const u32* starts, const u32* rows, const bf16* dx_td, float* dtable_vd, int d) {
  int column = (blockIdx.y * THREADS + threadIdx.x) * 2;
  if (column >= d) return;
  float* to = dtable_vd + (u64)ids[blockIdx.x] * d + column;
  float low = to[0], high = to[1];
  u32 first = starts[blockIdx.x] + (PLANTED(embedding_skips_a_row) ? 1 : 0);
  for (u32 i = first; i < starts[blockIdx.x + 1]; i++) {
    u32 pair = *(const u32*)(dx_td + (u64)rows[i] * d + column);
    low += low_bf16(pair);
    high += high_bf16(pair);
  }
  to[0] = low;
  to[1] = high;
}
EXPORT(embed_backward)
