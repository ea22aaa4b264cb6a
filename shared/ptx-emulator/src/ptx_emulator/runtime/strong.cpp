#include "strong.h"

#include <array>
#include <mutex>

#include "checker.h"
#include "fence.h"
#include "program.h"

namespace ptxe {

namespace {

// Synchronisation objects by host address, spread over locks: clusters on other threads use the same locations.
struct Locations : GroupState {
  static constexpr size_t kParts = 64;
  struct Part {
    std::mutex lock;
    std::unordered_map<const uint8_t*, Sync> syncs;
  };
  std::array<Part, kParts> parts;
  Part& part_of(const uint8_t* data) { return parts[reinterpret_cast<uintptr_t>(data) / 4 % kParts]; }
};

// Shared memory belongs to a cluster and is freed with it; global memory is the machine's.
Locations& locations(Warp& w, Place::Home home) {
  if (home == Place::Shared) return w.cluster->state.get<Locations>();
  Machine& machine = *w.cluster->machine;
  const std::lock_guard<std::mutex> hold(machine.lock);
  auto& entry = machine.shared_state["strong locations"];
  if (!entry) entry = std::make_unique<Locations>();
  return static_cast<Locations&>(*entry);
}

}  // namespace

void order_store(Warp& w, uint8_t* data, Place::Home home, Semantics semantics, bool modifies) {
  if (home == Place::Local) return;
  Locations::Part& part = locations(w, home).part_of(data);
  const std::lock_guard<std::mutex> hold(part.lock);
  Sync& sync = part.syncs[data];
  if (!modifies) sync.clear();
  if (releases(semantics)) {
    release(w, sync);
  } else {
    release_fenced(w, sync);
  }
}

void order_load(Warp& w, uint8_t* data, Place::Home home, Semantics semantics) {
  if (home == Place::Local) return;
  Locations::Part& part = locations(w, home).part_of(data);
  const std::lock_guard<std::mutex> hold(part.lock);
  const auto found = part.syncs.find(data);
  if (found == part.syncs.end()) return;
  if (acquires(semantics)) {
    acquire(w, found->second);
  } else {
    observe_relaxed(w, found->second);
  }
}

}  // namespace ptxe
