// Device primitives: the only place with instructions that exist on a GPU alone.
//
// Every primitive has two bodies side by side: PTX for the device (nvcc or NVRTC; no CUDA header is
// needed) and a call into the emulator (emu/emu.h) for the host. Kernels use these, the CUDA
// built-ins threadIdx, blockIdx, blockDim and gridDim, and plain C++17; nothing else. So the same
// kernel sources run on a GPU and, with every thread order that the emulator can think of, on a
// CPU.
//
// Arithmetic: compiled without contraction (-fmad=false, -ffp-contract=off), so that a*b+c rounds
// twice on both; a fused multiply-add is written fma_f32. Division and square root are IEEE on
// both.
//
// Files: this one holds what sm_80 has, hopper.h what sm_90a adds, numerics.h the elementary
// functions.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};

// Bytes of a CUtensorMap.
struct alignas(64) TensorMap {
  u64 words[16];
};

// 16 bytes, the widest load and store of a thread.
struct alignas(16) U32x4 {
  u32 v[4];
};

struct alignas(16) F32x4 {
  float v[4];
};

struct alignas(16) Bf16x8 {
  bf16 v[8];
};

struct alignas(8) U32x2 {
  u32 v[2];
};

// The macros SITE, SITE_ONLY, PASS and PASS_ONLY hand the caller's file and line to the emulator's
// reports.
#ifdef __CUDACC__

// Entry point `name` for blocks of at most `threads` threads.
#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
// As KERNEL, for a kernel that needs a whole multiprocessor's registers.
#define KERNEL_ALONE(threads, name) extern "C" __global__ void __launch_bounds__(threads, 1) name
// After an entry point: makes it known to the emulated driver.
#define EXPORT(name)
#define DEV static __device__ __forceinline__
// Parameter that TMA reads in place: `GRID_CONST TensorMap map`.
#define GRID_CONST const __grid_constant__
// Array of `n` elements in shared memory.
#define SHARED(type, name, n) __shared__ type name[n]
// The block's dynamic shared memory.
extern __shared__ __align__(1024) u8 dynamic_smem[];
#define SHARED_DYNAMIC(name) u8* const name = dynamic_smem
// Whether the named fault is planted (tests only): kernels/README.md has the table.
#define PLANTED(name) false
#define PRIM(ptx, emulated) ptx
#define SITE
#define SITE_ONLY
#define PASS
#define PASS_ONLY
#define UNROLL _Pragma("unroll")

#else

#include "emu/emu.h"
#define PRIM(ptx, emulated) emulated
#define SITE , Site site = emu::here()
#define SITE_ONLY Site site = emu::here()
#define PASS , site
#define PASS_ONLY site
#define UNROLL

#endif

// ------------------------------------------------------------------------------------------------
// Bits and numbers

DEV u32 bits_of(float x) { PRIM(return __float_as_uint(x), return emu::bits_of(x)); }
DEV float float_of(u32 bits) { PRIM(return __uint_as_float(bits), return emu::float_of(bits)); }

DEV float to_f32(bf16 x) { return float_of((u32)x.bits << 16); }

// Nearest bf16, ties to even; NaN becomes 0x7fff.
DEV bf16 to_bf16(float x) {
  bf16 r;
  PRIM(asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x)), r.bits = emu::round_bf16(x));
  return r;
}

// Two bf16 in a word, `low` in the lower half.
DEV u32 pack_bf16(float low, float high) {
  u32 r;
  PRIM(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)),
       r = (u32)emu::round_bf16(low) | (u32)emu::round_bf16(high) << 16);
  return r;
}

DEV float low_bf16(u32 pair) { return float_of(pair << 16); }
DEV float high_bf16(u32 pair) { return float_of(pair & 0xffff0000u); }

// x * y + z with one rounding.
DEV float fma_f32(float x, float y, float z) {
  PRIM(return __fmaf_rn(x, y, z), return __builtin_fmaf(x, y, z));
}
DEV float div_f32(float x, float y) { PRIM(return __fdiv_rn(x, y), return x / y); }
DEV float sqrt_f32(float x) { PRIM(return __fsqrt_rn(x), return __builtin_sqrtf(x)); }
DEV double sqrt_f64(double x) { PRIM(return __dsqrt_rn(x), return __builtin_sqrt(x)); }
DEV double fma_f64(double x, double y, double z) {
  PRIM(return __fma_rn(x, y, z), return __builtin_fma(x, y, z));
}
// The greater; of two zeros or with NaN the first that compares not less.
DEV float max_f32(float x, float y) { return x > y ? x : y; }
// Upper half of the 64-bit product.
DEV u32 mul_high(u32 x, u32 y) { return (u32)((u64)x * y >> 32); }
DEV int ceil_div(int x, int y) { return (x + y - 1) / y; }

// ------------------------------------------------------------------------------------------------
// Memory

// Address of shared memory as instructions take it.
DEV u32 smem_addr(const void* p) {
  PRIM(return (u32)__cvta_generic_to_shared(p), return emu::smem_addr(p));
}

// 16 bytes of global memory that no thread of the grid writes (16-byte aligned).
DEV U32x4 load_const16(const void* p) {
  U32x4 r;
  PRIM(asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]),
           "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(p)),
       r = *(const U32x4*)emu::aligned(p, 16));
  return r;
}

// As load_const16, for data that many blocks read.
DEV U32x4 load_cached16(const void* p) {
  U32x4 r;
  PRIM(asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]),
           "=r"(r.v[3]) : "l"(p)),
       r = *(const U32x4*)emu::aligned(p, 16));
  return r;
}

// 16 bytes of global memory.
DEV U32x4 load16(const void* p) {
  U32x4 r;
  PRIM(asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]),
                    "=r"(r.v[2]), "=r"(r.v[3]) : "l"(p) : "memory"),
       r = *(const U32x4*)emu::aligned(p, 16));
  return r;
}

DEV void store16(void* p, U32x4 x) {
  PRIM(asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.v[0]), "r"(x.v[1]),
                    "r"(x.v[2]), "r"(x.v[3]) : "memory"),
       *(U32x4*)emu::aligned(p, 16) = x);
}

// The same for shared memory.
DEV U32x4 load_shared16(u32 addr) {
  U32x4 r;
  PRIM(asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]),
                    "=r"(r.v[2]), "=r"(r.v[3]) : "r"(addr) : "memory"),
       r = *(const U32x4*)emu::smem_ptr(addr, 16));
  return r;
}

DEV void store_shared16(u32 addr, U32x4 x) {
  PRIM(asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(x.v[0]),
                    "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]) : "memory"),
       *(U32x4*)emu::smem_ptr(addr, 16) = x);
}

DEV void store_shared8(u32 addr, U32x2 x) {
  PRIM(asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(addr), "r"(x.v[0]),
                    "r"(x.v[1]) : "memory"),
       *(U32x2*)emu::smem_ptr(addr, 8) = x);
}

DEV void store_shared4(u32 addr, u32 x) {
  PRIM(asm volatile("st.shared.u32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"),
       *(u32*)emu::smem_ptr(addr, 4) = x);
}

// ------------------------------------------------------------------------------------------------
// Barriers and exchange within a warp. Lanes of a warp must reach a primitive together.

// __syncthreads.
DEV void block_sync(SITE_ONLY) { PRIM(__syncthreads(), emu::block_sync(site)); }

// Named barrier 1..15 of `threads` threads (a multiple of 32).
DEV void barrier_sync(int id, int threads SITE) {
  PRIM(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
       emu::barrier_sync(id, threads, site));
}

// Arrives at a named barrier without waiting.
DEV void barrier_arrive(int id, int threads SITE) {
  PRIM(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
       emu::barrier_arrive(id, threads, site));
}

// Waits for the lanes of `mask` and makes their earlier writes visible.
DEV void warp_sync(u32 mask SITE) { PRIM(__syncwarp(mask), emu::warp_sync(mask, site)); }

#define FULL_WARP 0xffffffffu

// Exchange of registers among all 32 lanes. None of these orders memory.
DEV float shuffle_xor(float x, int lanes SITE) {
  PRIM(return __shfl_xor_sync(FULL_WARP, x, lanes),
              return emu::float_of(emu::shuffle(emu::XOR, emu::bits_of(x), lanes, site)));
}
DEV u32 shuffle_xor(u32 x, int lanes SITE) {
  PRIM(return __shfl_xor_sync(FULL_WARP, x, lanes), return emu::shuffle(emu::XOR, x, lanes, site));
}
// Value of lane `lane`.
DEV float shuffle(float x, int lane SITE) {
  PRIM(return __shfl_sync(FULL_WARP, x, lane),
              return emu::float_of(emu::shuffle(emu::LANE, emu::bits_of(x), lane, site)));
}
DEV u32 shuffle(u32 x, int lane SITE) {
  PRIM(return __shfl_sync(FULL_WARP, x, lane), return emu::shuffle(emu::LANE, x, lane, site));
}
// Value of the lane `lanes` higher; own value at the end.
DEV u32 shuffle_down(u32 x, int lanes SITE) {
  PRIM(return __shfl_down_sync(FULL_WARP, x, lanes),
              return emu::shuffle(emu::DOWN, x, lanes, site));
}
// Bit i says whether lane i's condition holds.
DEV u32 warp_ballot(bool condition SITE) {
  PRIM(return __ballot_sync(FULL_WARP, condition), return emu::ballot(condition, site));
}

// ------------------------------------------------------------------------------------------------
// Asynchronous copies from global to shared memory (per thread)

// Copies 16 bytes, or writes 16 zeros when not `valid` (then `src` is not read, but must be a
// pointer).
DEV void cp_async16(u32 dst, const void* src, bool valid SITE) {
  PRIM(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                    "r"(valid ? 16 : 0) : "memory"),
       emu::cp_async(dst, src, valid, site));
}
// Ends a group of copies.
DEV void cp_async_commit() {
  PRIM(asm volatile("cp.async.commit_group;" :: : "memory"), emu::cp_async_commit());
}
// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
DEV void cp_async_wait() {
  PRIM(asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"),
       emu::cp_async_wait(pending));
}

// ------------------------------------------------------------------------------------------------
// Tensor cores

// Four 8x8 matrices of 16-bit elements; lane 8 m + r gives the address of row r of matrix m
// (16-byte aligned). Lane l receives of each matrix the elements 2 (l % 4) and the next of row l
// / 4.
DEV void ldmatrix_x4(u32 (&r)[4], u32 addr SITE) {
  PRIM(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                    "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"),
       emu::ldmatrix(r, 4, false, addr, site));
}
// The same with each matrix transposed.
DEV void ldmatrix_x4_trans(u32 (&r)[4], u32 addr SITE) {
  PRIM(asm volatile(
           "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
           "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"),
       emu::ldmatrix(r, 4, true, addr, site));
}
// Two matrices; lanes 0..15 give addresses.
DEV void ldmatrix_x2(u32 (&r)[2], u32 addr SITE) {
  PRIM(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                    "=r"(r[1]) : "r"(addr) : "memory"),
       emu::ldmatrix(r, 2, false, addr, site));
}
DEV void ldmatrix_x2_trans(u32 (&r)[2], u32 addr SITE) {
  PRIM(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                    "=r"(r[1]) : "r"(addr) : "memory"),
       emu::ldmatrix(r, 2, true, addr, site));
}

// d += a b for a 16x8 tile of f32, a 16x16 and b 16x8 of bf16. With g = lane / 4 and q = 2 (lane %
// 4): d[0..1] is row g, columns q and q + 1, d[2..3] row g + 8; a[0] row g, columns q and q + 1,
// a[1] row g + 8, a[2] and a[3] the same 8 columns on; b0 rows q and q + 1 of column g, b1 the same
// 8 rows on.
DEV void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1 SITE) {
  PRIM(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                    "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                    "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                    "r"(b0), "r"(b1)),
       emu::mma(d, a, b0, b1, site));
}

#include "hopper.h"
#include "numerics.h"
