// What an access of a warp costs: bytes and 32-byte sectors of global memory, wavefronts of shared memory.
#pragma once

#include "memory.h"

namespace ptxe {

// Sectors of 32 bytes that the lanes touch, each counted once.
uint32_t distinct_sectors(const LanePlaces& to, uint32_t bytes);

struct Wavefronts {
  uint32_t needed = 0;  // passes over the banks
  uint32_t least = 0;   // without conflicts
};
// 32 banks of 4 bytes. Accesses of 8 and 16 bytes go by half and quarter warps, larger ones by as many lanes as make
// 128 bytes. Lanes that read the same word of a bank share a pass.
Wavefronts shared_wavefronts(const LaneAddresses& from, Lanes lanes, uint32_t bytes);

void count_traffic(Warp& w, const LanePlaces& to, const LaneAddresses& from, uint32_t bytes, AccessKind kind);

}  // namespace ptxe
