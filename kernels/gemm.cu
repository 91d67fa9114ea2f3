// Products of matrices on warp-wide tensor-core instructions (sm_80 and later), in the three
// layouts that training needs, and transposed for a few rows (decoding).
//
// Every element is one chain of m16n8k16 products over K = 0, 16, 32.. into one f32 accumulator
// that starts from 0, whatever the tile, the layout or the number of rows: its bits depend on its
// row, its column and K alone, and equal those of gemm_hopper.cu.
//
// A block walks over tiles; steps of 64 of K stream through shared memory, the next tile's first
// ones already under way while a tile is finished. Operands lie in lines of 128 bytes, chunk c of
// 16 bytes of line l at c ^ (l % 8). K-major: a line is 64 of K of one row; M- (or N-) major: line
// 64 p + k is rows 64 p.. of one k.
#include "gemm.h"

// Work of a block: tiles of `rows` x `columns` by `down` x `across` warps, `stages` steps in shared
// memory.
template <int rows, int columns, int down, int across, int stages>
struct Tiling {
  static const int ROWS = rows, COLUMNS = columns, ACROSS = across, STAGES = stages;
  static const int THREADS = 32 * down * across;
  static const int WARP_ROWS = rows / down, WARP_COLUMNS = columns / across;
  static const int A_TILES = WARP_ROWS / 16, B_TILES = WARP_COLUMNS / 8;
  static const int A_BYTES = rows * 128, STAGE_BYTES = (rows + columns) * 128;
};

DEV u32 place(u32 base, int line, int chunk) {
  return base + line * 128 + ((chunk ^ (line % 8)) << 4);
}

// Starts the copies of `span` rows of an operand from `first` on, and 64 of K from k0 on; zeros
// past its end. row_of(i) is the i-th row of the tile, or -1 (K-major).
template <class T, int span, bool mn, class RowOf>
DEV void load_tile(u32 to, const bf16* from, int first, int num_rows, int k0, int k, RowOf row_of) {
  UNROLL for (int i = 0; i < span * 8; i += T::THREADS) {
    int line = (i + threadIdx.x) / 8, chunk = threadIdx.x % 8;
    if (line >= span) break;
    bool valid;
    u64 at;
    if (mn) {
      int kk = k0 + line % 64, row = first + line / 64 * 64 + chunk * 8;
      valid = kk < k && row < num_rows;
      at = (u64)kk * num_rows + row;
    } else {
      int row = row_of(line), kk = k0 + chunk * 8;
      valid = row >= 0 && (kk < k || PLANTED(gemm_reads_past_k));
      at = (u64)row * k + kk;
    }
    cp_async16(place(to, line, chunk), valid ? from + at : from, valid);
  }
}

template <class T>
struct Fragments {
  u32 a[T::A_TILES][4];
  u32 b[T::B_TILES][2];
};

// A warp's operands for 16 of K of a stage.
template <class T, bool a_mn, bool b_mn>
DEV void load_fragments(Fragments<T>& f, u32 a, int row, int column, int kk) {
  const int lane = threadIdx.x % 32;
  const u32 b = a + T::A_BYTES;
  UNROLL for (int i = 0; i < T::A_TILES; i++) {
    int m = row + i * 16;
    if (a_mn) {
      m += lane / 8 % 2 * 8;
      ldmatrix_x4_trans(f.a[i],
                        place(a, m / 64 * 64 + kk * 16 + lane / 16 * 8 + lane % 8, m % 64 / 8));
    } else {
      ldmatrix_x4(f.a[i], place(a, m + lane % 16, kk * 2 + lane / 16));
    }
  }
  if constexpr (T::B_TILES == 1) {
    u32 r[2];
    ldmatrix_x2(r, place(b, column + lane % 8, kk * 2 + lane / 8 % 2));
    f.b[0][0] = r[0];
    f.b[0][1] = r[1];
  } else {
    UNROLL for (int j = 0; j + 1 < T::B_TILES; j += 2) {
      u32 r[4];
      int n = column + j * 8 + lane / 16 * 8, eight = lane / 8 % 2;
      if (b_mn) {
        ldmatrix_x4_trans(r, place(b, n / 64 * 64 + kk * 16 + eight * 8 + lane % 8, n % 64 / 8));
      } else {
        ldmatrix_x4(r, place(b, n + lane % 8, kk * 2 + eight));
      }
      f.b[j][0] = r[0];
      f.b[j][1] = r[1];
      f.b[j + 1][0] = r[2];
      f.b[j + 1][1] = r[3];
    }
  }
}

// The product of a (m rows) and b (n rows) over k. GATED: the weight has n gates and then n ups;
// `swapped`: the weight is a, the output's columns are a's rows.
template <class T, bool a_mn, bool b_mn, int kind, bool swapped>
DEV void gemm(const bf16* a, const bf16* b, const Output& out, int m, int n, int k) {
  SHARED_DYNAMIC(smem);
  const u32 base = smem_addr(smem);
  // Of a gated weight, a tile has as many gates as ups.
  const int tile_m = T::ROWS / (kind == GATED && swapped ? 2 : 1);
  const int tile_n = T::COLUMNS / (kind == GATED && !swapped ? 2 : 1);
  const int tiles_m = ceil_div(m, tile_m), tiles_n = ceil_div(n, tile_n);
  const int count = tiles_m * tiles_n, steps = ceil_div(k, STEP_K);
  const int warp = threadIdx.x / 32;
  const int row = warp / T::ACROSS * T::WARP_ROWS, column = warp % T::ACROSS * T::WARP_COLUMNS;

  int load_index = blockIdx.x, load_step = 0, load_stage = 0;
  auto load_next = [&] {
    if (load_index < count) {
      TilePlace at = tile_place(load_index, tiles_m, tiles_n);
      int m0 = at.row * tile_m, n0 = at.column * tile_n, k0 = load_step * STEP_K;
      u32 to = base + load_stage * T::STAGE_BYTES;
      auto row_of_a = [&](int i) {
        int r = m0 + i;
        if (kind != GATED || !swapped) return r < m ? r : -1;
        r = m0 + i / 16 * 8 + i % 8;  // Of 16 rows, 8 gates and their ups.
        return r < m ? r + (i % 16 < 8 ? 0 : m) : -1;
      };
      auto row_of_b = [&](int i) {
        int r = n0 + i;
        if (kind != GATED || swapped) return r < n ? r : -1;
        const int half = T::WARP_COLUMNS / 2;  // Of a warp's columns, half are gates.
        r = n0 + i / T::WARP_COLUMNS * half + i % half;
        bool gate = i % T::WARP_COLUMNS < half || PLANTED(gemm_gate_twice);
        return r < n ? r + (gate ? 0 : n) : -1;
      };
      load_tile<T, T::ROWS, a_mn>(to, a, m0, m, k0, k, row_of_a);
      load_tile<T, T::COLUMNS, b_mn>(to + T::A_BYTES, b, n0, n, k0, k, row_of_b);
      if (++load_step == steps) {
        load_step = 0;
        load_index += gridDim.x;
      }
    }
    cp_async_commit();
    load_stage = load_stage + 1 == T::STAGES ? 0 : load_stage + 1;
  };

  for (int s = 0; s < T::STAGES - 1; s++) load_next();
  int stage = 0;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    float d[T::A_TILES][T::B_TILES][4];
    UNROLL for (int i = 0; i < T::A_TILES; i++) {
      UNROLL for (int j = 0; j < T::B_TILES; j++) {
        UNROLL for (int e = 0; e < 4; e++)
          d[i][j][e] = 0.0f;
      }
    }
    for (int step = 0; step < steps; step++) {
      if (PLANTED(gemm_waits_for_too_few)) {
        cp_async_wait<T::STAGES - 1>();
      } else {
        cp_async_wait<T::STAGES - 2>();
      }
      // The stage has come for all warps, and all have read the one that is loaded next.
      if (!PLANTED(gemm_no_barrier)) block_sync();
      load_next();
      const u32 at = base + stage * T::STAGE_BYTES;
      Fragments<T> f[2];
      load_fragments<T, a_mn, b_mn>(f[0], at, row, column, 0);
      UNROLL for (int kk = 0; kk < 4; kk++) {
        if (kk < 3) load_fragments<T, a_mn, b_mn>(f[(kk + 1) % 2], at, row, column, kk + 1);
        UNROLL for (int i = 0; i < T::A_TILES; i++) {
          UNROLL for (int j = 0; j < T::B_TILES; j++)
            mma_m16n8k16(d[i][j], f[kk % 2].a[i], f[kk % 2].b[j][0], f[kk % 2].b[j][1]);
        }
      }
      stage = stage + 1 == T::STAGES ? 0 : stage + 1;
    }
    TilePlace at = tile_place(index, tiles_m, tiles_n);
    UNROLL for (int i = 0; i < T::A_TILES; i++) {
      int r = row + i * 16;
      if (swapped) {
        int c = at.row * tile_m + (kind == GATED ? r / 2 : r);
        write_columns<kind, T::B_TILES>(out, d[i][0], at.column * tile_n + column, c);
      } else {
        int c = at.column * tile_n + (kind == GATED ? column / 2 : column);
        write_rows<kind, T::B_TILES>(out, d[i][0], at.row * tile_m + r, c);
      }
    }
  }
}

using Large = Tiling<128, 128, 2, 2, 3>;
using Small = Tiling<64, 64, 2, 2, 4>;

// y = x w^T (+ bias) (+ y).
KERNEL(128, gemm_forward)
(const bf16* x_tk, const bf16* w_nk, const bf16* bias_n, bf16* y_tn, int t, int n, int k, int add) {
  Output out = {y_tn, bias_n, nullptr, t, n, add};
  gemm<Large, false, false, STORE, false>(x_tk, w_nk, out, t, n, k);
}
EXPORT(gemm_forward)

// h = silu(gate) up with gate and up = x w^T, which go to gate_up when it is not null.
KERNEL(128, gemm_swiglu)
(const bf16* x_tk, const bf16* w, bf16* gate_up, bf16* h_tf, int t, int f, int k) {
  Output out = {h_tf, nullptr, gate_up, t, f, 0};
  gemm<Large, false, false, GATED, false>(x_tk, w, out, t, f, k);
}
EXPORT(gemm_swiglu)

// The transposed product in tiles of 64 or 16 rows of the weight and `tokens` rows of x.
template <int rows, int kind>
DEV void decode(const bf16* x, const bf16* w, const Output& out, int k, int tokens) {
  const int down = rows == 64 ? 4 : 1, stages = rows == 64 ? 6 : 8;
  const int across = 4 / down, t = out.rows, n = out.columns;
  if (tokens == 8)
    gemm<Tiling<rows, 8, down, 1, stages>, false, false, kind, true>(w, x, out, n, t, k);
  if (tokens == 16)
    gemm<Tiling<rows, 16, down, (across + 1) / 2, stages>, false, false, kind, true>(w, x, out, n,
                                                                                     t, k);
  if (tokens == 32)
    gemm<Tiling<rows, 32, down, across, stages>, false, false, kind, true>(w, x, out, n, t, k);
  if (tokens == 64)
    gemm<Tiling<rows, 64, down, across, stages>, false, false, kind, true>(w, x, out, n, t, k);
}

// As gemm_forward and gemm_swiglu, for few rows.
KERNEL(128, gemm_decode_64)
(const bf16* x_tk, const bf16* w_nk, const bf16* bias_n, bf16* y_tn, int t, int n, int k, int add,
 int tokens) {
  decode<64, STORE>(x_tk, w_nk, {y_tn, bias_n, nullptr, t, n, add}, k, tokens);
}
EXPORT(gemm_decode_64)

KERNEL(128, gemm_decode_16)
(const bf16* x_tk, const bf16* w_nk, const bf16* bias_n, bf16* y_tn, int t, int n, int k, int add,
 int tokens) {
  decode<16, STORE>(x_tk, w_nk, {y_tn, bias_n, nullptr, t, n, add}, k, tokens);
}
EXPORT(gemm_decode_16)

KERNEL(128, gemm_decode_swiglu_64)
(const bf16* x_tk, const bf16* w, bf16* gate_up, bf16* h_tf, int t, int f, int k, int tokens) {
  decode<64, GATED>(x_tk, w, {h_tf, nullptr, gate_up, t, f, 0}, k, tokens);
}
EXPORT(gemm_decode_swiglu_64)

KERNEL(128, gemm_decode_swiglu_16)
(const bf16* x_tk, const bf16* w, bf16* gate_up, bf16* h_tf, int t, int f, int k, int tokens) {
  decode<16, GATED>(x_tk, w, {h_tf, nullptr, gate_up, t, f, 0}, k, tokens);
}
EXPORT(gemm_decode_swiglu_16)

// dx = dy w (+ dx): sums over n.
KERNEL(128, gemm_input_128)
(const bf16* dy_tn, const bf16* w_nk, bf16* dx_tk, int t, int n, int k, int add) {
  Output out = {dx_tk, nullptr, nullptr, t, k, add};
  gemm<Large, false, true, STORE, false>(dy_tn, w_nk, out, t, k, n);
}
EXPORT(gemm_input_128)

KERNEL(128, gemm_input_64)
(const bf16* dy_tn, const bf16* w_nk, bf16* dx_tk, int t, int n, int k, int add) {
  Output out = {dx_tk, nullptr, nullptr, t, k, add};
  gemm<Small, false, true, STORE, false>(dy_tn, w_nk, out, t, k, n);
}
EXPORT(gemm_input_64)

// dw += dy^T x: sums over the tokens, in order.
KERNEL(128, gemm_weight_128)
(const bf16* dy_tn, const bf16* x_tk, float* dw_nk, int t, int n, int k) {
  Output out = {dw_nk, nullptr, nullptr, n, k, 1};
  gemm<Large, true, true, GRADIENT, false>(dy_tn, x_tk, out, n, k, t);
}
EXPORT(gemm_weight_128)

KERNEL(128, gemm_weight_64)
(const bf16* dy_tn, const bf16* x_tk, float* dw_nk, int t, int n, int k) {
  Output out = {dw_nk, nullptr, nullptr, n, k, 1};
  gemm<Small, true, true, GRADIENT, false>(dy_tn, x_tk, out, n, k, t);
}
EXPORT(gemm_weight_64)
