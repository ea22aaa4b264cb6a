// What an operation sees of the machine: lanes, warps, CTAs, clusters, and the instruction it executes.
//
// One instruction is executed for all lanes of a warp at once. A virtual register of the PTX is a lane vector:
// 32 values side by side in the warp's register file, addressed by byte offset (a slot). A predicate is one word
// with a bit per lane. Warps are resumable state machines, not threads: an operation that cannot finish returns
// Step::Wait, and the scheduler calls it again later.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace ptxe {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;
using Lanes = uint32_t;  // one bit per lane

struct Warp;
struct Cta;
struct Cluster;
struct Grid;
struct Machine;
struct Checker;
struct Instruction;

enum class Step : uint8_t {
  Next,     // done, go on with the next instruction
  Jump,     // done, the operation has set where its lanes go on
  Wait,     // not done: call again when something has changed; returned by wait_because()
  Yield,    // done, but a poll that failed: let others run before the next instruction
  Stop,     // the grid is aborted (trap)
  Execute,  // only from gather(): go on and execute
};

using Operation = Step (*)(Warp&, const Instruction&);

struct Instruction {
  Operation run;
  const uint32_t* args;  // slots and plain numbers, in the order the lowering gave them
  uint32_t num_args;
  int32_t guard;       // slot of the guarding predicate, -1 without
  bool guard_negated;  // @!p
  bool aligned;        // .aligned: all live lanes of the warp must be here together
  uint16_t op_class;   // index into the program's class names, for counts
  uint32_t line;       // PTX line
};

// Lanes that diverged meet again at `pc` (the immediate post-dominator); shared by the groups it was split into.
struct Reconvergence {
  uint32_t pc;
  Lanes expected;
  Lanes arrived = 0;
  std::shared_ptr<Reconvergence> outer;
};

// What the executing lanes wait for, in words. Called for a deadlock alone, with the warp as it was at the Step::Wait.
using Explanation = std::string (*)(Warp&, const Instruction&);

// Lanes of one warp that are at the same place.
struct Group {
  Lanes lanes;
  uint32_t pc;
  std::shared_ptr<Reconvergence> meets;
  bool parked = false;   // at meets->pc, waiting for the other lanes
  bool waiting = false;  // the last step was Step::Wait
  Explanation why = nullptr;  // it was
  Lanes awaited = 0;          // of the warp, by gather()
};

// A .sync operation whose lanes come one group after the other: executed once by the last, for all.
struct Gathering {
  uint32_t pc;
  Lanes arrived = 0;
  Lanes served = 0;  // executed on behalf of these, who have yet to go on
};

// State that one instruction group keeps per warp, CTA or cluster; made on first use: cta.state.get<MyState>().
struct GroupState {
  virtual ~GroupState() = default;
};
class StateTable {
 public:
  template <class T>
  T& get() {
    std::unique_ptr<GroupState>& state = entry(key<T>());
    if (!state) state = std::make_unique<T>();
    return static_cast<T&>(*state);
  }
  // Null if there is none yet.
  template <class T>
  T* find() {
    return static_cast<T*>(find(key<T>()));
  }

 private:
  template <class T>
  static const void* key() {
    static const char unique = 0;
    return &unique;
  }
  GroupState* find(const void* key) const;
  std::unique_ptr<GroupState>& entry(const void* key);  // null when new

  struct Entry {
    const void* key;
    std::unique_ptr<GroupState> state;
  };
  std::vector<Entry> entries_;
};

struct Program;  // program.h
struct Track;    // timeline.h

struct Warp {
  Cta* cta;
  Cluster* cluster;
  Grid* grid;
  uint8_t* registers;  // slots, 64-byte aligned, inside register_file
  std::vector<uint8_t> register_file;
  Lanes lanes = 0;     // the lanes the current instruction executes for: active and guarded
  Lanes live = 0;      // lanes that have not exited
  uint32_t index = 0;  // warp in the CTA
  uint32_t component = 0;  // this warp's entry in the vector clocks of its cluster
  uint64_t time = 0;       // virtual cycles
  std::vector<Group> groups;
  uint32_t current = 0;  // index into groups of the one that is executing
  const Instruction* at = nullptr;
  uint64_t* executed = nullptr;  // how often each instruction was, of this worker
  Track* track = nullptr;  // its row of the timeline, if there is one
  // Names a wait on the timeline: where `track` is set, an operation that need not wait any more sets it for acquire().
  std::string waits_for;

  std::vector<Gathering> gatherings;
  StateTable state;

  std::vector<uint8_t> local;  // .local memory of all lanes: lane * grid->program->local_bytes + offset

  // A slot as 32 values of T; b16, b32, b64 registers hold 2, 4, 8 bytes a lane, b128 16.
  template <class T>
  T* values(uint32_t slot) {
    return reinterpret_cast<T*>(registers + slot);
  }
  Lanes& predicate(uint32_t slot) { return *reinterpret_cast<Lanes*>(registers + slot); }
  void set_predicate(uint32_t slot, Lanes value) {
    Lanes& p = predicate(slot);
    p = (p & ~lanes) | (value & lanes);
  }
  uint32_t pc() const { return groups[current].pc; }
  int first_lane() const { return __builtin_ctz(lanes); }
};

// Calls f(lane) for the executing lanes; the full-warp case is a plain loop that the compiler vectorises.
template <class F>
inline void each_lane(const Warp& w, F f) {
  if (w.lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (Lanes rest = w.lanes; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// For an operation that cannot finish: `return wait_because(w, explain)`.
inline Step wait_because(Warp& w, Explanation why) {
  w.groups[w.current].why = why;
  return Step::Wait;
}

// For .sync operations with a member mask. Execute: all members that have not exited are here; w.lanes has been
// widened to all of them, so execute for w.lanes. Any other step is to be returned as it is. An aligned
// instruction that not all live lanes reach together is reported here.
Step gather(Warp& w, const Instruction& i, Lanes members);

std::string lanes_text(Lanes lanes);      // "0-3,7"
std::string cta_name(const Cta& cta);     // "CTA (1, 0, 0)", by %ctaid

// ---------------------------------------------------------------------------------------------- reports, counts

enum class Report : uint8_t {
  OutOfBounds, Misaligned, Uninitialised, Race, ProxyRace, Tcgen05Order, Deadlock, Divergence, BarrierMisuse,
  TmemMisuse, TmemLanes, GridDependency, Unsupported, Trap, WgmmaOrder, Registers,
};

// Records a report at the executing instruction. `lane` -1: the whole warp. `other` is the earlier side of a race.
struct Site {
  uint32_t cta = 0;  // linear CTA in the grid
  uint32_t warp = 0;
  int32_t lane = -1;
  uint32_t pc = ~0u;  // index of the instruction, ~0u if none
};
Site site_of(const Warp& w, int lane = -1);
void report(Grid& grid, Report kind, const Site& site, std::string message, const Site* other = nullptr);
void report(Warp& w, Report kind, int lane, std::string message);

// What is counted per warp besides executed instructions.
enum class Count : uint8_t {
  GlobalLoadBytes, GlobalStoreBytes, GlobalLoadSectors, GlobalStoreSectors, SharedLoadBytes, SharedStoreBytes,
  SharedWavefronts, SharedBankConflicts, TmaLoadBytes, TmaStoreBytes, TmemLoadBytes, TmemStoreBytes, MmaFlops,
  Exponentials, BarrierWaits, BarrierWaitCycles, NumCounts,
};
void count(Warp& w, Count what, uint64_t n);

// A wait for `w.waits_for` on the timeline of a warp, and an operation of an engine of a CTA ("tma", "mma") that the
// instruction of a PTX line has issued.
void trace_wait(Warp& w, uint64_t begin, uint64_t end);
void trace_engine(Cta& cta, const char* engine, const char* name, uint32_t line, uint64_t begin, uint64_t end);

// ---------------------------------------------------------------------------------------------- CTA, cluster

// An asynchronous operation in flight. The scheduler calls step() some time after it was issued, when the schedule
// says so and every earlier operation with the same non-zero `order` has finished. step() does one part of the work
// (read the source, write the destination and signal) and returns true when all is done. It must not block.
struct AsyncOp {
  uint64_t order = 0;
  virtual ~AsyncOp() = default;
  virtual bool step(Cluster& cluster) = 0;
  virtual std::string describe() const = 0;
};
void start_async(Warp& w, std::unique_ptr<AsyncOp> op);

struct Cta {
  Cluster* cluster;
  Grid* grid;
  uint32_t index[3];      // %ctaid
  uint32_t linear;        // in the grid
  uint32_t rank;          // %cluster_ctarank
  uint32_t num_threads;
  std::vector<uint8_t> shared;  // by address: what the system reserves, then static and dynamic shared memory
  uint32_t shared_base;         // where the kernel's own begins
  std::vector<uint32_t> tmem;   // [512 columns][128 lanes], empty before sm_100
  std::vector<Warp> warps;
  StateTable state;
  bool launched_dependents = false;  // griddepcontrol.launch_dependents, or all threads have exited
  bool waited = false;  // one of its threads has executed griddepcontrol.wait
  bool exited = false;  // all threads have
};

struct Cluster {
  Grid* grid;
  Machine* machine;
  uint32_t linear;       // in the grid
  std::vector<Cta> ctas;
  std::unique_ptr<Checker> checker;  // null when nothing is checked
  StateTable state;
  uint64_t progress = 0;  // raised by everything another warp could be waiting for
  uint32_t live_warps = 0;
  bool parked = false;  // all CTAs have launched their dependents, which are to run first
  std::vector<std::unique_ptr<AsyncOp>> in_flight;
  uint64_t random_state = 0;
};

constexpr uint32_t kTmemLanes = 128;
constexpr uint32_t kTmemColumns = 512;
inline uint32_t* tmem_column(Cta& cta, uint32_t column) { return cta.tmem.data() + column * kTmemLanes; }

// ---------------------------------------------------------------------------------------------- operations by name

struct Register {
  Register(const char* name, Operation run);
};
// PTXE_OP("add.u32") { ...; return Step::Next; }   defines and registers an operation
#define PTXE_JOIN2(a, b) a##b
#define PTXE_JOIN(a, b) PTXE_JOIN2(a, b)
#define PTXE_OP_AS(id, name)                                                              \
  static ::ptxe::Step id(::ptxe::Warp& w, const ::ptxe::Instruction& i);                  \
  static const ::ptxe::Register PTXE_JOIN(id, _registered)(name, id);                     \
  static ::ptxe::Step id([[maybe_unused]] ::ptxe::Warp& w, [[maybe_unused]] const ::ptxe::Instruction& i)
#define PTXE_OP(name) PTXE_OP_AS(PTXE_JOIN(op_, __COUNTER__), name)

}  // namespace ptxe
