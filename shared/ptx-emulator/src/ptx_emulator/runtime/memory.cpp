// The map of global memory, and the resolution of one address.
#include "memory.h"

#include <algorithm>
#include <cstdio>

#include "checker.h"
#include "program.h"

namespace ptxe {

// ---------------------------------------------------------------------------------------------- MemoryMap

void MemoryMap::add(const std::string& name, uint64_t base, uint64_t bytes, uint32_t flags) {
  const auto same = std::find_if(ranges_.begin(), ranges_.end(),
                                 [&](const Range& r) { return r.base == base && r.bytes == bytes; });
  if (same != ranges_.end()) {
    same->name = name;
    same->flags = flags;
    return;
  }
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), base,
                                      [](uint64_t b, const Range& r) { return b < r.base; });
  ranges_.insert(after, Range{name, base, bytes, flags});
  bases_.clear();
  furthest_.clear();
  uint64_t furthest = 0;
  for (const Range& r : ranges_) {
    furthest = std::max(furthest, r.end());
    bases_.push_back(r.base);
    furthest_.push_back(furthest);
  }
}

const MemoryMap::Range* MemoryMap::find(uint64_t address, uint64_t bytes) const {
  const uint64_t end = address + bytes;
  if (end < address) return nullptr;
  const auto after = std::upper_bound(bases_.begin(), bases_.end(), address);
  for (auto k = after - bases_.begin(); k-- > 0 && furthest_[static_cast<size_t>(k)] >= end;) {
    const Range& r = ranges_[static_cast<size_t>(k)];
    if (r.end() >= end) return &r;
  }
  return nullptr;
}

namespace {

uint64_t distance(const MemoryMap::Range& r, uint64_t address, uint64_t bytes) {
  const uint64_t before = address < r.base ? r.base - address : 0;
  const uint64_t after = address + bytes > r.end() ? address + bytes - r.end() : 0;
  return std::max(before, after);
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string num(uint64_t value) { return std::to_string(value); }

// "a 16-byte read at 0x7f00"
std::string subject(AccessKind kind, uint64_t address, uint32_t bytes) {
  const char* what = kind == AccessKind::Atomic ? "atomic" : writes(kind) ? "write" : "read";
  return "a " + num(bytes) + "-byte " + what + " at " + hex(address);
}

// "ends 4 bytes past the end of", "starts 8 bytes before": where [address, address + bytes) leaves [base, end).
std::string excess(uint64_t address, uint64_t bytes, uint64_t base, uint64_t end) {
  if (address < base) return "starts " + num(base - address) + " bytes before";
  if (address >= end) return "starts " + num(address - end) + " bytes past the end of";
  return "ends " + num(address + bytes - end) + " bytes past the end of";
}

Place refuse(Refusal& refusal, Report kind, std::string message) {
  refusal.kind = kind;
  refusal.message = std::move(message);
  return {};
}

Place misaligned(Refusal& refusal, AccessKind kind, uint64_t address, uint32_t bytes, uint32_t alignment) {
  return refuse(refusal, Report::Misaligned,
                subject(kind, address, bytes) + " has to be aligned to " + num(alignment) + " bytes, it is " +
                    num(address % alignment) + " bytes off");
}

struct Access {
  uint64_t address;
  uint32_t bytes, alignment;
  AccessKind kind;
};

Place global_place(const MemoryMap& memory, const Access& a, Refusal& refusal) {
  const MemoryMap::Range* range = memory.find(a.address, a.bytes);
  if (!range) {
    const std::string what = subject(a.kind, a.address, a.bytes);
    const MemoryMap::Range* near = memory.nearest(a.address, a.bytes);
    if (!near) return refuse(refusal, Report::OutOfBounds, what + " of global memory, of which the launch has none");
    return refuse(refusal, Report::OutOfBounds,
                  what + " of global memory " + excess(a.address, a.bytes, near->base, near->end()) + " " + near->name +
                      " (" + num(near->bytes) + " bytes at " + hex(near->base) + ")");
  }
  if (a.address & (a.alignment - 1)) return misaligned(refusal, a.kind, a.address, a.bytes, a.alignment);
  if (writes(a.kind) && (range->flags & MemoryMap::kReadOnly)) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " goes to " + range->name + ", which is read-only (offset " +
                      num(a.address - range->base) + ")");
  }
  Place place;
  place.data = reinterpret_cast<uint8_t*>(a.address);
  place.range = range;
  return place;
}

Place shared_place(Cluster& cluster, const Cta* own, bool own_only, const Access& a, Refusal& refusal) {
  if (a.address >> 32) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " is no address of shared memory" +
                      (in_shared_window(a.address) ? " but a generic one" : ""));
  }
  const auto address = static_cast<uint32_t>(a.address);
  Cta* cta = cta_of(cluster, address);
  if (!cta) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " of shared memory is in CTA rank " +
                      num(address >> kCtaShift) + ", the cluster has " + num(cluster.ctas.size()) + " CTAs");
  }
  if (own_only && own && cta != own) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " is in CTA rank " + num(cta->rank) +
                      ", .shared::cta memory of CTA rank " + num(own->rank) + " was expected");
  }
  if (cta->exited && cta != own) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " is in the shared memory of CTA rank " + num(cta->rank) +
                      ", whose threads have all exited");
  }
  const uint32_t offset = address & kOffsetMask;
  const uint64_t size = cta->shared.size();
  const uint32_t base = cta->shared_base;
  if (offset < base || offset + static_cast<uint64_t>(a.bytes) > size) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " " + excess(offset, a.bytes, base, size) +
                      " the shared memory of CTA rank " + num(cta->rank) + " (" + num(size - base) + " bytes" +
                      (base ? " from " + hex(base) + ", what is before them is reserved)" : ")"));
  }
  if (offset & (a.alignment - 1)) return misaligned(refusal, a.kind, a.address, a.bytes, a.alignment);
  return Place{Place::Shared, cta->shared.data() + offset, cta, offset, nullptr};
}

Place local_place(Warp& w, int lane, const Access& a, Refusal& refusal) {
  const uint64_t size = w.local.size() / kLanes;
  if (a.address + a.bytes > size || a.address >> 32) {
    return refuse(refusal, Report::OutOfBounds,
                  subject(a.kind, a.address, a.bytes) + " " + excess(a.address, a.bytes, 0, size) +
                      " the local memory of a thread (" + num(size) + " bytes)");
  }
  if (a.address & (a.alignment - 1)) return misaligned(refusal, a.kind, a.address, a.bytes, a.alignment);
  Place place;
  place.home = Place::Local;
  place.data = w.local.data() + static_cast<uint64_t>(lane) * size + a.address;
  return place;
}

}  // namespace

const MemoryMap::Range* MemoryMap::nearest(uint64_t address, uint64_t bytes) const {
  const auto near = std::min_element(ranges_.begin(), ranges_.end(), [&](const Range& a, const Range& b) {
    return distance(a, address, bytes) < distance(b, address, bytes);
  });
  return near == ranges_.end() ? nullptr : &*near;
}

// ---------------------------------------------------------------------------------------------- resolution

Cta* cta_of(Cluster& cluster, uint32_t shared_address) {
  const uint32_t rank = shared_address >> kCtaShift;
  return rank < cluster.ctas.size() ? &cluster.ctas[rank] : nullptr;
}

Place find_place(Cluster& cluster, Warp* w, const Cta* own, Space space, uint64_t address, uint32_t bytes,
                 uint32_t alignment, AccessKind kind, int lane, Refusal& refusal) {
  const Access access{address, bytes, alignment, kind};
  const Access inside{address & ((1ull << 48) - 1), bytes, alignment, kind};
  switch (space) {
    case Space::Shared: return shared_place(cluster, own, true, access, refusal);
    case Space::SharedCluster: return shared_place(cluster, own, false, access, refusal);
    case Space::Local:
      if (w) return local_place(*w, lane, access, refusal);
      break;
    case Space::Generic:
      if (in_shared_window(address)) return shared_place(cluster, own, false, inside, refusal);
      if (in_local_window(address) && w) return local_place(*w, lane, inside, refusal);
      break;
    default: break;
  }
  return global_place(cluster.machine->memory, access, refusal);
}

Place resolve(Warp& w, Space space, uint64_t address, uint32_t bytes, uint32_t alignment, AccessKind kind, int lane) {
  Refusal refusal;
  const Place place = find_place(*w.cluster, &w, w.cta, space, address, bytes, alignment, kind, lane, refusal);
  if (!place) {
    report(w, refusal.kind, lane, refusal.message);
  } else if (w.cluster->checker && place.home != Place::Local && space != Space::Param && space != Space::Const) {
    access_memory(w, place, bytes, kind, lane);
  }
  return place;
}

Place resolve_async(Cluster& cluster, const Actor& actor, Space space, uint64_t address, uint32_t bytes,
                    uint32_t alignment, AccessKind kind, const Site& site) {
  Refusal refusal;
  const auto own = std::find_if(cluster.ctas.begin(), cluster.ctas.end(),
                                [&](const Cta& c) { return c.linear == site.cta; });
  const Place place = find_place(cluster, nullptr, own == cluster.ctas.end() ? nullptr : &*own, space, address, bytes,
                                 alignment, kind, site.lane, refusal);
  if (!place) {
    report(*cluster.grid, refusal.kind, site, refusal.message);
  } else if (cluster.checker) {
    access_memory(cluster, actor, place, bytes, kind);
  }
  return place;
}

Place locate(Warp& w, Space space, uint64_t address, uint32_t bytes, uint32_t alignment, int lane) {
  Refusal refusal;
  const Place place =
      find_place(*w.cluster, &w, w.cta, space, address, bytes, alignment, AccessKind::Read, lane, refusal);
  if (!place) report(w, refusal.kind, lane, refusal.message);
  return place;
}

}  // namespace ptxe
