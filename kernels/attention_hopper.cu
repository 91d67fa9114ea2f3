// attention_forward.cu on Hopper's warpgroup-wide instructions, with the same bits: blocks of 32
// keys, chunks of 256, products of 16 columns (or keys) at a time, in the same order.
// arch: sm_90a
//
// A block has 128 packed rows: two consumer warpgroups of 64 rows each and, after them, a producer:
// a warp that keeps stages of 64 keys and their values filled through TMA, a page at a time. While
// a block's weights meet their values, the next block's weights are computed; the scores of the
// next stage go first, so that they are there when it begins.
#include "attention.h"

#if HAVE_HOPPER

const int CONSUMERS = 2;
const int THREADS = CONSUMERS * 128 + 128;
const int GROUP_ROWS = 64;
const int STAGE_KEYS = 64;
const int STAGE_PAGES = STAGE_KEYS / PAGE;
const int STAGES = 4;
// Bytes of 64 columns of 64 rows: a line of 128 bytes a row, swizzled as TMA leaves them.
const int PANEL = 64 * 128;

// Place of chunk `chunk` (8 columns) of row `row` in a tile of panels.
DEV u32 panel_at(u32 tile, int row, int chunk) {
  return tile + chunk / 8 * PANEL + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

// Stages of keys, then values, and whether they are filled or free.
struct Ring {
  u8* stages;
  u64 *full, *empty;
};

// Fills stages 0..count - 1 with the keys and values of head g.
template <int C>
DEV void produce(const Ring& ring, const TensorMap& keys, const TensorMap& values, const Pages& kv,
                 int g, int num_kv_heads, int count) {
  const int lane = threadIdx.x % 32, tile_bytes = C / 64 * PANEL;
  // A page that the sequence has begun: what others left in the rest of it must not count.
  const int tail = PLANTED(attention_hopper_tail_not_zeroed) ? 0 : kv.num_keys % PAGE;
  for (int j = 0; j < count; j++) {
    u8* stage = ring.stages + j % STAGES * 2 * tile_bytes;
    u64* full = &ring.full[j % STAGES];
    // Four lanes load a page each. Outside the matrix TMA finds zeros, for pages past the end.
    int page = lane % STAGE_PAGES, first = j * STAGE_KEYS + page * PAGE;
    int y = first < kv.num_keys ? (int)(kv.table[first / PAGE] * num_kv_heads + g) * PAGE : -PAGE;
    if (!PLANTED(attention_hopper_no_empty_wait))
      mbar_wait(&ring.empty[j % STAGES], j / STAGES % 2 ^ 1);
    bool begun = tail != 0 && kv.num_keys / STAGE_KEYS == j;
    if (begun) {
      // Values by hand. (The keys' scores are masked.)
      int row = kv.num_keys % STAGE_KEYS - tail;
      const bf16* from = kv.values + kv.table[kv.num_keys / PAGE] * kv.page_len;
      for (int i = lane; i < PAGE * (C / 8); i += 32) {
        int slot = i / (C / 8), chunk = i % (C / 8);
        U32x4 q = {};
        if (slot < tail) q = load_cached16(from + slot * C + chunk * 8);
        store_shared16(panel_at(smem_addr(stage) + tile_bytes, row + slot, chunk), q);
      }
      if (!PLANTED(attention_hopper_no_tail_fence)) fence_proxy_async();
      warp_sync(FULL_WARP);
    }
    if (lane == 0) mbar_arrive_expect(full, 2 * tile_bytes - (begun ? PAGE * C * 2 : 0));
    warp_sync(FULL_WARP);
    if (lane >= STAGE_PAGES) continue;
    bool by_hand = begun && kv.num_keys / PAGE == first / PAGE;
    for (int panel = 0; panel < C / 64; panel++) {
      u8* to = stage + panel * PANEL + page * (PAGE * 128);
      tma_load_2d(to, &keys, panel * 64, y, full);
      if (!by_hand) tma_load_2d(to + tile_bytes, &values, panel * 64, y, full);
    }
  }
}

// One warpgroup's rows of a tile: blocks 0..end - 1 of the keys, in stages of which the other
// warpgroup may need more (`count`). Leaves outputs and totals of rows lane / 4 and 8 further of
// each warp, 4 n.. for each 8 columns as in attention.h.
template <int C>
DEV void consume(float (&out)[C / 2], Total (&total)[2], const Ring& ring, u32 queries, int end,
                 int count, const int (&last)[2], float scale) {
  const int tile_bytes = C / 64 * PANEL, stages = ceil_div(end, 2);
  float s[STAGE_KEYS / 2], o[C / 2], m[2], l[2], keep[2];
  bool rises;
  u32 weights[2][4];
  Shares shares[2];
  auto clear = [&] {
    UNROLL for (int i = 0; i < C / 2; i++)
      o[i] = 0.0f;
  };
  auto begin = [&] {
    UNROLL for (int r = 0; r < 2; r++) {
      m[r] = minus_infinity();
      l[r] = 0.0f;
    }
  };
  // Merges a chunk: first what the next one's weights overwrite, then, once they are there,
  // outputs.
  auto merge_totals = [&] {
    UNROLL for (int r = 0; r < 2; r++)
      shares[r] = merge(total[r], m[r], quad_sum(l[r]));
  };
  auto merge_outputs = [&] {
    UNROLL for (int i = 0; i < C / 2; i++)
      out[i] = merge_output(out[i], o[i], shares[i % 4 / 2]);
  };
  auto wait = [&](int j) {
    if (!PLANTED(attention_hopper_no_full_wait)) mbar_wait(&ring.full[j % STAGES], j / STAGES % 2);
  };
  auto release = [&](int j) {
    warp_sync(FULL_WARP);
    if (threadIdx.x % 32 == 0) mbar_arrive(&ring.empty[j % STAGES]);
  };
  // Starts the products of queries and a stage's keys, which `scores` scales and masks.
  auto multiply = [&](float (&d)[STAGE_KEYS / 2], int j) {
    wait(j);
    u32 keys = smem_addr(ring.stages + j % STAGES * 2 * tile_bytes);
    wgmma_fence();
    UNROLL for (int step = 0; step < C / 16; step++) {
      u32 at = step / 4 * PANEL + step % 4 * 32;
      wgmma_ss<STAGE_KEYS>(d, wgmma_desc(queries + at), wgmma_desc(keys + at), step > 0);
    }
    wgmma_commit();
  };
  auto scores = [&](const float (&d)[STAGE_KEYS / 2], int j) {
    UNROLL for (int i = 0; i < STAGE_KEYS / 2; i++)
      s[i] = d[i];
    softmax_scores<STAGE_KEYS>(s, j * STAGE_KEYS, last, scale);
  };
  // Weights of a stage's first or second block.
  auto weigh = [&](int half) {
    rises = false;
    softmax_weights(s + half * (BLOCK / 2), m, l, [&](const float (&factors)[2]) {
      rises = true;
      UNROLL for (int r = 0; r < 2; r++)
        keep[r] = factors[r];
    });
  };
  // Makes room for a block's products, and its weights their operand.
  auto prepare = [&](int half) {
    if (rises) {
      UNROLL for (int i = 0; i < C / 2; i++)
        o[i] *= keep[i % 4 / 2];
    }
    UNROLL for (int i = 0; i < 8; i++)
      weights[i / 4][i % 4] = pack_bf16(s[half * 16 + 2 * i], s[half * 16 + 2 * i + 1]);
  };
  // Starts the products of a block's weights and values.
  auto add = [&](int j, int half) {
    u32 values = smem_addr(ring.stages + j % STAGES * 2 * tile_bytes) + tile_bytes;
    wgmma_fence();
    UNROLL for (int step = 0; step < BLOCK / 16; step++)
      wgmma_rs<C, 1>(o, weights[step], wgmma_desc_mn(values + (half * 2 + step) * 2048, PANEL),
                     true);
    wgmma_commit();
  };
  if (end > 0) {
    const int final = stages - 1;
    clear();
    begin();
    float first[STAGE_KEYS / 2];
    multiply(first, 0);
    wgmma_wait<0>();
    wgmma_hold(first);
    scores(first, 0);
    weigh(0);
    for (int j = 0; j < final; j++) {
      prepare(0);
      add(j, 0);
      weigh(1);
      wgmma_wait<0>();
      wgmma_hold(o);
      prepare(1);
      float next[STAGE_KEYS / 2];
      multiply(next, j + 1);
      add(j, 1);
      wgmma_wait<1>();  // The scores are there, the second block's products go on.
      wgmma_hold(next);
      bool chunk_ends = (j + 1) % (CHUNK / STAGE_KEYS) == 0;
      if (chunk_ends) {
        merge_totals();
        begin();
      }
      scores(next, j + 1);
      weigh(0);
      if (PLANTED(attention_hopper_early_release)) release(j);
      wgmma_wait<0>();
      wgmma_hold(o);
      if (!PLANTED(attention_hopper_early_release)) release(j);
      if (chunk_ends) {
        merge_outputs();
        clear();
      }
    }
    prepare(0);
    add(final, 0);
    if (end % 2 == 0) {
      weigh(1);
      wgmma_wait<0>();
      wgmma_hold(o);
      prepare(1);
      add(final, 1);
    }
    if (!PLANTED(attention_hopper_no_product_wait)) wgmma_wait<0>();
    wgmma_hold(o);
    release(final);
    merge_totals();
    merge_outputs();
  }
  for (int j = stages; j < count; j++) {
    wait(j);
    release(j);
  }
}

// out and lse of 128 packed rows of one sequence and group; arguments as attention_forward's, with
// tiles of 128 rows. The maps are matrices of the layer's pages with rows of C, in boxes of a page
// and 64 columns.
template <int C>
DEV void forward(const bf16* q_thc, const TensorMap& keys, const TensorMap& values,
                 const bf16* v_pages, const u32* spans, const u32* tiles, const u32* page_lists,
                 bf16* out_thc, float* lse_th, int num_heads, int num_kv_heads, float scale) {
  SHARED_DYNAMIC(smem);  // Each warpgroup's queries, the stages, two mbarriers for each.
  const int tile_bytes = C / 64 * PANEL;
  u64* barriers = (u64*)(smem + (CONSUMERS + 2 * STAGES) * tile_bytes);
  Ring ring = {smem + CONSUMERS * tile_bytes, barriers, barriers + STAGES};
  const int g = blockIdx.y, group = num_heads / num_kv_heads;
  const u32* span = spans + 4 * tiles[2 * blockIdx.x];
  const int rows = span[1] * group, pos = span[2];
  const int tile = tiles[2 * blockIdx.x + 1] * (CONSUMERS * GROUP_ROWS);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbar_init(&ring.full[s], 1);
      mbar_init(&ring.empty[s], 4 * CONSUMERS);  // Every consumer warp.
    }
    mbar_fence_init();
  }
  block_sync();
  // Blocks of keys that 64 rows from `first` on see.
  auto blocks = [&](int first) {
    if (first >= rows) return 0;
    int highest = first + GROUP_ROWS < rows ? first + GROUP_ROWS - 1 : rows - 1;
    return (pos + highest / group) / BLOCK + 1;
  };
  const int high = blocks(tile + GROUP_ROWS), low = blocks(tile);
  const int count = ceil_div(high > low ? high : low, 2);
  // Broadcast, so that the compiler sees that a warp takes one way.
  const int wg = shuffle((u32)threadIdx.x / 128, 0);
  if (wg == CONSUMERS) {
    registers_release<72>();
    if (threadIdx.x >= CONSUMERS * 128 + 32) return;
    u64 page_len = (u64)num_kv_heads * PAGE * C;
    Pages kv = {nullptr, v_pages + g * PAGE * C, page_lists + span[3], page_len,
                (int)span[1] + pos};
    produce<C>(ring, keys, values, kv, g, num_kv_heads, count);
    return;
  }
  registers_claim<216>();
  // Where packed row i begins in q and out, over C.
  auto place = [&](int i) {
    return (u64)(span[0] + i / group) * num_heads + g * group + i % group;
  };
  const int first = tile + wg * GROUP_ROWS;
  const u32 queries = smem_addr(smem) + wg * tile_bytes;
  for (int i = threadIdx.x % 128; i < GROUP_ROWS * (C / 8); i += 128) {
    int row = i / (C / 8), chunk = i % (C / 8);
    U32x4 q = {};
    if (first + row < rows) q = load_const16(q_thc + place(first + row) * C + chunk * 8);
    store_shared16(panel_at(queries, row, chunk), q);
  }
  if (!PLANTED(attention_hopper_no_query_fence)) fence_proxy_async();
  if (!PLANTED(attention_hopper_no_query_barrier)) barrier_sync(1 + wg, 128);
  int mine[2], last[2];
  Total total[2];
  UNROLL for (int r = 0; r < 2; r++) {
    mine[r] = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + r * 8;
    last[r] = mine[r] < rows ? pos + mine[r] / group : -1;
    total[r] = {minus_infinity(), 0.0f};
  }
  float out[C / 2];
  UNROLL for (int i = 0; i < C / 2; i++)
    out[i] = 0.0f;
  consume<C>(out, total, ring, queries, wg == 0 ? low : high, count, last, scale);
  UNROLL for (int r = 0; r < 2; r++) {
    if (mine[r] >= rows) continue;
    float inverse = final_scale(total[r]);
    bf16* to = out_thc + place(mine[r]) * C + threadIdx.x % 4 * 2;
    UNROLL for (int n = 0; n < C / 8; n++)
      *(u32*)(to + n * 8) =
          pack_bf16(out[4 * n + 2 * r] * inverse, out[4 * n + 2 * r + 1] * inverse);
    if (threadIdx.x % 4 == 0) lse_th[place(mine[r])] = log_sum_exp(total[r]);
  }
}

KERNEL_ALONE(THREADS, attention_hopper_forward_64)
(const bf16* q_thc, GRID_CONST TensorMap keys, GRID_CONST TensorMap values, const bf16* v_pages,
 const u32* spans, const u32* tiles, const u32* page_lists, bf16* out_thc, float* lse_th,
 int num_heads, int num_kv_heads, float scale) {
  forward<64>(q_thc, keys, values, v_pages, spans, tiles, page_lists, out_thc, lse_th, num_heads,
              num_kv_heads, scale);
}
EXPORT(attention_hopper_forward_64)

KERNEL_ALONE(THREADS, attention_hopper_forward_128)
(const bf16* q_thc, GRID_CONST TensorMap keys, GRID_CONST TensorMap values, const bf16* v_pages,
 const u32* spans, const u32* tiles, const u32* page_lists, bf16* out_thc, float* lse_th,
 int num_heads, int num_kv_heads, float scale) {
  forward<128>(q_thc, keys, values, v_pages, spans, tiles, page_lists, out_thc, lse_th, num_heads,
               num_kv_heads, scale);
}
EXPORT(attention_hopper_forward_128)

#endif  // HAVE_HOPPER
