// mbarrier: init, inval, arrive, expect_tx, complete_tx, waits.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <unordered_map>

#include "barrier.h"
#include "memory.h"

namespace ptxe {

namespace {

constexpr int64_t kMaxCount = (1 << 20) - 1;  // of arrivals, and of tx bytes either side of zero
constexpr uint32_t kMBarrierBytes = 8;
constexpr uint32_t kPendingBits = 20;  // a state token is the phase above the pending count

struct MBarrier {
  uint32_t expected = 0;  // arrivals per phase
  uint32_t pending = 0;   // arrivals missing in the current phase
  int64_t tx = 0;         // bytes expected less bytes arrived; copies may complete before they are expected
  uint64_t phase = 0;     // the incomplete one; all before it are complete
  Sync arriving;          // released into by those who have arrived in the current phase
  Sync completed;         // of all complete phases
  Stamp init, fence;      // mbarrier.init, and the fence.mbarrier_init of the same warp behind it
  Site init_site;
  Site expect_site;  // of the last expect_tx
};

struct MBarriers : GroupState {
  std::unordered_map<uint32_t, MBarrier> by_offset;
};

struct Suspended {
  uint32_t pc;
  uint64_t wakes;  // when it began to wait
};
struct TryWaits : GroupState {  // of a warp
  std::vector<Suspended> suspended;
};
struct Wakes : GroupState {  // of a cluster
  uint64_t wakes = 0;
  uint32_t suspended = 0;
};

// Where an mbarrier operation is executed, for its reports.
struct Origin {
  Cluster& cluster;
  Site site;
};

template <class... T>
std::string format(const char* pattern, T... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string name_of(const Cta& cta, uint32_t offset) {
  return format("mbarrier 0x%x of ", offset) + cta_name(cta) + format(" (rank %u)", cta.rank);
}

void misuse(const Origin& from, const std::string& message) {
  report(*from.cluster.grid, Report::BarrierMisuse, from.site, message);
}

MBarrier* find(const Origin& from, Cta& cta, uint32_t offset, const char* what) {
  auto& table = cta.state.get<MBarriers>().by_offset;
  const auto found = table.find(offset);
  if (found != table.end()) return &found->second;
  misuse(from, format("%s on ", what) + name_of(cta, offset) + ", which is not initialised.");
  return nullptr;
}

void settle(Cluster& cluster, MBarrier& b) {
  ++cluster.progress;
  if (b.pending != 0 || b.tx != 0) return;
  ++b.phase;
  b.pending = b.expected;
  b.completed.views.join(b.arriving.views);
  b.completed.time = std::max(b.completed.time, b.arriving.time);
  b.arriving.clear();
}

void arrive(const Origin& from, Cta& cta, uint32_t offset, MBarrier& b, uint32_t count) {
  if (count > b.pending) {
    misuse(from, format("%u arrivals on ", count) + name_of(cta, offset) +
                     format(" in phase %" PRIu64 ", where %u of %u are pending.", b.phase, b.pending, b.expected));
    count = b.pending;
  }
  b.pending -= count;
  settle(from.cluster, b);
}

void add_tx(const Origin& from, Cta& cta, uint32_t offset, MBarrier& b, int64_t bytes) {
  b.tx += bytes;
  if (bytes > 0) b.expect_site = from.site;
  if (b.tx > kMaxCount || b.tx < -kMaxCount) {
    misuse(from, format("The tx-count of ") + name_of(cta, offset) +
                     format(" is %" PRId64 " in phase %" PRIu64 "; the limit is %" PRId64 ".", b.tx, b.phase,
                            kMaxCount));
  }
  settle(from.cluster, b);
}

// The mbarrier that `lane` addresses; null after a report. The object is accessed as an atomic would be, so that an
// initialisation that is not ordered before shows as a race.
struct MBarrierAt {
  Place place;
  MBarrier* barrier = nullptr;
  explicit operator bool() const { return barrier != nullptr; }
};

MBarrierAt target_of(Warp& w, Space space, uint64_t address, int lane, const char* what, bool accessed = true) {
  MBarrierAt target{locate(w, space, address, kMBarrierBytes, kMBarrierBytes, lane)};
  if (!target.place) return target;
  if (target.place.home != Place::Shared) {
    report(w, Report::BarrierMisuse, lane, format("%s on an address that is not in shared memory.", what));
    return target;
  }
  const Origin from{*w.cluster, site_of(w, lane)};
  target.barrier = find(from, *target.place.cta, target.place.offset, what);
  if (target && accessed) access_memory(w, target.place, kMBarrierBytes, AccessKind::Atomic, lane);
  return target;
}

// The signal of an asynchronous operation must find the mbarrier initialised. (mbarrier.init is a write through the
// generic proxy; the warp that issues the operation is no exception.)
void check_init_visible(Cluster& cluster, const MBarrierAt& target, const Actor& actor, const char* what) {
  const MBarrier& b = *target.barrier;
  if (actor.proxy == Proxy::Generic || happened_before(b.fence, actor) || visible_to_async(b.init, actor)) return;
  if (!happened_before(b.init, actor)) return;  // a race, or nothing is checked
  report(*cluster.grid, Report::ProxyRace, actor.site,
         format("%s on ", what) + name_of(*target.place.cta, target.place.offset) +
             ", whose mbarrier.init the async proxy may not see yet: neither fence.mbarrier_init nor fence.proxy.async "
             "lies between the two.", &b.init_site);
}

// The same for an asynchronous operation, which accesses the mbarrier in the generic proxy.
MBarrierAt target_of(Cluster& cluster, uint32_t address, const Actor& actor, const char* what) {
  MBarrierAt target;
  const Origin from{cluster, actor.site};
  Cta* cta = cta_of(cluster, address);
  const uint32_t offset = address & kOffsetMask;
  if (!cta || offset % kMBarrierBytes != 0 || offset < cta->shared_base ||
      offset + kMBarrierBytes > cta->shared.size()) {
    misuse(from, format("%s on address 0x%x, which is no mbarrier of the cluster.", what, address));
    return target;
  }
  if (cta->exited && cta->linear != actor.site.cta) {
    report(*cluster.grid, Report::OutOfBounds, actor.site,
           format("%s on ", what) + name_of(*cta, offset) + ", whose threads have all exited.");
    return target;
  }
  target.place = Place{Place::Shared, cta->shared.data() + offset, cta, offset};
  target.barrier = find(from, *cta, offset, what);
  if (target && cluster.checker) {
    check_init_visible(cluster, target, actor, what);
    Actor generic = actor;
    generic.proxy = Proxy::Generic;
    access_memory(cluster, generic, target.place, kMBarrierBytes, AccessKind::Atomic);
  }
  return target;
}

bool same_barrier(const MBarrierAt& a, const MBarrierAt& b) { return a.barrier && a.barrier == b.barrier; }

// Arguments: address, space, ...
constexpr uint32_t kSpaceArg = 4;
Space space_of(const Instruction& i) { return static_cast<Space>(i.args[kSpaceArg]); }

enum ArriveFlags : uint32_t { kRelaxed = 1, kNoComplete = 2, kDrop = 4, kExpectTx = 8 };

uint64_t token_of(const MBarrier& b) { return b.phase << kPendingBits | b.pending; }

// One lane's arrival. `released`: the warp has already released into this phase of the barrier.
void arrive_lane(Warp& w, const MBarrierAt& target, uint32_t count, uint32_t tx, uint32_t flags, int lane,
                 bool released) {
  const Origin from{*w.cluster, site_of(w, lane)};
  MBarrier& b = *target.barrier;
  Cta& cta = *target.place.cta;
  const uint32_t offset = target.place.offset;
  if (count == 0 || count > kMaxCount) {
    misuse(from, format("An arrival with count %u on ", count) + name_of(cta, offset) + "; 1 to 1048575 are allowed.");
    return;
  }
  if (!released) {
    if (flags & kRelaxed) {
      release_fenced(w, b.arriving);
    } else {
      release(w, b.arriving);
    }
  }
  if (flags & kExpectTx) add_tx(from, cta, offset, b, tx);
  if (flags & kDrop) b.expected -= std::min(count, b.expected);
  const uint64_t phase = b.phase;
  arrive(from, cta, offset, b, count);
  if ((flags & kNoComplete) && b.phase != phase) {
    misuse(from, format("An arrival with .noComplete completed phase %" PRIu64 " of ", phase) + name_of(cta, offset) +
                     ".");
  }
}

// Whether the phase that a lane waits for is complete.
bool is_complete(Warp& w, const MBarrierAt& target, uint64_t wanted, bool parity, int lane) {
  const MBarrier& b = *target.barrier;
  if (parity) return (b.phase & 1) != (wanted & 1);
  const uint64_t phase = wanted >> kPendingBits;
  if (phase > b.phase || b.phase > phase + 1) {
    report(w, Report::BarrierMisuse, lane,
           format("A wait for the state of phase %" PRIu64 " of ", phase) +
               name_of(*target.place.cta, target.place.offset) +
               format(", which is in phase %" PRIu64 "; only the current and the preceding phase can be waited for.",
                      b.phase));
    return true;
  }
  return b.phase != phase;
}

std::string phase_name(const Warp& w, const MBarrierAt& target, uint64_t phase) {
  const Cta& cta = *target.place.cta;
  const std::string where = &cta == w.cta ? "" : " of " + cta_name(cta);
  return format("mbarrier 0x%x", target.place.offset) + where + format(", phase %" PRIu64, phase);
}

enum WaitFlags : uint32_t { kParity = 1, kWaitRelaxed = 2 };

// The lanes whose phase is complete. Arguments: address, space, predicate, wanted, flags.
Lanes test(Warp& w, const Instruction& i) {
  const AddressArgs address(i, 0);
  const uint32_t flags = i.args[7];
  Lanes complete = 0;
  MBarrierAt last;
  uint64_t last_address = ~0ull;
  bool acquired = false;  // from the barrier of the lane before
  each_lane(w, [&](int lane) {
    const uint64_t at = address.at(w, lane);
    if (at != last_address) {
      last = target_of(w, space_of(i), at, lane, "A wait", false);
      acquired = false;
    }
    last_address = at;
    if (!last) {
      complete |= 1u << lane;  // reported; a wait for it would never end
      return;
    }
    const uint64_t wanted =
        (flags & kParity) ? w.values<uint32_t>(i.args[6])[lane] : w.values<uint64_t>(i.args[6])[lane];
    if (!is_complete(w, last, wanted, flags & kParity, lane)) return;
    complete |= 1u << lane;
    if (acquired) return;
    acquired = true;
    access_memory(w, last.place, kMBarrierBytes, AccessKind::Atomic, lane);
    if (flags & kWaitRelaxed) {
      observe_relaxed(w, last.barrier->completed);
    } else {
      // The phase that is complete comes before the one that the barrier is in.
      if (w.track) w.waits_for = phase_name(w, last, last.barrier->phase - 1);
      acquire(w, last.barrier->completed);
    }
  });
  return complete;
}

// "1 of 2 arrivals and 256 bytes missing"
std::string missing_text(const MBarrier& b) {
  std::string text = b.pending ? format("%u of %u arrivals", b.pending, b.expected) : "";
  if (b.tx > 0) text += (b.pending ? " and " : "") + format("%" PRId64 " bytes", b.tx);
  if (b.pending || b.tx > 0) text += " missing";
  if (b.tx < 0) text += (b.pending ? ", " : "") + format("%" PRId64 " bytes more than were expected", -b.tx);
  return text;
}

// The phase that the first of the lanes waits for is the one that its mbarrier is in.
std::string explain_wait(Warp& w, const Instruction& i) {
  const AddressArgs address(i, 0);
  const int lane = w.first_lane();
  const Place place = locate(w, space_of(i), address.at(w, lane), kMBarrierBytes, kMBarrierBytes, lane);
  if (!place) return "an mbarrier";
  const MBarrier& b = place.cta->state.get<MBarriers>().by_offset[place.offset];
  return format("mbarrier 0x%x of ", place.offset) + cta_name(*place.cta) +
         format(", phase %" PRIu64 " (parity %u): ", b.phase, static_cast<unsigned>(b.phase & 1)) + missing_text(b);
}

// Whether a try_wait that has nothing to return may give up now; remembers since when it waits.
bool gives_up(Warp& w) {
  auto& wakes = w.cluster->state.get<Wakes>();
  auto& list = w.state.get<TryWaits>().suspended;
  const uint32_t pc = w.pc();
  const auto found = std::find_if(list.begin(), list.end(), [&](const Suspended& s) { return s.pc == pc; });
  if (found == list.end()) {
    list.push_back({pc, wakes.wakes});
    ++wakes.suspended;
    return false;
  }
  return found->wakes != wakes.wakes;
}

void resume(Warp& w) {
  auto& wakes = w.cluster->state.get<Wakes>();
  if (!wakes.suspended) return;
  auto& list = w.state.get<TryWaits>().suspended;
  const uint32_t pc = w.pc();
  const auto found = std::find_if(list.begin(), list.end(), [&](const Suspended& s) { return s.pc == pc; });
  if (found == list.end()) return;
  list.erase(found);
  --wakes.suspended;
}

}  // namespace

void mbarrier_complete_tx(Cluster& cluster, uint32_t address, uint32_t bytes, const Actor& actor) {
  const MBarrierAt target = target_of(cluster, address, actor, "A completed transaction");
  if (!target) return;
  MBarrier& b = *target.barrier;
  finish(cluster, actor, b.arriving);
  b.arriving.time = std::max(b.arriving.time, actor.time);
  add_tx({cluster, actor.site}, *target.place.cta, target.place.offset, b, -static_cast<int64_t>(bytes));
}

void mbarrier_arrive(Cluster& cluster, uint32_t address, const Actor& actor) {
  const MBarrierAt target = target_of(cluster, address, actor, "An asynchronous arrival");
  if (!target) return;
  MBarrier& b = *target.barrier;
  finish(cluster, actor, b.arriving);
  b.arriving.time = std::max(b.arriving.time, actor.time);
  arrive({cluster, actor.site}, *target.place.cta, target.place.offset, b, 1);
}

void mbarrier_arrive(Warp& w, uint32_t address, uint32_t count, int lane) {
  const MBarrierAt target = target_of(w, Space::SharedCluster, address, lane, "An arrival");
  if (target) arrive_lane(w, target, count, 0, 0, lane, false);
}

void mbarrier_add_pending(Warp& w, uint32_t address, uint32_t count, int lane) {
  const MBarrierAt target = target_of(w, Space::SharedCluster, address, lane, "An increment of the pending count");
  if (!target) return;
  target.barrier->pending += count;
  if (target.barrier->pending <= kMaxCount) return;
  report(w, Report::BarrierMisuse, lane,
         "The pending count of " + name_of(*target.place.cta, target.place.offset) + " exceeds 1048575.");
}

void check_barriers_at_exit(Cta& cta) {
  for (const auto& [offset, b] : cta.state.get<MBarriers>().by_offset) {
    if (b.tx == 0) continue;
    const Site site = b.tx > 0 ? b.expect_site : Site{cta.linear, 0, -1, ~0u};
    report(*cta.grid, Report::BarrierMisuse, site,
           "The CTA ended while " + name_of(cta, offset) +
               format(" had a tx-count of %" PRId64 " in phase %" PRIu64 ": %s.", b.tx, b.phase,
                      b.tx > 0 ? "more bytes were expected than arrived" : "more bytes arrived than were expected"));
  }
}

bool wake_try_waits(Cluster& cluster) {
  auto& wakes = cluster.state.get<Wakes>();
  ++wakes.wakes;
  return wakes.suspended != 0;
}

PTXE_OP("mbarrier.init") {  // address, space, count
  const AddressArgs address(i, 0);
  each_lane(w, [&](int lane) {
    const Place place = locate(w, space_of(i), address.at(w, lane), kMBarrierBytes, kMBarrierBytes, lane);
    if (!place) return;
    const Origin from{*w.cluster, site_of(w, lane)};
    if (place.home != Place::Shared || place.cta != w.cta) {
      misuse(from, "mbarrier.init on an address that is not in the CTA's own shared memory.");
      return;
    }
    const uint32_t count = w.values<uint32_t>(i.args[5])[lane];
    if (count == 0 || count > kMaxCount) {
      misuse(from, format("mbarrier.init of ") + name_of(*place.cta, place.offset) +
                       format(" with count %u; 1 to %" PRId64 " are allowed.", count, kMaxCount));
      return;
    }
    MBarrier& b = place.cta->state.get<MBarriers>().by_offset[place.offset];
    if (b.expected && (b.pending != b.expected || b.tx != 0)) {
      misuse(from, "mbarrier.init of " + name_of(*place.cta, place.offset) +
                       format(" while its phase %" PRIu64 " is in flight: ", b.phase) +
                       format("%u of %u arrivals missing, tx-count %" PRId64 ".", b.pending, b.expected, b.tx));
    }
    access_memory(w, place, kMBarrierBytes, AccessKind::Write, lane);
    b = MBarrier{};
    b.expected = b.pending = count;
    b.init = stamp(w);
    b.init_site = from.site;
    ++w.cluster->progress;
  });
  return Step::Next;
}

PTXE_OP("fence.mbarrier_init") {
  for (auto& [offset, b] : w.cta->state.get<MBarriers>().by_offset) {
    if (b.init.value && b.init.component == w.component && !b.fence.value) b.fence = stamp(w);
  }
  // Orders mbarrier.init alone; taken as a fence of everything.
  fence_memory(w, Order::Release, Scope::Cluster);
  return Step::Next;
}

PTXE_OP("mbarrier.inval") {  // address, space
  const AddressArgs address(i, 0);
  each_lane(w, [&](int lane) {
    const MBarrierAt target = target_of(w, space_of(i), address.at(w, lane), lane, "mbarrier.inval", false);
    if (!target) return;
    const MBarrier& b = *target.barrier;
    Cta& cta = *target.place.cta;
    if (b.pending != b.expected || b.tx != 0) {
      report(w, Report::BarrierMisuse, lane,
             "mbarrier.inval of " + name_of(cta, target.place.offset) +
                 format(" while its phase %" PRIu64 " is in flight: %u of %u arrivals missing, tx-count %" PRId64 ".",
                        b.phase, b.pending, b.expected, b.tx));
    }
    access_memory(w, target.place, kMBarrierBytes, AccessKind::Write, lane);
    cta.state.get<MBarriers>().by_offset.erase(target.place.offset);
    ++w.cluster->progress;
  });
  return Step::Next;
}

PTXE_OP("mbarrier.arrive") {  // address, space, state, count, tx bytes, flags
  const AddressArgs address(i, 0);
  const uint32_t flags = i.args[8];
  MBarrierAt last;
  uint64_t last_phase = 0;
  each_lane(w, [&](int lane) {
    const MBarrierAt target = target_of(w, space_of(i), address.at(w, lane), lane, "mbarrier.arrive", !last);
    if (!target) return;
    const bool released = same_barrier(target, last) && target.barrier->phase == last_phase;
    if (!same_barrier(target, last) && last) access_memory(w, target.place, kMBarrierBytes, AccessKind::Atomic, lane);
    w.values<uint64_t>(i.args[5])[lane] = token_of(*target.barrier);
    last_phase = target.barrier->phase;
    const uint32_t count = w.values<uint32_t>(i.args[6])[lane], tx = w.values<uint32_t>(i.args[7])[lane];
    arrive_lane(w, target, count, tx, flags, lane, released);
    last = target;
  });
  return Step::Next;
}

PTXE_OP("mbarrier.tx") {  // address, space, bytes, whether they are completed (else expected)
  const AddressArgs address(i, 0);
  const bool completed = i.args[6];
  const char* name = completed ? "mbarrier.complete_tx" : "mbarrier.expect_tx";
  each_lane(w, [&](int lane) {
    const MBarrierAt target = target_of(w, space_of(i), address.at(w, lane), lane, name);
    if (!target) return;
    const int64_t bytes = w.values<uint32_t>(i.args[5])[lane];
    add_tx({*w.cluster, site_of(w, lane)}, *target.place.cta, target.place.offset, *target.barrier,
           completed ? -bytes : bytes);
  });
  return Step::Next;
}

PTXE_OP("mbarrier.test_wait") {  // address, space, predicate, phase or parity, flags
  const Lanes complete = test(w, i);
  w.set_predicate(i.args[5], complete);
  return complete == w.lanes ? Step::Next : Step::Yield;
}

PTXE_OP("mbarrier.try_wait") {  // address, space, predicate, phase or parity, flags
  const Lanes complete = test(w, i);
  if (!complete && !gives_up(w)) return wait_because(w, explain_wait);
  resume(w);
  w.set_predicate(i.args[5], complete);
  return complete == w.lanes ? Step::Next : Step::Yield;
}

PTXE_OP("mbarrier.pending_count") {  // count, state
  each_lane(w, [&](int lane) {
    w.values<uint32_t>(i.args[0])[lane] =
        static_cast<uint32_t>(w.values<uint64_t>(i.args[1])[lane] & ((1u << kPendingBits) - 1));
  });
  return Step::Next;
}

}  // namespace ptxe
