// The order that strong accesses make, as the lowering passes it.
#pragma once

#include "checker.h"
#include "memory.h"

namespace ptxe {

// Two arguments: semantics (0 weak, 1 + Order otherwise), scope.
struct Strength {
  bool strong;
  Order order = Order::Relaxed;
  Scope scope;
  Strength(uint32_t semantics, uint32_t scope_number)
      : strong(semantics != 0), scope(static_cast<Scope>(scope_number)) {
    if (strong) order = static_cast<Order>(semantics - 1);
  }
};

// Calls f(place) for every granted lane, if anybody checks.
template <class F>
void each_place(Warp& w, Space space, const LaneAddresses& from, const LanePlaces& to, F f) {
  if (!w.cluster->checker) return;
  for (Lanes rest = to.granted; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    Refusal refusal;
    const Place place =
        find_place(*w.cluster, &w, w.cta, space, from.address[lane], 1, 1, AccessKind::Read, lane, refusal);
    if (place) f(place);
  }
}

}  // namespace ptxe
