// LM head: log-probability, entropy and a sampled token of rows of the hidden state without their
// logits in memory, and the policy gradient of the logits in chunks of the vocabulary.
//
// A logit is one f32 accumulator over D in steps of 16; z is the logit times its row's inverse
// temperature. A tile of 64 tokens leaves per row its maximum, the sums of exp(z - max) and
// exp(z - max) z, and the token with the best score: two lanes share a row, lane h takes the groups
// of four tokens 2 i + h in order, then the lanes are added. Tiles are merged by 128 threads: each
// takes its tiles in order, then lanes in a tree, then the 4 warps in order. So a row's numbers
// depend on V and D alone.
#include "head.h"

const int THREADS = 128;
const int WARPS = THREADS / 32;
// Tokens of a tile.
const int TILE = 64;
// Elements of D of a stage: rows of 64 bytes, chunk c of row r at c ^ (r / 2 % 4).
const int STEP = 32;
const int STAGES = 4;
// Bytes between the 16 rows of 64 logits that a warp has in shared memory.
const int LOGITS_STRIDE = 288;

// Loss of a row.
struct alignas(16) PolicyRow {
  u32 clips;  // 0: -weight logprob; 1: the clipped ratio.
  float advantage, old_logprob, low, high, weight, entropy_coef;
  u32 unused;
};

struct alignas(16) PolicyReport {
  float logprob, entropy, loss;
  u32 clipped;
};

// What the gradient of a row's logits needs.
struct alignas(16) RowSlope {
  float log_sum, slope, entropy, entropy_coef;
};

// What a tile leaves of a row.
struct alignas(16) TileStats {
  float max, sum, weighted;
  float best_z;  // z of the token with the best score.
};

struct alignas(8) TileBest {
  float score;
  u32 token;
};

DEV u32 place(u32 stage, int row, int chunk) {
  return stage + row * (STEP * 2) + ((chunk ^ (row / 2 % 4)) << 4);
}

// Where a block's and a warp's logits lie. A block has WARPS warps, WR of them one below another; a
// warp has 16 MT rows and one tile.
template <int MT, int WR>
struct Shape {
  static const int ROWS = 16 * MT * WR;
  static const int TOKENS = TILE * WARPS / WR;
  static const int STAGE_BYTES = (ROWS + TOKENS) * STEP * 2;

  int row0, token0;          // The block's first row and token.
  int warp_row, warp_token;  // The warp's, within the block.
};

template <int MT, int WR>
DEV Shape<MT, WR> shape(int first_token) {
  typedef Shape<MT, WR> S;
  int warp = threadIdx.x / 32;
  return {(int)blockIdx.x * S::ROWS, first_token + (int)blockIdx.y * S::TOKENS, warp % WR * 16 * MT,
          warp / WR * TILE};
}

// Logits of the block: acc[i][j] is the warp's rows 16 i.. and tokens 8 j.., laid out as
// mma_m16n8k16's d. Tokens from `v` on and rows from `num_rows` on are zero. Afterwards shared
// memory is free.
template <int MT, int WR>
DEV void product(float (&acc)[MT][8][4], const Shape<MT, WR>& at, u32 base, const bf16* x_td,
                 const HeadRow* rows, int num_rows, const bf16* w_vd, int v, int d) {
  typedef Shape<MT, WR> S;
  const int A_LOADS = (S::ROWS * 4 + THREADS - 1) / THREADS;
  const int B_LOADS = S::TOKENS * 4 / THREADS;
  const int t = threadIdx.x, lane = t % 32, chunk = t % 4;
  // Of each tile a thread copies rows t / 4, t / 4 + 32 and so on.
  const bf16* x_from[A_LOADS];
  bool x_valid[A_LOADS];
  UNROLL for (int i = 0; i < A_LOADS; i++) {
    int row = t / 4 + i * (THREADS / 4);
    x_valid[i] = row < S::ROWS && at.row0 + row < num_rows;
    x_from[i] = x_td + (x_valid[i] ? (u64)rows[at.row0 + row].row * d : 0);
  }
  const int token = at.token0 + t / 4;
  const bf16* w_from = w_vd + (u64)(token < v ? token : 0) * d;
  auto load = [&](int step) {
    int k = step * STEP + chunk * 8;
    if (step * STEP < d) {
      u32 stage = base + step % STAGES * S::STAGE_BYTES;
      UNROLL for (int i = 0; i < A_LOADS; i++) {
        int row = t / 4 + i * (THREADS / 4);
        bool valid = x_valid[i] && k < d;
        if (row < S::ROWS) cp_async16(place(stage, row, chunk), x_from[i] + (valid ? k : 0), valid);
      }
      UNROLL for (int i = 0; i < B_LOADS; i++) {
        int row = i * (THREADS / 4);
        bool valid = token + row < v && k < d;
        cp_async16(place(stage, S::ROWS + t / 4 + row, chunk),
                   w_from + (valid ? (u64)row * d + k : 0), valid);
      }
    }
    cp_async_commit();
  };
  UNROLL for (int i = 0; i < MT; i++) {
    UNROLL for (int j = 0; j < 8; j++) {
      UNROLL for (int e = 0; e < 4; e++)
        acc[i][j][e] = 0.0f;
    }
  }
  for (int step = 0; step < STAGES - 1; step++) load(step);
  for (int step = 0; step * STEP < d; step++) {
    if (!PLANTED(head_no_wait)) cp_async_wait<STAGES - 2>();
    if (!PLANTED(head_no_barrier)) block_sync();
    load(step + STAGES - 1);  // Into the stage that all warps have left.
    u32 stage = base + step % STAGES * S::STAGE_BYTES;
    UNROLL for (int kk = 0; kk < STEP / 16; kk++) {
      u32 a[MT][4], b[4][4];
      UNROLL for (int i = 0; i < MT; i++)
        ldmatrix_x4(a[i], place(stage, at.warp_row + i * 16 + lane % 16, kk * 2 + lane / 16));
      UNROLL for (int j = 0; j < 4; j++) {
        int row = S::ROWS + at.warp_token + j * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b[j], place(stage, row, kk * 2 + lane / 8 % 2));
      }
      UNROLL for (int i = 0; i < MT; i++) {
        UNROLL for (int j = 0; j < 8; j++)
          mma_m16n8k16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  if (!PLANTED(head_no_last_barrier)) block_sync();
}

// Puts 16 rows of a warp's logits in its part of shared memory, for all its lanes.
DEV void share_logits(u32 logits, const float (&acc)[8][4]) {
  int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  if (!PLANTED(head_no_reuse_sync)) warp_sync(FULL_WARP);  // All lanes have read what was there.
  UNROLL for (int j = 0; j < 8; j++) {
    u32 to = logits + row * LOGITS_STRIDE + (j * 8 + column) * 4;
    store_shared8(to, {bits_of(acc[j][0]), bits_of(acc[j][1])});
    store_shared8(to + 8 * LOGITS_STRIDE, {bits_of(acc[j][2]), bits_of(acc[j][3])});
  }
  if (!PLANTED(head_no_share_sync)) warp_sync(FULL_WARP);
}

DEV u32 warp_logits(u32 base) { return base + threadIdx.x / 32 * (16 * LOGITS_STRIDE); }

// Numbers of 16 rows of one tile. `best` may be null: then nothing is drawn.
DEV void reduce_tile(u32 logits, const HeadRow* rows, int row0, int num_rows, int token0, int v,
                     TileStats* stats, TileBest* best, float* target_z, u32 key0, u32 key1) {
  int lane = threadIdx.x % 32, h = lane % 2, t = row0 + lane / 2;
  int tile = token0 / TILE, num_tiles = ceil_div(v, TILE);
  HeadRow row = {};
  row.token = ~0u;
  if (t < num_rows) row = rows[t];
  u32 from = logits + lane / 2 * LOGITS_STRIDE + h * 16;
  int end = PLANTED(head_vocabulary_end) ? ceil_div(v, TILE) * TILE : v;
  float max = float_of(0xff800000u);
  for (int i = 0; i < TILE / 8; i++) {
    U32x4 q = load_shared16(from + i * 32);
    UNROLL for (int e = 0; e < 4; e++) {
      float z = float_of(q.v[e]) * row.inv_temperature;
      if (token0 + i * 8 + h * 4 + e < end) max = max_f32(z, max);
    }
  }
  max = max_f32(max, shuffle_xor(max, 1));
  float sum = 0.0f, weighted = 0.0f, score = float_of(0xff800000u), best_z = 0.0f;
  u32 best_token = token0 + h * 4;
  for (int i = 0; i < TILE / 8; i++) {
    U32x4 q = load_shared16(from + i * 32);
    u32 token = token0 + i * 8 + h * 4;
    u32 noise[4] = {(PLANTED(head_noise_counter) ? token % TILE : token) / 4, row.position,
                    row.seq_low, row.seq_high};
    bool noisy = best != nullptr && row.greedy == 0;
    if (noisy) philox(noise, key0, key1);
    UNROLL for (int e = 0; e < 4; e++) {
      if (token + e >= (u32)end) continue;
      float z = float_of(q.v[e]) * row.inv_temperature;
      float p = exp_f32(z - max);
      sum += p;
      weighted = fma_f32(p, z, weighted);
      if (token + e == row.token) target_z[t] = z;
      if (best != nullptr) {
        float s = noisy ? z + gumbel(noise[e]) : z;
        if (goes_before(s, token + e, score, best_token)) {
          score = s;
          best_token = token + e;
          best_z = z;
        }
      }
    }
  }
  sum = sum + shuffle_xor(sum, 1);
  weighted = weighted + shuffle_xor(weighted, 1);
  float other_score = shuffle_xor(score, 1), other_z = shuffle_xor(best_z, 1);
  u32 other_token = shuffle_xor(best_token, 1);
  if (goes_before(other_score, other_token, score, best_token)) {
    score = other_score;
    best_token = other_token;
    best_z = other_z;
  }
  if (t >= num_rows || h != 0) return;
  u64 to = (u64)t * num_tiles + tile;
  stats[to] = {max, sum, weighted, best_z};
  if (best != nullptr) best[to] = {score, best_token};
}

template <int MT, int WR>
DEV void forward(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, TileStats* stats,
                 TileBest* best, float* target_z, int num_rows, int v, int d, u32 key0, u32 key1) {
  SHARED_DYNAMIC(smem);
  u32 base = smem_addr(smem);
  Shape<MT, WR> at = shape<MT, WR>(0);
  float acc[MT][8][4];
  product<MT, WR>(acc, at, base, x_td, rows, num_rows, w_vd, v, d);
  int row0 = at.row0 + at.warp_row, token0 = at.token0 + at.warp_token;
  if (token0 >= v) return;
  UNROLL for (int i = 0; i < MT; i++) {
    if (row0 + i * 16 >= num_rows) return;
    share_logits(warp_logits(base), acc[i]);
    reduce_tile(warp_logits(base), rows, row0 + i * 16, num_rows, token0, v, stats, best, target_z,
                key0, key1);
  }
}

// stats[T][tiles], best[T][tiles] (may be null) and target_z[T] of a batch, in blocks of 16 rows
// and 256 tokens.
KERNEL(THREADS, head_forward_16)
(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, TileStats* stats, TileBest* best,
 float* target_z, int num_rows, int v, int d, u32 key0, u32 key1) {
  forward<1, 1>(x_td, rows, w_vd, stats, best, target_z, num_rows, v, d, key0, key1);
}
EXPORT(head_forward_16)

// The same in blocks of 64 rows and 128 tokens.
KERNEL(THREADS, head_forward_64)
(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, TileStats* stats, TileBest* best,
 float* target_z, int num_rows, int v, int d, u32 key0, u32 key1) {
  forward<2, 2>(x_td, rows, w_vd, stats, best, target_z, num_rows, v, d, key0, key1);
}
EXPORT(head_forward_64)

// The same in blocks of 128 rows and 128 tokens.
KERNEL(THREADS, head_forward_128)
(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, TileStats* stats, TileBest* best,
 float* target_z, int num_rows, int v, int d, u32 key0, u32 key1) {
  forward<4, 2>(x_td, rows, w_vd, stats, best, target_z, num_rows, v, d, key0, key1);
}
EXPORT(head_forward_128)

// The logits themselves, f32 [T][V], not scaled: for evaluation.
KERNEL(THREADS, head_logits)
(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, float* logits_tv, int num_rows, int v,
 int d) {
  SHARED_DYNAMIC(smem);
  u32 base = smem_addr(smem);
  Shape<2, 2> at = shape<2, 2>(0);
  float acc[2][8][4];
  product<2, 2>(acc, at, base, x_td, rows, num_rows, w_vd, v, d);
  int lane = threadIdx.x % 32, token0 = at.token0 + at.warp_token;
  const float* shared = (const float*)(smem + threadIdx.x / 32 * (16 * LOGITS_STRIDE));
  UNROLL for (int i = 0; i < 2; i++) {
    share_logits(warp_logits(base), acc[i]);
    int row0 = at.row0 + at.warp_row + i * 16;
    for (int r = 0; r < 16 && row0 + r < num_rows; r++) {
      UNROLL for (int half = 0; half < 2; half++) {
        int column = half * 32 + lane, token = PLANTED(head_logits_index) ? lane : token0 + column;
        if (token0 + column < v)
          logits_tv[(u64)(row0 + r) * v + token] = shared[r * (LOGITS_STRIDE / 4) + column];
      }
    }
  }
}
EXPORT(head_logits)

// Numbers of a whole row.
struct RowStats {
  float log_sum, entropy;
};

// Merges a row's tiles; scratch has 3 WARPS floats.
DEV RowStats merge_tiles(const TileStats* stats, int num_tiles, float* scratch) {
  float max = float_of(0xff800000u);
  for (int i = threadIdx.x; i < num_tiles; i += THREADS) max = max_f32(stats[i].max, max);
  max = warp_max(max);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = max;
  if (!PLANTED(head_merge_no_barrier)) block_sync();
  UNROLL for (int w = 0; w < WARPS; w++)
    max = max_f32(scratch[w], max);
  float sum = 0.0f, weighted = 0.0f;
  for (int i = threadIdx.x; i < num_tiles; i += THREADS) {
    TileStats s = stats[i];
    float factor = exp_f32(s.max - max);
    sum = fma_f32(factor, s.sum, sum);
    weighted = fma_f32(factor, s.weighted, weighted);
  }
  sum = block_sum<WARPS>(sum, scratch + WARPS);
  weighted = block_sum<WARPS>(weighted, scratch + 2 * WARPS);
  float log_sum = max + ln_f32(sum);
  return {log_sum, log_sum - div_f32(weighted, sum)};
}

// The drawn token of a row, one block a row.
KERNEL(THREADS, head_draw)
(const TileStats* stats, const TileBest* bests, DrawnRow* drawn, int num_tiles) {
  SHARED(float, scratch, 3 * WARPS);
  SHARED(float, scores, WARPS);
  SHARED(float, zs, WARPS);
  SHARED(u32, tokens, WARPS);
  const TileStats* tile_stats = stats + (u64)blockIdx.x * num_tiles;
  const TileBest* tile_best = bests + (u64)blockIdx.x * num_tiles;
  Best best = {float_of(0xff800000u), 0.0f, ~0u};
  for (int i = threadIdx.x; i < num_tiles; i += THREADS)
    best = better(best, {tile_best[i].score, tile_stats[i].best_z, tile_best[i].token});
  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) {
    scores[threadIdx.x / 32] = best.score;
    tokens[threadIdx.x / 32] = best.token;
    zs[threadIdx.x / 32] = best.z;
  }
  // Its barriers show the bests of all warps.
  RowStats row = merge_tiles(tile_stats, num_tiles, scratch);
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; w++) best = better(best, {scores[w], zs[w], tokens[w]});
  drawn[blockIdx.x] = {best.token, best.z - row.log_sum, row.entropy, row.log_sum};
}
EXPORT(head_draw)

// Report of a row and what the gradient of its logits needs, one block a row.
KERNEL(THREADS, head_policy)
(const TileStats* stats, const float* target_z, const PolicyRow* policy, PolicyReport* reports,
 RowSlope* slopes, int num_tiles) {
  SHARED(float, scratch, 3 * WARPS);
  RowStats row = merge_tiles(stats + (u64)blockIdx.x * num_tiles, num_tiles, scratch);
  if (threadIdx.x != 0) return;
  PolicyRow p = policy[blockIdx.x];
  float logprob = target_z[blockIdx.x] - row.log_sum;
  float loss = -p.weight * logprob, slope = -p.weight;
  u32 clipped = 0;
  if (p.clips != 0) {
    float ratio = exp_f32(logprob - p.old_logprob), low = 1.0f - p.low, high = 1.0f + p.high;
    float within = ratio < low ? low : ratio > high ? high : ratio;
    float plain = -p.advantage * ratio, bounded = -p.advantage * within;
    clipped = bounded > plain && !PLANTED(head_never_clips) ? 1 : 0;
    loss = p.weight * (clipped ? bounded : plain);
    slope = clipped ? 0.0f : p.weight * plain;
  }
  reports[blockIdx.x] = {logprob, row.entropy, loss - p.entropy_coef * row.entropy, clipped};
  slopes[blockIdx.x] = {row.log_sum, slope, row.entropy, p.entropy_coef};
}
EXPORT(head_policy)

// Gradient of the loss by the logits of tokens token0.. : dz[T][width] (width a multiple of 8),
// zeros for tokens from v on. The logits are computed again.
KERNEL(THREADS, head_gradient)
(const bf16* x_td, const HeadRow* rows, const bf16* w_vd, const RowSlope* slopes, bf16* dz,
 int num_rows, int v, int d, int token0, int width) {
  SHARED_DYNAMIC(smem);
  u32 base = smem_addr(smem);
  Shape<4, 2> at = shape<4, 2>(token0);
  float acc[4][8][4];
  product<4, 2>(acc, at, base, x_td, rows, num_rows, w_vd, v, d);
  int lane = threadIdx.x % 32, first = at.token0 + at.warp_token + lane % 8 * 8;
  int column = first - token0;
  UNROLL for (int i = 0; i < 4; i++) {
    share_logits(warp_logits(base), acc[i]);
    // 8 lanes take a row.
    for (int r = lane / 8; r < 16; r += 4) {
      int t = at.row0 + at.warp_row + i * 16 + r;
      if (t >= num_rows || column >= width) continue;
      HeadRow row = rows[t];
      RowSlope s = slopes[t];
      u32 from = warp_logits(base) + r * LOGITS_STRIDE + lane % 8 * 32;
      U32x4 q[2] = {load_shared16(from), load_shared16(from + 16)}, out;
      float g[8];
      UNROLL for (int e = 0; e < 8; e++) {
        float log_p = float_of(q[e / 4].v[e % 4]) * row.inv_temperature - s.log_sum;
        float slope = -s.slope + s.entropy_coef * (log_p + s.entropy);
        g[e] = exp_f32(log_p) * slope * row.inv_temperature;
        u32 token = first + e;
        if (token == row.token && !PLANTED(head_no_target)) g[e] += s.slope * row.inv_temperature;
        if (token >= (u32)v && !PLANTED(head_gradient_end)) g[e] = 0.0f;
      }
      UNROLL for (int e = 0; e < 4; e++)
        out.v[e] = pack_bf16(g[2 * e], g[2 * e + 1]);
      store16(dz + (u64)t * width + column, out);
    }
  }
}
EXPORT(head_gradient)
