#include "traffic.h"

#include <algorithm>

namespace ptxe {

namespace {

constexpr uint32_t kSectorShift = 5;
constexpr uint32_t kMostSectors = 5;  // of one lane: 128 bytes, wherever they start
constexpr uint32_t kBanks = 32;
constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kPassBytes = kBanks * kBankBytes;

// Whether all lanes use different banks, or all of them the same words.
bool no_bank_twice(const LaneAddresses& from, Lanes lanes, uint32_t bytes) {
  const uint32_t num_words = std::max(1u, bytes / kBankBytes);
  const uint64_t first = from.address[__builtin_ctz(lanes)];
  uint64_t used = 0, not_equal = 0;
  for (Lanes rest = lanes; rest; rest &= rest - 1) {
    const uint64_t address = from.address[__builtin_ctz(rest)];
    const uint64_t banks = ((1ull << num_words) - 1) << (address / kBankBytes % kBanks);
    not_equal |= (address ^ first) & ~3ull;
    used = (used & banks) ? ~0ull : used | banks;
  }
  return used != ~0ull || !not_equal;
}

// Passes for lanes that go together: the largest number of distinct words in one bank.
uint32_t passes(const LaneAddresses& from, Lanes lanes, uint32_t bytes) {
  if (no_bank_twice(from, lanes, bytes)) return 1;
  uint64_t words[kBanks][kLanes];
  uint8_t depth[kBanks] = {};
  uint32_t most = 0;
  for (Lanes rest = lanes; rest; rest &= rest - 1) {
    const uint64_t begin = from.address[__builtin_ctz(rest)];
    const uint64_t last = (begin + bytes - 1) / kBankBytes;
    for (uint64_t word = begin / kBankBytes; word <= last; ++word) {
      const uint32_t bank = word % kBanks;
      const uint64_t* end = words[bank] + depth[bank];
      if (std::find(static_cast<const uint64_t*>(words[bank]), end, word) != end) continue;
      words[bank][depth[bank]++] = word;
      most = std::max<uint32_t>(most, depth[bank]);
    }
  }
  return most;
}

}  // namespace

uint32_t distinct_sectors(const LanePlaces& to, uint32_t bytes) {
  uint64_t sectors[kLanes * kMostSectors];
  uint32_t n = 0;
  bool ascending = true;
  for (Lanes rest = to.granted; rest; rest &= rest - 1) {
    const auto begin = reinterpret_cast<uint64_t>(to.data[__builtin_ctz(rest)]);
    const uint64_t last = (begin + bytes - 1) >> kSectorShift;
    for (uint64_t sector = begin >> kSectorShift; sector <= last; ++sector) {
      if (n && sectors[n - 1] == sector) continue;
      ascending = ascending && (!n || sectors[n - 1] < sector);
      sectors[n++] = sector;
    }
  }
  if (ascending) return n;
  std::sort(sectors, sectors + n);
  return static_cast<uint32_t>(std::unique(sectors, sectors + n) - sectors);
}

Wavefronts shared_wavefronts(const LaneAddresses& from, Lanes lanes, uint32_t bytes) {
  uint32_t together = kLanes;
  while (together > 1 && together * bytes > kPassBytes) together /= 2;
  const Lanes part = together == kLanes ? kAllLanes : (1u << together) - 1;
  Wavefronts total;
  for (uint32_t first = 0; first < kLanes; first += together) {
    const Lanes here = lanes & (part << first);
    if (!here) continue;
    total.needed += passes(from, here, bytes);
    ++total.least;
  }
  return total;
}

void count_traffic(Warp& w, const LanePlaces& to, const LaneAddresses& from, uint32_t bytes, AccessKind kind) {
  if (!to.granted || to.home == Place::Local) return;
  const uint64_t moved = static_cast<uint64_t>(__builtin_popcount(to.granted)) * bytes;
  if (to.home == Place::Shared) {
    if (reads(kind)) count(w, Count::SharedLoadBytes, moved);
    if (writes(kind)) count(w, Count::SharedStoreBytes, moved);
    if (to.adjoining) {
      count(w, Count::SharedWavefronts, std::max(1u, bytes / kBankBytes));
      return;
    }
    const Wavefronts wavefronts = shared_wavefronts(from, to.granted, bytes);
    count(w, Count::SharedWavefronts, wavefronts.needed);
    if (wavefronts.needed > wavefronts.least) {
      count(w, Count::SharedBankConflicts, wavefronts.needed - wavefronts.least);
    }
    return;
  }
  const auto begin = reinterpret_cast<uint64_t>(to.data[0]);
  const uint64_t sectors = to.adjoining
                               ? ((begin + bytes * kLanes - 1) >> kSectorShift) - (begin >> kSectorShift) + 1
                               : distinct_sectors(to, bytes);
  if (reads(kind)) {
    count(w, Count::GlobalLoadBytes, moved);
    count(w, Count::GlobalLoadSectors, sectors);
  }
  if (writes(kind)) {
    count(w, Count::GlobalStoreBytes, moved);
    count(w, Count::GlobalStoreSectors, sectors);
  }
}

}  // namespace ptxe
