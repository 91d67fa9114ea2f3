// Shared by gemm.cu and gemm_hopper.cu: order of tiles, and what becomes of a finished one.
//
// Both kinds of product leave their sums alike: a warp has 16 rows; lane 4 g + c has rows g and
// g + 8, and of each 8 columns 2 c and 2 c + 1. So the epilogues, and their rounding, are the same.
#pragma once

#include "prims.h"

// K that one step takes: a line of 128 bytes.
const int STEP_K = 64;
// Rows of tiles that are worked on together, so that their operands stay in the L2 cache.
const int TILE_GROUP = 8;

// What happens to the sums: y = sum (+ bias) (+ y) in bf16; h = silu(gate) up; y += sum in f32.
enum Epilogue { STORE, GATED, GRADIENT };

struct Output {
  void* y;           // [rows][columns]: bf16, or f32 (GRADIENT).
  const bf16* bias;  // [columns], or null (STORE).
  bf16* gate_up;     // [rows][2 columns], or null (GATED).
  int rows, columns;
  int add;  // Whether y is added to (STORE).
};

struct TilePlace {
  int row, column;
};

// Place of tile `index`: down a group of 8 rows of tiles, then on to the next column.
DEV TilePlace tile_place(int index, int rows, int columns) {
  int group = index / (TILE_GROUP * columns), first = group * TILE_GROUP;
  int height = rows - first < TILE_GROUP ? rows - first : TILE_GROUP;
  int within = index - first * columns;
  return {first + within % height, within / height};
}

// Gives word i to lane i of each four lanes, and receives that lane's word for this one.
DEV void transpose_words(u32 (&words)[4] SITE) {
  int own = threadIdx.x % 4;
  UNROLL for (int bit = 1; bit < 4; bit *= 2) {
    UNROLL for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      u32 other = shuffle_xor(own & bit ? words[i] : words[i | bit], bit PASS);
      if (own & bit) {
        words[i] = other;
      } else {
        words[i | bit] = other;
      }
    }
  }
}

// Stores four words of each lane, which belong to 4 x 8 columns, as 16 bytes of 8 columns.
DEV void store_words(bf16* row, u32 (&words)[4], int column, int columns, bool valid SITE) {
  transpose_words(words PASS);
  int at = column + threadIdx.x % 4 * 8;
  if (valid && at < columns) store16(row + at, {words[0], words[1], words[2], words[3]});
}

// Loads what store_words would overwrite; every lane reads the 16 bytes that it will write.
DEV void load_words(const bf16* row, u32 (&words)[4], int column, int columns, bool valid SITE) {
  int at = column + threadIdx.x % 4 * 8;
  U32x4 q = {};
  if (valid && at < columns) q = load16(row + at);
  UNROLL for (int i = 0; i < 4; i++)
    words[i] = q.v[i];
  transpose_words(words PASS);
}

// The sum as it is stored, before rounding.
DEV float finished(float sum, float bias, bool has_bias, float old, bool add) {
  if (has_bias) sum = sum + bias;
  return add ? old + sum : sum;
}

// A warp's 16 rows from `row` on and `tiles` x 8 columns from `column` on; d[4 j..] belongs to the
// j-th eight. GATED: the first half of the eights are gates, the second their ups; `column` counts
// results.
template <int kind, int tiles>
DEV void write_rows(const Output& out, const float* d, int row, int column) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  UNROLL for (int half = 0; half < 2; half++) {
    int r = row + lane / 4 + half * (PLANTED(gemm_row_pairs) ? 1 : 8);
    bool inside = r < out.rows;
    u64 at = (u64)r * out.columns;
    if (kind == GRADIENT) {
      UNROLL for (int j = 0; j < tiles; j++) {
        int c = column + j * 8 + pair;
        if (!inside || c >= out.columns) continue;
        U32x2* to = (U32x2*)((float*)out.y + at + c);
        U32x2 old = *to;
        if (PLANTED(gemm_gradient_overwrites)) old = {};
        *to = {bits_of(float_of(old.v[0]) + d[j * 4 + half * 2]),
               bits_of(float_of(old.v[1]) + d[j * 4 + half * 2 + 1])};
      }
    } else if (kind == GATED) {
      UNROLL for (int j = 0; j < tiles / 2; j += 4) {
        u32 gate[4], up[4], h[4];
        UNROLL for (int i = 0; i < 4; i++) {
          const float *g = d + (j + i) * 4 + half * 2, *u = g + tiles / 2 * 4;
          gate[i] = pack_bf16(g[0], g[1]);
          up[i] = pack_bf16(u[0], u[1]);
          h[i] = pack_bf16(gated(low_bf16(gate[i]), low_bf16(up[i])),
                           gated(high_bf16(gate[i]), high_bf16(up[i])));
        }
        store_words((bf16*)out.y + at, h, column + j * 8, out.columns, inside);
        if (out.gate_up) {
          bf16* both = out.gate_up + at * 2;
          store_words(both, gate, column + j * 8, out.columns, inside);
          store_words(both + out.columns, up, column + j * 8, out.columns, inside);
        }
      }
    } else {
      bf16* y = (bf16*)out.y + at;
      UNROLL for (int j = 0; j < tiles; j += 4) {
        u32 words[4] = {};
        if (out.add) load_words(y, words, column + j * 8, out.columns, inside);
        UNROLL for (int i = 0; i < 4; i++) {
          int c = column + (j + i) * 8 + pair;
          u32 old = words[i], bias = 0;
          if (out.bias && c < out.columns)
            bias = *(const u32*)(out.bias + (PLANTED(gemm_bias_index) ? pair : c));
          const float* sum = d + (j + i) * 4 + half * 2;
          words[i] = pack_bf16(
              finished(sum[0], low_bf16(bias), out.bias != nullptr, low_bf16(old), out.add),
              finished(sum[1], high_bf16(bias), out.bias != nullptr, high_bf16(old), out.add));
        }
        store_words(y, words, column + j * 8, out.columns, inside);
      }
    }
  }
}

// The same for the transposed product: the warp's 16 rows are columns of the output from `column`
// on, its columns are rows from `row` on. GATED: of the 16, the first 8 are gates, the others their
// ups.
template <int kind, int tiles>
DEV void write_columns(const Output& out, const float* d, int row, int column) {
  const int lane = threadIdx.x % 32;
  UNROLL for (int j = 0; j < tiles; j++) {
    UNROLL for (int e = 0; e < 4; e++) {
      int r = row + j * 8 + lane % 4 * 2 + e % 2;
      int c =
          column + lane / 4 + (kind == GATED ? 0 : e / 2 * (PLANTED(gemm_column_pairs) ? 1 : 8));
      if (r >= out.rows || c >= out.columns) continue;
      bf16* y = (bf16*)out.y + (u64)r * out.columns + c;
      if (kind == GATED) {
        if (e >= 2) continue;
        bf16 gate = to_bf16(d[j * 4 + e]), up = to_bf16(d[j * 4 + 2 + e]);
        *y = to_bf16(gated(to_f32(gate), to_f32(up)));
        if (out.gate_up) {
          bf16* both = out.gate_up + (u64)r * 2 * out.columns + c;
          both[0] = gate;
          both[out.columns] = up;
        }
      } else {
        float bias = out.bias ? to_f32(out.bias[c]) : 0.0f, old = out.add ? to_f32(*y) : 0.0f;
        *y = to_bf16(finished(d[j * 4 + e], bias, out.bias != nullptr, old, out.add));
      }
    }
  }
}
