// The emulator's own content of a CUtensorMap: a box of a matrix.
#pragma once

#include "runtime.h"

namespace emu {

const u64 BOX_MAGIC = 0x626f78206d617031ull;

struct BoxMap {
  u64 magic;
  u8* base;
  u64 inner, outer, stride;  // Elements of a row, rows, bytes from row to row.
  u32 box_inner, box_outer, element_bytes, swizzle;
};

inline BoxMap decode_map(const TensorMap& map) {
  BoxMap m;
  memcpy(&m, &map, sizeof m);
  return m;
}

inline void encode_map(TensorMap* map, const BoxMap& m) {
  memset(map, 0, sizeof *map);
  memcpy(map, &m, sizeof m);
}

static_assert(sizeof(BoxMap) <= sizeof(TensorMap), "a box fits a tensor map");

}  // namespace emu
