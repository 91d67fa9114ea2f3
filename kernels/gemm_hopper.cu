// The products of gemm.cu on Hopper's warpgroup-wide instructions, with the same bits: K in chains
// of 16 from 0 on, in one f32 accumulator an element, and the same epilogues.
// arch: sm_90a
//
// A block has one or two consumer warpgroups of 64 rows each and, after them, a producer: one
// thread that keeps stages of 64 of K filled through TMA. It goes from tile to tile; the producer
// loads the next tile while the consumers write out the last. In a cluster of two, the blocks have
// tiles below each other; each loads half of what both need of b, into both.
#include "gemm.h"

#if HAVE_HOPPER

// Bytes of 64 lines of 128 bytes.
const int PANEL = 64 * 128;

// The product of a and b over k. A tile has 64 rows per consumer. GATED: half of a tile's columns
// are gates, the other half their ups.
template <int consumers, int columns, int stages, bool a_mn, bool b_mn, int kind>
DEV void gemm(const TensorMap& map_a, const TensorMap& map_b, const Output& out, int k,
              int cluster) {
  const int rows = consumers * 64, width = kind == GATED ? columns / 2 : columns;
  const int a_bytes = consumers * PANEL, half_bytes = columns / 2 * 128;
  const int stage_bytes = a_bytes + 2 * half_bytes;
  SHARED_DYNAMIC(smem);  // The stages, then two mbarriers for each.
  u64* full = (u64*)(smem + stages * stage_bytes);
  u64* empty = full + stages;
  const int tiles_n = ceil_div(out.columns, width), steps = ceil_div(k, STEP_K);
  const int clusters_m = ceil_div(ceil_div(out.rows, rows), cluster);
  const int count = clusters_m * tiles_n, stride = gridDim.x / cluster;
  const int rank = cluster_rank(), group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      mbar_init(&full[s], 1);
      mbar_init(&empty[s], 4 * consumers * cluster);  // Every consumer warp that the stage feeds.
    }
    mbar_fence_init();
  }
  cluster_sync();

  int stage = 0, phase = 0;
  auto advance = [&] {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (group == consumers) {
    registers_release<40>();
    if (threadIdx.x == consumers * 128) {
      for (int index = blockIdx.x / cluster; index < count; index += stride) {
        TilePlace at = tile_place(index, clusters_m, tiles_n);
        int m0 = (at.row * cluster + rank) * rows, n0 = at.column * width;
        for (int step = 0; step < steps; step++, advance()) {
          u8* to = smem + stage * stage_bytes;
          int k0 = step * STEP_K;
          if (!PLANTED(gemm_hopper_no_empty_wait)) mbar_wait(&empty[stage], phase ^ 1);
          mbar_arrive_expect(&full[stage], stage_bytes);
          if (a_mn) {
            for (int c = 0; c < consumers; c++)
              tma_load_2d(to + c * PANEL, &map_a, m0 + c * 64, k0, &full[stage]);
          } else {
            tma_load_2d(to, &map_a, k0, m0, &full[stage]);
          }
          for (int half = 0; half < 2; half++) {
            if (cluster == 2 && half != rank) continue;
            u8* b = to + a_bytes + half * half_bytes;
            // A gated weight's ups follow all its gates.
            int ups = PLANTED(gemm_hopper_gate_twice) ? 0 : out.columns;
            int n = n0 + half * (kind == GATED ? ups : columns / 2);
            for (int p = 0; p < (b_mn ? columns / 128 : 1); p++) {
              int x = b_mn ? n + p * 64 : k0, y = b_mn ? k0 : n;
              if (cluster == 2) {
                tma_load_2d_multicast(b + p * PANEL, &map_b, x, y, &full[stage], 3);
              } else {
                tma_load_2d(b + p * PANEL, &map_b, x, y, &full[stage]);
              }
            }
          }
        }
      }
    }
  } else {
    registers_claim<232>();
    float d[columns / 2];
    // Tells the producers of all blocks whose loads come here that the stage has been read.
    auto release = [&](int s) {
      warp_sync(FULL_WARP);
      if (lane < cluster) mbar_release_remote(&empty[s], lane);
    };
    // Starts the products of the stage that comes next.
    auto multiply = [&](bool first) {
      if (!PLANTED(gemm_hopper_no_full_wait)) mbar_wait(&full[stage], phase);
      u32 a = smem_addr(smem + stage * stage_bytes) + group * PANEL;
      u32 b = smem_addr(smem + stage * stage_bytes) + a_bytes;
      wgmma_fence();
      UNROLL for (int kk = 0; kk < 4; kk++) {
        u64 da = a_mn ? wgmma_desc_mn(a + kk * 2048, PANEL) : wgmma_desc(a + kk * 32);
        u64 db = b_mn ? wgmma_desc_mn(b + kk * 2048, PANEL) : wgmma_desc(b + kk * 32);
        wgmma_ss<columns, a_mn, b_mn>(d, da, db, !first || kk > 0);
      }
      wgmma_commit();
      if (PLANTED(gemm_hopper_early_release)) release(stage);
    };
    for (int index = blockIdx.x / cluster; index < count; index += stride) {
      multiply(true);
      int previous = stage;
      advance();
      for (int step = 1; step < steps; step++) {
        multiply(false);
        // The step before is done; this one goes on under the next one's wait.
        wgmma_wait<1>();
        if (!PLANTED(gemm_hopper_early_release)) release(previous);
        previous = stage;
        advance();
      }
      if (!PLANTED(gemm_hopper_no_product_wait)) wgmma_wait<0>();
      wgmma_hold(d);
      if (!PLANTED(gemm_hopper_early_release)) release(previous);
      TilePlace at = tile_place(index, clusters_m, tiles_n);
      int row = (at.row * cluster + rank) * rows + threadIdx.x / 32 * 16;
      write_rows<kind, columns / 8>(out, d, row, at.column * width);
    }
  }
  warp_sync(FULL_WARP);
  // A block stays while its peer signals to it.
  if (!PLANTED(gemm_hopper_no_last_sync)) cluster_sync();
}

// `tile`: 0 for 128 x 256, 1 for 128 x 128, 2 for 64 x 128.
template <bool a_mn, bool b_mn, int kind>
DEV void gemm_tile(const TensorMap& map_a, const TensorMap& map_b, const Output& out, int k,
                   int cluster, int tile) {
  if (tile == 0) gemm<2, 256, 4, a_mn, b_mn, kind>(map_a, map_b, out, k, cluster);
  if (tile == 1) gemm<2, 128, 6, a_mn, b_mn, kind>(map_a, map_b, out, k, cluster);
  if (tile == 2) gemm<1, 128, 8, a_mn, b_mn, kind>(map_a, map_b, out, k, cluster);
}

// y = x w^T (+ bias) (+ y).
KERNEL_ALONE(384, gemm_hopper_forward)
(GRID_CONST TensorMap x_tk, GRID_CONST TensorMap w_nk, const bf16* bias_n, bf16* y_tn, int t, int n,
 int k, int add, int cluster, int tile) {
  Output out = {y_tn, bias_n, nullptr, t, n, add};
  gemm_tile<false, false, STORE>(x_tk, w_nk, out, k, cluster, tile);
}
EXPORT(gemm_hopper_forward)

// h = silu(gate) up with gate and up = x w^T, which go to gate_up when it is not null.
KERNEL_ALONE(384, gemm_hopper_swiglu)
(GRID_CONST TensorMap x_tk, GRID_CONST TensorMap w, bf16* gate_up, bf16* h_tf, int t, int f, int k,
 int cluster, int tile) {
  Output out = {h_tf, nullptr, gate_up, t, f, 0};
  gemm_tile<false, false, GATED>(x_tk, w, out, k, cluster, tile);
}
EXPORT(gemm_hopper_swiglu)

// dx = dy w (+ dx): sums over n.
KERNEL_ALONE(384, gemm_hopper_input)
(GRID_CONST TensorMap dy_tn, GRID_CONST TensorMap w_nk, bf16* dx_tk, int t, int n, int k, int add,
 int cluster, int tile) {
  Output out = {dx_tk, nullptr, nullptr, t, k, add};
  gemm_tile<false, true, STORE>(dy_tn, w_nk, out, n, cluster, tile);
}
EXPORT(gemm_hopper_input)

// dw += dy^T x: sums over the tokens, in order.
KERNEL_ALONE(384, gemm_hopper_weight)
(GRID_CONST TensorMap dy_tn, GRID_CONST TensorMap x_tk, float* dw_nk, int t, int n, int k,
 int cluster, int tile) {
  Output out = {dw_nk, nullptr, nullptr, n, k, 1};
  gemm_tile<true, true, GRADIENT>(dy_tn, x_tk, out, t, cluster, tile);
}
EXPORT(gemm_hopper_weight)

#endif  // HAVE_HOPPER
