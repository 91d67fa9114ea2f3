// Inside of the emulator: fibers, blocks and clusters, vector clocks, and what its files share.
//
// The model is an adversary: a thread runs as far ahead as its barriers let it, in an order that an
// option picks; asynchronous work lands as early or as late as the waits allow; memory starts as
// NaN. A kernel that is right under all of it does not depend on luck.
#pragma once

#include <setjmp.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../prims.h"

namespace emu {

enum Order { ASCENDING, DESCENDING, RANDOM };
enum Landing { LATE, EARLY, ANY };
// Arithmetic of the tensor cores: f32 sums, or the published models of Hopper and Ampere.
enum Arithmetic { PLAIN, HOPPER, AMPERE };

// How a launch is run.
struct Options {
  u32 order = ASCENDING;
  u32 landing = LATE;
  u32 seed = 0;
  u32 race = 0;  // 1: race detector.
  u32 arithmetic = PLAIN;
  u32 workers = 1;  // Host threads that share the grid (one when the race detector is on).
};

// Counts of a launch.
struct Stats {
  u64 switches, matrix_loads, bank_replays, mmas, wgmmas, async_bytes;
};

// ---- Vector clocks. Entry t is thread t of the cluster, entry num + t its asynchronous agent.

typedef std::vector<u32> Clock;

inline void join(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++) a[i] = a[i] < b[i] ? b[i] : a[i];
}

enum State { READY, BLOCKED, DONE };

struct Block;
struct Cluster;

// An asynchronous copy of one thread.
struct Copy {
  u32 dst;
  const void* src;
  bool valid, landed;
};

struct CopyGroup {
  std::vector<Copy> copies;
  std::shared_ptr<Clock> clock;
  u32 epoch;
};

// A TMA or bulk transfer.
struct Transfer {
  bool load, tensor;
  TensorMap map;
  int x, y;
  u32 smem, bytes, bar;
  const u8* global;
  std::vector<Block*> blocks;
  std::shared_ptr<Clock> clock;
  u32 agent, epoch;
  Site site;
};

struct StoreGroup {
  std::vector<Transfer> stores;
};

struct Fiber : Thread {
  void* stack_pointer;
  Cluster* cluster;
  Block* home;
  u32 id, local;  // Index in the cluster and in the block.
  u32 position;   // Place in the order of the schedule.
  State state;
  const char* waits_for;
  Site site;

  CopyGroup open_copies;
  std::deque<CopyGroup> copies;
  StoreGroup open_stores;
  std::deque<StoreGroup> stores;
  std::vector<u32> open_products;
  std::deque<std::vector<u32>> products;
  u32 products_issued;
  bool registers_fenced;

  Clock clock;
  std::shared_ptr<Clock> snapshot;  // Copy of `clock`, null when it has changed since.
  u32 agent_epoch;
  u32 proxy_fence;  // Own clock at the last fence.proxy.async.
};

struct Barrier {
  u32 need = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  Clock clock;
  Site site = {nullptr, 0};
};

struct MBarrier {
  u32 count = 0, phase = 0;
  long pending = 0, bytes = 0;
  std::vector<Fiber*> waiting;
  Clock gathering, visible;
  u32 init_thread = 0, init_clock = 0;
  bool fenced = false;
};

enum Collective { SHUFFLE, BALLOT, SYNC, LDMATRIX, MMA };

// One lane's part of a warp collective.
struct Lane {
  Collective kind;
  u32 mask;
  Site site;
  Shuffle shuffle;
  u32 value;
  int arg;
  u32 addr;
  bool transposed;
  u32* out;
  float* d;
  const u32* a;
  u32 b[2];
};

struct WarpMeeting {
  u32 mask = 0, arrived = 0;
  Lane* lanes[32] = {};
};

// A warpgroup product.
struct Product {
  Operand a, b;
  bool accumulate, done;
  int n;
  u32 issued;
  float* d[128];
  const u32* a_registers[128];
  std::vector<Fiber*> waiting;
  std::shared_ptr<Clock> clock;
  u32 agent, epoch;
  Site site;
};

struct Block {
  Cluster* cluster;
  u32 rank;
  Dim index;
  u8* smem;
  u32 smem_bytes;  // Dynamic, then static.
  std::map<int, u32> static_offsets;
  std::vector<Fiber*> fibers;
  Barrier barriers[16];
  std::vector<std::vector<WarpMeeting>> warps;
  std::map<u32, MBarrier> mbarriers;
  std::map<u32, std::deque<Product>> products;  // By warpgroup.
};

// State of one byte of shared memory: last write and two reads, as (thread or agent, its clock).
struct ByteShadow {
  u16 writer, readers[2];
  u32 write_clock, read_clocks[2];
  bool ordinary;  // Last write came from a thread, not from an asynchronous agent.
};

// Blocks that run together: a cluster, or one block.
struct Cluster {
  Options options;
  const Kernel* kernel;
  void** args;
  u32 threads_per_block;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Barrier barrier;
  std::deque<Transfer> transfers;

  // Scheduler.
  std::vector<Fiber*> ranking;
  std::vector<u64> ready_bits;
  u32 start = 0;  // Where the search for a ready thread begins (random order).
  u64 random_state = 1;
  void* main_stack_pointer = nullptr;
  sigjmp_buf escape;
  std::string error;
  Stats stats{};

  // Memory that launches reuse.
  u8* stacks = nullptr;
  u32 num_stacks = 0;
  u8* smem = nullptr;
  std::vector<ByteShadow> shadow;
  u64 unit_base =
      0;  // Number of this cluster's thread 0 in the grid, for the shadow of global memory.
};

const u32 STACK_BYTES = 128 << 10;  // The runtime itself needs some 50 KB of it.
const u32 SMEM_BYTES = 1 << 18;  // Room of one block; the limit of the device is checked at launch.
const u32 MAX_CLUSTER = 16;

extern TLS Cluster* running;
// Return address of the access under check, 0 when not known.
extern TLS void* access_address;

inline Fiber* self() { return (Fiber*)current; }
inline Block& my_block() { return *self()->home; }

// ---- scheduler.cpp

void wake(Fiber* fiber);
void wait_here(const char* what, Site site);
// After waking others: hands over to one that comes earlier in the schedule, or by chance to any.
void reconsider();
[[noreturn]] void fail(const std::string& message);
// Reports an error from outside a fiber, or without leaving the current one.
void note_error(const std::string& message);
std::string at(Site site);
u64 random_number(Cluster& cluster);
bool land_now();

// ---- async.cpp

void land_transfer(Transfer& transfer);

// ---- arithmetic.cpp

// d[i][j] += sum over k of a[i][k] b[k][j], k = 0..15, in the arithmetic asked for; rows of `d` lie
// `stride` apart.
void products16(u32 arithmetic, int rows, int cols, const float* a, const float* b, float* d,
                int stride);
inline float bf16_value(u32 bits) { return float_of(bits << 16); }

// ---- race.cpp

// Who accesses memory.
struct Source {
  u32 who, epoch;      // Thread or agent, and its clock.
  const Clock* clock;  // What it has seen.
  bool proxy;          // Asynchronous proxy (TMA, wgmma): sees ordinary writes only after a fence.
  Site site;
};
Source thread_source(Fiber* fiber);
void check_shared(Block& block, u32 offset, u32 bytes, bool write, const Source& source);
void check_global(const void* p, u64 bytes, bool write, const Source& source);
std::shared_ptr<Clock> snapshot(Fiber* fiber);
// The fiber's clock goes on: what it does next is not covered by snapshots taken so far.
void advance(Fiber* fiber);
void synchronize(const std::vector<Fiber*>& fibers);
void begin_race_epoch();

// ---- memory.cpp

struct Allocation {
  u64 base, bytes;
};
u64 device_alloc(u64 bytes);
bool device_free(u64 base);
// Allocation that holds an address; null outside.
const Allocation* find_allocation(u64 address);
bool in_arena(const void* p);
void install_fault_handler();
std::string describe_address(u64 address, u64 bytes);

// ---- scheduler.cpp, for the driver

struct Launch {
  const Kernel* kernel;
  Dim grid, block, cluster;
  u32 smem_bytes;
  void** args;
  Options options;
};
// Runs a grid; returns the report of what went wrong, or nothing.
std::string run_grid(const Launch& launch, Stats* stats);

}  // namespace emu
