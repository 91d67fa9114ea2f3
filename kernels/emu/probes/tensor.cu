// Probe: tensor cores and the asynchronous machinery, in small products of all kinds, and what must
// be reported when a wait, a fence or a release is missing. Not part of the product. arch: sm_90a
#include "prims.h"

// c[64][64] = a[64][k] b[64][k]^T (k a multiple of 32) by one block of 4 warps: cp.async in 2
// stages, ldmatrix, mma.sync. Rows of 64 bytes, chunk c of row r at c ^ (r / 2 % 4).
KERNEL(128, probe_mma)
(const bf16* a, const bf16* b, float* c, int k) {
  SHARED_DYNAMIC(smem);  // 2 stages of two 64 x 32 tiles: 16 KB.
  const u32 base = smem_addr(smem);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, m0 = warp % 2 * 32, n0 = warp / 2 * 32;
  auto place = [&](int stage, int tile, int row, int chunk) {
    return base + (stage * 2 + tile) * 4096 + row * 64 + ((chunk ^ (row / 2 % 4)) << 4);
  };
  auto load = [&](int step) {
    if (step * 32 < k) {
      for (int i = t; i < 256; i += 128) {
        cp_async16(place(step % 2, 0, i / 4, i % 4), a + i / 4 * k + step * 32 + i % 4 * 8, true);
        cp_async16(place(step % 2, 1, i / 4, i % 4), b + i / 4 * k + step * 32 + i % 4 * 8, true);
      }
    }
    cp_async_commit();
  };
  float d[2][4][4] = {};
  load(0);
  for (int step = 0; step * 32 < k; step++) {
    load(step + 1);
    if (!PLANTED(probe_mma_no_wait)) cp_async_wait<1>();
    if (!PLANTED(probe_mma_no_barrier)) block_sync();
    for (int kk = 0; kk < 2; kk++) {
      u32 fa[2][4], fb[2][4];
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4(fa[i], place(step % 2, 0, m0 + i * 16 + lane % 16, kk * 2 + lane / 16));
        int row = n0 + i * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(fb[i], place(step % 2, 1, row, kk * 2 + lane / 8 % 2));
      }
      for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
          mma_m16n8k16(d[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    if (!PLANTED(probe_mma_no_second_barrier)) block_sync();
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 4; j++) {
      for (int e = 0; e < 4; e++) {
        int row = m0 + i * 16 + lane / 4 + e / 2 * 8, column = n0 + j * 8 + lane % 4 * 2 + e % 2;
        c[row * 64 + column] = d[i][j][e];
      }
    }
  }
}
EXPORT(probe_mma)

#if HAVE_HOPPER

const int STAGES = 2;
const int TILE_BYTES = 64 * 128;

// Writes a warpgroup's 64 x 128 tile.
DEV void write_tile(float* c, const float (&d)[64]) {
  int t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  for (int i = 0; i < 64; i++) c[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = d[i];
}

// c[64][128] = a b^T over k (a multiple of 64), by a producer warp and a consumer warpgroup. a is
// [64][k], or [k][64] when `a_mn`; b is [128][k], or [k][128] when `b_mn`. With `a_registers`, a
// goes through registers.
template <int a_mn, int b_mn, bool a_registers>
DEV void wgmma_pipeline(const TensorMap& map_a, const TensorMap& map_b, float* c, int k) {
  SHARED_DYNAMIC(smem);  // Stages of a (8 KB) and b (16 KB), then 4 mbarriers.
  u64* full = (u64*)(smem + STAGES * 3 * TILE_BYTES);
  u64* empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbar_init(&full[s], 1);
      mbar_init(&empty[s], 4);
    }
    if (!PLANTED(probe_wgmma_no_init_fence)) mbar_fence_init();
  }
  block_sync();
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    for (int step = 0; step * 64 < k; step++) {
      int s = step % STAGES;
      u8* to = smem + s * 3 * TILE_BYTES;
      if (!PLANTED(probe_wgmma_no_empty_wait)) mbar_wait(&empty[s], (step / STAGES & 1) ^ 1);
      mbar_arrive_expect(&full[s], PLANTED(probe_wgmma_wrong_bytes) ? TILE_BYTES : 3 * TILE_BYTES);
      tma_load_2d(to, &map_a, a_mn ? 0 : step * 64, a_mn ? step * 64 : 0, &full[s]);
      for (int half = 0; half < 2; half++) {
        tma_load_2d(to + (1 + half) * TILE_BYTES, &map_b, b_mn ? half * 64 : step * 64,
                    b_mn ? step * 64 : half * 64, &full[s]);
      }
    }
    return;
  }
  float d[64];
  for (int step = 0; step * 64 < k; step++) {
    int s = step % STAGES;
    if (!PLANTED(probe_wgmma_no_full_wait)) mbar_wait(&full[s], step / STAGES & 1);
    u32 a = smem_addr(smem + s * 3 * TILE_BYTES), b = a + TILE_BYTES;
    u32 ra[4][4];
    if (a_registers) {
      int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
      for (int kk = 0; kk < 4; kk++) {
        ldmatrix_x4(ra[kk], a + row * 128 + (((kk * 2 + lane / 16) ^ (row % 8)) << 4));
      }
    }
    if (!PLANTED(probe_wgmma_no_fence)) wgmma_fence();
    for (int kk = 0; kk < 4; kk++) {
      u64 db = b_mn ? wgmma_desc_mn(b + kk * 2048, TILE_BYTES) : wgmma_desc(b + kk * 32);
      if (a_registers) {
        wgmma_rs<128, b_mn>(d, ra[kk], db, step + kk > 0);
      } else {
        u64 da = a_mn ? wgmma_desc_mn(a + kk * 2048, TILE_BYTES) : wgmma_desc(a + kk * 32);
        wgmma_ss<128, a_mn, b_mn>(d, da, db, step + kk > 0);
      }
    }
    wgmma_commit();
    bool early = PLANTED(probe_wgmma_early_release), first = threadIdx.x % 32 == 0;
    if (early && first) mbar_arrive(&empty[s]);
    if (!PLANTED(probe_wgmma_no_product_wait)) wgmma_wait<0>();
    warp_sync(FULL_WARP);  // All lanes have read their registers' part of a.
    if (!early && first) mbar_arrive(&empty[s]);
  }
  write_tile(c, d);
}

// kind: 0 both K-major, 1 a M-major, 2 b N-major, 3 both, 4 a through registers, 5 that and b
// N-major.
KERNEL(160, probe_wgmma)
(GRID_CONST TensorMap map_a, GRID_CONST TensorMap map_b, float* c, int k, int kind) {
  if (kind == 0) wgmma_pipeline<0, 0, false>(map_a, map_b, c, k);
  if (kind == 1) wgmma_pipeline<1, 0, false>(map_a, map_b, c, k);
  if (kind == 2) wgmma_pipeline<0, 1, false>(map_a, map_b, c, k);
  if (kind == 3) wgmma_pipeline<1, 1, false>(map_a, map_b, c, k);
  if (kind == 4) wgmma_pipeline<0, 0, true>(map_a, map_b, c, k);
  if (kind == 5) wgmma_pipeline<0, 1, true>(map_a, map_b, c, k);
}
EXPORT(probe_wgmma)

// A product of operands that ordinary stores put there: a[64][64] b[128][64]^T.
KERNEL(128, probe_proxy)
(const bf16* a, const bf16* b, float* c) {
  SHARED_DYNAMIC(smem);
  for (int i = threadIdx.x; i < 192 * 64; i += 128) {
    u32 at = i / 64 * 128 + i % 64 * 2;
    *(bf16*)(smem + (at ^ (at >> 7 & 7) << 4)) = i < 4096 ? a[i] : b[i - 4096];
  }
  if (!PLANTED(probe_proxy_no_fence)) fence_proxy_async();
  block_sync();
  float d[64];
  u32 s = smem_addr(smem);
  wgmma_fence();
  for (int kk = 0; kk < 4; kk++) {
    wgmma_ss<128>(d, wgmma_desc(s + kk * 32), wgmma_desc(s + TILE_BYTES + kk * 32), kk > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  write_tile(c, d);
}
EXPORT(probe_proxy)

// A cluster of 2: each block loads one half of a 128 x 64 matrix into both, sends its half back
// through a TMA store, and adds its sum to its peer's. out[2]: the two sums as each block sees
// them.
KERNEL(128, probe_cluster)
(GRID_CONST TensorMap from, GRID_CONST TensorMap to, const float* numbers, float* out) {
  SHARED_DYNAMIC(smem);  // Two tiles, then 64 floats, then 2 mbarriers.
  float* copied = (float*)(smem + 2 * TILE_BYTES);
  u64* full = (u64*)(copied + 64);
  SHARED(float, scratch, 4);
  SHARED(float, sum, 1);
  u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbar_init(&full[0], 1);
    mbar_init(&full[1], 2);
    mbar_fence_init();
  }
  if (!PLANTED(probe_cluster_no_first_sync)) cluster_sync();
  if (threadIdx.x == 0) {
    mbar_arrive_expect(&full[0], 2 * TILE_BYTES + 256);
    tma_load_2d_multicast(smem + rank * TILE_BYTES, &from, 0, rank * 64, &full[0], 3);
    bulk_load(copied, numbers, 256, &full[0]);
  }
  mbar_wait_cluster(&full[0], 0);
  float x = threadIdx.x < 64 ? copied[threadIdx.x] : 0.0f;
  for (int i = threadIdx.x; i < 2 * TILE_BYTES / 2; i += 128) x += to_f32(((bf16*)smem)[i]);
  x = block_sum<4>(x, scratch);
  if (threadIdx.x == 0) {
    sum[0] = x + rank;
    for (u32 r = 0; r < 2; r++) mbar_arrive_remote(&full[1], r);
  }
  mbar_wait_cluster(&full[1], 0);
  if (threadIdx.x == 0) {
    tma_store_2d(&to, 0, rank * 64, smem + rank * TILE_BYTES);
    bulk_commit();
    if (!PLANTED(probe_cluster_no_store_wait)) bulk_wait_read<0>();
    out[rank] = sum[0] + load_peer(sum, rank ^ 1);
  }
  if (!PLANTED(probe_cluster_no_last_sync))
    cluster_sync();  // A block stays while its peer reads from it.
}
EXPORT(probe_cluster)

#endif
