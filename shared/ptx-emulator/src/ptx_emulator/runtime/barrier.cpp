// The sixteen named barriers of a CTA, and the barrier of the cluster.
//
// A warp arrives when all of its live threads have; it then counts as 32 threads, as the PTX ISA says. A barrier
// without a thread count waits for every warp that has not exited.
#include "barrier.h"

#include <algorithm>
#include <array>

#include "memory.h"

namespace ptxe {


namespace {

constexpr uint32_t kNumBarriers = 16;
constexpr uint32_t kMaxWarps = 32;
constexpr uint32_t kClusterBarrier = kNumBarriers;  // number of the cluster's barrier in entries

enum class Kind : uint32_t { Sync, Arrive, Popc, And, Or };

// A warp at a barrier.
struct Arrival {
  Stamp stamp;
  Site site;
};

// One use of a barrier, from the first arrival until it completes.
struct Generation {
  Sync sync;
  uint32_t expected = 0;        // threads; 0: all of the CTA
  uint32_t arrived = 0;         // threads
  uint32_t arrivals = 0;        // warps, counted as often as they arrive
  std::vector<bool> came;       // warps, by component
  std::vector<Arrival> by_warp;  // of a named barrier, in their order
  bool reduces = false;
  uint32_t num_true = 0, num_voted = 0;
  bool complete = false;

  bool has(const Warp& w) const { return w.component < came.size() && came[w.component]; }
  void add(const Warp& w) {
    if (came.size() <= w.component) came.resize(w.component + 1);
    came[w.component] = true;
    ++arrivals;
  }
};
using GenerationPtr = std::shared_ptr<Generation>;

struct NamedBarrier {
  GenerationPtr current = std::make_shared<Generation>();
  GenerationPtr completed;  // the one before; null if there is none
  std::array<uint32_t, kMaxWarps> counts{};  // threads that each warp's lanes here expect
  std::array<Lanes, kMaxWarps> here{};   // of each warp, before all of its live lanes have come
  std::array<Lanes, kMaxWarps> votes{};  // their predicates
};

struct NamedBarriers : GroupState {  // of a CTA
  std::array<NamedBarrier, kNumBarriers> barriers;
};

struct ClusterBarrier : GroupState {  // of a cluster
  GenerationPtr current = std::make_shared<Generation>();
};

// Lanes of a warp that have come to a barrier and not gone on.
struct Entry {
  Lanes lanes;
  uint32_t barrier;
  GenerationPtr generation;  // null until the whole warp has come
};
struct Entries : GroupState {  // of a warp
  std::vector<Entry> list;
};

std::vector<Entry>& entries_of(Warp& w) { return w.state.get<Entries>().list; }

Entry* find_entry(std::vector<Entry>& list, Lanes lanes, bool cluster) {
  for (Entry& entry : list) {
    if ((entry.lanes & lanes) && (entry.barrier == kClusterBarrier) == cluster) return &entry;
  }
  return nullptr;
}

void leave(std::vector<Entry>& list, Entry* entry, Lanes lanes) {
  entry->lanes &= ~lanes;
  if (!entry->lanes) list.erase(list.begin() + (entry - list.data()));
}

// All warps that can still come, and have not.
std::vector<const Warp*> missing_warps(const Cta& cta, const Generation& generation) {
  std::vector<const Warp*> missing;
  for (const Warp& w : cta.warps) {
    if (w.live && !generation.has(w)) missing.push_back(&w);
  }
  return missing;
}

bool is_full(const Cta& cta, const Generation& generation) {
  if (generation.expected) return generation.arrived >= generation.expected;
  return generation.arrivals != 0 && missing_warps(cta, generation).empty();
}

void try_complete(Cta& cta, NamedBarrier& barrier) {
  if (!is_full(cta, *barrier.current)) return;
  barrier.current->complete = true;
  barrier.completed = barrier.current;
  barrier.current = std::make_shared<Generation>();
  ++cta.cluster->progress;
}

std::string barrier_name(const Cta& cta, uint32_t number) {
  return "barrier " + std::to_string(number) + " of " + cta_name(cta);
}

// "warp 3", "warps 0-3,7"
std::string warps_text(const std::vector<const Warp*>& warps) {
  Lanes mask = 0;
  for (const Warp* w : warps) mask |= 1u << w->index;
  return (warps.size() == 1 ? "warp " : "warps ") + lanes_text(mask);
}

std::string count_text(uint32_t expected) {
  return expected ? std::to_string(expected) + " threads" : std::string("all threads");
}

void check_use(Warp& w, uint32_t number, const Generation& generation, uint32_t expected, bool reduces) {
  const std::string name = barrier_name(*w.cta, number);
  const uint32_t all = static_cast<uint32_t>(w.cta->warps.size()) * kLanes;
  // Also a count of all threads beside no count: an H200 stops with an illegal instruction.
  if (generation.arrivals && generation.expected != expected) {
    const auto counted = [](uint32_t count) {
      return count_text(count) + (count ? " by a count" : " without a count");
    };
    report(w, Report::BarrierMisuse, -1,
           "A warp arrives at " + name + " for " + counted(expected) + ", others did for " +
               counted(generation.expected) + ".");
  }
  if (generation.arrivals && generation.reduces != reduces) {
    report(w, Report::BarrierMisuse, -1, "A reduction is mixed with sync or arrive at " + name + ".");
  }
  if (generation.has(w)) {
    report(w, Report::BarrierMisuse, -1,
           "The warp arrives at " + name + " again before it has completed: " + std::to_string(generation.arrived) +
               " of " + count_text(generation.expected) + " have arrived.");
  }
  if (expected % kLanes || expected > all) {
    report(w, Report::BarrierMisuse, -1,
           "The thread count of " + name + " is " + std::to_string(expected) + "; a multiple of 32 up to " +
               std::to_string(all) + " is expected.");
  }
}

// The warps of the use before must have arrived before: else one of them may be counted together with this warp,
// whether or not that has happened here.
void check_order(Warp& w, uint32_t number, const NamedBarrier& barrier, uint32_t expected) {
  if (!barrier.completed) return;
  for (const Arrival& earlier : barrier.completed->by_warp) {
    if (happened_before(earlier.stamp, w)) continue;
    report(*w.grid, Report::BarrierMisuse, site_of(w),
           "A warp arrives at " + barrier_name(*w.cta, number) + " for " + count_text(expected) +
               ", and nothing orders it behind the use before, for " + count_text(barrier.completed->expected) +
               ", which it may disturb: more threads arrive than the barrier counts, or the counts differ.",
           &earlier.site);
    return;
  }
}

// The whole warp has come: it arrives.
void arrive(Warp& w, uint32_t number, NamedBarrier& barrier, uint32_t expected, Kind kind) {
  Generation& generation = *barrier.current;
  const bool reduces = kind != Kind::Sync && kind != Kind::Arrive;
  check_use(w, number, generation, expected, reduces);
  check_order(w, number, barrier, expected);
  generation.expected = expected;
  generation.reduces = reduces;
  generation.arrived += kLanes;
  generation.add(w);
  generation.by_warp.push_back({stamp(w), site_of(w)});
  generation.num_voted += static_cast<uint32_t>(__builtin_popcount(barrier.here[w.index]));
  generation.num_true += static_cast<uint32_t>(__builtin_popcount(barrier.votes[w.index] & barrier.here[w.index]));
  release(w, generation.sync);
  for (Entry& entry : entries_of(w)) {
    if (entry.barrier == number && !entry.generation) entry.generation = barrier.current;
  }
  barrier.here[w.index] = barrier.votes[w.index] = 0;
  ++w.cluster->progress;
}

// The number of the barrier that the lanes name, or kNumBarriers after a report.
uint32_t barrier_number(Warp& w, uint32_t slot) {
  const uint32_t number = w.values<uint32_t>(slot)[w.first_lane()];
  bool uniform = true;
  each_lane(w, [&](int lane) { uniform = uniform && w.values<uint32_t>(slot)[lane] == number; });
  if (!uniform) report(w, Report::BarrierMisuse, w.first_lane(), "The lanes of the warp name different barriers.");
  if (number < kNumBarriers) return number;
  report(w, Report::BarrierMisuse, w.first_lane(),
         "Barrier " + std::to_string(number) + " does not exist; 0 to 15 do.");
  return kNumBarriers;
}

// Notes how many threads the lanes expect at a barrier. They must agree, also with those of the warp that came before.
void note_count(Warp& w, uint32_t slot, uint32_t number, NamedBarrier& barrier) {
  const uint32_t* counts = w.values<uint32_t>(slot);
  uint32_t& count = barrier.counts[w.index];
  if (!barrier.here[w.index]) count = counts[w.first_lane()];
  for (Lanes rest = w.lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (counts[lane] == count) continue;
    report(w, Report::BarrierMisuse, lane,
           "The thread arrives at " + barrier_name(*w.cta, number) + " for " + count_text(counts[lane]) +
               ", others of its warp do for " + count_text(count) + ".");
    return;
  }
}

// The lanes come to a barrier: notes them and their votes. False after a report.
bool come(Warp& w, const Instruction& i, Kind kind) {
  const uint32_t number = barrier_number(w, i.args[0]);
  if (number == kNumBarriers) return false;
  NamedBarrier& barrier = w.cta->state.get<NamedBarriers>().barriers[number];
  if (kind != Kind::Sync && kind != Kind::Arrive) {
    const Lanes votes = i.args[5] ? ~w.predicate(i.args[4]) : w.predicate(i.args[4]);
    barrier.votes[w.index] = (barrier.votes[w.index] & ~w.lanes) | (votes & w.lanes);
  }
  note_count(w, i.args[1], number, barrier);
  barrier.here[w.index] |= w.lanes;
  entries_of(w).push_back({w.lanes, number, nullptr});
  return true;
}

void write_result(Warp& w, uint32_t slot, Kind kind, const Generation& generation) {
  if (kind == Kind::Popc) each_lane(w, [&](int lane) { w.values<uint32_t>(slot)[lane] = generation.num_true; });
  if (kind == Kind::And) w.set_predicate(slot, generation.num_true == generation.num_voted ? kAllLanes : 0);
  if (kind == Kind::Or) w.set_predicate(slot, generation.num_true ? kAllLanes : 0);
}

// ---------------------------------------------------------------------------------------------- of the cluster

bool everybody_came(const Cluster& cluster, const Generation& generation) {
  return std::all_of(cluster.ctas.begin(), cluster.ctas.end(),
                     [&](const Cta& cta) { return missing_warps(cta, generation).empty(); });
}

void try_complete(Cluster& cluster, ClusterBarrier& barrier) {
  if (!barrier.current->arrivals || !everybody_came(cluster, *barrier.current)) return;
  barrier.current->complete = true;
  barrier.current = std::make_shared<Generation>();
  ++cluster.progress;
}

const char* have(const std::vector<const Warp*>& warps) { return warps.size() == 1 ? " has " : " have "; }

// Of lanes whose warp has not come as a whole.
std::string own_lanes_text(const Warp& w, Lanes here) {
  return "lanes " + lanes_text(w.live & ~here) + " of its own warp have not arrived";
}

std::string explain_barrier(Warp& w, const Instruction&) {
  const Entry* entry = find_entry(entries_of(w), w.lanes, false);
  const NamedBarrier& barrier = w.cta->state.get<NamedBarriers>().barriers[entry->barrier];
  const std::string name = barrier_name(*w.cta, entry->barrier) + ": ";
  if (!entry->generation) return name + own_lanes_text(w, barrier.here[w.index]);
  const Generation& generation = *entry->generation;
  const std::vector<const Warp*> missing = missing_warps(*w.cta, generation);
  return name + std::to_string(generation.arrived) + " of " + count_text(generation.expected) + " have arrived" +
         (missing.empty() ? ", all warps among them" : "; " + warps_text(missing) + have(missing) + "not");
}

std::string explain_cluster_barrier(Warp& w, const Instruction&) {
  const Entry* entry = find_entry(entries_of(w), w.lanes, true);
  const std::string name = "the barrier of the cluster: ";
  if (!entry->generation) return name + own_lanes_text(w, entry->lanes);
  std::string text;
  for (const Cta& cta : w.cluster->ctas) {
    const std::vector<const Warp*> missing = missing_warps(cta, *entry->generation);
    if (!missing.empty()) text += (text.empty() ? "" : ", ") + warps_text(missing) + " of " + cta_name(cta);
  }
  return name + text + " not arrived yet";
}

}  // namespace

// Arguments: barrier, threads (0: all), kind; of a reduction also: result, predicate, whether it is negated.
PTXE_OP("barrier") {
  auto& list = entries_of(w);
  const auto kind = static_cast<Kind>(i.args[2]);
  Entry* entry = find_entry(list, w.lanes, false);
  if (!entry) {
    if (i.aligned) {
      const Step step = gather(w, i, w.live);
      if (step != Step::Execute) return step;
    }
    if (!come(w, i, kind)) return Step::Next;
    entry = &list.back();
  }
  const uint32_t number = entry->barrier;
  NamedBarrier& barrier = w.cta->state.get<NamedBarriers>().barriers[number];
  if (!entry->generation && !(w.live & ~barrier.here[w.index])) {
    arrive(w, number, barrier, barrier.counts[w.index], kind);
  }
  try_complete(*w.cta, barrier);
  if (!entry->generation) {
    return wait_because(w, explain_barrier);
  }
  const GenerationPtr generation = entry->generation;
  if (kind == Kind::Arrive) {
    leave(list, entry, w.lanes);
    return Step::Next;
  }
  if (!generation->complete) {
    return wait_because(w, explain_barrier);
  }
  if (generation->expected && generation->arrived > generation->expected) {
    report(w, Report::BarrierMisuse, -1,
           std::to_string(generation->arrived) + " threads arrived at " + barrier_name(*w.cta, number) +
               ", which expects " + std::to_string(generation->expected) + ".");
  }
  leave(list, entry, w.lanes);
  if (w.track) w.waits_for = "barrier " + std::to_string(number);
  acquire(w, generation->sync);
  if (kind != Kind::Sync) write_result(w, i.args[3], kind, *generation);
  return Step::Next;
}

PTXE_OP("barrier.cluster.arrive") {  // relaxed
  auto& list = entries_of(w);
  ClusterBarrier& barrier = w.cluster->state.get<ClusterBarrier>();
  Entry* here = find_entry(list, w.live & ~w.lanes, true);
  if (i.aligned) {
    const Step step = gather(w, i, w.live);
    if (step != Step::Execute) return step;
  }
  if (find_entry(list, w.lanes, true)) {
    report(w, Report::BarrierMisuse, -1,
           "barrier.cluster.arrive a second time, without barrier.cluster.wait in between.");
    return Step::Next;
  }
  if (here && !here->generation) {
    here->lanes |= w.lanes;
  } else {
    list.push_back({w.lanes, kClusterBarrier, nullptr});
    here = &list.back();
  }
  Generation& generation = *barrier.current;
  if (i.args[0]) {
    release_fenced(w, generation.sync);
  } else {
    release(w, generation.sync);
  }
  if (!(w.live & ~here->lanes)) {
    here->generation = barrier.current;
    generation.add(w);
    ++w.cluster->progress;
    try_complete(*w.cluster, barrier);
  }
  return Step::Next;
}

PTXE_OP("barrier.cluster.wait") {
  auto& list = entries_of(w);
  Entry* entry = find_entry(list, w.lanes, true);
  if (!entry) {
    report(w, Report::BarrierMisuse, -1, "barrier.cluster.wait without barrier.cluster.arrive before it.");
    return Step::Next;
  }
  ClusterBarrier& barrier = w.cluster->state.get<ClusterBarrier>();
  if (!entry->generation && !(w.live & ~entry->lanes)) {  // the other lanes have exited
    entry->generation = barrier.current;
    barrier.current->add(w);
  }
  if (!entry->generation || !entry->generation->complete) try_complete(*w.cluster, barrier);
  if (!entry->generation || !entry->generation->complete) {
    return wait_because(w, explain_cluster_barrier);
  }
  const GenerationPtr generation = entry->generation;
  leave(list, entry, w.lanes);
  if (w.track) w.waits_for = "barrier of the cluster";
  acquire(w, generation->sync);
  return Step::Next;
}

}  // namespace ptxe
