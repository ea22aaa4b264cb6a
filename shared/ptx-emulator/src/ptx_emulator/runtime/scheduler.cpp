// Runs launches: which cluster, which warp, which asynchronous operation goes next.
//
// A worker (an OS thread) runs one cluster until it ends or cannot go on, then takes another. Within a cluster
// the order is a function of the schedule and the seed alone.
#include <algorithm>
#include <chrono>
#include <thread>

#include "barrier.h"
#include "program.h"

namespace ptxe {

namespace {

constexpr uint32_t kFairQuantum = 64;        // instructions of a warp before the next one runs
constexpr uint32_t kGreedyQuantum = 5000;    // until it waits, in practice
constexpr uint32_t kRandomQuantum = 200;     // at most
constexpr uint32_t kQuietPasses = 3;         // over all warps without progress before a late operation completes
constexpr uint32_t kSpinPasses = 200;        // ... before other clusters get a turn
constexpr uint64_t kHungSteps = 20000000;    // instructions of a cluster without progress that count as a deadlock
constexpr auto kIdleSleep = std::chrono::microseconds(20);

enum class Outcome : uint8_t { Finished, Stuck, Spinning, Parked };

// The next group of the warp that can run; false if all have been tried and wait.
bool next_group(Warp& w) {
  const auto n = static_cast<uint32_t>(w.groups.size());
  for (uint32_t k = 1; k <= n; ++k) {
    const uint32_t g = (w.current + k) % n;
    if (!w.groups[g].parked && !w.groups[g].waiting) {
      w.current = g;
      return true;
    }
  }
  return false;
}

struct Ran {
  uint32_t executed = 0;  // instructions
  bool stopped = false;   // trap
};

// The lanes of the current group that an instruction executes for.
inline Lanes guarded_lanes(Warp& w, const Group& group, const Instruction& i) {
  if (i.guard < 0) return group.lanes;
  const Lanes guard = w.predicate(static_cast<uint32_t>(i.guard));
  return group.lanes & (i.guard_negated ? ~guard : guard);
}

// Executes the current group until it jumps, waits, yields or has used up `left`. The last step says which: Next
// if `left` was used up or the group has reached where it meets others.
Step run_straight(Warp& w, uint32_t& left) {
  Group& group = w.groups[w.current];
  const Instruction* const code = w.grid->program->code.data();
  uint64_t* const executed = w.executed;
  const uint32_t meets = group.meets ? group.meets->pc : ~0u;
  while (left) {
    const Instruction& i = code[group.pc];
    const Lanes lanes = guarded_lanes(w, group, i);
    if (lanes) {
      w.lanes = lanes;
      w.at = &i;
      const Step step = i.run(w, i);
      if (step == Step::Wait) return step;
      ++executed[&i - code];
      ++w.time;
      if (w.track) w.track->executed(i, w.time);
      --left;
      if (step == Step::Jump || step == Step::Stop) return step;
      ++group.pc;
      if (step == Step::Yield || group.pc == meets) return step;
    } else if (++group.pc == meets) {
      return Step::Next;
    }
  }
  return Step::Next;
}

Ran run_warp(Warp& w, uint32_t quantum) {
  Ran ran;
  for (Group& group : w.groups) group.waiting = false;
  uint32_t left = quantum;
  while (left && !w.groups.empty()) {
    const Step step = run_straight(w, left);
    if (step == Step::Stop) {
      ran.stopped = true;
      return ran;
    }
    if (step == Step::Wait) {
      w.groups[w.current].waiting = true;
      if (!next_group(w)) break;
      continue;
    }
    if (!w.groups.empty()) settle_groups(w);
    if (step == Step::Yield) break;
  }
  ran.executed = quantum - left;
  if (w.groups.size() > 1) next_group(w);
  return ran;
}

struct ClusterRun {
  std::unique_ptr<Cluster> cluster;
  std::vector<Warp*> warps;
  Outcome last = Outcome::Spinning;
  uint64_t timed_out_at = ~0ull;  // progress at which waiting try_waits last gave up
  uint64_t quiet_steps = 0;  // instructions since something happened that another warp could wait for

  explicit ClusterRun(std::unique_ptr<Cluster> c) : cluster(std::move(c)) {
    for (Cta& cta : cluster->ctas) {
      for (Warp& w : cta.warps) warps.push_back(&w);
    }
  }

  Options& options() { return cluster->machine->options; }
  uint32_t random(uint32_t bound) { return static_cast<uint32_t>(next_random(cluster->random_state) % bound); }

  // One step of an operation in flight that no earlier one of the same order holds back. -1: the first, else chosen
  // by `pick` among those that may go.
  bool step_async(AsyncPolicy policy) {
    auto& ops = cluster->in_flight;
    std::vector<size_t> free;
    for (size_t k = 0; k < ops.size(); ++k) {
      bool held_back = false;
      for (size_t e = 0; e < k && ops[k]->order != 0 && !held_back; ++e) held_back = ops[e]->order == ops[k]->order;
      if (!held_back) free.push_back(k);
      if (policy == AsyncPolicy::Prompt && !free.empty()) break;
    }
    if (free.empty()) return false;
    size_t k = free.front();
    if (policy == AsyncPolicy::Late) k = free.back();
    if (policy == AsyncPolicy::Random) k = free[random(static_cast<uint32_t>(free.size()))];
    ++cluster->progress;
    AsyncOp* op = ops[k].get();
    if (op->step(*cluster)) {
      const auto at = std::find_if(ops.begin(), ops.end(), [&](const auto& o) { return o.get() == op; });
      ops.erase(at);
    }
    return true;
  }

  void drain_async() {
    while (!cluster->in_flight.empty() && step_async(AsyncPolicy::Prompt)) {
    }
  }

  uint32_t quantum() {
    switch (options().warps) {
      case WarpPolicy::Fair: return kFairQuantum;
      case WarpPolicy::Greedy: return kGreedyQuantum;
      case WarpPolicy::Random: return 1 + random(kRandomQuantum);
    }
    return kFairQuantum;
  }

  void after_warp() {
    const AsyncPolicy policy = options().asyncs;
    if (policy == AsyncPolicy::Prompt) step_async(policy);
    if (policy == AsyncPolicy::Random && random(4) == 0) step_async(policy);
  }

  void retire_warp(Warp& w) {
    Cta& cta = *w.cta;
    --cluster->live_warps;
    ++cluster->progress;
    const bool last = std::all_of(cta.warps.begin(), cta.warps.end(), [](const Warp& o) { return !o.live; });
    if (!last) return;
    cta.exited = true;
    if (!cta.launched_dependents && !cta.waited) cta.grid->let_go_unwaited = true;
    signal_cta(cta);
  }

  static void signal_cta(Cta& cta) {
    if (cta.launched_dependents) return;
    cta.launched_dependents = true;
    cta.grid->signalled_ctas.fetch_add(1);
  }

  // A try_wait may give up when nothing else can run; once, unless something has happened since.
  bool time_out_waits() {
    if (timed_out_at == cluster->progress) return false;
    timed_out_at = cluster->progress;
    return wake_try_waits(*cluster);
  }

  // One turn of every live warp. Returns false on a trap.
  bool pass(uint64_t& executed) {
    for (size_t n = 0; n < warps.size(); ++n) {
      Warp& w = *warps[options().warps == WarpPolicy::Random ? random(static_cast<uint32_t>(warps.size())) : n];
      if (!w.live) continue;
      const Ran ran = run_warp(w, quantum());
      executed += ran.executed;
      if (ran.stopped) return false;
      if (!w.live) retire_warp(w);
      after_warp();
      if (cluster->parked) return true;
    }
    return true;
  }

  void finish() {
    drain_async();
    for (Cta& cta : cluster->ctas) end_cta(cta);
    finish_checks(*cluster);
    cluster->grid->finished_clusters.fetch_add(1);
    last = Outcome::Finished;
  }

  Outcome run() {
    Machine& machine = *cluster->machine;
    uint32_t quiet = 0;
    uint64_t executed = 0;  // since the last progress, in this call
    while (!machine.stopped.load(std::memory_order_relaxed)) {
      const uint64_t before = cluster->progress;
      const uint64_t executed_before = executed;
      if (!pass(executed)) {
        machine.stopped = true;
        break;
      }
      if (!cluster->live_warps) {
        finish();
        return last;
      }
      if (cluster->parked) return last = Outcome::Parked;
      if (cluster->progress == before) {
        ++quiet;
        quiet_steps += executed - executed_before;
        const bool all_wait = executed == executed_before && options().warps != WarpPolicy::Random;
        const bool stepped = (all_wait || quiet >= kQuietPasses) && step_async(options().asyncs);
        if (!stepped && (all_wait || quiet >= kSpinPasses)) {
          if (!time_out_waits()) return last = all_wait || !executed ? Outcome::Stuck : Outcome::Spinning;
          quiet = 0;
        }
        if (!stepped) continue;
      }
      quiet = 0;
      executed = 0;
      quiet_steps = 0;
      machine.epoch.fetch_add(1, std::memory_order_relaxed);
    }
    return last = Outcome::Finished;
  }
};

// "waits for ..." or "is in a loop ..."; of a part of the warp: "lanes 0-3 wait for ...".
std::string waiting_text(Warp& w, const Group& group) {
  const bool whole = group.lanes == w.live;
  const std::string who = whole ? "" : "lanes " + lanes_text(group.lanes) + " ";
  if (!group.parked && !(group.waiting && group.why)) {
    return who + (whole ? "is" : "are") + " in a loop where nothing changes";
  }
  w.at = &w.grid->program->code[group.pc];
  w.lanes = guarded_lanes(w, group, *w.at);
  return who + (whole ? "waits for " : "wait for ") +
         (group.parked ? "the other lanes of the warp" : group.why(w, *w.at));
}

// What waits for what, for every warp that has not exited.
void report_deadlock(Machine& machine, const std::vector<ClusterRun*>& runs) {
  for (ClusterRun* run : runs) {
    Cluster& cluster = *run->cluster;
    for (Warp* w : run->warps) {
      for (w->current = 0; w->live && w->current < w->groups.size(); ++w->current) {
        report(*w, Report::Deadlock, -1, waiting_text(*w, w->groups[w->current]));
      }
    }
    for (const auto& op : cluster.in_flight) {
      report(*cluster.grid, Report::Deadlock, Site{}, "still in flight: " + op->describe());
    }
  }
  machine.stopped = true;
}

bool all_complete_before(const Grid& grid) {
  return std::all_of(grid.machine->grids.begin(), grid.machine->grids.begin() + grid.id,
                     [](const Grid& earlier) { return earlier.complete(); });
}

// What workers know of each other.
struct Crew {
  static constexpr uint64_t kBusy = ~0ull, kEnded = ~1ull;

  std::vector<std::atomic<uint64_t>> idle_since;  // per worker: the epoch at which it found nothing to do
  std::atomic<uint32_t> live{0};                  // clusters that have started and not finished

  explicit Crew(uint32_t workers) : idle_since(workers) {
    for (auto& epoch : idle_since) epoch = kBusy;
  }

  // Whether no worker can go on: every one has tried all that it has since the epoch began.
  bool at_an_end(uint64_t epoch) const {
    return std::all_of(idle_since.begin(), idle_since.end(),
                       [=](const auto& since) { return since == epoch || since == kEnded; });
  }
};

class Worker {
 public:
  Worker(Machine& machine, Crew& crew, uint32_t index)
      : machine_(machine), crew_(crew), idle_since_(crew.idle_since[index]) {}

  void run() {
    while (!machine_.stopped) {
      const uint64_t seen = machine_.epoch;  // before anything is tried: what others do meanwhile must be noticed
      if (run_live() || start_next()) continue;
      if (live_.empty() && all_started()) break;
      if (unpark()) continue;
      if (!wait_for_others(seen)) break;
    }
    idle_since_ = Crew::kEnded;
  }

 private:
  // Runs every live cluster once; true if one made progress.
  bool run_live() {
    bool progressed = false;
    for (size_t k = 0; k < live_.size() && !machine_.stopped; ++k) {
      ClusterRun& run = *live_[k];
      if (run.cluster->parked) continue;
      const uint64_t before = run.cluster->progress;
      run.run();
      progressed |= run.cluster->progress != before || run.last == Outcome::Finished;
    }
    const auto finished =
        std::remove_if(live_.begin(), live_.end(), [](const auto& r) { return r->last == Outcome::Finished; });
    crew_.live.fetch_sub(static_cast<uint32_t>(live_.end() - finished));
    live_.erase(finished, live_.end());
    if (progressed) machine_.epoch.fetch_add(1);
    return progressed;
  }

  bool may_start(const Grid& grid) const {
    if (grid.id == 0) return true;
    if (!grid.pdl) return all_complete_before(grid);
    const Grid& before = machine_.grids[grid.id - 1];
    if (before.complete()) return true;
    const uint32_t num_ctas = before.size[0] * before.size[1] * before.size[2];
    return machine_.options.early_dependents && before.signalled_ctas == num_ctas;
  }

  bool start_next() {
    const std::lock_guard<std::mutex> hold(machine_.starting);
    for (auto grid = machine_.grids.rbegin(); grid != machine_.grids.rend(); ++grid) {
      if (grid->next_cluster >= grid->num_clusters || !may_start(*grid)) continue;
      if (live_.size() * grid->cluster[0] * grid->cluster[1] * grid->cluster[2] >= machine_.target.num_sms) continue;
      live_.push_back(std::make_unique<ClusterRun>(make_cluster(*grid, grid->next_cluster.fetch_add(1))));
      crew_.live.fetch_add(1);
      machine_.epoch.fetch_add(1);
      return true;
    }
    return false;
  }

  bool all_started() const {
    return std::all_of(machine_.grids.begin(), machine_.grids.end(),
                       [](const Grid& g) { return g.next_cluster >= g.num_clusters; });
  }

  bool unpark() {
    bool any = false;
    for (auto& run : live_) {
      any |= run->cluster->parked;
      run->cluster->parked = false;
    }
    return any;
  }

  // Sleeps until another worker has made progress since `seen`; false if none can: then all is at an end, or
  // deadlocked, which a worker reports that has a cluster to tell of.
  bool wait_for_others(uint64_t seen) {
    const bool hung = std::all_of(live_.begin(), live_.end(), [](const auto& run) {
      return run->last == Outcome::Stuck || run->quiet_steps > kHungSteps;
    });
    if (!hung) return true;
    idle_since_ = seen;
    while (machine_.epoch == seen && !machine_.stopped) {
      const bool tells = !live_.empty() || !crew_.live;
      if (tells && crew_.at_an_end(seen) && machine_.epoch == seen) {
        const std::lock_guard<std::mutex> hold(machine_.starting);  // one report, if several find out
        if (machine_.stopped) break;
        std::vector<ClusterRun*> runs;
        for (auto& run : live_) runs.push_back(run.get());
        report_deadlock(machine_, runs);
        return false;
      }
      std::this_thread::sleep_for(kIdleSleep);
    }
    idle_since_ = Crew::kBusy;
    return !machine_.stopped;
  }

  Machine& machine_;
  Crew& crew_;
  std::atomic<uint64_t>& idle_since_;
  std::vector<std::unique_ptr<ClusterRun>> live_;
};

}  // namespace

bool grid_dependencies_done(const Grid& grid) {
  return !grid.pdl || grid.id == 0 || grid.machine->grids[grid.id - 1].complete();
}

void launch_dependents(Warp& w) {
  ClusterRun::signal_cta(*w.cta);
  Cluster& cluster = *w.cluster;
  ++cluster.progress;
  const auto& grids = cluster.machine->grids;
  const uint32_t next = w.grid->id + 1;
  const bool dependent = next < grids.size() && grids[next].pdl && cluster.machine->options.early_dependents;
  const bool all = std::all_of(cluster.ctas.begin(), cluster.ctas.end(),
                               [](const Cta& cta) { return cta.launched_dependents; });
  if (dependent && all && grids[next].next_cluster < grids[next].num_clusters) cluster.parked = true;
}

bool cancel_next_cluster(Warp& w, uint32_t first_cta[3]) {
  Grid& grid = *w.grid;
  const std::lock_guard<std::mutex> hold(grid.machine->starting);
  if (grid.next_cluster >= grid.num_clusters) return false;
  const uint32_t linear = grid.next_cluster.fetch_add(1);
  grid.finished_clusters.fetch_add(1);
  const uint32_t clusters_x = grid.size[0] / grid.cluster[0];
  const uint32_t clusters_y = grid.size[1] / grid.cluster[1];
  first_cta[0] = linear % clusters_x * grid.cluster[0];
  first_cta[1] = linear / clusters_x % clusters_y * grid.cluster[1];
  first_cta[2] = linear / clusters_x / clusters_y * grid.cluster[2];
  grid.signalled_ctas.fetch_add(grid.cluster[0] * grid.cluster[1] * grid.cluster[2]);
  return true;
}

void synchronize(Machine& machine) {
  Crew crew(machine.options.workers);
  auto work = [&](uint32_t index) {
    worker_index = index;
    Worker(machine, crew, index).run();
  };
  std::vector<std::thread> threads;
  for (uint32_t index = 1; index < machine.options.workers; ++index) threads.emplace_back(work, index);
  work(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace ptxe
