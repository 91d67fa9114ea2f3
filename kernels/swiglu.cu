// SwiGLU and its backward pass, elementwise on fused rows [gate F][up F] of bf16.
//
// A thread has 8 outputs of a row (F is a multiple of 8).
#include "prims.h"

const int THREADS = 256;

DEV float sigmoid(float x) { return div_f32(1.0f, 1.0f + exp_f32(-x)); }

struct Gradient {
  float gate, up;
};

DEV Gradient gated_backward(float gate, float up, float dh) {
  float s = sigmoid(gate);
  float silu = gate * s;
  return {dh * up * (s + silu * (1.0f - s)), dh * silu};
}

// h = silu(gate) up.
KERNEL(THREADS, swiglu_forward)
(const bf16* gate_up, bf16* h_tf, int num_rows, int f) {
  u64 index = (u64)blockIdx.x * THREADS + threadIdx.x;
  u32 eights = f / 8;
  u64 row = index / eights;
  u32 column = (u32)(index % eights) * 8;
  if (row >= (u64)num_rows) return;
  const bf16* from = gate_up + row * 2 * f + column;
  int up_at = PLANTED(swiglu_up_index) ? f - 8 : f;
  U32x4 gate = load_const16(from), up = load_const16(from + up_at), h;
  UNROLL for (int e = 0; e < 4; e++) {
    h.v[e] = pack_bf16(gated(low_bf16(gate.v[e]), low_bf16(up.v[e])),
                       gated(high_bf16(gate.v[e]), high_bf16(up.v[e])));
  }
  store16(h_tf + row * f + column, h);
}
EXPORT(swiglu_forward)

// Gradient of gate and up from that of h.
KERNEL(THREADS, swiglu_backward)
(const bf16* gate_up, const bf16* dh_tf, bf16* dgate_up, int num_rows, int f) {
  u64 index = (u64)blockIdx.x * THREADS + threadIdx.x;
  u32 eights = f / 8;
  u64 row = index / eights;
  u32 column = (u32)(index % eights) * 8;
  if (row >= (u64)num_rows) return;
  u64 at = row * 2 * f + column;
  U32x4 gate = load_const16(gate_up + at), up = load_const16(gate_up + at + f);
  U32x4 dh = load_const16(dh_tf + row * f + column), dgate, dup;
  UNROLL for (int e = 0; e < 4; e++) {
    Gradient low = gated_backward(low_bf16(gate.v[e]), low_bf16(up.v[e]), low_bf16(dh.v[e]));
    Gradient high = gated_backward(high_bf16(gate.v[e]), high_bf16(up.v[e]), high_bf16(dh.v[e]));
    dgate.v[e] = pack_bf16(low.gate, high.gate);
    dup.v[e] = pack_bf16(low.up, high.up);
  }
  store16(dgate_up + at, dgate);
  store16(dgate_up + at + (PLANTED(swiglu_gradient_overlap) ? 0 : f), dup);
}
EXPORT(swiglu_backward)
