// What the attention kernels share: tiles in shared memory, 16 rows of a warp against a block of
// keys, and the merge of chunks.
//
// One row's arithmetic, whoever computes it. Its keys come in blocks of 32 at absolute positions;
// an online softmax takes them in order within a chunk of 256 keys. A chunk's maximum m, sum l (of
// the quad's lanes, in a tree) and output o are then merged into the row's total, chunks in order.
// A block or chunk that the row does not see changes no bit. So decoding, which gives chunks to
// different warps, and prefill, which takes them one after another, agree to the bit, and so do any
// two batches, since a row of a tensor core's product does not depend on the other rows.
//
// Keys and values of a layer lie in pages [pages][G][16][C]; queries and outputs are [T][H][C]. The
// R = H / G query heads of a group are packed: packed row i of a sequence is position i / R, head
// g R + i % R.
#pragma once

#include "prims.h"

const int PAGE = 16;
// Keys of one step of the online softmax.
const int BLOCK = 32;
// Keys of one online softmax.
const int CHUNK = 256;

DEV float minus_infinity() { return float_of(0xff800000u); }

// ---- Tiles of rows of C bf16 in shared memory; 16-byte chunk i of row r lies at i ^ (r % 8), or,
// where two rows share a line of 128 bytes (C 32), at i ^ (r / 2 % 4). So ldmatrix has no bank
// conflicts.

template <int C>
DEV u32 tile_at(u32 tile, int row, int chunk) {
  return tile + row * (C * 2) + ((chunk ^ (C == 32 ? row / 2 % 4 : row % 8)) << 4);
}

// Left operand: rows row.. of a tile, columns 16 step...
template <int C>
DEV void load_left(u32 (&a)[4], u32 tile, int row, int step) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile_at<C>(tile, row + lane % 16, step * 2 + lane / 16));
}

// Right operand of a product with the transposed tile: rows row..row + 15 (columns of the result)
// and columns 16 step... b[0..1] has the first 8.
template <int C>
DEV void load_right(u32 (&b)[4], u32 tile, int row, int step) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(b, tile_at<C>(tile, row + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
}

// Right operand of a product with the tile itself: rows row..row + 15 (summed over) and columns
// 16 pair... b[0..1] has the first 8.
template <int C>
DEV void load_right_rows(u32 (&b)[4], u32 tile, int row, int pair) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, tile_at<C>(tile, row + lane % 16, pair * 2 + lane / 16));
}

// d = a b^T for rows row..row + 15 of tile a and the 32 rows of tile b.
template <int C>
DEV void product_transposed(float (&d)[BLOCK / 8][4], u32 a_tile, int row, u32 b_tile) {
  UNROLL for (int j = 0; j < BLOCK / 8; j++) {
    UNROLL for (int e = 0; e < 4; e++)
      d[j][e] = 0.0f;
  }
  UNROLL for (int step = 0; step < C / 16; step++) {
    u32 a[4];
    load_left<C>(a, a_tile, row, step);
    UNROLL for (int j = 0; j < BLOCK / 16; j++) {
      u32 b[4];
      load_right<C>(b, b_tile, j * 16, step);
      mma_m16n8k16(d[2 * j], a, b[0], b[1]);
      mma_m16n8k16(d[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// d += p b for 16 rows of weights (rounded to bf16) and the 32 rows of tile b.
template <int C>
DEV void product_add(float (&d)[C / 8][4], const float (&p)[BLOCK / 8][4], u32 b_tile) {
  UNROLL for (int step = 0; step < BLOCK / 16; step++) {
    const float (&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
    u32 a[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
    UNROLL for (int pair = 0; pair < C / 16; pair++) {
      u32 b[4];
      load_right_rows<C>(b, b_tile, step * 16, pair);
      mma_m16n8k16(d[2 * pair], a, b[0], b[1]);
      mma_m16n8k16(d[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// ---- Loads

// Keys and values of one head of one sequence.
struct Pages {
  const bf16 *keys, *values;  // Of the layer, at the head.
  const u32* table;           // The sequence's pages.
  u64 page_len;               // G 16 C.
  int num_keys;               // Later ones count as zeros.
};

// Begins to load keys first..first + count - 1 and their values (rows of C); `threads` threads take
// part, this one being number t.
template <int C>
DEV void load_keys(u32 k_tile, u32 v_tile, const Pages& kv, int first, int count, int t,
                   int threads) {
  for (int i = t; i < count * (C / 8); i += threads) {
    int row = i / (C / 8), chunk = i % (C / 8), key = first + row;
    bool valid = key < kv.num_keys;
    if (PLANTED(attention_tail_not_zeroed)) valid = key / PAGE * PAGE < kv.num_keys;
    u64 at = valid ? kv.table[key / PAGE] * kv.page_len + key % PAGE * C + chunk * 8 : 0;
    cp_async16(tile_at<C>(k_tile, row, chunk), kv.keys + at, valid);
    cp_async16(tile_at<C>(v_tile, row, chunk), kv.values + at, valid);
  }
}

// ---- The online softmax

// Two rows of a thread's quad (lane / 4 and 8 further): output, maximum and the thread's part of
// the sum.
template <int C>
struct Softmax {
  float o[C / 8][4];
  float m[2], l[2];
};

template <int C>
DEV void softmax_begin(Softmax<C>& x) {
  UNROLL for (int n = 0; n < C / 8; n++) {
    UNROLL for (int e = 0; e < 4; e++)
      x.o[n][e] = 0.0f;
  }
  UNROLL for (int r = 0; r < 2; r++) {
    x.m[r] = minus_infinity();
    x.l[r] = 0.0f;
  }
}

// Scales products with the keys first.. (4 for each 8 keys); row r of the thread sees keys up to
// last[r].
template <int keys>
DEV void softmax_scores(float* s, int first, const int (&last)[2], float scale) {
  UNROLL for (int i = 0; i < keys / 2; i++)
    s[i] *= scale;
  // Most blocks lie whole before what the warp's rows see last.
  int end = first + keys - 1;
  if (warp_ballot(end > last[0] || end > last[1]) == 0) return;
  UNROLL for (int i = 0; i < keys / 2; i++) {
    int key = first + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (key > last[i % 4 / 2]) s[i] = minus_infinity();
  }
}

// Turns a block's scores into weights, and brings maximum and sum up to date. When a maximum of the
// warp rises it calls `rescale` with what outputs so far are to be multiplied by: exactly 1 where
// it stays, so that leaving it out changes no bit.
template <class Rescale>
DEV void softmax_weights(float* s, float (&m)[2], float (&l)[2], Rescale rescale) {
  float top[2] = {m[0], m[1]};
  UNROLL for (int i = 0; i < BLOCK / 2; i++)
    top[i % 4 / 2] = max_f32(top[i % 4 / 2], s[i]);
  float from[2];
  UNROLL for (int r = 0; r < 2; r++) {
    top[r] = max_f32(top[r], shuffle_xor(top[r], 1));
    top[r] = max_f32(top[r], shuffle_xor(top[r], 2));
    from[r] = top[r] == minus_infinity() ? 0.0f : top[r];
  }
  bool rises = top[0] != m[0] || top[1] != m[1];
  if (warp_ballot(rises) != 0 && !PLANTED(attention_no_rescale)) {
    float keep[2] = {exp_f32(m[0] - from[0]), exp_f32(m[1] - from[1])};
    rescale(keep);
    UNROLL for (int r = 0; r < 2; r++) {
      l[r] *= keep[r];
      m[r] = top[r];
    }
  }
  UNROLL for (int i = 0; i < BLOCK / 2; i++) {
    s[i] = exp_below_88(s[i] - from[i % 4 / 2]);
    l[i % 4 / 2] += s[i];
  }
}

// Adds the block of keys first..; row r of the thread sees keys up to last[r].
template <int C>
DEV void softmax_block(Softmax<C>& x, u32 q_tile, int q_row, u32 k_tile, u32 v_tile, int first,
                       const int (&last)[2], float scale) {
  float s[BLOCK / 8][4];
  product_transposed<C>(s, q_tile, q_row, k_tile);
  softmax_scores<BLOCK>(s[0], first, last, scale);
  softmax_weights(s[0], x.m, x.l, [&](const float (&keep)[2]) {
    UNROLL for (int n = 0; n < C / 8; n++) {
      UNROLL for (int e = 0; e < 4; e++)
        x.o[n][e] *= keep[e / 2];
    }
  });
  product_add<C>(x.o, s, v_tile);
}

// The quad's sum.
DEV float quad_sum(float x) {
  x = x + shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// ---- Merging chunks

// Maximum and sum of the chunks so far.
struct Total {
  float m, l;
};

// Factors of the total so far and of the next chunk.
struct Shares {
  float keep, take;
};

DEV Shares merge(Total& total, float m, float l) {
  float top = max_f32(total.m, m), from = top == minus_infinity() ? 0.0f : top;
  Shares shares = {exp_f32(total.m - from), exp_f32(m - from)};
  total.l = fma_f32(total.l, shares.keep, l * shares.take);
  total.m = top;
  return shares;
}

DEV float merge_output(float total, float o, Shares shares) {
  return fma_f32(total, shares.keep, o * shares.take);
}

DEV float log_sum_exp(const Total& total) {
  return total.l > 0.0f ? total.m + ln_f32(total.l) : minus_infinity();
}

// What the total output is multiplied by at the end; 0 for a row without keys.
DEV float final_scale(const Total& total) { return total.l > 0.0f ? div_f32(1.0f, total.l) : 0.0f; }

// Leaves row r of a finished chunk (with its quad's sum l) as part `at`: o[at][C], ml[at] = (m, l).
template <int C>
DEV void store_part(const Softmax<C>& x, int r, float l, u64 at, float* part_o, float* part_ml) {
  UNROLL for (int n = 0; n < C / 8; n++) {
    U32x2* to = (U32x2*)(part_o + at * C + n * 8 + threadIdx.x % 4 * 2);
    *to = {bits_of(x.o[n][2 * r]), bits_of(x.o[n][2 * r + 1])};
  }
  if (threadIdx.x % 4 == 0) *(U32x2*)(part_ml + at * 2) = {bits_of(x.m[r]), bits_of(l)};
}
