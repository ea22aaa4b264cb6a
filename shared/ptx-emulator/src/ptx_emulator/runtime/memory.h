// Address spaces, and the ways to reach memory: resolve() for one piece of it and resolve_lanes() for a warp. Both
// check bounds, alignment and (when checking is on) initialisation and races, and give host pointers.
//
// Addresses: global = host address. Shared = (cta rank << 24) | offset, so mapa and `& 0xFEFFFFFF` work unchanged.
// Generic addresses of shared and local memory carry a window in the top 16 bits.
#pragma once

#include "core.h"

namespace ptxe {

enum class Space : uint8_t { Generic, Global, Shared, SharedCluster, Local, Param, Const };

// Strong accesses (.relaxed, .acquire, .release, .volatile, .mmio; Atomic reads and writes) do not race with each
// other.
enum class AccessKind : uint8_t { Read, Write, Atomic, StrongRead, StrongWrite };
inline bool reads(AccessKind kind) { return kind != AccessKind::Write && kind != AccessKind::StrongWrite; }
inline bool writes(AccessKind kind) { return kind != AccessKind::Read && kind != AccessKind::StrongRead; }
inline bool is_strong(AccessKind kind) { return kind >= AccessKind::Atomic; }

constexpr uint64_t kSharedWindow = 0x5348ull << 48;
constexpr uint64_t kLocalWindow = 0x4c4full << 48;
constexpr uint32_t kCtaShift = 24;
constexpr uint32_t kOffsetMask = (1u << kCtaShift) - 1;

inline bool in_shared_window(uint64_t a) { return (a >> 48) == (kSharedWindow >> 48); }
inline bool in_local_window(uint64_t a) { return (a >> 48) == (kLocalWindow >> 48); }

struct Actor;  // checker.h

// The global memory that kernels may touch. Filled before a launch, only read while kernels run.
class MemoryMap {
 public:
  static constexpr uint32_t kReadOnly = 1;
  static constexpr uint32_t kUninitialised = 2;  // holds nothing until a kernel writes it
  static constexpr uint32_t kConstant = 4;       // .const memory

  struct Range {
    std::string name;
    uint64_t base, bytes;
    uint32_t flags;
    uint64_t end() const { return base + bytes; }
  };

  // A range with the base and size of an earlier one replaces it; ranges may overlap.
  void add(const std::string& name, uint64_t base, uint64_t bytes, uint32_t flags);
  // A range that holds all `bytes` at `address`, or nullptr.
  const Range* find(uint64_t address, uint64_t bytes) const;
  // The range with the least distance to the access, or nullptr if there is none at all.
  const Range* nearest(uint64_t address, uint64_t bytes) const;
  const std::vector<Range>& ranges() const { return ranges_; }

 private:
  std::vector<Range> ranges_;        // by base
  std::vector<uint64_t> bases_;      // of ranges_
  std::vector<uint64_t> furthest_;   // largest end of ranges_[0..k]
};

// `[base+offset]` as Lowering.address() passes it: slot, bits of the slot, offset low word, offset high word.
struct AddressArgs {
  static constexpr uint32_t kNumArgs = 4;
  uint32_t slot, bits;
  uint64_t offset;
  AddressArgs(const Instruction& i, uint32_t first)
      : slot(i.args[first]), bits(i.args[first + 1]),
        offset(static_cast<uint64_t>(i.args[first + 3]) << 32 | i.args[first + 2]) {}
  uint64_t at(Warp& w, int lane) const {
    if (bits == 64) return w.values<uint64_t>(slot)[lane] + offset;
    return static_cast<uint32_t>(w.values<uint32_t>(slot)[lane] + static_cast<uint32_t>(offset));
  }
};

// One contiguous piece of memory after resolution. Exactly one of the three homes.
struct Place {
  enum Home : uint8_t { Global, Shared, Local } home = Global;
  uint8_t* data = nullptr;  // host pointer; null: refused and reported
  Cta* cta = nullptr;       // home of shared memory
  uint32_t offset = 0;      // in shared memory
  const MemoryMap::Range* range = nullptr;  // of global memory
  explicit operator bool() const { return data != nullptr; }
};

// Resolves `bytes` at `address` for one lane of the executing warp and tells the checker about the access by the
// warp (generic proxy). `alignment` in bytes. Refused (null) after a report. A refused read should give all ones.
Place resolve(Warp& w, Space space, uint64_t address, uint32_t bytes, uint32_t alignment, AccessKind kind, int lane);

// The same for an asynchronous operation: the access is by `actor`, the report names `site`.
Place resolve_async(Cluster& cluster, const Actor& actor, Space space, uint64_t address, uint32_t bytes,
                    uint32_t alignment, AccessKind kind, const Site& site);

// Bounds only, no checker: for objects the hardware reads by other means (tensor maps, mbarriers).
Place locate(Warp& w, Space space, uint64_t address, uint32_t bytes, uint32_t alignment, int lane);

// The CTA a shared address is in; `w` is the warp that uses it. nullptr if the cluster has no such rank.
Cta* cta_of(Cluster& cluster, uint32_t shared_address);
inline uint32_t own_shared_address(const Cta& cta, uint32_t offset) { return (cta.rank << kCtaShift) | offset; }

// An access by several lanes of the executing warp, each to its own address.
struct LaneAddresses {
  uint64_t address[kLanes];  // of `lanes`; the others hold the address of a lane in `lanes`
  Lanes lanes;
  LaneAddresses(Warp& w, const AddressArgs& args, Lanes lanes);
};
struct LanePlaces {
  uint8_t* data[kLanes];  // null: refused and reported; meaningless for lanes that were not asked for
  Lanes granted;          // lanes whose access may be done
  Place::Home home;       // of the first lane
  bool adjoining;         // all lanes are granted, and each one's data begin where the lane before ends
};
// resolve() for all lanes of `from`, with one report for all that are refused for the same reason; counts traffic.
LanePlaces resolve_lanes(Warp& w, Space space, const LaneAddresses& from, uint32_t bytes, uint32_t alignment,
                         AccessKind kind);

// Why an access is not possible.
struct Refusal {
  Report kind = Report::OutOfBounds;
  std::string message;
};
// Where an access goes, or null with the reason in `refusal`. Local memory needs `w`, otherwise it may be null;
// `own` is the CTA that .shared::cta and generic shared addresses are checked against, or null.
Place find_place(Cluster& cluster, Warp* w, const Cta* own, Space space, uint64_t address, uint32_t bytes,
                 uint32_t alignment, AccessKind kind, int lane, Refusal& refusal);

}  // namespace ptxe
