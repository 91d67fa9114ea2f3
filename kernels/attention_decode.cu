// Attention of one row of each sequence over its pages: a warp takes one chunk of one sequence's
// keys for all query heads of a group (one tile of 16 rows), and leaves a part; the parts are then
// merged in order. attention.h has a row's arithmetic.
#include "attention.h"

const int WARPS = 2;
const int THREADS = WARPS * 32;
const int STAGES = 2;
const int MERGE_THREADS = 128;

// Parts of a chunk: sequences[s] = (keys, where its pages begin in page_lists); its parts begin at
// starts[s]; items[i] = (sequence, chunk). A unit is an item and a group. Items past a sequence's
// keys, or among its first shared[s] chunks (none without `shared`), are not for this kernel.
template <int C>
DEV void decode(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
                const u32* starts, const u32* items, const u32* shared, const u32* page_lists,
                float* part_o, float* part_ml, int num_items, int num_heads, int num_kv_heads,
                float scale) {
  SHARED_DYNAMIC(smem);
  const int lane = threadIdx.x % 32, unit = blockIdx.x * WARPS + threadIdx.x / 32;
  if (unit >= num_items * num_kv_heads) return;
  // A warp's own tile of queries and ring of stages: warps meet at no barrier.
  const u32 q_tile = smem_addr(smem) + threadIdx.x / 32 * (16 * C * 2 + STAGES * BLOCK * C * 4);
  const u32 ring = q_tile + 16 * C * 2;
  const int g = unit % num_kv_heads, group = num_heads / num_kv_heads;
  const u32 sequence = items[2 * (unit / num_kv_heads)];
  const int chunk = items[2 * (unit / num_kv_heads) + 1];
  if (chunk * CHUNK >= (int)sequences[2 * sequence]) return;
  if (shared && chunk < (int)shared[sequence]) return;
  u64 head_len = PAGE * C, page_len = num_kv_heads * head_len;
  Pages kv = {k_pages + g * head_len, v_pages + g * head_len,
              page_lists + sequences[2 * sequence + 1], page_len, (int)sequences[2 * sequence]};
  for (int i = lane; i < 16 * (C / 8); i += 32) {
    int row = i / (C / 8), at = i % (C / 8);
    bool valid = row < group;
    u64 from = valid ? (u64)sequence * num_heads + g * group + row : 0;
    cp_async16(tile_at<C>(q_tile, row, at), q_thc + from * C + at * 8, valid);
  }
  int last[2];
  UNROLL for (int r = 0; r < 2; r++)
    last[r] = lane / 4 + r * 8 < group ? kv.num_keys - 1 : -1;
  int first = chunk * (CHUNK / BLOCK), end = ceil_div(kv.num_keys, BLOCK);
  if (end > first + CHUNK / BLOCK) end = first + CHUNK / BLOCK;
  auto load = [&](int block) {
    if (block < end) {
      u32 stage = ring + block % STAGES * (BLOCK * C * 4);
      load_keys<C>(stage, stage + BLOCK * C * 2, kv, block * BLOCK, BLOCK, lane, 32);
    }
    cp_async_commit();
  };
  Softmax<C> x;
  softmax_begin(x);
  load(first);
  for (int block = first; block < end; block++) {
    load(block + 1);
    if (!PLANTED(decode_no_wait)) cp_async_wait<STAGES - 1>();
    if (!PLANTED(decode_no_warp_sync)) warp_sync(FULL_WARP);  // Shows all lanes' copies to all.
    u32 stage = ring + block % STAGES * (BLOCK * C * 4);
    softmax_block<C>(x, q_tile, 0, stage, stage + BLOCK * C * 2, block * BLOCK, last, scale);
    if (!PLANTED(decode_early_refill)) warp_sync(FULL_WARP);  // The stage is free.
  }
  float l[2] = {quad_sum(x.l[0]), quad_sum(x.l[1])};
  UNROLL for (int r = 0; r < 2; r++) {
    int row = lane / 4 + r * 8;
    if (row >= group) continue;
    u64 at = (u64)(starts[sequence] + chunk) * num_heads + g * group + row;
    store_part<C>(x, r, l[r], at, part_o, part_ml);
  }
}

KERNEL(THREADS, attention_decode_32)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* shared, const u32* page_lists, float* part_o,
 float* part_ml, int num_items, int num_heads, int num_kv_heads, float scale) {
  decode<32>(q_thc, k_pages, v_pages, sequences, starts, items, shared, page_lists, part_o, part_ml,
             num_items, num_heads, num_kv_heads, scale);
}
EXPORT(attention_decode_32)

KERNEL(THREADS, attention_decode_64)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* shared, const u32* page_lists, float* part_o,
 float* part_ml, int num_items, int num_heads, int num_kv_heads, float scale) {
  decode<64>(q_thc, k_pages, v_pages, sequences, starts, items, shared, page_lists, part_o, part_ml,
             num_items, num_heads, num_kv_heads, scale);
}
EXPORT(attention_decode_64)

KERNEL(THREADS, attention_decode_128)
(const bf16* q_thc, const bf16* k_pages, const bf16* v_pages, const u32* sequences,
 const u32* starts, const u32* items, const u32* shared, const u32* page_lists, float* part_o,
 float* part_ml, int num_items, int num_heads, int num_kv_heads, float scale) {
  decode<128>(q_thc, k_pages, v_pages, sequences, starts, items, shared, page_lists, part_o,
              part_ml, num_items, num_heads, num_kv_heads, scale);
}
EXPORT(attention_decode_128)

// out[S][H][C] and lse[S][H] from the parts of each sequence, in order. A thread has 4 columns of a
// head. A sequence without keys gets zeros and minus infinity.
KERNEL(MERGE_THREADS, attention_merge)
(const u32* sequences, const u32* starts, const float* part_o, const float* part_ml, bf16* out_thc,
 float* lse_th, int num_heads, int c) {
  const u32 sequence = blockIdx.x;
  const int index = blockIdx.y * MERGE_THREADS + threadIdx.x;
  if (index >= num_heads * c / 4) return;
  const int head = index / (c / 4), column = index % (c / 4) * 4;
  Total total = {minus_infinity(), 0.0f};
  float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  u32 first = starts[sequence], count = ceil_div(sequences[2 * sequence], CHUNK);
  for (u32 i = 0; i < count; i++) {
    u64 at = (u64)(first + (PLANTED(merge_backwards) ? count - 1 - i : i)) * num_heads + head;
    Shares shares = merge(total, part_ml[2 * at], part_ml[2 * at + 1]);
    U32x4 part = load16(part_o + at * c + column);
    UNROLL for (int e = 0; e < 4; e++)
      o[e] = merge_output(o[e], float_of(part.v[e]), shares);
  }
  float inverse = final_scale(total);
  u64 row = (u64)sequence * num_heads + head;
  U32x2* to = (U32x2*)(out_thc + row * c + column);
  *to = {pack_bf16(o[0] * inverse, o[1] * inverse), pack_bf16(o[2] * inverse, o[3] * inverse)};
  if (column == 0) lse_th[row] = log_sum_exp(total);
}
EXPORT(attention_merge)
