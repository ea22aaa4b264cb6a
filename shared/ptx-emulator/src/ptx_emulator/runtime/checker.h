// Happens-before and initialisation checks. Every check returns at once when checking is off; virtual time is carried
// all the same.
//
// Each warp has one entry in the vector clocks of its cluster, and asynchronous operations in flight borrow one.
// Of every warp these views are kept: what happened before it (generic), what of that is visible to the async proxy
// (fence.proxy.async copies the first into the second), and what its tcgen05 operations are ordered after
// (tcgen05.fence::after_thread_sync). A synchronisation object takes the views of those who release into it and gives
// them to those who acquire from it. `Sync::time` carries virtual time the same way.
//
// Between clusters only global locations synchronise (publish, observe). Kernel boundaries order everything, except
// in a grid launched with programmatic stream serialization before it knows of a griddepcontrol.wait.
#pragma once

#include <memory>

#include "core.h"
#include "memory.h"

namespace ptxe {

struct Clock {
  std::vector<uint32_t> entries;  // by component; missing entries are 0
  void join(const Clock& other);
  void raise(uint32_t component, uint32_t value);
  bool covers(uint32_t component, uint32_t value) const {
    return component < entries.size() && entries[component] >= value;
  }
};

// What is known of other clusters, sorted by cluster.
struct Foreign {
  uint32_t cluster;
  Clock generic, async;
};
using ForeignTable = std::shared_ptr<const std::vector<Foreign>>;

struct Views {
  Clock generic, async, tcgen05;
  Clock fenced;                  // what a memory fence of gpu or system scope has ordered before later strong accesses
  ForeignTable foreign;          // null: nothing known
  bool grid_dependency = false;  // griddepcontrol.wait happened before
  void join(const Views& other);
  void clear();  // keeps the memory
};

// A synchronisation object: an mbarrier phase, a named barrier's generation, a location of an atomic.
struct Sync {
  Views views;
  uint64_t time = 0;
  void clear();
};

// Tcgen05 reads shared memory as the async proxy does.
enum class Proxy : uint8_t { Generic, Async, Tcgen05, Tensormap };

// Who accesses memory. For an asynchronous operation it is made at issue and lives in the AsyncOp.
struct Actor {
  Proxy proxy = Proxy::Generic;
  bool pipelined = false;  // its component is that of a pipeline of the warp, not borrowed
  uint32_t component = 0;
  uint32_t value = 0;         // of the component, at this operation
  uint32_t issuer = 0;        // component of the warp that issued it
  uint32_t issuer_value = 0;  // what the warp did up to here happens before it
  std::shared_ptr<const Views> before;  // what else happened before it was issued; null when nothing is checked
  Site site;          // where it was issued
  uint64_t time = 0;  // virtual time of issue
};

// --- synchronisation, called by the instruction that synchronises (always moves virtual time, too)
void release(Warp& w, Sync& sync);        // what w did so far happens before whoever acquires from sync
void acquire(Warp& w, const Sync& sync);  // and w.time = max(w.time, sync.time), counted and traced as a wait
void release_fenced(Warp& w, Sync& sync);         // .relaxed forms: what fences have covered, see publish()
void observe_relaxed(Warp& w, const Sync& sync);  // ... counts from the next fence or barrier on
void fence_proxy_async(Warp& w);          // fence.proxy.async in any form: generic accesses become visible to async
void tcgen05_fence_before(Warp& w);       // tcgen05.fence::before_thread_sync
void tcgen05_fence_after(Warp& w);        // tcgen05.fence::after_thread_sync
void grid_dependency_wait(Warp& w);       // griddepcontrol.wait, after it has waited
bool knows_grid_dependency(Warp& w);      // whether such a wait happened before; true when nothing is checked

// --- synchronisation through memory: ld.acquire, st.release, atom and red of any order, volatile accesses.
// publish() before the access becomes visible to others, observe() after it: a store publishes, a load observes, an
// atomic does both (a `red` only publishes). The access itself is told as usual, as Atomic, StrongRead or StrongWrite.
// A relaxed (or volatile) access publishes what a memory fence has covered, by this warp or by one it has synchronised
// with since; what it observes counts from the next fence or barrier on. (The memory model asks for the fence in the
// same thread. Kernels that fence before bar.sync and let one thread count, or count and read behind bar.sync, are
// common, and work.)
enum class Order : uint8_t { Relaxed, Acquire, Release, AcquireRelease };
enum class Scope : uint8_t { Cta, Cluster, Gpu, System };
// A store that does not read (not `modifies`) starts the location's order anew.
void publish(Warp& w, const Place& place, Order order, Scope scope, bool modifies = true);
void observe(Warp& w, const Place& place, Order order, Scope scope);
void fence_memory(Warp& w, Order order, Scope scope);  // fence, membar; order is not Relaxed

// --- asynchronous operations
// At issue: borrows a component, copies the views. Proxy: Generic for cp.async, Async for bulk copies, TMA and wgmma,
// Tcgen05 for mma, cp and shift. Operations of Tcgen05 of one warp are ordered among each other (the pipeline
// executes in order) and share a component; retire() is still to be called for each.
Actor issue(Warp& w, Proxy proxy);
void finish(Cluster& cluster, const Actor& actor, Sync& sync);  // its effects happen before who acquires from sync
void finish(Cluster& cluster, const Actor& actor, Warp& w);     // ... or before w goes on (wait_group)
void retire(Cluster& cluster, const Actor& actor);              // gives the component back

// --- initialised mbarriers, which asynchronous operations signal: a point in the execution of a warp
struct Stamp {
  uint32_t component = 0;
  uint32_t value = 0;  // 0: none
};
Stamp stamp(Warp& w);
bool happened_before(const Stamp& stamp, const Actor& actor);
bool happened_before(const Stamp& stamp, Warp& w);  // what the warp executes now; true when nothing is checked
bool visible_to_async(const Stamp& stamp, const Actor& actor);  // a fence.proxy.async lies between the two

// --- accesses that do not go through resolve(): tensor memory, rectangle of lanes and columns of cta.tmem
// By a warp (tcgen05.ld, tcgen05.st): asynchronous until tcgen05_wait_ld / tcgen05_wait_st of the same warp. A store
// that is not waited for is a race; a load may only lack tcgen05 order, as its registers are used.
void access_tmem(Warp& w, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column, uint32_t num_columns,
                 AccessKind kind);
void tcgen05_load(Warp& w);  // the executing tcgen05.ld loads registers
void tcgen05_wait_ld(Warp& w);

// Registers that instructions in flight write. `kind` is Tcgen05Order or WgmmaOrder.
void registers_in_flight(Warp& w, std::vector<uint32_t> pcs);  // the instructions that are, in place of those before
void use_registers(Warp& w, uint32_t pc, Report kind);  // the executing instruction accesses what that at `pc` writes
// An operation that may access such registers too early: number of instructions, operation, the instructions, then the
// operation's own arguments.
Step run_early_use(Warp& w, const Instruction& i, Report kind);
void tcgen05_wait_st(Warp& w);
// By an operation of the tensor core. An Atomic access reads and writes (an accumulator).
void access_tmem(Cluster& cluster, const Actor& actor, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                 uint32_t num_columns, AccessKind kind);
void free_tmem(Warp& w, Cta& cta, uint32_t column, uint32_t num_columns);  // tcgen05.dealloc: all accesses came before
void forget_tmem(Cta& cta, uint32_t column, uint32_t num_columns);  // freshly allocated: holds nothing written

// --- called by resolve() and resolve_async()
void access_memory(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane);
// `num_lanes` lanes from `lane` on whose pieces of `bytes` adjoin, beginning at `place`.
void access_lanes(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane, uint32_t num_lanes);
void access_memory(Cluster& cluster, const Actor& actor, const Place& place, uint32_t bytes, AccessKind kind);

// --- called by the core
struct Checker {  // of one cluster
  virtual ~Checker() = default;
};
// After the CTAs and their numbers are known, under the machine's `starting` lock (what clusters share is made here).
std::unique_ptr<Checker> make_checker(Cluster& cluster);
// What kernels of an earlier machine have written of memory that was handed over uninitialised stays written; memory
// that is handed over anew does not.
void inherit_written(Machine& machine, Machine& earlier);
void forget_written(Machine& machine, uint64_t base, uint64_t bytes);
// Before the cluster counts as finished: the last accesses are checked before another grid begins, and those to the
// shared memory of other CTAs for whether these have certainly not exited before.
void finish_checks(Cluster& cluster);

}  // namespace ptxe
