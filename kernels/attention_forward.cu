// Causal attention of many rows of each sequence (prefill, training), and of several sequences'
// decoding rows over a chunk that they share: blocks of 4 warps with 64 packed rows, K and V
// through a ring of cp.async stages. attention.h has a row's arithmetic.
#include "attention.h"

const int THREADS = 128;
const int TILE_ROWS = THREADS / 2;
const int STAGES = 3;

// Runs `done` with each chunk's softmax for blocks first..end - 1. The tile of queries has been
// asked for, but not committed.
template <int C, class Done>
DEV void attend(u32 q_tile, u32 ring, const Pages& kv, int first, int end, const int (&last)[2],
                float scale, Done done) {
  auto load = [&](int block) {
    if (block < end) {
      u32 stage = ring + block % STAGES * (BLOCK * C * 4);
      load_keys<C>(stage, stage + BLOCK * C * 2, kv, block * BLOCK, BLOCK, threadIdx.x, THREADS);
    }
    cp_async_commit();
  };
  for (int s = 0; s < STAGES - 1; s++) load(first + s);
  Softmax<C> x;
  softmax_begin(x);
  for (int block = first; block < end; block++) {
    if (!PLANTED(attention_no_wait)) cp_async_wait<STAGES - 2>();
    if (!PLANTED(attention_no_barrier)) block_sync();
    load(block + STAGES - 1);  // Into the stage that all have just finished with.
    u32 stage = ring + block % STAGES * (BLOCK * C * 4);
    softmax_block<C>(x, q_tile, threadIdx.x / 32 * 16, stage, stage + BLOCK * C * 2, block * BLOCK,
                     last, scale);
    if ((block + 1) % (CHUNK / BLOCK) == 0 || block + 1 == end) {
      done(x);
      softmax_begin(x);
    }
  }
}

// out and lse of 64 packed rows of one sequence and group. spans[i] = (first row in the batch,
// rows, position of the first, where its pages begin in page_lists); tiles[i] = (span, tile).
template <int C>
DEV void forward(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* spans,
                 const u32* tiles, const u32* page_lists, bf16* out_thc, float* lse_th,
                 int num_heads, int num_kv_heads, float scale) {
  SHARED_DYNAMIC(smem);
  const u32 q_tile = smem_addr(smem), ring = q_tile + TILE_ROWS * C * 2;
  // Total outputs, each thread's own.
  F32x4* totals = (F32x4*)(smem + TILE_ROWS * C * 2 + STAGES * BLOCK * C * 4) + threadIdx.x;
  const int g = blockIdx.y, group = num_heads / num_kv_heads;
  const u32* span = spans + 4 * tiles[2 * blockIdx.x];
  const int rows = span[1] * group, tile = tiles[2 * blockIdx.x + 1] * TILE_ROWS;
  const int pos = span[2];
  u64 head_len = PAGE * C, page_len = num_kv_heads * head_len;
  Pages kv = {k_pages + g * head_len, v_pages + g * head_len, page_lists + span[3], page_len,
              (int)(span[1] + span[2])};
  // Where packed row i begins in q and out, over C.
  auto place = [&](int i) {
    return (u64)(span[0] + i / group) * num_heads + g * group + i % group;
  };
  for (int i = threadIdx.x; i < TILE_ROWS * (C / 8); i += THREADS) {
    int row = i / (C / 8), chunk = i % (C / 8);
    bool valid = tile + row < rows;
    const bf16* from = q_thc + (valid ? place(tile + row) * C + chunk * 8 : 0);
    cp_async16(tile_at<C>(q_tile, row, chunk), from, valid);
  }
  int mine[2], last[2];
  Total total[2];
  UNROLL for (int r = 0; r < 2; r++) {
    mine[r] = tile + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + r * 8;
    last[r] = mine[r] < rows ? pos + mine[r] / group : -1;
    if (PLANTED(attention_sees_ahead) && mine[r] < rows) last[r]++;
    total[r] = {minus_infinity(), 0.0f};
  }
  UNROLL for (int n = 0; n < C / 8; n++)
    totals[n * THREADS] = {{0.0f, 0.0f, 0.0f, 0.0f}};
  int highest = tile + TILE_ROWS < rows ? tile + TILE_ROWS - 1 : rows - 1;
  int end = (pos + highest / group) / BLOCK + 1;
  attend<C>(q_tile, ring, kv, 0, end, last, scale, [&](const Softmax<C>& x) {
    Shares shares[2];
    UNROLL for (int r = 0; r < 2; r++)
      shares[r] = merge(total[r], x.m[r], quad_sum(x.l[r]));
    UNROLL for (int n = 0; n < C / 8; n++) {
      F32x4 sum = totals[n * THREADS];
      UNROLL for (int e = 0; e < 4; e++)
        sum.v[e] = merge_output(sum.v[e], x.o[n][e], shares[e / 2]);
      totals[n * THREADS] = sum;
    }
  });
  float inverse[2] = {final_scale(total[0]), final_scale(total[1])};
  UNROLL for (int n = 0; n < C / 8; n++) {
    F32x4 sum = totals[n * THREADS];
    UNROLL for (int r = 0; r < 2; r++) {
      if (mine[r] >= rows) continue;
      bf16* to = out_thc + place(mine[r]) * C + n * 8 + threadIdx.x % 4 * 2;
      *(u32*)to = pack_bf16(sum.v[2 * r] * inverse[r], sum.v[2 * r + 1] * inverse[r]);
    }
  }
  UNROLL for (int r = 0; r < 2; r++) {
    if (mine[r] < rows && threadIdx.x % 4 == 0) lse_th[place(mine[r])] = log_sum_exp(total[r]);
  }
}

KERNEL_ALONE(THREADS, attention_forward_32)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* out_thc, float* lse_th, int num_heads, int num_kv_heads,
 float scale) {
  forward<32>(q_thc, k_pages, v_pages, spans, tiles, page_lists, out_thc, lse_th, num_heads,
              num_kv_heads, scale);
}
EXPORT(attention_forward_32)

KERNEL_ALONE(THREADS, attention_forward_64)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* out_thc, float* lse_th, int num_heads, int num_kv_heads,
 float scale) {
  forward<64>(q_thc, k_pages, v_pages, spans, tiles, page_lists, out_thc, lse_th, num_heads,
              num_kv_heads, scale);
}
EXPORT(attention_forward_64)

KERNEL_ALONE(THREADS, attention_forward_128)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* spans, const u32* tiles,
 const u32* page_lists, bf16* out_thc, float* lse_th, int num_heads, int num_kv_heads,
 float scale) {
  forward<128>(q_thc, k_pages, v_pages, spans, tiles, page_lists, out_thc, lse_th, num_heads,
               num_kv_heads, scale);
}
EXPORT(attention_forward_128)

// Parts of the decoding rows of up to 64 / R sequences for a whole chunk that all of them share:
// item[i] = (chunk, where its sequences begin in members, how many); one without sequences only
// fills the grid. A sequence that has ended in the meantime sees no keys: it is passed over, as its
// part would be another's. Results as attention_decode's.
template <int C>
DEV void shared_chunk(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages,
                      const u32* sequences, const u32* starts, const u32* items, const u32* members,
                      const u32* page_lists, float* part_o, float* part_ml, int num_heads,
                      int num_kv_heads, float scale) {
  SHARED_DYNAMIC(smem);
  const u32 q_tile = smem_addr(smem), ring = q_tile + TILE_ROWS * C * 2;
  const int g = blockIdx.y, group = num_heads / num_kv_heads;
  const u32* item = items + 3 * blockIdx.x;
  const int chunk = item[0], rows = item[2] * group;
  if (rows == 0) return;
  members += item[1];
  u64 head_len = PAGE * C, page_len = num_kv_heads * head_len;
  Pages kv = {k_pages + g * head_len, v_pages + g * head_len,
              page_lists + sequences[2 * members[0] + 1], page_len, (chunk + 1) * CHUNK};
  auto sees = [&](int row) {
    return row < rows && ((int)sequences[2 * members[row / group]] >= kv.num_keys ||
                          PLANTED(attention_ended_member));
  };
  for (int i = threadIdx.x; i < TILE_ROWS * (C / 8); i += THREADS) {
    int row = i / (C / 8), at = i % (C / 8);
    bool valid = sees(row);
    u64 from = valid ? (u64)members[row / group] * num_heads + g * group + row % group : 0;
    cp_async16(tile_at<C>(q_tile, row, at), q_thc + from * C + at * 8, valid);
  }
  int mine[2], last[2];
  UNROLL for (int r = 0; r < 2; r++) {
    mine[r] = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + r * 8;
    last[r] = sees(mine[r]) ? kv.num_keys - 1 : -1;
  }
  int first = chunk * (CHUNK / BLOCK);
  attend<C>(q_tile, ring, kv, first, first + CHUNK / BLOCK, last, scale, [&](const Softmax<C>& x) {
    float l[2] = {quad_sum(x.l[0]), quad_sum(x.l[1])};
    UNROLL for (int r = 0; r < 2; r++) {
      if (last[r] < 0) continue;
      u32 slot = starts[members[PLANTED(attention_one_member) ? 0 : mine[r] / group]] + chunk;
      store_part<C>(x, r, l[r], (u64)slot * num_heads + g * group + mine[r] % group, part_o,
                    part_ml);
    }
  });
}

KERNEL(THREADS, attention_shared_32)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* members, const u32* page_lists, float* part_o,
 float* part_ml, int num_heads, int num_kv_heads, float scale) {
  shared_chunk<32>(q_thc, k_pages, v_pages, sequences, starts, items, members, page_lists, part_o,
                   part_ml, num_heads, num_kv_heads, scale);
}
EXPORT(attention_shared_32)

KERNEL(THREADS, attention_shared_64)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* members, const u32* page_lists, float* part_o,
 float* part_ml, int num_heads, int num_kv_heads, float scale) {
  shared_chunk<64>(q_thc, k_pages, v_pages, sequences, starts, items, members, page_lists, part_o,
                   part_ml, num_heads, num_kv_heads, scale);
}
EXPORT(attention_shared_64)

KERNEL(THREADS, attention_shared_128)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* members, const u32* page_lists, float* part_o,
 float* part_ml, int num_heads, int num_kv_heads, float scale) {
  shared_chunk<128>(q_thc, k_pages, v_pages, sequences, starts, items, members, page_lists, part_o,
                    part_ml, num_heads, num_kv_heads, scale);
}
EXPORT(attention_shared_128)
