// Pages of keys and values: a sample begins with a copy of its prompt's last page when that is not
// full, and goes on in it.
#include "prims.h"

const int THREADS = 128;

// Block (c, a): page copies[2 c] of array a becomes page copies[2 c + 1]. Arrays of `array_len`
// elements, one behind another (a layer's keys, its values, ...), pages of `page_len`, a multiple
// of 8.
KERNEL(THREADS, copy_pages)
(bf16* arrays, const u32* copies, u64 array_len, int page_len) {
  bf16* array = arrays + blockIdx.y * array_len;
  const bf16* from = array + (u64)copies[2 * blockIdx.x] * page_len;
  bf16* to = array + (u64)copies[2 * blockIdx.x + 1] * page_len;
  int end = PLANTED(copy_pages_cut) ? page_len - 8 : page_len;
  for (int i = threadIdx.x * 8; i < end; i += THREADS * 8) store16(to + i, load_cached16(from + i));
}
EXPORT(copy_pages)
