// Device memory: an arena of address space that is never used twice. An allocation ends at a page
// that faults, a freed one faults altogether; new memory is NaN. A fault becomes the launch's
// error.
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "runtime.h"

namespace emu {

const u64 ARENA_BYTES = 1ull << 40;
const u64 PAGE = 4096;
// What cuMemAlloc aligns to is 256; 16 is what kernels may rely on, so that parts of a buffer work
// too.
const u64 ALIGN = 16;

struct Arena {
  std::mutex mutex;
  u8* base = nullptr;
  u64 used = 0, live_bytes = 0;
  std::map<u64, Allocation> by_base;
};

static Arena& arena() {
  static Arena* a = [] {
    auto* fresh = new Arena;
    void* p =
        mmap(nullptr, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fresh->base = p == MAP_FAILED ? nullptr : (u8*)p;
    return fresh;
  }();
  return *a;
}

static u8* arena_base;  // For the hooks: set once, before the first launch.

bool in_arena(const void* p) {
  return arena_base && (u64)((const u8*)p - arena_base) < ARENA_BYTES;
}

u64 device_alloc(u64 bytes) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  arena_base = a.base;
  u64 rounded = (bytes + ALIGN - 1) / ALIGN * ALIGN;
  u64 pages = (rounded + PAGE - 1) / PAGE * PAGE;
  if (!a.base || a.used + pages + 2 * PAGE > ARENA_BYTES) return 0;
  u8* start = a.base + a.used + PAGE;
  if (mprotect(start, pages, PROT_READ | PROT_WRITE)) return 0;
  a.used += pages + PAGE;
  memset(start, 0xff, pages);
  u64 base = (u64)start + pages - rounded;
  a.by_base[base] = {base, bytes};
  return base;
}

bool device_free(u64 base) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  auto found = a.by_base.find(base);
  if (found == a.by_base.end()) return false;
  u64 first = base & ~(PAGE - 1), rounded = (found->second.bytes + ALIGN - 1) / ALIGN * ALIGN;
  u64 end = (base + rounded + PAGE - 1) & ~(PAGE - 1);
  madvise((void*)first, end - first, MADV_DONTNEED);
  mprotect((void*)first, end - first, PROT_NONE);
  a.by_base.erase(found);
  return true;
}

const Allocation* find_allocation(u64 address) {
  static thread_local Allocation last;
  if (address >= last.base && address < last.base + last.bytes) return &last;
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  auto after = a.by_base.upper_bound(address);
  if (after == a.by_base.begin()) return nullptr;
  const Allocation& candidate = std::prev(after)->second;
  if (address >= candidate.base + candidate.bytes) return nullptr;
  last = candidate;
  return &last;
}

// What lies at an address, in words.
std::string describe_address(u64 address, u64 bytes) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  auto after = a.by_base.upper_bound(address);
  char text[160];
  if (after == a.by_base.begin()) {
    snprintf(text, sizeof text, "%lu bytes at %#lx, before all allocations", (unsigned long)bytes,
             (long)address);
    return text;
  }
  const Allocation& near = std::prev(after)->second;
  snprintf(text, sizeof text, "%lu bytes at byte %lu of an allocation of %lu", (unsigned long)bytes,
           (unsigned long)(address - near.base), (unsigned long)near.bytes);
  return text;
}

// ---- Faults

static struct sigaction previous[2];

static void on_fault(int signal, siginfo_t* info, void* context) {
  Cluster* c = running;
  if (c && in_arena(info->si_addr)) {
    Fiber* f = self();
    char place[128];
    snprintf(place, sizeof place, " by thread (%u,%u,%u) of block (%u,%u,%u)", f->thread.x,
             f->thread.y, f->thread.z, f->block.x, f->block.y, f->block.z);
    if (c->error.empty()) {
      c->error = "illegal memory access: " + describe_address((u64)info->si_addr, 1) + place;
    }
    siglongjmp(c->escape, 1);
  }
  struct sigaction& old = previous[signal == SIGBUS];
  if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
  sigaction(signal, &old, nullptr);  // The instruction faults again, now as without us.
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous[0]);
    sigaction(SIGBUS, &action, &previous[1]);
  });
}

}  // namespace emu
