// What a kernel sees when it is compiled for the host: the bodies that prims.h and hopper.h call.
//
// One fiber per thread, blocks (or clusters) one after another; runtime.h has the machinery. Shared
// memory addresses are 32 bits as on the device: rank of the block in its cluster << 24 | offset.
#pragma once

#include <string.h>

#include <utility>

#define DEV static inline
#define GRID_CONST const
#define KERNEL(threads, name)                         \
  static constexpr emu::u32 name##_threads = threads; \
  static void name
#define KERNEL_ALONE(threads, name) KERNEL(threads, name)
#define EXPORT(name) static emu::Registration name##_entry(#name, name, name##_threads);
#define SHARED(type, name, n) \
  type* name = (type*)emu::static_smem(__COUNTER__, sizeof(type) * (n), alignof(type))
#define SHARED_DYNAMIC(name) u8* name = emu::dynamic_smem()
#define PLANTED(name) (emu::planted_fault && emu::is_planted(#name))

#define threadIdx (emu::current->thread)
#define blockIdx (emu::current->block)
#define blockDim (emu::current->block_dim)
#define gridDim (emu::current->grid_dim)

// Place of a call in a kernel's source, for reports. Outside the namespace, lest its functions be
// found through it.
struct Site {
  const char* file;
  int line;
};

namespace emu {

// The types of prims.h, which includes this file after it has defined them.
using ::u16;
using ::u32;
using ::u64;
using ::u8;

struct Dim {
  u32 x, y, z;
};

// Place of a thread in its grid.
struct Thread {
  Dim thread, block, block_dim, grid_dim;
};

constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// Pointers only: a library that is opened late has little room for this fast kind of variable.
#define TLS thread_local __attribute__((tls_model("initial-exec")))
extern TLS Thread* current;
extern TLS const char* planted_fault;
bool is_planted(const char* name);

// ---- Entry points

// Calls a kernel with arguments given by address, as cuLaunchKernel takes them.
typedef void (*Thunk)(void (*kernel)(), void** args);

struct Kernel {
  const char* name;
  void (*function)();
  Thunk thunk;
  const u32* param_bytes;  // Size of each parameter, then 0.
  u32 max_threads;
};

void register_kernel(const Kernel& kernel);

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
  kernel(*(P*)args[I]...);
}

struct Registration {
  template <class... P>
  Registration(const char* name, void (*kernel)(P...), u32 max_threads) {
    static const u32 bytes[] = {sizeof(P)..., 0};
    Thunk thunk = [](void (*function)(), void** args) {
      call((void (*)(P...))function, args, std::index_sequence_for<P...>{});
    };
    register_kernel({name, (void (*)())kernel, thunk, bytes, max_threads});
  }
};

// ---- Numbers

inline u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline u16 round_bf16(float x) {
  u32 bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- Memory

u8* dynamic_smem();
u8* static_smem(int id, size_t bytes, size_t align);
u32 smem_addr(const void* p);
u32 peer_addr(u32 addr, u32 rank);
// Host address of shared memory; fails when misaligned or outside the block's.
u8* smem_ptr(u32 addr, u32 bytes);
[[noreturn]] void misaligned(const void* p, u32 bytes);
inline const void* aligned(const void* p, u32 bytes) {
  if ((u64)p & (bytes - 1)) misaligned(p, bytes);
  return p;
}
inline void* aligned(void* p, u32 bytes) { return (void*)aligned((const void*)p, bytes); }

// ---- Barriers and warps

enum Shuffle { XOR, LANE, DOWN };

void block_sync(Site site);
void barrier_sync(int id, int threads, Site site);
void barrier_arrive(int id, int threads, Site site);
void cluster_sync(Site site);
u32 cluster_rank();
void warp_sync(u32 mask, Site site);
u32 shuffle(Shuffle kind, u32 x, int arg, Site site);
u32 ballot(bool condition, Site site);
void ldmatrix(u32* out, int matrices, bool transposed, u32 addr, Site site);
void mma(float* d, const u32* a, u32 b0, u32 b1, Site site);

// ---- Asynchronous work

void cp_async(u32 dst, const void* src, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);

void mbar_init(u32 bar, int count);
void mbar_fence_init();
void mbar_arrive(u32 bar, u32 expect_bytes, Site site);
void mbar_wait(u32 bar, u32 parity, Site site);

void fence_proxy_async();
// `blocks` 0: the calling block alone.
void tma_load(u32 dst, const TensorMap* map, int x, int y, u32 bar, u32 blocks, Site site);
void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, Site site);
void tma_store(const TensorMap* map, int x, int y, u32 src, Site site);
void bulk_commit();
void bulk_wait(int pending);

// Operand of a warpgroup product: registers of this thread, or a descriptor of shared memory.
struct Operand {
  const u32* registers;
  u64 desc;
  int mn_major;
};
void wgmma_fence();
void wgmma(float* d, int n, Operand a, Operand b, bool accumulate, Site site);
void wgmma_commit();
void wgmma_wait(int pending, Site site);

}  // namespace emu
