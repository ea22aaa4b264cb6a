// Address spaces, and the one way to reach memory: resolve(), which checks bounds, alignment and (when checking is
// on) initialisation and races, and returns a host pointer.
//
// Addresses: global = host address. Shared = (cta rank << 24) | offset, so mapa and `& 0xFEFFFFFF` work unchanged.
// Generic addresses of shared and local memory carry a window in the top 16 bits.
#pragma once

#include "core.h"

namespace ptxe {

enum class Space : uint8_t { Generic, Global, Shared, SharedCluster, Local, Param, Const };
// Strong: ld/st with .volatile, .relaxed, .acquire or .release. They race with weak accesses, not with each other
// and not with atomics.
enum class AccessKind : uint8_t { Read, Write, Atomic, StrongRead, StrongWrite };

constexpr uint64_t kSharedWindow = 0x5348ull << 48;
constexpr uint64_t kLocalWindow = 0x4c4full << 48;
constexpr uint32_t kCtaShift = 24;
constexpr uint32_t kOffsetMask = (1u << kCtaShift) - 1;

inline bool in_shared_window(uint64_t a) { return (a >> 48) == (kSharedWindow >> 48); }
inline bool in_local_window(uint64_t a) { return (a >> 48) == (kLocalWindow >> 48); }

struct Actor;  // checker.h

// `[base+offset]` as Lowering.address() passes it: slot, bits of the slot, offset low word, offset high word.
struct AddressArgs {
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

}  // namespace ptxe
