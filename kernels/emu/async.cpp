// Asynchronous work: cp.async, mbarriers, TMA and bulk transfers, warpgroup products.
//
// Landing LATE: a copy lands when its thread waits for it, a transfer when no thread can run, a
// product is computed (its operands read, its accumulators written) when its thread waits. EARLY:
// at issue.
#include <string.h>

#include <algorithm>

#include "runtime.h"
#include "tensor_map.h"

namespace emu {

static u32 agent_of(const Fiber* fiber) { return running->fibers.size() + fiber->id; }

// ---- cp.async

static void land_copy(Fiber* fiber, CopyGroup& group, Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  u8* to = smem_ptr(copy.dst, 16);
  if (running->options.race) {
    Source source = {agent_of(fiber), group.epoch, group.clock.get(), false, fiber->site};
    if (copy.valid) check_global(copy.src, 16, false, source);
    check_shared(*fiber->home, copy.dst & 0xffffff, 16, true, source);
  }
  if (copy.valid) {
    memcpy(to, copy.src, 16);
  } else {
    memset(to, 0, 16);
  }
  running->stats.async_bytes += 16;
}

void cp_async(u32 dst, const void* src, bool valid, Site site) {
  Fiber* fiber = self();
  if ((u64)src & 15) misaligned(src, 16);
  smem_ptr(dst, 16);
  CopyGroup& group = fiber->open_copies;
  if (group.copies.empty() && running->options.race) {
    group.clock = snapshot(fiber);
    group.epoch = ++fiber->agent_epoch;
  }
  fiber->site = site;
  group.copies.push_back({dst, src, valid, false});
  if (land_now()) land_copy(fiber, group, group.copies.back());
}

void cp_async_commit() {
  Fiber* fiber = self();
  if (running->options.race && !fiber->open_copies.copies.empty()) advance(fiber);
  fiber->copies.push_back(std::move(fiber->open_copies));
  fiber->open_copies = CopyGroup{};
  reconsider();
}

void cp_async_wait(int pending) {
  Fiber* fiber = self();
  while ((int)fiber->copies.size() > pending) {
    CopyGroup group = std::move(fiber->copies.front());
    fiber->copies.pop_front();
    for (Copy& copy : group.copies) land_copy(fiber, group, copy);
    if (running->options.race && !group.copies.empty()) {
      fiber->clock[agent_of(fiber)] = group.epoch;
      advance(fiber);
    }
  }
}

// ---- mbarriers

static MBarrier& find_mbarrier(u32 addr, const char* what, Site site) {
  Block& block = running->blocks[addr >> 24];
  auto found = block.mbarriers.find(addr & 0xffffff);
  if (found == block.mbarriers.end()) {
    fail(std::string(what) + " at " + at(site) + " on an mbarrier that is not initialised");
  }
  MBarrier& m = found->second;
  Fiber* fiber = self();
  if (running->options.race && m.init_thread != fiber->id &&
      fiber->clock[m.init_thread] < m.init_clock) {
    fail(std::string(what) + " at " + at(site) +
         " on an mbarrier whose initialisation is not synchronised with this thread");
  }
  return m;
}

// Ends the phase when everything has come.
static void settle(MBarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.count;
  m.visible = std::move(m.gathering);
  m.gathering.clear();
  for (Fiber* fiber : m.waiting) wake(fiber);
  m.waiting.clear();
}

void mbar_init(u32 bar, int count) {
  Fiber* fiber = self();
  smem_ptr(bar, 8);
  if (count < 1) fail("an mbarrier needs at least one arrival");
  MBarrier m;
  m.count = m.pending = count;
  m.init_thread = fiber->id;
  if (running->options.race) {
    m.init_clock = fiber->clock[fiber->id];
    advance(fiber);
  }
  my_block().mbarriers[bar & 0xffffff] = m;
}

void mbar_fence_init() {
  for (auto& entry : my_block().mbarriers) {
    if (entry.second.init_thread == self()->id) entry.second.fenced = true;
  }
}

void mbar_arrive(u32 bar, u32 expect_bytes, Site site) {
  Fiber* fiber = self();
  MBarrier& m = find_mbarrier(bar, "arrival", site);
  Block& block = running->blocks[bar >> 24];
  if (&block != fiber->home) {
    if (!m.fenced) fail("a peer arrives at " + at(site) + " but mbar_fence_init is missing");
  }
  m.bytes += expect_bytes;
  if (--m.pending < 0) fail("more arrivals than the mbarrier's count at " + at(site));
  if (running->options.race) {
    join(m.gathering, fiber->clock);
    advance(fiber);
  }
  settle(m);
  reconsider();
}

void mbar_wait(u32 bar, u32 parity, Site site) {
  Fiber* fiber = self();
  MBarrier& m = find_mbarrier(bar, "wait", site);
  while (m.phase == (parity & 1)) {
    m.waiting.push_back(fiber);
    wait_here("mbar_wait", site);
  }
  if (running->options.race) {
    join(fiber->clock, m.visible);
    advance(fiber);
  }
}

void fence_proxy_async() {
  Fiber* fiber = self();
  if (!running->options.race) return;
  fiber->proxy_fence = fiber->clock[fiber->id];
  advance(fiber);
}

// ---- Transfers

static Source source_of(const Transfer& t) {
  return {t.agent, t.epoch, t.clock.get(), true, t.site};
}

// Calls `each(shared offset, global pointer or null, bytes valid)` for 16-byte chunks of a tensor
// box.
template <class F>
static void each_chunk(const Transfer& t, F each) {
  BoxMap map = decode_map(t.map);
  u32 row_bytes = map.box_inner * map.element_bytes;
  for (u32 r = 0; r < map.box_outer; r++) {
    long y = (long)t.y + r;
    bool row_inside = y >= 0 && y < (long)map.outer;
    for (u32 c = 0; c < row_bytes; c += 16) {
      u32 offset = (t.smem & 0xffffff) + r * row_bytes + c;
      if (map.swizzle == 128) offset ^= (offset >> 7 & 7) << 4;
      long first = (long)t.x + c / map.element_bytes;
      long inside = std::min<long>(16 / map.element_bytes, (long)map.inner - first);
      bool whole = row_inside && first >= 0 && inside > 0;
      const u8* p = whole ? map.base + y * map.stride + first * map.element_bytes : nullptr;
      each(offset, p, whole ? (u32)inside * map.element_bytes : 0);
    }
  }
}

static void land_in_block(Transfer& t, Block& block) {
  auto write = [&](u32 offset, const u8* from, u32 valid) {
    if (offset + 16 > block.smem_bytes)
      return note_error("a transfer writes past shared memory, " + at(t.site));
    if (running->options.race) {
      if (valid) check_global(from, valid, false, source_of(t));
      check_shared(block, offset, 16, true, source_of(t));
    }
    memset(block.smem + offset, 0, 16);
    if (valid) memcpy(block.smem + offset, from, valid);
  };
  if (t.tensor) {
    each_chunk(t, write);
  } else {
    for (u32 i = 0; i < t.bytes; i += 16) write((t.smem & 0xffffff) + i, t.global + i, 16);
  }
  auto found = block.mbarriers.find(t.bar & 0xffffff);
  if (found == block.mbarriers.end()) {
    return note_error("a transfer of " + at(t.site) +
                      " reports to an mbarrier that is not initialised");
  }
  MBarrier& m = found->second;
  if (running->options.race) {
    join(m.gathering, *t.clock);
    m.gathering[t.agent] = std::max(m.gathering[t.agent], t.epoch);
  }
  m.bytes -= t.bytes;
  settle(m);
}

static void land_store(Transfer& t) {
  Block& block = *t.blocks[0];
  each_chunk(t, [&](u32 offset, const u8* to, u32 valid) {
    if (running->options.race) {
      check_shared(block, offset, 16, false, source_of(t));
      if (valid) check_global(to, valid, true, source_of(t));
    }
    if (valid) memcpy((void*)to, block.smem + offset, valid);
  });
}

void land_transfer(Transfer& t) {
  running->stats.async_bytes += t.bytes * t.blocks.size();
  if (!t.load) return land_store(t);
  for (Block* block : t.blocks) land_in_block(t, *block);
}

static Transfer new_transfer(u32 smem, Site site) {
  Fiber* fiber = self();
  Transfer t{};
  t.smem = smem;
  t.site = site;
  t.agent = agent_of(fiber);
  if (running->options.race) {
    t.clock = snapshot(fiber);
    t.epoch = ++fiber->agent_epoch;
    advance(fiber);
  }
  return t;
}

static void issue_load(Transfer t, u32 bar, u32 blocks) {
  Fiber* fiber = self();
  t.load = true;
  t.bar = bar;
  if (!find_mbarrier(bar, "transfer", t.site).fenced) {
    fail("a transfer at " + at(t.site) + " uses an mbarrier without mbar_fence_init");
  }
  for (Block& block : running->blocks) {
    if (blocks ? blocks >> block.rank & 1 : &block == fiber->home) t.blocks.push_back(&block);
  }
  if (land_now()) {
    land_transfer(t);
    if (!running->error.empty()) fail(running->error);
  } else {
    running->transfers.push_back(std::move(t));
  }
  reconsider();
}

static void check_box(const Transfer& t) {
  BoxMap map = decode_map(t.map);
  if (map.magic != BOX_MAGIC) fail("not a tensor map, at " + at(t.site));
  u32 align = map.swizzle == 128 ? 1024 : 128;
  if ((t.smem & 0xffffff) % align) {
    fail("the tile of " + at(t.site) + " is not " + std::to_string(align) + "-byte aligned");
  }
  smem_ptr(t.smem, 16);
  smem_ptr(t.smem + t.bytes - 16, 16);
}

static u32 box_bytes(const TensorMap* map) {
  BoxMap m = decode_map(*map);
  return m.box_inner * m.box_outer * m.element_bytes;
}

void tma_load(u32 dst, const TensorMap* map, int x, int y, u32 bar, u32 blocks, Site site) {
  Transfer t = new_transfer(dst, site);
  t.tensor = true;
  t.map = *map;
  t.x = x;
  t.y = y;
  t.bytes = box_bytes(map);
  check_box(t);
  issue_load(std::move(t), bar, blocks);
}

void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, Site site) {
  Transfer t = new_transfer(dst, site);
  if (bytes % 16 || bytes == 0) fail("a bulk copy takes a multiple of 16 bytes, at " + at(site));
  if ((u64)src & 15) misaligned(src, 16);
  smem_ptr(dst, 16);
  smem_ptr(dst + bytes - 16, 16);
  t.global = (const u8*)src;
  t.bytes = bytes;
  issue_load(std::move(t), bar, 0);
}

void tma_store(const TensorMap* map, int x, int y, u32 src, Site site) {
  Transfer t = new_transfer(src, site);
  t.tensor = true;
  t.map = *map;
  t.x = x;
  t.y = y;
  t.bytes = box_bytes(map);
  check_box(t);
  t.blocks.push_back(self()->home);
  self()->open_stores.stores.push_back(std::move(t));
}

void bulk_commit() {
  Fiber* fiber = self();
  if (land_now()) {
    for (Transfer& t : fiber->open_stores.stores) land_transfer(t);
    fiber->open_stores.stores.clear();
  }
  fiber->stores.push_back(std::move(fiber->open_stores));
  fiber->open_stores = StoreGroup{};
}

void bulk_wait(int pending) {
  Fiber* fiber = self();
  while ((int)fiber->stores.size() > pending) {
    for (Transfer& t : fiber->stores.front().stores) {
      land_transfer(t);
      if (running->options.race) fiber->clock[t.agent] = std::max(fiber->clock[t.agent], t.epoch);
    }
    fiber->stores.pop_front();
  }
  if (running->options.race) advance(fiber);
}

// ---- Warpgroup products

// Reads an operand of `rows` indices and 16 K through its descriptor; put(row, k, value).
template <class F>
static void read_operand(const Product& p, Block& block, const Operand& operand, int rows, F put) {
  u32 start = (operand.desc & 0x3fff) << 4;
  u32 leading = (operand.desc >> 16 & 0x3fff) << 4, stride = (operand.desc >> 32 & 0x3fff) << 4;
  if (operand.desc >> 62 != 1)
    return note_error("only the 128-byte swizzle is modelled, at " + at(p.site));
  Source source = {p.agent, p.epoch, p.clock.get(), true, p.site};
  auto chunk = [&](u32 addr, u16(&values)[8]) {
    addr ^= (addr >> 7 & 7) << 4;
    if (addr + 16 > block.smem_bytes) {
      note_error("an operand of " + at(p.site) + " lies past shared memory");
      memset(values, 0, sizeof values);
      return;
    }
    if (running->options.race) check_shared(block, addr, 16, false, source);
    memcpy(values, block.smem + addr, 16);
  };
  u16 values[8];
  if (operand.mn_major) {
    for (int r = 0; r < rows; r += 8) {
      for (int k = 0; k < 16; k++) {
        chunk(start + r / 64 * leading + k / 8 * stride + k % 8 * 128 + r % 64 / 8 * 16, values);
        for (int e = 0; e < 8; e++) put(r + e, k, bf16_value(values[e]));
      }
    }
  } else {
    for (int r = 0; r < rows; r++) {
      for (int k = 0; k < 16; k += 8) {
        chunk(start + r / 8 * stride + r % 8 * 128 + k * 2, values);
        for (int e = 0; e < 8; e++) put(r, k + e, bf16_value(values[e]));
      }
    }
  }
}

// Calls f(accumulator register, element of the 64 x n tile) for every thread.
template <class F>
static void each_accumulator(Product& p, float (*tile)[256], F f) {
  for (int t = 0; t < 128; t++) {
    float* r = p.d[t];
    float* upper = tile[t / 32 * 16 + t % 32 / 4] + (t & 3) * 2;
    float* lower = upper + 8 * 256;
    for (int j = 0; j < p.n / 8; j++, r += 4, upper += 8, lower += 8) {
      f(r[0], upper[0]);
      f(r[1], upper[1]);
      f(r[2], lower[0]);
      f(r[3], lower[1]);
    }
  }
}

static void compute(Product& p, Block& block) {
  struct Room {
    float a[64 * 16], b[16 * 256], d[64][256];
  };
  static thread_local std::unique_ptr<Room> room(new Room);
  auto& [a, b, d] = *room;
  p.done = true;
  int n = p.n;
  if (p.a.registers) {
    for (int t = 0; t < 128; t++) {
      int g = t / 32 * 16 + t % 32 / 4, q = (t & 3) * 2;
      for (int r = 0; r < 4; r++) {
        u32 pair = p.a_registers[t][r];
        float* to = &a[(g + (r & 1) * 8) * 16 + q + (r >> 1) * 8];
        to[0] = bf16_value(pair & 0xffff);
        to[1] = bf16_value(pair >> 16);
      }
    }
  } else {
    float* to = a;
    read_operand(p, block, p.a, 64, [=](int r, int k, float x) { to[r * 16 + k] = x; });
  }
  float* to = b;
  read_operand(p, block, p.b, n, [=](int r, int k, float x) { to[k * n + r] = x; });
  if (p.accumulate) {
    each_accumulator(p, d, [](float& reg, float& element) { element = reg; });
  } else {
    memset(d, 0, sizeof d);
  }
  products16(running->options.arithmetic, 64, n, a, b, d[0], 256);
  each_accumulator(p, d, [](float& reg, float& element) { reg = element; });
  running->stats.wgmmas++;
}

// Computes the products up to `last`, in order.
static void compute_until(std::deque<Product>& queue, u32 last, Block& block) {
  u32 first = last;
  while (first > 0 && !queue[first - 1].done) first--;
  for (u32 i = first; i <= last; i++) {
    if (!queue[i].done) compute(queue[i], block);
  }
  if (!running->error.empty()) fail(running->error);
}

// What every thread of the warpgroup has seen: each warp may start its share on its own.
static std::shared_ptr<Clock> common_clock(Block& block, u32 first) {
  auto common = std::make_shared<Clock>(block.fibers[first]->clock);
  for (u32 t = 1; t < 128; t++) {
    const Clock& other = block.fibers[first + t]->clock;
    for (size_t i = 0; i < common->size(); i++) (*common)[i] = std::min((*common)[i], other[i]);
  }
  return common;
}

void wgmma_fence() { self()->registers_fenced = true; }

void wgmma(float* d, int n, Operand a, Operand b, bool accumulate, Site site) {
  Fiber* fiber = self();
  Block& block = my_block();
  u32 group = fiber->local / 128, lane = fiber->local % 128;
  if (!fiber->registers_fenced) fail("a product without wgmma_fence before it, at " + at(site));
  auto& queue = block.products[group];
  u32 index = fiber->products_issued++;
  if (queue.size() <= index) {
    Product p{};
    p.a = a;
    p.b = b;
    p.accumulate = accumulate;
    p.n = n;
    p.site = site;
    queue.push_back(p);
  }
  Product& p = queue[index];
  bool same = p.a.desc == a.desc && p.b.desc == b.desc && p.accumulate == accumulate && p.n == n &&
              p.site.line == site.line && p.a.mn_major == a.mn_major && p.b.mn_major == b.mn_major;
  if (!same) fail("the threads of a warpgroup disagree on a product at " + at(site));
  p.d[lane] = d;
  p.a_registers[lane] = a.registers;
  fiber->open_products.push_back(index);
  if (++p.issued < 128) return;
  if (running->options.race) {
    Fiber* leader = block.fibers[group * 128];
    p.clock = common_clock(block, group * 128);
    p.agent = agent_of(leader);
    p.epoch = ++leader->agent_epoch;
  }
  if (land_now()) compute_until(queue, index, block);
  for (Fiber* other : p.waiting) wake(other);
  p.waiting.clear();
}

void wgmma_commit() {
  Fiber* fiber = self();
  fiber->products.push_back(std::move(fiber->open_products));
  fiber->open_products.clear();
  if (running->options.race) advance(fiber);
}

void wgmma_wait(int pending, Site site) {
  Fiber* fiber = self();
  Block& block = my_block();
  auto& queue = block.products[fiber->local / 128];
  while ((int)fiber->products.size() > pending) {
    for (u32 index : fiber->products.front()) {
      while (queue[index].issued < 128) {
        queue[index].waiting.push_back(fiber);
        wait_here("wgmma_wait", site);
      }
      compute_until(queue, index, block);
      if (running->options.race) {
        u32& seen = fiber->clock[queue[index].agent];
        seen = std::max(seen, queue[index].epoch);
      }
    }
    fiber->products.pop_front();
  }
  fiber->registers_fenced = false;
  if (running->options.race) advance(fiber);
}

}  // namespace emu
