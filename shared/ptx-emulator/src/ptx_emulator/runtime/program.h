// A lowered kernel, a launch of it, and the machine that runs launches.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <mutex>
#include <unordered_map>

#include "checker.h"
#include "core.h"
#include "grid.h"
#include "memory.h"
#include "timeline.h"

namespace ptxe {

// A value that is in the registers of a warp when it starts.
struct Constant {
  uint32_t slot, bits;
  uint64_t value, high;  // high: upper half of a 128-bit value
};
using SpecialValue = uint64_t (*)(const Warp& w, int lane, uint64_t number);
struct Special {
  uint32_t slot, bits;
  SpecialValue value;
  uint64_t number;  // of "shared:16" or "param:8"
};

struct Program {
  std::string name;
  std::vector<uint32_t> args;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  std::vector<Special> specials;
  uint32_t register_bytes = 0;
  uint32_t local_bytes = 0;
  uint32_t shared_base = 0;  // address of the first byte that is the kernel's own; the system has those before it
  uint32_t static_shared_bytes = 0;
  uint64_t notable_classes = 0;  // a bit for each class of instructions that names what a warp does on the timeline
};

struct Target {
  uint32_t sm = 90;                  // 90, 100, 120
  uint32_t max_shared_bytes = 0;     // dynamic and static, per CTA
  uint32_t num_sms = 1;
};

enum class WarpPolicy : uint8_t { Fair, Greedy, Random };
enum class AsyncPolicy : uint8_t { Prompt, Eager, Late, Random };

struct Options {
  WarpPolicy warps = WarpPolicy::Fair;
  AsyncPolicy asyncs = AsyncPolicy::Prompt;
  uint64_t seed = 0;
  uint32_t workers = 1;
  bool check = false;
  bool trace = false;
  bool early_dependents = true;  // run a dependent grid as early as the hint allows
};

struct Finding {
  Report kind;
  Site site;
  Site other;
  bool has_other;
  std::string message;
  const Program* program;
  uint32_t grid;
  uint64_t times = 1;  // at the same instructions of the same launch, by whatever lane
};

// Executed instructions and counts of one worker for one grid.
struct Tally {
  std::vector<uint64_t> executed;  // [warp in CTA][instruction]
  std::vector<uint64_t> counts;    // [warp in CTA][Count]
};

struct Grid {
  Machine* machine;
  const Program* program;
  uint32_t id;           // in order of launch
  uint32_t size[3];      // CTAs
  uint32_t block[3];
  uint32_t cluster[3];
  uint32_t dynamic_shared_bytes;
  uint32_t registers_per_thread;  // 0: not known
  uint32_t num_warps;    // per CTA
  uint32_t num_clusters;
  bool pdl;              // may start before its predecessor has completed
  std::vector<uint8_t> params;  // 64-byte aligned start at params_base()
  uint8_t* params_base = nullptr;
  std::atomic<uint32_t> next_cluster{0};
  std::atomic<uint32_t> finished_clusters{0};
  std::atomic<uint32_t> signalled_ctas{0};
  std::vector<Tally> tallies;  // one per worker
  std::atomic<bool> waited{false};           // a thread has executed griddepcontrol.wait
  std::atomic<bool> let_go_unwaited{false};  // a CTA has let the dependents start without having waited itself
  bool complete() const { return finished_clusters.load() == num_clusters; }
};

struct Machine {
  Target target;
  Options options;
  MemoryMap memory;
  std::deque<Grid> grids;
  std::mutex lock;      // findings, rows of the timeline
  std::mutex starting;  // of clusters
  std::vector<Finding> findings;
  Timeline timeline;
  std::atomic<bool> stopped{false};
  std::atomic<uint64_t> epoch{0};  // raised when any cluster made progress
  std::atomic<uint64_t> steps{0};
  std::unordered_map<std::string, std::unique_ptr<GroupState>> shared_state;
};

thread_local inline uint32_t worker_index = 0;

// scheduler.cpp: runs all launches of the queue to the end, or to a deadlock or trap.
void synchronize(Machine& machine);
// control.cpp
void split_group(Warp& w, Lanes taken, uint32_t target, uint32_t meets);
void settle_groups(Warp& w);
void exit_lanes(Warp& w, Lanes lanes);
// cluster.cpp
SpecialValue find_special(const std::string& name);  // null if unknown
std::unique_ptr<Cluster> make_cluster(Grid& grid, uint32_t linear);
void end_cta(Cta& cta);
uint64_t next_random(uint64_t& state);

const std::vector<std::string>& operation_names();
Operation operation_at(uint32_t index);

}  // namespace ptxe
