// Operations by name, gathering of lanes, reports, counts.
#include "core.h"

#include <algorithm>

#include "program.h"

namespace ptxe {

namespace {

struct OperationTable {
  std::vector<std::string> names;
  std::vector<Operation> operations;
};

OperationTable& table() {
  static OperationTable instance;
  return instance;
}

constexpr size_t kMaxFindings = 1000;  // per machine

// Whether a finding is one more of a kind at the same instructions. Who waits in a deadlock is told for each warp.
bool is_again(const Finding& known, const Grid& grid, Report kind, const Site& site, const Site* other) {
  return kind != Report::Deadlock && known.kind == kind && known.grid == grid.id && known.site.pc == site.pc &&
         known.has_other == (other != nullptr) && (!other || known.other.pc == other->pc);
}

std::string explain_gathering(Warp& w, const Instruction&) {
  return "lanes " + lanes_text(w.groups[w.current].awaited) + " of its warp at a .sync instruction";
}

}  // namespace

Register::Register(const char* name, Operation run) {
  table().names.push_back(name);
  table().operations.push_back(run);
}

const std::vector<std::string>& operation_names() { return table().names; }
Operation operation_at(uint32_t index) { return table().operations[index]; }

GroupState* StateTable::find(const void* key) const {
  for (const Entry& entry : entries_) {
    if (entry.key == key) return entry.state.get();
  }
  return nullptr;
}

std::unique_ptr<GroupState>& StateTable::entry(const void* key) {
  for (Entry& entry : entries_) {
    if (entry.key == key) return entry.state;
  }
  entries_.push_back(Entry{key, nullptr});
  return entries_.back().state;
}

Step gather(Warp& w, const Instruction& i, Lanes members) {
  const Lanes wanted = members & w.live;
  if ((wanted & ~w.lanes) == 0) return Step::Execute;
  if (i.aligned) {
    report(w, Report::Divergence, w.first_lane(),
           "an .aligned instruction is executed by lanes " + lanes_text(w.lanes) + " while lanes " +
               lanes_text(wanted & ~w.lanes) + " of the warp are elsewhere");
    return Step::Execute;
  }
  const uint32_t pc = w.pc();
  auto here = std::find_if(w.gatherings.begin(), w.gatherings.end(), [&](const Gathering& g) { return g.pc == pc; });
  if (here == w.gatherings.end()) here = w.gatherings.insert(here, Gathering{pc});
  if ((w.lanes & ~here->served) == 0) {
    here->served &= ~w.lanes;
    if (!here->served && !here->arrived) w.gatherings.erase(here);
    return Step::Next;
  }
  here->arrived |= w.lanes;
  if (wanted & ~here->arrived) {
    w.groups[w.current].awaited = wanted & ~here->arrived;
    return wait_because(w, explain_gathering);
  }
  here->served |= here->arrived & ~w.lanes;
  w.lanes = here->arrived;
  here->arrived = 0;
  if (!here->served) w.gatherings.erase(here);
  return Step::Execute;
}

std::string lanes_text(Lanes lanes) {
  if (lanes == kAllLanes) return "0-31";
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    int last = lane;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1)) ++last;
    if (!text.empty()) text += ",";
    text += std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text.empty() ? "none" : text;
}

std::string cta_name(const Cta& cta) {
  return "CTA (" + std::to_string(cta.index[0]) + ", " + std::to_string(cta.index[1]) + ", " +
         std::to_string(cta.index[2]) + ")";
}

Site site_of(const Warp& w, int lane) { return Site{w.cta->linear, w.index, lane, w.pc()}; }

void report(Grid& grid, Report kind, const Site& site, std::string message, const Site* other) {
  Machine& machine = *grid.machine;
  const std::lock_guard<std::mutex> hold(machine.lock);
  for (Finding& known : machine.findings) {
    if (is_again(known, grid, kind, site, other)) {
      ++known.times;
      return;
    }
  }
  if (machine.findings.size() >= kMaxFindings) return;
  machine.findings.push_back(
      Finding{kind, site, other ? *other : Site{}, other != nullptr, std::move(message), grid.program, grid.id});
}

void report(Warp& w, Report kind, int lane, std::string message) {
  report(*w.grid, kind, site_of(w, lane), std::move(message));
}

void count(Warp& w, Count what, uint64_t n) {
  Tally& tally = w.grid->tallies[worker_index];
  tally.counts[w.index * static_cast<size_t>(Count::NumCounts) + static_cast<size_t>(what)] += n;
}

void start_async(Warp& w, std::unique_ptr<AsyncOp> op) {
  Cluster& cluster = *w.cluster;
  ++cluster.progress;
  if (cluster.machine->options.asyncs == AsyncPolicy::Eager) {
    const bool held_back = std::any_of(cluster.in_flight.begin(), cluster.in_flight.end(), [&](const auto& earlier) {
      return op->order != 0 && earlier->order == op->order;
    });
    if (!held_back) {
      while (!op->step(cluster)) {
      }
      return;
    }
  }
  cluster.in_flight.push_back(std::move(op));
}

}  // namespace ptxe
