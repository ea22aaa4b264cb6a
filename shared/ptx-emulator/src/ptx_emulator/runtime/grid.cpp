// Instructions about the grid: dependent launch, cluster launch control, sleep, clocks.
#include "grid.h"

#include <algorithm>

#include "barrier.h"
#include "checker.h"
#include "memory.h"
#include "program.h"

namespace ptxe {

namespace {

constexpr uint32_t kResponseBytes = 16;
constexpr uint64_t kCancelLatency = 1000;  // virtual cycles from try_cancel to its response
// Virtual cycles are taken to be those of a clock of 1.5 GHz: three cycles are two nanoseconds.
constexpr uint64_t to_nanoseconds(uint64_t cycles) { return cycles * 2 / 3; }
constexpr uint64_t to_cycles(uint64_t nanoseconds) { return nanoseconds * 3 / 2; }

// clusterlaunchcontrol.try_cancel: writes the response and signals the mbarrier, in one CTA or in all.
struct CancelOp : AsyncOp {
  Actor actor;
  uint32_t response[4];  // %ctaid of the first CTA, whether a cluster was cancelled
  std::vector<uint32_t> destinations, mbarriers;

  bool step(Cluster& cluster) override {
    for (size_t k = 0; k < destinations.size(); ++k) {
      const Place place = resolve_async(cluster, actor, Space::SharedCluster, destinations[k], kResponseBytes,
                                        kResponseBytes, AccessKind::Write, actor.site);
      if (place) std::memcpy(place.data, response, kResponseBytes);
      mbarrier_complete_tx(cluster, mbarriers[k], kResponseBytes, actor);
    }
    retire(cluster, actor);
    return true;
  }
  std::string describe() const override { return "clusterlaunchcontrol.try_cancel"; }
};

void try_cancel(Warp& w, const Place& destination, const Place& mbarrier, bool multicast, int lane) {
  auto op = std::make_unique<CancelOp>();
  uint32_t first_cta[3] = {0, 0, 0};
  const bool cancelled = cancel_next_cluster(w, first_cta);
  std::copy(first_cta, first_cta + 3, op->response);
  op->response[3] = cancelled;
  for (const Cta& cta : w.cluster->ctas) {
    if (!multicast && &cta != destination.cta) continue;
    op->destinations.push_back(own_shared_address(cta, destination.offset));
    op->mbarriers.push_back(own_shared_address(cta, mbarrier.offset));
  }
  op->actor = issue(w, Proxy::Async);
  op->actor.site = site_of(w, lane);
  op->actor.time = w.time + kCancelLatency;
  start_async(w, std::move(op));
}

template <class T, class F>
Step read_time(Warp& w, const Instruction& i, F value) {
  const T now = static_cast<T>(value(w.time));
  each_lane(w, [&](int lane) { w.values<T>(i.args[0])[lane] = now; });
  return Step::Next;
}

}  // namespace

PTXE_OP("griddepcontrol.wait") {
  if (grid_dependencies_done(*w.grid)) {
    w.cta->waited = true;
    w.grid->waited = true;
    grid_dependency_wait(w);
    return Step::Next;
  }
  return wait_because(w, [](Warp&, const Instruction&) -> std::string { return "the launch before this one to end"; });
}

PTXE_OP("griddepcontrol.launch_dependents") {
  if (!knows_grid_dependency(w)) w.grid->let_go_unwaited = true;
  launch_dependents(w);
  return Step::Next;
}

PTXE_OP("nanosleep") {  // nanoseconds
  uint32_t longest = 0;
  each_lane(w, [&](int lane) { longest = std::max(longest, w.values<uint32_t>(i.args[0])[lane]); });
  w.time += to_cycles(longest);
  return Step::Yield;
}

PTXE_OP("pmevent") { return Step::Next; }

PTXE_OP("clusterlaunchcontrol.try_cancel") {  // address, mbarrier, space, whether all CTAs get the response
  const AddressArgs address(i, 0), mbarrier(i, 4);
  const auto space = static_cast<Space>(i.args[8]);
  each_lane(w, [&](int lane) {
    const Place to = locate(w, space, address.at(w, lane), kResponseBytes, kResponseBytes, lane);
    const Place signal = locate(w, space, mbarrier.at(w, lane), sizeof(uint64_t), sizeof(uint64_t), lane);
    if (!to || !signal) return;
    if (to.home != Place::Shared || to.cta != w.cta || signal.home != Place::Shared || signal.cta != w.cta) {
      report(w, Report::OutOfBounds, lane, "The response and the mbarrier must be in the CTA's own shared memory.");
      return;
    }
    try_cancel(w, to, signal, i.args[9], lane);
  });
  return Step::Next;
}

PTXE_OP("clusterlaunchcontrol.is_canceled") {  // predicate, response
  Lanes cancelled = 0;
  each_lane(w, [&](int lane) {
    cancelled |= static_cast<Lanes>(w.values<uint32_t>(i.args[1])[4 * lane + 3] == 1) << lane;
  });
  w.set_predicate(i.args[0], cancelled);
  return Step::Next;
}

PTXE_OP("clusterlaunchcontrol.first_ctaid") {  // destination, response, dimension (3: unspecified word)
  each_lane(w, [&](int lane) {
    w.values<uint32_t>(i.args[0])[lane] = w.values<uint32_t>(i.args[1])[4 * lane + static_cast<int>(i.args[2])];
  });
  return Step::Next;
}

// Clocks must be read when the instruction executes, so a mov from them becomes one of these: destination.
PTXE_OP("read.clock") { return read_time<uint32_t>(w, i, [](uint64_t t) { return t; }); }
PTXE_OP("read.clock_hi") { return read_time<uint32_t>(w, i, [](uint64_t t) { return t >> 32; }); }
PTXE_OP("read.clock64") { return read_time<uint64_t>(w, i, [](uint64_t t) { return t; }); }
PTXE_OP("read.globaltimer") { return read_time<uint64_t>(w, i, to_nanoseconds); }
PTXE_OP("read.globaltimer_lo") { return read_time<uint32_t>(w, i, to_nanoseconds); }
PTXE_OP("read.globaltimer_hi") { return read_time<uint32_t>(w, i, [](uint64_t t) { return to_nanoseconds(t) >> 32; }); }

}  // namespace ptxe
