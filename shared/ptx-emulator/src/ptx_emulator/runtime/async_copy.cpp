// cp.async: copies of 4, 8 or 16 bytes from global to shared memory that single threads start and wait for.
#include <algorithm>

#include "barrier.h"
#include "checker.h"
#include "memory.h"
#include "traffic.h"

namespace ptxe {

namespace {

constexpr uint64_t kCopyCycles = 400;   // virtual, from issue to completion
constexpr size_t kKeptArrived = 64;     // copies that an mbarrier was told of and nobody has waited for

enum class Fill : uint32_t { None, SourceSize, IgnoreSource };  // what the last argument is, as in async_copy.py

// The copies of one instruction, and who has yet to wait for them.
struct Copy {
  Actor actor;
  Lanes lanes = 0;      // that copy
  Lanes unwaited = 0;   // that have not waited for it
  Lanes committed = 0;  // that have put it into a group
  uint32_t group[kLanes];
  Space destination_space;
  uint64_t destination[kLanes], source[kLanes];
  uint32_t source_bytes[kLanes];  // the rest is filled with zeros
  uint32_t bytes;
  bool done = false;
  bool arrived = false;  // an mbarrier has been told

  void run(Cluster& cluster);

 private:
  struct Run {
    int lane;
    uint32_t num_lanes;
  };
  Run run_from(int lane) const;
  void copy(Cluster& cluster, const Run& run);
};

// Lanes from `lane` on whose sources and destinations adjoin.
Copy::Run Copy::run_from(int lane) const {
  uint32_t n = 1;
  if (source_bytes[lane] != bytes) return {lane, n};
  while (lane + static_cast<int>(n) < kLanes) {
    const int next = lane + static_cast<int>(n);
    const uint64_t ahead = static_cast<uint64_t>(n) * bytes;
    if (!(lanes >> next & 1) || source_bytes[next] != bytes || source[next] != source[lane] + ahead ||
        destination[next] != destination[lane] + ahead) {
      break;
    }
    ++n;
  }
  return {lane, n};
}

bool is_possible(Cluster& cluster, Space space, uint64_t address, uint32_t bytes, uint32_t alignment,
                 AccessKind kind) {
  Refusal refusal;
  return static_cast<bool>(find_place(cluster, nullptr, nullptr, space, address, bytes, alignment, kind, -1, refusal));
}

void Copy::copy(Cluster& cluster, const Run& run) {
  Site site = actor.site;
  site.lane = run.lane;
  const uint32_t total = bytes * run.num_lanes;
  const uint32_t wanted = run.num_lanes > 1 ? total : source_bytes[run.lane];
  const uint64_t from = source[run.lane], to = destination[run.lane];
  if (run.num_lanes > 1 && !(is_possible(cluster, Space::Global, from, wanted, bytes, AccessKind::Read) &&
                             is_possible(cluster, destination_space, to, total, bytes, AccessKind::Write))) {
    for (uint32_t n = 0; n < run.num_lanes; ++n) copy(cluster, {run.lane + static_cast<int>(n), 1});
    return;
  }
  Place in;
  if (wanted) in = resolve_async(cluster, actor, Space::Global, from, wanted, bytes, AccessKind::Read, site);
  const Place out = resolve_async(cluster, actor, destination_space, to, total, bytes, AccessKind::Write, site);
  if (!out) return;
  if (in) {
    std::memcpy(out.data, in.data, wanted);
  } else {
    std::memset(out.data, 0xff, wanted);
  }
  std::memset(out.data + wanted, 0, total - wanted);
}

void Copy::run(Cluster& cluster) {
  if (done) return;
  done = true;
  for (int lane = 0; lane < kLanes;) {
    if (!(lanes >> lane & 1)) {
      ++lane;
      continue;
    }
    const Run next = run_from(lane);
    copy(cluster, next);
    lane += static_cast<int>(next.num_lanes);
  }
  actor.time += kCopyCycles;
  ++cluster.progress;
}

struct CopyOp : AsyncOp {
  std::shared_ptr<Copy> copy;
  bool step(Cluster& cluster) override {
    copy->run(cluster);
    return true;
  }
  std::string describe() const override {
    return "cp.async of warp " + std::to_string(copy->actor.site.warp) + ", " +
           std::to_string(__builtin_popcount(copy->lanes)) + " lanes of " + std::to_string(copy->bytes) + " bytes";
  }
};

// Per warp: copies that some lane has yet to wait for, in order of issue.
struct Copies : GroupState {
  std::vector<std::shared_ptr<Copy>> open;
  uint32_t num_groups[kLanes] = {};  // committed by each lane
};

Copies& copies_of(Warp& w) { return w.state.get<Copies>(); }

// The lanes among w.lanes that have to wait for `copy` so that at most `allowed` of their groups are incomplete.
Lanes waiting_lanes(const Warp& w, const Copies& copies, const Copy& copy, uint32_t allowed) {
  Lanes waiting = 0;
  for (Lanes rest = copy.unwaited & copy.committed & w.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (static_cast<uint64_t>(copy.group[lane]) + allowed < copies.num_groups[lane]) waiting |= 1u << lane;
  }
  return waiting;
}

void forget(Cluster& cluster, Copies& copies) {
  const auto over = [&](const std::shared_ptr<Copy>& copy) {
    const bool is_over = !copy->unwaited || (copy->done && copy->arrived && copies.open.size() > kKeptArrived);
    if (is_over) retire(cluster, copy->actor);
    return is_over;
  };
  copies.open.erase(std::remove_if(copies.open.begin(), copies.open.end(), over), copies.open.end());
}

// `select(copy)` gives the lanes that wait for a copy.
template <class Select>
Step wait_for(Warp& w, Copies& copies, Select select) {
  uint32_t missing = 0;
  for (const auto& copy : copies.open) missing += !copy->done && select(*copy);
  if (missing) {
    return wait_because(w, [](Warp& waiting, const Instruction&) {
      const auto& open = copies_of(waiting).open;
      const auto pending = std::count_if(open.begin(), open.end(), [](const auto& copy) { return !copy->done; });
      return "cp.async: " + std::to_string(pending) + " copies of its threads are not complete";
    });
  }
  for (const auto& copy : copies.open) {
    const Lanes lanes = select(*copy);
    if (!lanes) continue;
    finish(*w.cluster, copy->actor, w);
    w.time = std::max(w.time, copy->actor.time);
    copy->unwaited &= ~lanes;
  }
  forget(*w.cluster, copies);
  return Step::Next;
}

void count_copy(Warp& w, const Copy& copy, const LaneAddresses& from, const LaneAddresses& to) {
  LanePlaces source{};
  uint64_t wanted = 0;
  for (Lanes rest = copy.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (!copy.source_bytes[lane]) continue;
    wanted += copy.source_bytes[lane];
    source.granted |= 1u << lane;
    source.data[lane] = reinterpret_cast<uint8_t*>(from.address[lane]);
  }
  count(w, Count::GlobalLoadBytes, wanted);
  count(w, Count::GlobalLoadSectors, distinct_sectors(source, copy.bytes));
  count(w, Count::SharedStoreBytes, static_cast<uint64_t>(__builtin_popcount(copy.lanes)) * copy.bytes);
  const Wavefronts wavefronts = shared_wavefronts(to, copy.lanes, copy.bytes);
  count(w, Count::SharedWavefronts, wavefronts.needed);
  count(w, Count::SharedBankConflicts, wavefronts.needed - wavefronts.least);
}

uint32_t source_bytes(Warp& w, Fill fill, uint32_t slot, uint32_t bytes, int lane) {
  if (fill == Fill::IgnoreSource) return (w.predicate(slot) >> lane & 1) ? 0 : bytes;
  if (fill == Fill::None) return bytes;
  const uint32_t wanted = w.values<uint32_t>(slot)[lane];
  if (wanted > bytes) {
    report(w, Report::OutOfBounds, lane,
           "cp.async has a src-size of " + std::to_string(wanted) + " bytes, more than its cp-size of " +
               std::to_string(bytes));
  }
  return std::min(wanted, bytes);
}

// An arrival on an mbarrier per lane, once the lane's earlier copies are complete.
struct ArriveOp : AsyncOp {
  Actor actor;
  std::vector<std::shared_ptr<Copy>> copies;
  Lanes lanes = 0;
  uint32_t address[kLanes];

  bool step(Cluster& cluster) override {
    Sync copied;
    uint64_t time = actor.time;
    for (const auto& copy : copies) {
      copy->run(cluster);
      copy->arrived = true;
      finish(cluster, copy->actor, copied);
      time = std::max(time, copy->actor.time);
    }
    if (actor.before) {
      copied.views.join(*actor.before);
      actor.before = std::make_shared<const Views>(std::move(copied.views));
    }
    actor.time = time;
    for (Lanes rest = lanes; rest; rest &= rest - 1) mbarrier_arrive(cluster, address[__builtin_ctz(rest)], actor);
    retire(cluster, actor);
    ++cluster.progress;
    return true;
  }
  std::string describe() const override {
    return "cp.async.mbarrier.arrive of warp " + std::to_string(actor.site.warp);
  }
};

}  // namespace

// Arguments: destination address, its space, source address, bytes, Fill, its slot.
PTXE_OP("cp.async") {
  const auto fill = static_cast<Fill>(i.args[10]);
  const LaneAddresses to(w, AddressArgs(i, 0), w.lanes), from(w, AddressArgs(i, 5), w.lanes);
  auto copy = std::make_shared<Copy>();
  copy->lanes = copy->unwaited = w.lanes;
  copy->destination_space = static_cast<Space>(i.args[4]);
  copy->bytes = i.args[9];
  std::copy_n(to.address, kLanes, copy->destination);
  std::copy_n(from.address, kLanes, copy->source);
  each_lane(w, [&](int lane) { copy->source_bytes[lane] = source_bytes(w, fill, i.args[11], copy->bytes, lane); });
  copy->actor = issue(w, Proxy::Generic);
  count_copy(w, *copy, from, to);
  Copies& copies = copies_of(w);
  forget(*w.cluster, copies);
  copies.open.push_back(copy);
  auto op = std::make_unique<CopyOp>();
  op->copy = std::move(copy);
  start_async(w, std::move(op));
  return Step::Next;
}

PTXE_OP("cp.async.commit_group") {
  Copies& copies = copies_of(w);
  for (const auto& copy : copies.open) {
    const Lanes lanes = copy->unwaited & ~copy->committed & w.lanes;
    for (Lanes rest = lanes; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      copy->group[lane] = copies.num_groups[lane];
    }
    copy->committed |= lanes;
  }
  each_lane(w, [&](int lane) { ++copies.num_groups[lane]; });
  return Step::Next;
}

// Arguments: groups that may be incomplete.
PTXE_OP("cp.async.wait_group") {
  Copies& copies = copies_of(w);
  return wait_for(w, copies, [&](const Copy& copy) { return waiting_lanes(w, copies, copy, i.args[0]); });
}

PTXE_OP("cp.async.wait_all") {
  return wait_for(w, copies_of(w), [&](const Copy& copy) { return copy.unwaited & w.lanes; });
}

// Arguments: address of the mbarrier, whether the pending count stays as it is (.noinc).
PTXE_OP("cp.async.mbarrier.arrive") {
  const LaneAddresses at(w, AddressArgs(i, 0), w.lanes);
  auto op = std::make_unique<ArriveOp>();
  op->lanes = w.lanes;
  each_lane(w, [&](int lane) {
    op->address[lane] = static_cast<uint32_t>(at.address[lane]);
    if (!i.args[4]) mbarrier_add_pending(w, op->address[lane], 1, lane);
  });
  for (const auto& copy : copies_of(w).open) {
    if (copy->unwaited & w.lanes) op->copies.push_back(copy);
  }
  op->actor = issue(w, Proxy::Generic);
  start_async(w, std::move(op));
  return Step::Next;
}

}  // namespace ptxe
