// Barriers, warp collectives and shared memory.
#include <string.h>

#include <algorithm>

#include "runtime.h"

namespace emu {

// ---- Shared memory

u8* dynamic_smem() { return my_block().smem; }

u8* static_smem(int id, size_t bytes, size_t align) {
  Block& block = my_block();
  auto known = block.static_offsets.find(id);
  if (known != block.static_offsets.end()) return block.smem + known->second;
  u32 offset = (block.smem_bytes + align - 1) / align * align;
  if (offset + bytes > SMEM_BYTES) fail("too much static shared memory");
  memset(block.smem + offset, 0xff, bytes);
  block.static_offsets[id] = offset;
  block.smem_bytes = offset + bytes;
  return block.smem + offset;
}

u32 smem_addr(const void* p) {
  u64 offset = (const u8*)p - running->smem;
  if (offset >= (u64)running->blocks.size() * SMEM_BYTES) fail("not an address of shared memory");
  return (u32)(offset / SMEM_BYTES) << 24 | (u32)(offset % SMEM_BYTES);
}

u32 peer_addr(u32 addr, u32 rank) {
  if (rank >= running->blocks.size()) fail("no block " + std::to_string(rank) + " in the cluster");
  bool ended = true;
  for (Fiber* fiber : running->blocks[rank].fibers) ended = ended && fiber->state == DONE;
  if (ended) fail("use of the shared memory of a block of the cluster that has ended");
  return rank << 24 | (addr & 0xffffff);
}

u8* smem_ptr(u32 addr, u32 bytes) {
  u32 rank = addr >> 24, offset = addr & 0xffffff;
  if (addr & (std::min(bytes, 16u) - 1)) fail("misaligned address of shared memory");
  if (rank >= running->blocks.size() || offset + bytes > running->blocks[rank].smem_bytes) {
    fail("shared memory at " + std::to_string(offset) + " is past the block's " +
         std::to_string(running->blocks[rank].smem_bytes) + " bytes");
  }
  return running->blocks[rank].smem + offset;
}

void misaligned(const void* p, u32 bytes) {
  fail("misaligned access of " + std::to_string(bytes) + " bytes at " +
       describe_address((u64)p, bytes));
}

// ---- Barriers

// The fiber's part in a barrier; with `waits`, it stays until all have come.
static void meet(Barrier& barrier, u32 need, bool waits, const char* what, Site site) {
  Fiber* fiber = self();
  if (barrier.arrived && barrier.need != need) {
    fail(std::string(what) + " at " + at(site) + " expects " + std::to_string(need) +
         " threads, at " + at(barrier.site) + " " + std::to_string(barrier.need));
  }
  barrier.need = need;
  barrier.site = site;
  barrier.arrived++;
  if (running->options.race) join(barrier.clock, fiber->clock);
  if (waits) {
    barrier.waiting.push_back(fiber);
  } else if (running->options.race) {
    advance(fiber);
  }
  if (barrier.arrived < need) {
    if (waits) wait_here(what, site);
    return;
  }
  for (Fiber* other : barrier.waiting) {
    if (running->options.race) {
      join(other->clock, barrier.clock);
      advance(other);
    }
    wake(other);
  }
  barrier = Barrier{};
  if (waits) wait_here(what, site);  // Already awake: goes on in the order of the schedule.
}

void block_sync(Site site) {
  Block& block = my_block();
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived && (barrier.site.line != site.line || barrier.site.file != site.file)) {
    fail("threads of a block are in different barriers, at " + at(site) + " and " +
         at(barrier.site));
  }
  meet(barrier, block.fibers.size(), true, "block_sync", site);
}

static Barrier& named(int id, int threads, Site site) {
  if (id < 1 || id > 15 || threads % 32 || threads < 32)
    fail("a wrong named barrier at " + at(site));
  return my_block().barriers[id];
}

void barrier_sync(int id, int threads, Site site) {
  meet(named(id, threads, site), threads, true, "barrier_sync", site);
}

void barrier_arrive(int id, int threads, Site site) {
  meet(named(id, threads, site), threads, false, "barrier_arrive", site);
}

void cluster_sync(Site site) {
  meet(running->barrier, running->fibers.size(), true, "cluster_sync", site);
}

u32 cluster_rank() { return my_block().rank; }

// ---- Warp collectives: the last lane to arrive computes for all

static void run_shuffle(Lane** lanes) {
  u32 values[32] = {};
  for (int i = 0; i < 32; i++) {
    if (lanes[i]) values[i] = lanes[i]->value;
  }
  for (int i = 0; i < 32; i++) {
    if (!lanes[i]) continue;
    int arg = lanes[i]->arg, from = i;
    if (lanes[i]->shuffle == XOR) from = i ^ arg;
    if (lanes[i]->shuffle == LANE) from = arg & 31;
    if (lanes[i]->shuffle == DOWN) from = i + arg < 32 ? i + arg : i;
    if (from > 31 || !lanes[from]) fail("a shuffle reads a lane that is not there");
    lanes[i]->value = values[from];
  }
}

static void run_ballot(Lane** lanes) {
  u32 bits = 0;
  for (int i = 0; i < 32; i++) {
    if (lanes[i] && lanes[i]->value) bits |= 1u << i;
  }
  for (int i = 0; i < 32; i++) {
    if (lanes[i]) lanes[i]->value = bits;
  }
}

static void run_ldmatrix(Lane** lanes, Fiber** fibers) {
  int matrices = lanes[0]->arg;
  for (int m = 0; m < matrices; m++) {
    u16 rows[8][8];
    u8 hits[8] = {}, worst = 0;
    for (int r = 0; r < 8; r++) {
      u32 addr = lanes[m * 8 + r]->addr;
      if (addr & 15) fail("ldmatrix needs 16-byte aligned rows, at " + at(lanes[0]->site));
      u8* row = smem_ptr(addr, 16);
      Fiber* fiber = fibers[m * 8 + r];
      if (running->options.race) {
        check_shared(running->blocks[addr >> 24], addr & 0xffffff, 16, false, thread_source(fiber));
      }
      memcpy(rows[r], row, 16);
      worst = std::max(worst, ++hits[addr >> 4 & 7]);
    }
    running->stats.matrix_loads++;
    running->stats.bank_replays += worst - 1;
    for (int i = 0; i < 32; i++) {
      int r = i / 4, c = i % 4 * 2;
      bool t = lanes[0]->transposed;
      u32 low = t ? rows[c][r] : rows[r][c], high = t ? rows[c + 1][r] : rows[r][c + 1];
      lanes[i]->out[m] = low | high << 16;
    }
  }
}

static void run_mma(Lane** lanes) {
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (int i = 0; i < 32; i++) {
    int g = i >> 2, q = (i & 3) * 2;
    for (int e = 0; e < 2; e++) {
      for (int r = 0; r < 4; r++) {
        a[(g + (r & 1) * 8) * 16 + q + e + (r >> 1) * 8] =
            bf16_value(lanes[i]->a[r] >> 16 * e & 0xffff);
      }
      for (int r = 0; r < 2; r++) {
        b[(q + e + r * 8) * 8 + g] = bf16_value(lanes[i]->b[r] >> 16 * e & 0xffff);
        d[(g + r * 8) * 8 + q + e] = lanes[i]->d[r * 2 + e];
      }
    }
  }
  products16(running->options.arithmetic, 16, 8, a, b, d, 8);
  for (int i = 0; i < 32; i++) {
    int g = i >> 2, q = (i & 3) * 2;
    for (int e = 0; e < 4; e++) lanes[i]->d[e] = d[(g + (e >> 1) * 8) * 8 + q + (e & 1)];
  }
  running->stats.mmas++;
}

static void run_collective(Lane** lanes, Fiber** fibers, u32 mask) {
  switch (lanes[__builtin_ctz(mask)]->kind) {
    case SHUFFLE:
      return run_shuffle(lanes);
    case BALLOT:
      return run_ballot(lanes);
    case SYNC: {
      if (!running->options.race) return;
      std::vector<Fiber*> members;
      for (int i = 0; i < 32; i++) {
        if (lanes[i]) members.push_back(fibers[i]);
      }
      return synchronize(members);
    }
    case LDMATRIX:
      return run_ldmatrix(lanes, fibers);
    case MMA:
      return run_mma(lanes);
  }
}

static WarpMeeting& find_meeting(std::vector<WarpMeeting>& meetings, u32 mask, u32 warp,
                                 Site site) {
  WarpMeeting* found = nullptr;
  for (WarpMeeting& meeting : meetings) {
    if (meeting.mask == mask) {
      found = &meeting;
    } else if (meeting.mask & mask && meeting.arrived) {
      fail("collectives with overlapping masks in warp " + std::to_string(warp) + " at " +
           at(site));
    }
  }
  if (found) return *found;
  meetings.emplace_back();
  meetings.back().mask = mask;
  return meetings.back();
}

static void collective(Lane& lane) {
  Fiber* fiber = self();
  Block& block = my_block();
  u32 index = fiber->local & 31, warp = fiber->local >> 5;
  u32 present = std::min<u32>(32, block.fibers.size() - warp * 32);
  u32 mask = lane.mask & (present == 32 ? ~0u : (1u << present) - 1);
  if (!(mask >> index & 1)) fail("a lane is not in its own mask at " + at(lane.site));
  if (lane.kind >= LDMATRIX && mask != ~0u) fail("a tensor-core primitive needs 32 lanes");
  WarpMeeting& meeting = find_meeting(block.warps[warp], mask, warp, lane.site);
  if (meeting.arrived) {
    Lane* other = meeting.lanes[__builtin_ctz(meeting.arrived)];
    if (other->kind != lane.kind || other->site.line != lane.site.line) {
      fail("warp " + std::to_string(warp) + " has diverged: its lanes are at " + at(lane.site) +
           " and " + at(other->site));
    }
  }
  meeting.lanes[index] = &lane;
  meeting.arrived |= 1u << index;
  if (meeting.arrived != mask) return wait_here("a warp primitive", lane.site);
  Fiber** fibers = &block.fibers[warp * 32];
  run_collective(meeting.lanes, fibers, mask);
  meeting.arrived = 0;
  memset(meeting.lanes, 0, sizeof meeting.lanes);
  for (int i = 0; i < 32; i++) {
    if (mask >> i & 1 && i != (int)index) wake(fibers[i]);
  }
  reconsider();
}

void warp_sync(u32 mask, Site site) {
  Lane lane{};
  lane.kind = SYNC;
  lane.mask = mask;
  lane.site = site;
  collective(lane);
}

u32 shuffle(Shuffle kind, u32 x, int arg, Site site) {
  Lane lane{};
  lane.kind = SHUFFLE;
  lane.mask = ~0u;
  lane.site = site;
  lane.shuffle = kind;
  lane.value = x;
  lane.arg = arg;
  collective(lane);
  return lane.value;
}

u32 ballot(bool condition, Site site) {
  Lane lane{};
  lane.kind = BALLOT;
  lane.mask = ~0u;
  lane.site = site;
  lane.value = condition;
  collective(lane);
  return lane.value;
}

void ldmatrix(u32* out, int matrices, bool transposed, u32 addr, Site site) {
  Lane lane{};
  lane.kind = LDMATRIX;
  lane.mask = ~0u;
  lane.site = site;
  lane.addr = addr;
  lane.arg = matrices;
  lane.transposed = transposed;
  lane.out = out;
  collective(lane);
}

void mma(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Lane lane{};
  lane.kind = MMA;
  lane.mask = ~0u;
  lane.site = site;
  lane.d = d;
  lane.a = a;
  lane.b[0] = b0;
  lane.b[1] = b1;
  collective(lane);
}

}  // namespace emu
