// Arithmetic of the tensor cores.
//
// PLAIN: f32 multiply-adds in the order of k. HOPPER and AMPERE follow MMA-Sim (Xie et al.,
// "MMA-Sim: bit-accurate reference model of tensor cores"): the 16 products and the accumulator are
// aligned to the largest exponent among them (of a product: the sum of its factors' exponents),
// each is truncated to 25 (Ampere: 24) fraction bits, they are added exactly, and the sum is
// truncated to f32. Ampere does this for 8 products at a time, Hopper for 16.
#include <math.h>
#include <string.h>

#include "runtime.h"

namespace emu {

const int MAX_COLS = 256;
// Exponents that the vectorised path takes; zeros count as far below.
const int LOWEST = -100, HIGHEST = 100, ZERO = -10000;

static int exponent_of(float x) {
  int biased = bits_of(x) >> 23 & 255;
  return biased ? biased - 127 : -126;
}

static float truncate(double x) {
  float nearest = (float)x;
  if (isinf(nearest)) return isinf(x) ? nearest : copysignf(3.40282347e38f, nearest);
  return fabs((double)nearest) > fabs(x) ? nextafterf(nearest, 0.0f) : nearest;
}

// One sum, for any exponents.
static float sum_scalar(const float* a, const float* b, int stride, float c, int count,
                        int fraction) {
  double plain = c;
  for (int k = 0; k < count; k++) plain += (double)a[k] * b[k * stride];
  if (isnan(plain)) return float_of(0x7fffffff);
  if (isinf(plain)) return (float)plain;
  int top = exponent_of(c);
  for (int k = 0; k < count; k++) {
    int e = exponent_of(a[k]) + exponent_of(b[k * stride]);
    if (e > top) top = e;
  }
  double sum = trunc(ldexp((double)c, fraction - top));
  for (int k = 0; k < count; k++) sum += trunc(ldexp((double)a[k] * b[k * stride], fraction - top));
  return truncate(ldexp(sum, top - fraction));
}

// A factor's exponent for the vectorised path, or ZERO; `wild` when it needs the scalar one.
static int vector_exponent(float x, bool& wild) {
  if (x == 0.0f) return ZERO;
  int e = exponent_of(x);
  if (!(e >= LOWEST / 2 && e <= HIGHEST / 2)) wild = true;
  return e;
}

// One row: d[j] for all j. `eb` holds the exponents of b.
static void sum_row(const float* a, const int* ea, const float* b, const int* eb, float* d,
                    int cols, int count, int fraction) {
  int top[MAX_COLS];
  int sum[MAX_COLS] = {};
  float scale[MAX_COLS];
  for (int j = 0; j < cols; j++) {
    u32 bits;
    memcpy(&bits, &d[j], 4);
    int e = (int)(bits >> 23 & 255) - 127;
    top[j] = (bits & 0x7fffffff) == 0 ? ZERO : e;
  }
  for (int k = 0; k < count; k++) {
    for (int j = 0; j < cols; j++) {
      int e = ea[k] + eb[k * MAX_COLS + j];
      top[j] = top[j] > e ? top[j] : e;
    }
  }
  for (int j = 0; j < cols; j++) {
    if (top[j] < LOWEST) top[j] = LOWEST;  // All zero.
    u32 bits = (u32)(fraction - top[j] + 127) << 23;
    memcpy(&scale[j], &bits, 4);
  }
  // A product of two bf16 is exact in f32, scaling by a power of two too; below 2^27 after it.
  for (int k = 0; k < count; k++) {
    for (int j = 0; j < cols; j++) sum[j] += (int)(a[k] * b[k * cols + j] * scale[j]);
  }
  for (int j = 0; j < cols; j++) {
    double total = (double)sum[j] + (double)(int)(d[j] * scale[j]);
    u64 bits;
    memcpy(&bits, &total, 8);
    bits &= ~((1ull << 29) - 1);  // To 24 significant bits, towards zero.
    memcpy(&total, &bits, 8);
    d[j] = (float)(total * (1.0 / (double)scale[j]));
  }
}

static void model_products(int rows, int cols, const float* a, const float* b, float* d, int stride,
                           int from, int count, int fraction) {
  int eb[16 * MAX_COLS];
  float packed[16 * MAX_COLS];
  bool wild_b = false;
  for (int k = 0; k < count; k++) {
    for (int j = 0; j < cols; j++) {
      packed[k * cols + j] = b[(from + k) * cols + j];
      eb[k * MAX_COLS + j] = vector_exponent(packed[k * cols + j], wild_b);
    }
  }
  for (int i = 0; i < rows; i++) {
    const float* row = a + i * 16 + from;
    float* out = d + i * stride;
    int ea[16];
    bool wild = wild_b;
    for (int k = 0; k < count; k++) ea[k] = vector_exponent(row[k], wild);
    for (int j = 0; j < cols && !wild; j++) {
      u32 biased = bits_of(out[j]) >> 23 & 255;
      bool zero = (bits_of(out[j]) & 0x7fffffff) == 0;
      wild = !zero && ((int)biased - 127 < LOWEST || (int)biased - 127 > HIGHEST);
    }
    if (!wild) {
      sum_row(row, ea, packed, eb, out, cols, count, fraction);
      continue;
    }
    for (int j = 0; j < cols; j++)
      out[j] = sum_scalar(row, packed + j, cols, out[j], count, fraction);
  }
}

void products16(u32 arithmetic, int rows, int cols, const float* a, const float* b, float* d,
                int stride) {
  if (arithmetic == HOPPER) return model_products(rows, cols, a, b, d, stride, 0, 16, 25);
  if (arithmetic == AMPERE) {
    model_products(rows, cols, a, b, d, stride, 0, 8, 24);
    return model_products(rows, cols, a, b, d, stride, 8, 8, 24);
  }
  for (int i = 0; i < rows; i++) {
    float* out = d + i * stride;
    for (int k = 0; k < 16; k++) {
      float x = a[i * 16 + k];
      const float* row = b + k * cols;
      for (int j = 0; j < cols; j++) out[j] += x * row[j];
    }
  }
}

}  // namespace emu
