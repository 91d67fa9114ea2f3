// Runs a grid: sets up clusters, switches between their threads, reports deadlocks.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <thread>

#include "fiber.h"
#include "runtime.h"

namespace emu {

TLS Thread* current;
TLS Cluster* running;
TLS const char* planted_fault;

bool is_planted(const char* name) { return strcmp(planted_fault, name) == 0; }

u64 random_number(Cluster& cluster) {
  u64& s = cluster.random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s * 0x2545f4914f6cdd1dull >> 32;
}

// Whether asynchronous work that is issued now lands at once.
bool land_now() {
  Cluster& c = *running;
  return c.options.landing == EARLY || (c.options.landing == ANY && random_number(c) % 2 == 0);
}

std::string at(Site site) {
  if (!site.file) return "?";
  const char* slash = strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

static std::string block_name(const Dim& d) {
  char text[64];
  snprintf(text, sizeof text, "block (%u,%u,%u)", d.x, d.y, d.z);
  return text;
}

// ---- Ready threads, by place in the schedule

void wake(Fiber* fiber) {
  fiber->state = READY;
  running->ready_bits[fiber->position >> 6] |= 1ull << (fiber->position & 63);
}

static Fiber* take_first(Cluster& c, u32 from) {
  u64 mask = ~0ull << (from & 63);
  for (size_t i = from >> 6; i < c.ready_bits.size(); i++, mask = ~0ull) {
    u64 bits = c.ready_bits[i] & mask;
    if (!bits) continue;
    int bit = __builtin_ctzll(bits);
    c.ready_bits[i] &= ~(1ull << bit);
    c.stats.switches++;
    return c.ranking[i * 64 + bit];
  }
  return nullptr;
}

static void land_one(Cluster& c, size_t index) {
  Transfer transfer = std::move(c.transfers[index]);
  c.transfers.erase(c.transfers.begin() + index);
  land_transfer(transfer);
}

// The next thread to run. Transfers land when nothing else can run, or now and then.
static Fiber* pick() {
  Cluster& c = *running;
  bool loose = c.options.order == RANDOM;
  if (c.options.landing == ANY && !c.transfers.empty() && random_number(c) % 4 == 0) {
    land_one(c, random_number(c) % c.transfers.size());
  }
  if (loose && random_number(c) % 16 == 0) c.start = random_number(c) % c.fibers.size();
  for (;;) {
    if (!c.error.empty()) return nullptr;
    Fiber* next = take_first(c, c.start);
    if (!next && c.start) next = take_first(c, 0);
    if (next || c.transfers.empty()) return next;
    land_one(c, loose ? random_number(c) % c.transfers.size() : 0);
  }
}

// Hands the host thread to the next thread, or to the main stack when there is none.
static void leave() {
  Fiber* fiber = self();
  Fiber* next = pick();
  if (next == fiber) return;
  current = next;
  emu_fiber_switch(&fiber->stack_pointer, next ? next->stack_pointer : running->main_stack_pointer);
}

void wait_here(const char* what, Site site) {
  Fiber* fiber = self();
  fiber->state = BLOCKED;
  fiber->waits_for = what;
  fiber->site = site;
  leave();
}

// Whether a thread that comes before `position` in the schedule is ready.
static bool earlier_is_ready(Cluster& c, u32 position) {
  for (u32 i = 0; i < position >> 6; i++) {
    if (c.ready_bits[i]) return true;
  }
  return c.ready_bits[position >> 6] & ((1ull << (position & 63)) - 1);
}

void reconsider() {
  Cluster& c = *running;
  Fiber* fiber = self();
  if (c.options.order == RANDOM) {
    if (random_number(c) % 4) return;
    c.start = random_number(c) % c.fibers.size();
  } else if (!earlier_is_ready(c, fiber->position)) {
    return;
  }
  wake(fiber);
  leave();
}

void note_error(const std::string& message) {
  if (running->error.empty()) running->error = message;
}

void fail(const std::string& message) {
  Fiber* fiber = self();
  char place[96];
  snprintf(place, sizeof place, " [thread (%u,%u,%u) of block (%u,%u,%u)]", fiber->thread.x,
           fiber->thread.y, fiber->thread.z, fiber->block.x, fiber->block.y, fiber->block.z);
  note_error(message + place);
  fiber->state = DONE;
  leave();
  __builtin_trap();
}

// ---- One cluster

static void fiber_entry() {
  Fiber* fiber = self();
  const Kernel& kernel = *running->kernel;
  kernel.thunk(kernel.function, running->args);
  if (!fiber->stores.empty() || !fiber->open_stores.stores.empty()) {
    fail("a thread ended while its stores still read shared memory (bulk_wait_read is missing)");
  }
  fiber->state = DONE;
  leave();
  __builtin_trap();
}

static void make_room(Cluster& c, u32 threads) {
  if (!c.smem) {
    c.smem = (u8*)mmap(nullptr, MAX_CLUSTER * SMEM_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (c.num_stacks >= threads) return;
  if (c.stacks) munmap(c.stacks, (u64)c.num_stacks * STACK_BYTES);
  c.num_stacks = threads;
  c.stacks = (u8*)mmap(nullptr, (u64)threads * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (u32 i = 0; i < threads; i++) {
    mprotect(c.stacks + (u64)i * STACK_BYTES, 4096, PROT_NONE);  // A stack overflow faults.
  }
}

static void set_up_block(Cluster& c, const Launch& launch, u32 rank, Dim index) {
  Block& block = c.blocks[rank];
  u32 threads = c.threads_per_block;
  block.cluster = &c;
  block.rank = rank;
  block.index = index;
  block.smem = c.smem + (u64)rank * SMEM_BYTES;
  block.smem_bytes = launch.smem_bytes;
  memset(block.smem, 0xff, launch.smem_bytes);  // NaN in f32 and in bf16.
  block.warps.assign((threads + 31) / 32, {});
  for (u32 i = 0; i < threads; i++) {
    Fiber& f = c.fibers[rank * threads + i];
    Dim b = launch.block;
    f.thread = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    f.block = index;
    f.block_dim = launch.block;
    f.grid_dim = launch.grid;
    f.cluster = &c;
    f.home = &block;
    f.id = rank * threads + i;
    f.local = i;
    f.state = READY;
    block.fibers.push_back(&f);
  }
}

static void set_up_schedule(Cluster& c) {
  u32 n = c.fibers.size();
  c.ranking.resize(n);
  c.ready_bits.assign((n + 63) / 64, 0);
  c.start = 0;
  for (u32 i = 0; i < n; i++) c.ranking[i] = &c.fibers[i];
  if (c.options.order == DESCENDING) std::reverse(c.ranking.begin(), c.ranking.end());
  if (c.options.order == RANDOM) {
    for (u32 i = n - 1; i > 0; i--) std::swap(c.ranking[i], c.ranking[random_number(c) % (i + 1)]);
  }
  for (u32 i = 0; i < n; i++) c.ranking[i]->position = i;
  for (u32 i = 0; i < n; i++) wake(&c.fibers[i]);
}

// What unfinished threads wait for, counted.
static std::string deadlock_report(Cluster& c) {
  std::map<std::string, int> waits;
  int done = 0;
  for (Fiber& f : c.fibers) {
    if (f.state == DONE) {
      done++;
    } else {
      waits[std::string(f.waits_for) + " at " + at(f.site)]++;
    }
  }
  if (waits.empty()) return "";
  std::string text = "deadlock in " + block_name(c.blocks[0].index) + ":";
  for (auto& wait : waits)
    text += " " + std::to_string(wait.second) + " threads in " + wait.first + ";";
  return text + " " + std::to_string(done) + " threads finished";
}

// Runs the cluster whose first block has this index; the report of what went wrong.
static std::string run_cluster(Cluster& c, const Launch& launch, Dim first, u64 number) {
  Dim shape = launch.cluster;
  u32 num_blocks = shape.x * shape.y * shape.z;
  c.threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  u32 threads = num_blocks * c.threads_per_block;
  make_room(c, threads);
  c.fibers.assign(threads, Fiber{});
  c.blocks.assign(num_blocks, Block{});
  c.barrier = Barrier{};
  c.transfers.clear();
  c.error.clear();
  c.random_state =
      (c.options.seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xbf58476d1ce4e5b9ull;
  c.unit_base = number * threads;
  for (u32 rank = 0; rank < num_blocks; rank++) {
    Dim offset = {rank % shape.x, rank / shape.x % shape.y, rank / (shape.x * shape.y)};
    set_up_block(c, launch, rank, {first.x + offset.x, first.y + offset.y, first.z + offset.z});
  }
  for (Fiber& f : c.fibers) {
    f.stack_pointer = fiber_new(c.stacks + (u64)f.id * STACK_BYTES, STACK_BYTES, fiber_entry);
    if (c.options.race) {
      f.clock.assign(2 * threads, 0);
      f.clock[f.id] = 1;
    }
  }
  if (c.options.race) c.shadow.assign((u64)num_blocks * SMEM_BYTES, ByteShadow{});
  set_up_schedule(c);
  c.main_stack_pointer = fiber_main();
  if (sigsetjmp(c.escape, 1) == 0) {
    if (Fiber* next = pick()) {
      current = next;
      emu_fiber_switch(&c.main_stack_pointer, next->stack_pointer);
    }
  }
  if (!c.error.empty()) return c.error;
  return deadlock_report(c);
}

// ---- The grid

static std::vector<u32> cluster_order(const Options& options, u32 count) {
  std::vector<u32> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == DESCENDING) std::reverse(order.begin(), order.end());
  if (options.order == RANDOM) {
    u64 state = (options.seed + 1) * 0x9e3779b97f4a7c15ull;
    for (u32 i = count - 1; i > 0 && count; i--) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
  }
  return order;
}

static void add(Stats& sum, const Stats& x) {
  sum.switches += x.switches;
  sum.matrix_loads += x.matrix_loads;
  sum.bank_replays += x.bank_replays;
  sum.mmas += x.mmas;
  sum.wgmmas += x.wgmmas;
  sum.async_bytes += x.async_bytes;
}

std::string run_grid(const Launch& launch, Stats* stats) {
  // Behind pointers, because the library has little room for thread-local variables (emu.h: TLS).
  static thread_local std::unique_ptr<Cluster> mine(new Cluster);
  Dim clusters = {launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                  launch.grid.z / launch.cluster.z};
  std::vector<u32> order = cluster_order(launch.options, clusters.x * clusters.y * clusters.z);
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;
  Stats sum{};
  const char* fault = planted_fault;
  if (launch.options.race) begin_race_epoch();
  auto work = [&](Cluster& c) {
    c.options = launch.options;
    c.kernel = launch.kernel;
    c.args = launch.args;
    c.stats = {};
    running = &c;
    planted_fault = fault;
    for (size_t i; (i = next++) < order.size();) {
      u32 n = order[i];
      Dim first = {n % clusters.x * launch.cluster.x,
                   n / clusters.x % clusters.y * launch.cluster.y,
                   n / (clusters.x * clusters.y) * launch.cluster.z};
      std::string report = run_cluster(c, launch, first, n);
      if (report.empty()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (error.empty()) error = report;
      next = order.size();
    }
    running = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    add(sum, c.stats);
  };
  u32 workers = launch.options.race ? 1 : std::min<size_t>(launch.options.workers, order.size());
  std::vector<std::thread> threads;
  for (u32 i = 1; i < workers; i++) {
    threads.emplace_back([&] {
      Cluster cluster;
      work(cluster);
      if (cluster.stacks) munmap(cluster.stacks, (u64)cluster.num_stacks * STACK_BYTES);
      if (cluster.smem) munmap(cluster.smem, MAX_CLUSTER * SMEM_BYTES);
    });
  }
  work(*mine);
  for (std::thread& thread : threads) thread.join();
  if (stats) add(*stats, sum);
  return error;
}

}  // namespace emu
