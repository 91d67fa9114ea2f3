// What a batch asks of the LM head, and what a draw gives: the records of head.cu, keep.cu and
// seats.cu; and which of two tokens is drawn.
#pragma once
#include "prims.h"

// A row of the batch.
struct alignas(16) HeadRow {
  u32 row;    // Row of the hidden state.
  u32 token;  // Target, or ~0.
  float inv_temperature;
  u32 greedy;             // 1: the score is the logit, without noise.
  u32 position;           // Position of the drawn token.
  u32 seq_low, seq_high;  // Sequence id.
  u32 top_k;              // Likeliest tokens kept; 0: all.
  float top_p;            // Probability kept; 1: all.
  u32 unused[3];
};

struct alignas(16) DrawnRow {
  u32 token;
  float logprob, entropy, log_sum;
};

// A token with its score, and z, its logit times the row's inverse temperature.
struct Best {
  float score, z;
  u32 token;
};

// Whether score a (of token a) goes before b: of equals the first.
DEV bool goes_before(float a, u32 token_a, float b, u32 token_b) {
  if (PLANTED(head_last_of_equals)) return a > b || (a == b && token_a > token_b);
  return a > b || (a == b && token_a < token_b);
}

DEV Best better(const Best& a, const Best& b) {
  return goes_before(b.score, b.token, a.score, a.token) ? b : a;
}

DEV Best best_of_warp(Best best) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    Best other = {shuffle_xor(best.score, lanes), shuffle_xor(best.z, lanes),
                  shuffle_xor(best.token, lanes)};
    best = better(best, other);
  }
  return best;
}
