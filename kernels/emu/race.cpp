// Race detector: vector clocks over threads and their asynchronous agents, a shadow of every byte
// of shared memory and of every two bytes of global memory that a launch touches.
//
// Kernels are compiled with gcc's -fsanitize=thread, which calls a hook at each access; libtsan is
// not linked, the hooks are here. A barrier, warp_sync, an mbarrier, a wait orders accesses; a
// shuffle does not. Blocks of a grid are never ordered, so what one block writes no other may
// touch.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace emu {

TLS void* access_address;

Source thread_source(Fiber* fiber) {
  return {fiber->id, fiber->clock[fiber->id], &fiber->clock, false, {nullptr, 0}};
}

std::shared_ptr<Clock> snapshot(Fiber* fiber) {
  if (!fiber->snapshot) fiber->snapshot = std::make_shared<Clock>(fiber->clock);
  return fiber->snapshot;
}

void advance(Fiber* fiber) {
  if (!running->options.race) return;
  fiber->clock[fiber->id]++;
  fiber->snapshot = nullptr;
}

void synchronize(const std::vector<Fiber*>& fibers) {
  Clock all;
  for (Fiber* fiber : fibers) join(all, fiber->clock);
  for (Fiber* fiber : fibers) {
    fiber->clock = all;
    advance(fiber);
  }
}

// ---- Reports

static std::string who_is(u32 who) {
  u32 threads = running->fibers.size(), id = who % threads;
  Fiber& fiber = running->fibers[id];
  std::string name = "thread " + std::to_string(fiber.local);
  if (running->blocks.size() > 1) name += " of cluster block " + std::to_string(fiber.home->rank);
  return name + (who >= threads ? " (async)" : "");
}

static std::string where(const Source& source) {
  if (source.site.file) return " at " + at(source.site);
  Dl_info info{};
  if (!access_address || !dladdr(access_address, &info) || !info.dli_fname) return "";
  char text[64];
  snprintf(text, sizeof text, "%#lx]", (u64)access_address - (u64)info.dli_fbase);
  return std::string(" [addr2line -e ") + info.dli_fname + " " + text;
}

static void report(const std::string& place, bool write, const Source& source,
                   const std::string& before) {
  Dim b = running->blocks[0].index;
  char block[64];
  snprintf(block, sizeof block, ", block (%u,%u,%u): ", b.x, b.y, b.z);
  note_error("race in " + place + block + (write ? "write" : "read") + " by " + who_is(source.who) +
             where(source) + " after " + before + ", not synchronised");
}

// ---- Shared memory

void check_shared(Block& block, u32 offset, u32 bytes, bool write, const Source& source) {
  if (!running->error.empty()) return;
  ByteShadow* shadow = &running->shadow[(u64)block.rank * SMEM_BYTES];
  const Clock& seen = *source.clock;
  for (u32 i = offset; i < offset + bytes; i++) {
    ByteShadow& s = shadow[i];
    std::string before;
    if (s.write_clock && s.writer != source.who && seen[s.writer] < s.write_clock) {
      before = "a write by " + who_is(s.writer);
    }
    for (int r = 0; write && r < 2; r++) {
      if (s.read_clocks[r] && s.readers[r] != source.who && seen[s.readers[r]] < s.read_clocks[r]) {
        before = "a read by " + who_is(s.readers[r]);
      }
    }
    if (source.proxy && s.write_clock && s.ordinary && before.empty() &&
        running->fibers[s.writer].proxy_fence < s.write_clock) {
      before = "a write without fence_proxy_async by " + who_is(s.writer);
    }
    if (!before.empty())
      return report("shared memory at byte " + std::to_string(i), write, source, before);
    if (write) {
      s.writer = source.who;
      s.write_clock = source.epoch;
      s.ordinary = source.who < running->fibers.size();
      s.read_clocks[0] = s.read_clocks[1] = 0;
    } else {
      // Two readers are kept; of more, the bytes of a word keep different ones.
      int slot = s.read_clocks[0] && s.readers[0] != source.who;
      if (slot && s.read_clocks[1] && s.readers[1] != source.who && (i & 1)) slot = 0;
      s.readers[slot] = source.who;
      s.read_clocks[slot] = source.epoch;
    }
  }
}

// ---- Global memory

// State of two bytes: who wrote and who read in this launch, as (number in the grid + 1, clock).
struct PairShadow {
  u64 writer, reader;
  u32 write_clock, read_clock;
  bool many_readers;  // In different clusters.
};

const u64 PAGE_PAIRS = 2048;
struct ShadowPage {
  u64 launch = 0;
  PairShadow pairs[PAGE_PAIRS];
};

struct GlobalShadow {
  u64 launch = 0;
  std::unordered_map<u64, std::unique_ptr<ShadowPage>> pages;
  u64 last_number = ~0ull;
  ShadowPage* last = nullptr;
};
static TLS GlobalShadow* global_shadow;

void begin_race_epoch() {
  if (!global_shadow) global_shadow = new GlobalShadow;
  global_shadow->launch++;
  if (global_shadow->pages.size() > 4096) global_shadow->pages.clear();
  global_shadow->last_number = ~0ull;
}

static PairShadow& pair_shadow(u64 address) {
  GlobalShadow& g = *global_shadow;
  u64 number = address >> 12;
  if (number != g.last_number) {
    auto& page = g.pages[number];
    if (!page) page.reset(new ShadowPage);
    g.last = page.get();
    g.last_number = number;
  }
  if (g.last->launch != g.launch) {
    memset(g.last->pairs, 0, sizeof g.last->pairs);
    g.last->launch = g.launch;
  }
  return g.last->pairs[address >> 1 & (PAGE_PAIRS - 1)];
}

// Whether the access of `unit` (number in the grid) at `clock` is ordered before `source`.
static bool ordered(u64 unit, u32 clock, const Source& source) {
  u64 base = running->unit_base * 2 + 1, size = source.clock->size();
  if (unit < base || unit >= base + size) return false;  // Another cluster.
  u32 who = unit - base;
  return who == source.who || (*source.clock)[who] >= clock;
}

static std::string grid_name(u64 unit) {
  u64 base = running->unit_base * 2 + 1;
  if (unit >= base && unit < base + 2 * running->fibers.size()) return who_is(unit - base);
  return "another block";
}

void check_global(const void* p, u64 bytes, bool write, const Source& source) {
  if (!running->error.empty()) return;
  u64 address = (u64)p;
  const Allocation* allocation = find_allocation(address);
  if (!allocation || address + bytes > allocation->base + allocation->bytes) {
    return note_error(std::string("a ") + (write ? "write" : "read") +
                      " outside device memory: " + describe_address(address, bytes) + " by " +
                      who_is(source.who) + where(source));
  }
  u64 unit = running->unit_base * 2 + 1 + source.who;
  for (u64 a = address & ~1ull; a < address + bytes; a += 2) {
    PairShadow& s = pair_shadow(a);
    std::string before;
    if (s.writer && !ordered(s.writer, s.write_clock, source))
      before = "a write by " + grid_name(s.writer);
    if (write && s.reader && (s.many_readers || !ordered(s.reader, s.read_clock, source))) {
      before = "a read by " + grid_name(s.reader);
    }
    if (!before.empty()) {
      return report("global memory, " + describe_address(a, 2), write, source, before);
    }
    if (write) {
      s.writer = unit;
      s.write_clock = source.epoch;
      s.reader = 0;
      s.many_readers = false;
    } else {
      u64 base = running->unit_base * 2 + 1, size = 2 * running->fibers.size();
      bool other_cluster = s.reader && (s.reader < base || s.reader >= base + size);
      if (other_cluster) s.many_readers = true;
      s.reader = unit;
      s.read_clock = source.epoch;
    }
  }
}

// ---- Hooks

// Called at every access of a kernel.
static inline void hook(void* p, u64 bytes, bool write, bool natural, void* from) {
  Cluster* c = running;
  if (!c || !c->options.race || !c->error.empty()) return;
  u64 offset = (u8*)p - c->smem;
  bool shared = offset < (u64)c->blocks.size() * SMEM_BYTES;
  if (!shared && !in_arena(p)) return;  // A thread's own stack, or a constant.
  access_address = from;
  if (natural && ((u64)p & (bytes - 1))) {
    note_error("misaligned access of " + std::to_string(bytes) + " bytes" + where({}));
  }
  Fiber* fiber = self();
  if (shared) {
    check_shared(c->blocks[offset / SMEM_BYTES], offset % SMEM_BYTES, bytes, write,
                 thread_source(fiber));
  } else {
    check_global(p, bytes, write, thread_source(fiber));
  }
  access_address = nullptr;
  if (!c->error.empty()) fail(c->error);
}

}  // namespace emu

#define FROM __builtin_return_address(0)
#define HOOKS(n)                                                                  \
  void __tsan_read##n(void* p) { emu::hook(p, n, false, true, FROM); }            \
  void __tsan_write##n(void* p) { emu::hook(p, n, true, true, FROM); }            \
  void __tsan_unaligned_read##n(void* p) { emu::hook(p, n, false, false, FROM); } \
  void __tsan_unaligned_write##n(void* p) { emu::hook(p, n, true, false, FROM); } \
  void __tsan_volatile_read##n(void* p) { emu::hook(p, n, false, true, FROM); }   \
  void __tsan_volatile_write##n(void* p) { emu::hook(p, n, true, true, FROM); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) { emu::hook(p, n, false, false, FROM); }
void __tsan_write_range(void* p, unsigned long n) { emu::hook(p, n, true, false, FROM); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
