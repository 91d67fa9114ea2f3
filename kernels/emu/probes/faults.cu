// Probe: mistakes that the emulator must report, and correct twins. Not part of the product.
#include "prims.h"

// One block of 64 threads, 1024 bytes of dynamic shared memory.
KERNEL(64, probe_fault)
(float* x, int which) {
  SHARED_DYNAMIC(smem);
  float* s = (float*)smem;
  int t = threadIdx.x;
  float v = t;
  switch (which) {
    case 0:  // Half a warp in a primitive of all lanes.
      if (t < 16) v = shuffle_xor(v, 1);
      break;
    case 1:  // Lanes of a warp in different primitives.
      if (t & 1) {
        v = shuffle_xor(v, 1);
      } else {
        v = shuffle_xor(v, 2);
      }
      break;
    case 2:  // A barrier that half the block does not reach.
      if (t < 32) block_sync();
      break;
    case 3:  // Neighbours exchange through memory without a barrier.
      s[t] = v;
      v = s[t ^ 1];
      break;
    case 4:  // A shuffle does not order memory.
      s[t] = v;
      shuffle_xor(v, 1);
      v = s[t ^ 1];
      break;
    case 5:  // Right.
      s[t] = v;
      warp_sync(FULL_WARP);
      v = s[t ^ 1];
      break;
    case 6:  // Past the end of the buffer.
      x[64 + 4 * t] = v;
      break;
    case 7:  // Every thread writes the same element.
      x[0] = v;
      break;
    case 8:  // Misaligned.
      v = load_const16(x + 1).v[0];
      break;
    case 9:  // Right: a producer arrives, a consumer waits.
      if (t < 32) {
        s[t] = v;
        barrier_arrive(1, 64);
      } else {
        barrier_sync(1, 64);
        v = s[t - 32];
      }
      break;
  }
  x[t] = v;
}
EXPORT(probe_fault)

// Blocks of one thread that write the same element: 0 all write x[0], 1 each its own.
KERNEL(1, probe_blocks)
(float* x, int which) { x[which ? blockIdx.x : 0] = blockIdx.x; }
EXPORT(probe_blocks)
