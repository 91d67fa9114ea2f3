// What sm_90a adds: mbarriers, the tensor memory accelerator (TMA), clusters, warpgroup products
// (wgmma) and register reallocation. Included by prims.h; on the device only sm_90a code may use
// it.
#pragma once

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAVE_HOPPER 1
#else
#define HAVE_HOPPER 0
#endif

#if HAVE_HOPPER

// ------------------------------------------------------------------------------------------------
// mbarriers: a phase ends when `count` arrivals and all expected bytes have come. Phases alternate
// in parity, beginning with 0; waiting for parity p returns when a phase of parity p has ended, so
// waiting for parity 1 on a fresh barrier returns at once.

DEV void mbar_init(u64* bar, int count) {
  PRIM(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)),
                    "r"(count) : "memory"),
       emu::mbar_init(emu::smem_addr(bar), count));
}
// After the inits of a thread, before its block (or cluster) synchronises: shows them to TMA and
// peers.
DEV void mbar_fence_init() {
  PRIM(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), emu::mbar_fence_init());
}
DEV void mbar_arrive(u64* bar SITE) {
  PRIM(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory"),
       emu::mbar_arrive(emu::smem_addr(bar), 0, site));
}
// Arrives, and adds to the bytes that the phase waits for.
DEV void mbar_arrive_expect(u64* bar, u32 bytes SITE) {
  PRIM(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)),
                    "r"(bytes) : "memory"),
       emu::mbar_arrive(emu::smem_addr(bar), bytes, site));
}
// Arrives at the barrier at the same place in block `rank` of the cluster.
DEV void mbar_arrive_remote(u64* bar, u32 rank SITE) {
  PRIM(asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
                        smem_addr(bar)),
                    "r"(rank) : "memory"),
       emu::mbar_arrive(emu::peer_addr(emu::smem_addr(bar), rank), 0, site));
}
// The same by a thread that has only read what TMA brought: no ordinary write of it is shown to the
// cluster, which would take a fence of the whole device (MEMBAR.ALL.GPU).
DEV void mbar_release_remote(u64* bar, u32 rank SITE) {
  PRIM(asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                    "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_addr(bar)),
                    "r"(rank) : "memory"),
       emu::mbar_arrive(emu::peer_addr(emu::smem_addr(bar), rank), 0, site));
}
DEV void mbar_wait(u64* bar, u32 parity SITE) {
  PRIM(asm volatile("{\n.reg .pred done;\nwait:\n"
                    "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
                    "@!done bra.uni wait;\n}" ::"r"(smem_addr(bar)),
                    "r"(parity) : "memory"),
       emu::mbar_wait(emu::smem_addr(bar), parity, site));
}
// As mbar_wait, when blocks of the cluster arrive at it.
DEV void mbar_wait_cluster(u64* bar, u32 parity SITE) {
  PRIM(asm volatile("{\n.reg .pred done;\nwait:\n"
                    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                    "@!done bra.uni wait;\n}" ::"r"(smem_addr(bar)),
                    "r"(parity) : "memory"),
       emu::mbar_wait(emu::smem_addr(bar), parity, site));
}

// ------------------------------------------------------------------------------------------------
// Asynchronous proxy

// Orders this thread's ordinary accesses to shared memory before later asynchronous ones (TMA,
// wgmma).
DEV void fence_proxy_async() {
  PRIM(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), emu::fence_proxy_async());
}
// Brings a TensorMap parameter into the cache.
DEV void prefetch_map(const TensorMap* map) {
  PRIM(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), (void)map);
}
// Loads the map's box at column x, row y to `dst` (1024-byte aligned) and reports its bytes to
// `bar`. Elements outside the matrix are zero.
DEV void tma_load_2d(void* dst, const TensorMap* map, int x, int y, u64* bar SITE) {
  PRIM(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[%0], [%1, {%3, %4}], [%2];" ::"r"(smem_addr(dst)),
                    "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y) : "memory"),
       emu::tma_load(emu::smem_addr(dst), map, x, y, emu::smem_addr(bar), 0, site));
}
// The same into every block of the cluster whose bit is set in `blocks`, each with its own barrier.
DEV void tma_load_2d_multicast(void* dst, const TensorMap* map, int x, int y, u64* bar,
                               u32 blocks SITE) {
  PRIM(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                    ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_addr(dst)),
                    "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y), "h"((u16)blocks) : "memory"),
       emu::tma_load(emu::smem_addr(dst), map, x, y, emu::smem_addr(bar), blocks, site));
}
// Copies `bytes` (a multiple of 16) of global memory to shared memory and reports them to `bar`.
DEV void bulk_load(void* dst, const void* src, u32 bytes, u64* bar SITE) {
  PRIM(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                    "%3, [%2];" ::"r"(smem_addr(dst)),
                    "l"(src), "r"(smem_addr(bar)), "r"(bytes) : "memory"),
       emu::bulk_load(emu::smem_addr(dst), src, bytes, emu::smem_addr(bar), site));
}
// Stores a box of shared memory; elements outside the matrix are dropped.
DEV void tma_store_2d(const TensorMap* map, int x, int y, const void* src SITE) {
  PRIM(asm volatile(
           "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
           "r"(smem_addr(src)), "r"(x), "r"(y) : "memory"),
       emu::tma_store(map, x, y, emu::smem_addr(src), site));
}
DEV void bulk_commit() {
  PRIM(asm volatile("cp.async.bulk.commit_group;" :: : "memory"), emu::bulk_commit());
}
// Waits until at most `pending` groups of this thread's stores still read shared memory.
template <int pending>
DEV void bulk_wait_read() {
  PRIM(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"),
       emu::bulk_wait(pending));
}

// ------------------------------------------------------------------------------------------------
// Clusters

DEV u32 cluster_rank() {
  u32 r;
  PRIM(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)), r = emu::cluster_rank());
  return r;
}
// Barrier over all threads of the cluster; earlier writes are visible after it.
DEV void cluster_sync(SITE_ONLY) {
  PRIM(asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire."
                    "aligned;" :: : "memory"),
       emu::cluster_sync(site));
}
// A float at the same place in the shared memory of block `rank`.
DEV float load_peer(const float* p, u32 rank) {
  float r;
  PRIM(asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\n"
                    "ld.shared::cluster.f32 %0, [remote];\n}" : "=f"(r) : "r"(smem_addr(p)),
                    "r"(rank) : "memory"),
       r = *(const float*)emu::smem_ptr(emu::peer_addr(emu::smem_addr(p), rank), 4));
  return r;
}

// ------------------------------------------------------------------------------------------------
// Launches that overlap: lets the next kernel of the stream start, or waits for the one before.

DEV void grid_release() {
  PRIM(asm volatile("griddepcontrol.launch_dependents;" :: : "memory"), (void)0);
}
DEV void grid_wait() { PRIM(asm volatile("griddepcontrol.wait;" :: : "memory"), (void)0); }

// ------------------------------------------------------------------------------------------------
// Warpgroups: four warps, the first a multiple of four.

// Gives registers back, or takes them; every warp of the warpgroup must call it.
template <int registers>
DEV void registers_release() {
  PRIM(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)), (void)0);
}
template <int registers>
DEV void registers_claim() {
  PRIM(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)), (void)0);
}

// Before the first product, and again before a product that follows ordinary use of its registers.
DEV void wgmma_fence() {
  PRIM(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), emu::wgmma_fence());
}
DEV void wgmma_commit() {
  PRIM(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), emu::wgmma_commit());
}
// Waits until at most `pending` groups of products are under way.
template <int pending>
DEV void wgmma_wait(SITE_ONLY) {
  PRIM(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"),
       emu::wgmma_wait(pending, site));
}

// After a wait, before ordinary use of products' registers: the compiler moves none ahead of it.
template <int n>
DEV void wgmma_hold(float (&d)[n]) {
  UNROLL for (int i = 0; i < n; i++)
    PRIM(asm volatile("" : "+f"(d[i]) :: "memory"), (void)d);
}

// Operand in shared memory with rows of 128 bytes, 128-byte swizzle (chunk c of 16 bytes of row r
// lies at c ^ (r % 8)), groups of 8 rows 1024 bytes apart. K-major: a row is 64 elements of K of
// one M (or N) index. The next 16 of K: add 32 to the address.
DEV u64 wgmma_desc(u32 addr) {
  return (u64)((addr & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// M- or N-major: a row is 64 M (or N) indices of one K; blocks of 64 indices lie `block_bytes`
// apart. The next 16 of K: add 2048 to the address.
DEV u64 wgmma_desc_mn(u32 addr, u32 block_bytes) {
  return (u64)((addr & 0x3ffff) >> 4) | (u64)(block_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// d (+)= a b^T: a is 64 x 16, b is n x 16 (bf16), d 64 x n (f32); without `accumulate` d starts
// from 0. Warp w of the warpgroup holds rows 16 w..; with g = lane / 4, q = 2 (lane % 4): d[4 j]
// and d[4 j + 1] are row g, columns 8 j + q and the next; d[4 j + 2], d[4 j + 3] row g + 8. `a_mn`,
// `b_mn`: 1 when the operand is M- or N-major. wgmma_rs takes a from registers, laid out as
// mma_m16n8k16's.

#define WGMMA_SS(n, regs, outs, a, b, p, ta, tb)                                           \
  asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, %" #p                                 \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" regs "}, %" #a \
               ", %" #b ", acc, 1, 1, %" #ta ", %" #tb ";\n}"                              \
               : outs                                                                      \
               : "l"(da), "l"(db), "r"((int)accumulate), "n"(a_mn), "n"(b_mn))
#define WGMMA_RS(n, regs, outs, a0, a1, a2, a3, b, p, tb)                                    \
  asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, %" #p                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" regs "}, {%" #a0 \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", acc, 1, 1, %" #tb ";\n}"           \
               : outs                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"((int)accumulate),  \
                 "n"(b_mn))

#define WGMMA_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_R8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_R16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_R24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_R40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_R48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_R56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_R64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_R72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_R80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_R88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_R96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_R104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_R112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_R120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D8(i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_RS0 WGMMA_R0
#define WGMMA_DS0 WGMMA_D8(0)
#define WGMMA_RS8 WGMMA_RS0 ", " WGMMA_R8
#define WGMMA_DS8 WGMMA_DS0, WGMMA_D8(8)
#define WGMMA_RS16 WGMMA_RS8 ", " WGMMA_R16
#define WGMMA_DS16 WGMMA_DS8, WGMMA_D8(16)
#define WGMMA_RS24 WGMMA_RS16 ", " WGMMA_R24
#define WGMMA_DS24 WGMMA_DS16, WGMMA_D8(24)
#define WGMMA_RS32 WGMMA_RS24 ", " WGMMA_R32
#define WGMMA_DS32 WGMMA_DS24, WGMMA_D8(32)
#define WGMMA_RS40 WGMMA_RS32 ", " WGMMA_R40
#define WGMMA_DS40 WGMMA_DS32, WGMMA_D8(40)
#define WGMMA_RS48 WGMMA_RS40 ", " WGMMA_R48
#define WGMMA_DS48 WGMMA_DS40, WGMMA_D8(48)
#define WGMMA_RS56 WGMMA_RS48 ", " WGMMA_R56
#define WGMMA_DS56 WGMMA_DS48, WGMMA_D8(56)
#define WGMMA_RS64 WGMMA_RS56 ", " WGMMA_R64
#define WGMMA_DS64 WGMMA_DS56, WGMMA_D8(64)
#define WGMMA_RS72 WGMMA_RS64 ", " WGMMA_R72
#define WGMMA_DS72 WGMMA_DS64, WGMMA_D8(72)
#define WGMMA_RS80 WGMMA_RS72 ", " WGMMA_R80
#define WGMMA_DS80 WGMMA_DS72, WGMMA_D8(80)
#define WGMMA_RS88 WGMMA_RS80 ", " WGMMA_R88
#define WGMMA_DS88 WGMMA_DS80, WGMMA_D8(88)
#define WGMMA_RS96 WGMMA_RS88 ", " WGMMA_R96
#define WGMMA_DS96 WGMMA_DS88, WGMMA_D8(96)
#define WGMMA_RS104 WGMMA_RS96 ", " WGMMA_R104
#define WGMMA_DS104 WGMMA_DS96, WGMMA_D8(104)
#define WGMMA_RS112 WGMMA_RS104 ", " WGMMA_R112
#define WGMMA_DS112 WGMMA_DS104, WGMMA_D8(112)
#define WGMMA_RS120 WGMMA_RS112 ", " WGMMA_R120
#define WGMMA_DS120 WGMMA_DS112, WGMMA_D8(120)

template <int n, int a_mn = 0, int b_mn = 0>
DEV void wgmma_ss(float (&d)[n / 2], u64 da, u64 db, bool accumulate SITE) {
#ifdef __CUDACC__
  if constexpr (n == 16)
    WGMMA_SS(16, WGMMA_RS0, WGMMA_DS0, 8, 9, 10, 11, 12);
  else if constexpr (n == 32)
    WGMMA_SS(32, WGMMA_RS8, WGMMA_DS8, 16, 17, 18, 19, 20);
  else if constexpr (n == 48)
    WGMMA_SS(48, WGMMA_RS16, WGMMA_DS16, 24, 25, 26, 27, 28);
  else if constexpr (n == 64)
    WGMMA_SS(64, WGMMA_RS24, WGMMA_DS24, 32, 33, 34, 35, 36);
  else if constexpr (n == 80)
    WGMMA_SS(80, WGMMA_RS32, WGMMA_DS32, 40, 41, 42, 43, 44);
  else if constexpr (n == 96)
    WGMMA_SS(96, WGMMA_RS40, WGMMA_DS40, 48, 49, 50, 51, 52);
  else if constexpr (n == 112)
    WGMMA_SS(112, WGMMA_RS48, WGMMA_DS48, 56, 57, 58, 59, 60);
  else if constexpr (n == 128)
    WGMMA_SS(128, WGMMA_RS56, WGMMA_DS56, 64, 65, 66, 67, 68);
  else if constexpr (n == 160)
    WGMMA_SS(160, WGMMA_RS72, WGMMA_DS72, 80, 81, 82, 83, 84);
  else if constexpr (n == 192)
    WGMMA_SS(192, WGMMA_RS88, WGMMA_DS88, 96, 97, 98, 99, 100);
  else if constexpr (n == 224)
    WGMMA_SS(224, WGMMA_RS104, WGMMA_DS104, 112, 113, 114, 115, 116);
  else if constexpr (n == 256)
    WGMMA_SS(256, WGMMA_RS120, WGMMA_DS120, 128, 129, 130, 131, 132);
  else
    static_assert(n < 0, "a width without a wrapper");
#else
  emu::wgmma(d, n, emu::Operand{nullptr, da, a_mn}, emu::Operand{nullptr, db, b_mn}, accumulate,
             site);
#endif
}

template <int n, int b_mn = 0>
DEV void wgmma_rs(float (&d)[n / 2], const u32 (&a)[4], u64 db, bool accumulate SITE) {
#ifdef __CUDACC__
  if constexpr (n == 16)
    WGMMA_RS(16, WGMMA_RS0, WGMMA_DS0, 8, 9, 10, 11, 12, 13, 14);
  else if constexpr (n == 32)
    WGMMA_RS(32, WGMMA_RS8, WGMMA_DS8, 16, 17, 18, 19, 20, 21, 22);
  else if constexpr (n == 48)
    WGMMA_RS(48, WGMMA_RS16, WGMMA_DS16, 24, 25, 26, 27, 28, 29, 30);
  else if constexpr (n == 64)
    WGMMA_RS(64, WGMMA_RS24, WGMMA_DS24, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (n == 80)
    WGMMA_RS(80, WGMMA_RS32, WGMMA_DS32, 40, 41, 42, 43, 44, 45, 46);
  else if constexpr (n == 96)
    WGMMA_RS(96, WGMMA_RS40, WGMMA_DS40, 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (n == 112)
    WGMMA_RS(112, WGMMA_RS48, WGMMA_DS48, 56, 57, 58, 59, 60, 61, 62);
  else if constexpr (n == 128)
    WGMMA_RS(128, WGMMA_RS56, WGMMA_DS56, 64, 65, 66, 67, 68, 69, 70);
  else if constexpr (n == 160)
    WGMMA_RS(160, WGMMA_RS72, WGMMA_DS72, 80, 81, 82, 83, 84, 85, 86);
  else if constexpr (n == 192)
    WGMMA_RS(192, WGMMA_RS88, WGMMA_DS88, 96, 97, 98, 99, 100, 101, 102);
  else if constexpr (n == 224)
    WGMMA_RS(224, WGMMA_RS104, WGMMA_DS104, 112, 113, 114, 115, 116, 117, 118);
  else if constexpr (n == 256)
    WGMMA_RS(256, WGMMA_RS120, WGMMA_DS120, 128, 129, 130, 131, 132, 133, 134);
  else
    static_assert(n < 0, "a width without a wrapper");
#else
  emu::wgmma(d, n, emu::Operand{a, 0, 0}, emu::Operand{nullptr, db, b_mn}, accumulate, site);
#endif
}

#endif  // HAVE_HOPPER
