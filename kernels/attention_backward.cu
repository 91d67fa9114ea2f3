// Backward pass of attention for sequences that lie whole in the batch, without atomics: one kernel
// for dQ (a tile of packed rows meets its keys in order), one for dK and dV (a tile of keys meets
// its packed rows in order). Weights are recomputed from the log-sum-exp. attention.h has the
// layouts.
#include "attention.h"

const int THREADS = 128;
// Packed rows of a block of the dQ kernels, keys of one of the dK and dV kernels.
const int TILE_ROWS = THREADS / 2;
const int STAGES = 3;
// Stages of the dK and dV kernels.
const int ROW_STAGES = 2;

// delta[T][H] = sum over C of out dout: C / 8 lanes, a thread's 8 products in order, the lanes in a
// tree.
KERNEL(THREADS, attention_delta)
(const bf16* out_thc, const bf16* dout_thc, float* delta_th, int num_rows, int num_heads, int c) {
  int lanes = c / 8;
  u64 index = (u64)blockIdx.x * THREADS + threadIdx.x, head = index / lanes;
  // Threads past the end help with the sums.
  bool inside = head < (u64)num_rows * num_heads;
  u64 at = inside ? index * 8 : 0;
  U32x4 o = load_const16(out_thc + at), d = load_const16(dout_thc + at);
  float sum = 0.0f;
  UNROLL for (int e = 0; e < 4; e++) {
    sum = fma_f32(low_bf16(o.v[e]), low_bf16(d.v[e]), sum);
    sum = fma_f32(high_bf16(o.v[e]), high_bf16(d.v[e]), sum);
  }
  int first = PLANTED(delta_half_a_head) ? lanes / 4 : lanes / 2;
  for (int step = first; step > 0; step >>= 1) sum = sum + shuffle_xor(sum, step);
  if (inside && index % lanes == 0) delta_th[head] = sum;
}
EXPORT(attention_delta)

// Begins to load `count` packed rows from row `first` of two arrays [T][H][C]; rows past the end
// are zeros.
template <int C, class Place>
DEV void load_rows(u32 a_tile, u32 b_tile, const bf16* a, const bf16* b, int first, int count,
                   int rows, Place place) {
  for (int i = threadIdx.x; i < count * (C / 8); i += THREADS) {
    int row = i / (C / 8), chunk = i % (C / 8);
    bool valid = first + row < rows;
    u64 at = valid ? place(first + row) * C + chunk * 8 : 0;
    cp_async16(tile_at<C>(a_tile, row, chunk), a + at, valid);
    cp_async16(tile_at<C>(b_tile, row, chunk), b + at, valid);
  }
}

// Gradient of 64 packed rows' queries, into dqkv[T][Q]. spans and tiles as in attention_forward.
template <int C>
DEV void backward_q(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages,
                    const bf16* dout_thc, const float* lse_th, const float* delta_th,
                    const u32* spans, const u32* tiles, const u32* page_lists, bf16* dqkv_tq,
                    int num_heads, int num_kv_heads, float scale) {
  SHARED_DYNAMIC(smem);
  const u32 q_tile = smem_addr(smem), d_tile = q_tile + TILE_ROWS * C * 2;
  const u32 ring = d_tile + TILE_ROWS * C * 2;
  const int g = blockIdx.y, group = num_heads / num_kv_heads;
  const u32* span = spans + 4 * tiles[2 * blockIdx.x];
  const int rows = span[1] * group, tile = tiles[2 * blockIdx.x + 1] * TILE_ROWS;
  u64 head_len = PAGE * C, page_len = num_kv_heads * head_len;
  Pages kv = {k_pages + g * head_len, v_pages + g * head_len, page_lists + span[3], page_len,
              (int)span[1]};
  auto place = [&](int i) {
    return (u64)(span[0] + i / group) * num_heads + g * group + i % group;
  };
  load_rows<C>(q_tile, d_tile, q_thc, dout_thc, tile, TILE_ROWS, rows, place);
  int mine[2], last[2];
  float lse[2], delta[2];
  UNROLL for (int r = 0; r < 2; r++) {
    mine[r] = tile + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + r * 8;
    bool valid = mine[r] < rows;
    last[r] = valid ? mine[r] / group : -1;
    lse[r] = valid ? lse_th[place(mine[r])] : 0.0f;
    delta[r] = valid ? delta_th[place(mine[r])] : 0.0f;
  }
  int highest = tile + TILE_ROWS < rows ? tile + TILE_ROWS - 1 : rows - 1;
  int end = highest / group / BLOCK + 1;
  auto load = [&](int block) {
    if (block < end) {
      u32 stage = ring + block % STAGES * (BLOCK * C * 4);
      load_keys<C>(stage, stage + BLOCK * C * 2, kv, block * BLOCK, BLOCK, threadIdx.x, THREADS);
    }
    cp_async_commit();
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);
  float dq[C / 8][4];
  UNROLL for (int n = 0; n < C / 8; n++) {
    UNROLL for (int e = 0; e < 4; e++)
      dq[n][e] = 0.0f;
  }
  for (int block = 0; block < end; block++) {
    cp_async_wait<STAGES - 2>();
    if (!PLANTED(backward_q_no_barrier)) block_sync();
    load(block + STAGES - 1);
    const u32 k_tile = ring + block % STAGES * (BLOCK * C * 4), v_tile = k_tile + BLOCK * C * 2;
    float s[BLOCK / 8][4], dp[BLOCK / 8][4];
    product_transposed<C>(s, q_tile, threadIdx.x / 32 * 16, k_tile);
    product_transposed<C>(dp, d_tile, threadIdx.x / 32 * 16, v_tile);
    UNROLL for (int j = 0; j < BLOCK / 8; j++) {
      UNROLL for (int e = 0; e < 4; e++) {
        int key = block * BLOCK + j * 8 + threadIdx.x % 4 * 2 + e % 2;
        float p = key <= last[e / 2] ? exp_f32(s[j][e] * scale - lse[e / 2]) : 0.0f;
        s[j][e] = p * (dp[j][e] - (PLANTED(backward_q_no_delta) ? 0.0f : delta[e / 2])) * scale;
      }
    }
    product_add<C>(dq, s, k_tile);
  }
  UNROLL for (int r = 0; r < 2; r++) {
    if (mine[r] >= rows) continue;
    u64 row = span[0] + mine[r] / group;
    bf16* to = dqkv_tq + (row * (num_heads + 2 * num_kv_heads) + g * group + mine[r] % group) * C;
    UNROLL for (int n = 0; n < C / 8; n++)
      *(u32*)(to + n * 8 + threadIdx.x % 4 * 2) = pack_bf16(dq[n][2 * r], dq[n][2 * r + 1]);
  }
}

// Gradients of 64 keys and their values, into dqkv[T][Q]: the sum over the group's packed rows from
// the first that sees a key, in blocks of 32 at multiples of 32.
template <int C>
DEV void backward_kv(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages,
                     const bf16* dout_thc, const float* lse_th, const float* delta_th,
                     const u32* spans, const u32* tiles, const u32* page_lists, bf16* dqkv_tq,
                     int num_heads, int num_kv_heads, float scale) {
  SHARED(float, row_stats, ROW_STAGES * 2 * BLOCK);
  SHARED_DYNAMIC(smem);
  const u32 k_tile = smem_addr(smem), v_tile = k_tile + TILE_ROWS * C * 2;
  const u32 ring = v_tile + TILE_ROWS * C * 2;
  const int g = blockIdx.y, group = num_heads / num_kv_heads;
  const u32* span = spans + 4 * tiles[2 * blockIdx.x];
  const int rows = span[1] * group, tile = tiles[2 * blockIdx.x + 1] * TILE_ROWS;
  u64 head_len = PAGE * C, page_len = num_kv_heads * head_len;
  Pages kv = {k_pages + g * head_len, v_pages + g * head_len, page_lists + span[3], page_len,
              (int)span[1]};
  auto place = [&](int i) {
    return (u64)(span[0] + i / group) * num_heads + g * group + i % group;
  };
  load_keys<C>(k_tile, v_tile, kv, tile, TILE_ROWS, threadIdx.x, THREADS);
  const int first = tile * group / BLOCK, end = ceil_div(rows, BLOCK);
  auto load = [&](int block) {
    if (block < end) {
      int at = block % ROW_STAGES;
      u32 stage = ring + at * (BLOCK * C * 4);
      load_rows<C>(stage, stage + BLOCK * C * 2, q_thc, dout_thc, block * BLOCK, BLOCK, rows,
                   place);
      int row = block * BLOCK + threadIdx.x;
      if (threadIdx.x < BLOCK) {
        row_stats[at * 2 * BLOCK + threadIdx.x] = row < rows ? lse_th[place(row)] : 0.0f;
        row_stats[(at * 2 + 1) * BLOCK + threadIdx.x] = row < rows ? delta_th[place(row)] : 0.0f;
      }
    }
    cp_async_commit();
  };
  load(first);
  float dk[C / 8][4], dv[C / 8][4];
  UNROLL for (int n = 0; n < C / 8; n++) {
    UNROLL for (int e = 0; e < 4; e++)
      dk[n][e] = dv[n][e] = 0.0f;
  }
  // This thread's keys are `mine` and 8 further.
  const int mine = tile + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  for (int block = first; block < end; block++) {
    cp_async_wait<0>();
    if (!PLANTED(backward_kv_no_barrier)) block_sync();
    load(block + 1);  // Into the stage that all have just finished with.
    const u32 q_tile = ring + block % ROW_STAGES * (BLOCK * C * 4);
    const u32 d_tile = q_tile + BLOCK * C * 2;
    const float* stats = row_stats + block % ROW_STAGES * 2 * BLOCK;
    float s[BLOCK / 8][4], dp[BLOCK / 8][4];
    product_transposed<C>(s, k_tile, threadIdx.x / 32 * 16, q_tile);
    product_transposed<C>(dp, v_tile, threadIdx.x / 32 * 16, d_tile);
    UNROLL for (int j = 0; j < BLOCK / 8; j++) {
      UNROLL for (int e = 0; e < 4; e++) {
        int column = j * 8 + threadIdx.x % 4 * 2 + e % 2, row = block * BLOCK + column;
        // Packed row i sees keys up to i / R.
        int key = mine + (PLANTED(backward_kv_one_key) ? 0 : e / 2 * 8);
        bool seen = row < rows && row >= key * group;
        float p = seen ? exp_f32(s[j][e] * scale - stats[column]) : 0.0f;
        dp[j][e] = p * (dp[j][e] - stats[BLOCK + column]) * scale;
        s[j][e] = p;
      }
    }
    product_add<C>(dv, s, d_tile);
    product_add<C>(dk, dp, q_tile);
  }
  UNROLL for (int r = 0; r < 2; r++) {
    int key = mine + r * 8;
    if (key >= (int)span[1]) continue;
    bf16* to = dqkv_tq +
               ((u64)(span[0] + key) * (num_heads + 2 * num_kv_heads) + num_heads + g) * C +
               threadIdx.x % 4 * 2;
    UNROLL for (int n = 0; n < C / 8; n++) {
      *(u32*)(to + n * 8) = pack_bf16(dk[n][2 * r], dk[n][2 * r + 1]);
      *(u32*)(to + num_kv_heads * C + n * 8) = pack_bf16(dv[n][2 * r], dv[n][2 * r + 1]);
    }
  }
}

KERNEL(THREADS, attention_backward_q_32)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_q<32>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                 dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_q_32)

KERNEL(THREADS, attention_backward_q_64)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_q<64>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                 dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_q_64)

KERNEL(THREADS, attention_backward_q_128)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_q<128>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                  dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_q_128)

KERNEL(THREADS, attention_backward_kv_32)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_kv<32>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                  dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_kv_32)

KERNEL(THREADS, attention_backward_kv_64)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_kv<64>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                  dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_kv_64)

KERNEL(THREADS, attention_backward_kv_128)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const bf16* dout_thc,
 const float* lse_th, const float* delta_th, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* dqkv_tq, int num_heads, int num_kv_heads, float scale) {
  backward_kv<128>(q_thc, k_pages, v_pages, dout_thc, lse_th, delta_th, spans, tiles, page_lists,
                   dqkv_tq, num_heads, num_kv_heads, scale);
}
EXPORT(attention_backward_kv_128)
