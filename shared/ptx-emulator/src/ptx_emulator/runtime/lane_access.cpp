// Resolution of the addresses of a whole warp: one lookup for lanes that touch one piece of memory, and the traffic
// that the access causes.
#include <algorithm>

#include "checker.h"
#include "memory.h"
#include "program.h"
#include "traffic.h"

namespace ptxe {

LaneAddresses::LaneAddresses(Warp& w, const AddressArgs& args, Lanes which) : lanes(which) {
  if (args.bits == 64) {
    const uint64_t* base = w.values<uint64_t>(args.slot);
    for (int lane = 0; lane < kLanes; ++lane) address[lane] = base[lane] + args.offset;
  } else {
    const uint32_t* base = w.values<uint32_t>(args.slot);
    const auto offset = static_cast<uint32_t>(args.offset);
    for (int lane = 0; lane < kLanes; ++lane) address[lane] = static_cast<uint32_t>(base[lane] + offset);
  }
  if (lanes == kAllLanes || !lanes) return;
  const uint64_t first = address[__builtin_ctz(lanes)];
  for (int lane = 0; lane < kLanes; ++lane) address[lane] = (lanes >> lane & 1) ? address[lane] : first;
}

namespace {

struct Extent {
  uint64_t low, high;  // smallest and largest address
  uint64_t bits;       // those that are set in any address
  bool adjoining;      // lane n is at low + n * bytes
};

// The two patterns that are most frequent, all lanes in a row and all at one place, need no search.
Extent extent_of(const LaneAddresses& from, uint32_t bytes) {
  const uint64_t first = from.address[0];
  uint64_t not_adjoining = 0, not_equal = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t ahead = from.address[lane] - first;
    not_equal |= ahead;
    not_adjoining |= ahead ^ static_cast<uint64_t>(lane) * bytes;
  }
  if (!not_equal) return {first, first, first, false};
  if (!not_adjoining && from.lanes == kAllLanes) return {first, from.address[kLanes - 1], first | bytes, true};
  Extent e{~0ull, 0, 0, false};
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t a = from.address[lane];
    e.low = std::min(e.low, a);
    e.high = std::max(e.high, a);
    e.bits |= a;
  }
  return e;
}

// All lanes in one piece of memory: address + `shift` is the host address.
struct Whole {
  bool found = false;
  uint64_t shift = 0;
  Place place;  // of the lowest address
};

Whole whole_global(const MemoryMap& memory, const Extent& e, uint32_t bytes, AccessKind kind) {
  const MemoryMap::Range* range = memory.find(e.low, e.high - e.low + bytes);
  if (!range || (writes(kind) && (range->flags & MemoryMap::kReadOnly))) return {};
  Place place;
  place.data = reinterpret_cast<uint8_t*>(e.low);
  place.range = range;
  return {true, 0, place};
}

Whole whole_shared(Warp& w, bool own_only, const Extent& e, uint32_t bytes) {
  if (e.high >> 32 || e.low >> kCtaShift != e.high >> kCtaShift) return {};
  Cta* cta = cta_of(*w.cluster, static_cast<uint32_t>(e.low));
  if (!cta || ((own_only || cta->exited) && cta != w.cta)) return {};
  const uint32_t offset = static_cast<uint32_t>(e.low) & kOffsetMask;
  if (offset < cta->shared_base || offset + (e.high - e.low) + bytes > cta->shared.size()) return {};
  uint8_t* data = cta->shared.data() + offset;
  return {true, reinterpret_cast<uint64_t>(data) - e.low, Place{Place::Shared, data, cta, offset, nullptr}};
}

Whole find_whole(Warp& w, Space space, const Extent& e, uint32_t bytes, AccessKind kind) {
  switch (space) {
    case Space::Local: return {};
    case Space::Shared: return whole_shared(w, true, e, bytes);
    case Space::SharedCluster: return whole_shared(w, false, e, bytes);
    case Space::Generic:
      if (in_shared_window(e.low) && in_shared_window(e.high)) {
        Whole whole = whole_shared(w, false, Extent{e.low - kSharedWindow, e.high - kSharedWindow, 0, false}, bytes);
        whole.shift -= kSharedWindow;
        return whole;
      }
      break;
    default: break;
  }
  return whole_global(w.cluster->machine->memory, e, bytes, kind);
}

// Parameters and constants do not change while a kernel runs.
bool is_checked(const Warp& w, Space space) {
  return w.cluster->checker && space != Space::Param && space != Space::Const;
}

LanePlaces resolve_together(Warp& w, Space space, const Whole& whole, const LaneAddresses& from, const Extent& e,
                            uint32_t bytes, AccessKind kind) {
  LanePlaces to;
  to.granted = from.lanes;
  to.home = whole.place.home;
  to.adjoining = e.adjoining;
  for (int lane = 0; lane < kLanes; ++lane) {
    to.data[lane] = reinterpret_cast<uint8_t*>(from.address[lane] + whole.shift);
  }
  if (!is_checked(w, space)) return to;
  if (e.adjoining) {
    access_lanes(w, whole.place, bytes, kind, 0, kLanes);
    return to;
  }
  const uint8_t* last = nullptr;
  for (Lanes rest = from.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (to.data[lane] == last) continue;
    last = to.data[lane];
    Place place = whole.place;
    place.data = to.data[lane];
    place.offset += static_cast<uint32_t>(from.address[lane] - e.low);
    access_memory(w, place, bytes, kind, lane);
  }
  return to;
}

// One report for all lanes that are refused, by the words of the first one of each kind.
struct Refused {
  Lanes lanes = 0;
  int first = -1;
  std::string message;
};

void report_refused(Warp& w, Report kind, const Refused& refused) {
  if (!refused.lanes) return;
  std::string message = refused.message;
  if (refused.lanes & (refused.lanes - 1)) {
    message += "; lanes " + lanes_text(refused.lanes) + " are refused alike";
  }
  report(w, kind, refused.first, std::move(message));
}

LanePlaces resolve_each(Warp& w, Space space, const LaneAddresses& from, uint32_t bytes, uint32_t alignment,
                        AccessKind kind) {
  LanePlaces to{};
  Refused out, odd;
  const bool checked = is_checked(w, space);
  bool first = true;
  for (Lanes rest = from.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Refusal refusal;
    const Place place =
        find_place(*w.cluster, &w, w.cta, space, from.address[lane], bytes, alignment, kind, lane, refusal);
    to.data[lane] = place.data;
    if (!place) {
      Refused& refused = refusal.kind == Report::Misaligned ? odd : out;
      if (!refused.lanes) {
        refused.first = lane;
        refused.message = std::move(refusal.message);
      }
      refused.lanes |= 1u << lane;
      continue;
    }
    if (first) to.home = place.home;
    first = false;
    to.granted |= 1u << lane;
    if (checked && place.home != Place::Local) access_memory(w, place, bytes, kind, lane);
  }
  report_refused(w, Report::OutOfBounds, out);
  report_refused(w, Report::Misaligned, odd);
  return to;
}

}  // namespace

LanePlaces resolve_lanes(Warp& w, Space space, const LaneAddresses& from, uint32_t bytes, uint32_t alignment,
                         AccessKind kind) {
  if (!from.lanes) return LanePlaces{};
  const Extent e = extent_of(from, bytes);
  Whole whole;
  if (!(e.bits & (alignment - 1))) whole = find_whole(w, space, e, bytes, kind);
  const LanePlaces to = whole.found ? resolve_together(w, space, whole, from, e, bytes, kind)
                                    : resolve_each(w, space, from, bytes, alignment, kind);
  if (space != Space::Param && space != Space::Const) count_traffic(w, to, from, bytes, kind);
  return to;
}

}  // namespace ptxe
