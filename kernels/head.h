// What a batch asks of the LM head, and what a draw gives: the records of head.cu and seats.cu.
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
  u32 unused;
};

struct alignas(16) DrawnRow {
  u32 token;
  float logprob, entropy, log_sum;
};
