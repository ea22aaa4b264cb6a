// Happens-before and initialisation checks. Every call returns at once when checking is off.
//
// Each warp has one entry in the vector clocks of its cluster, and asynchronous operations in flight borrow one.
// Of every warp three views are kept: what happened before it for the generic proxy, what of that is visible to the
// async proxy (fence.proxy.async copies the first into the second), and what its tcgen05 operations are ordered
// after (tcgen05.fence::after_thread_sync). A synchronisation object takes the views of those who release into it
// and gives them to those who acquire from it. `Sync::time` carries virtual time the same way.
#pragma once

#include "core.h"
#include "memory.h"

namespace ptxe {

struct Clock {
  std::vector<uint32_t> entries;  // by component; missing entries are 0
  void join(const Clock& other);
  bool covers(uint32_t component, uint32_t value) const {
    return component < entries.size() && entries[component] >= value;
  }
};

struct Views {
  Clock generic, async, tcgen05;
  void join(const Views& other);
};

// A synchronisation object: an mbarrier phase, a named barrier's generation, a location of an atomic.
struct Sync {
  Views views;
  uint64_t time = 0;
  void clear();
};

enum class Proxy : uint8_t { Generic, Async, Tcgen05, Tensormap };

// Who accesses memory. For an asynchronous operation it is made at issue and lives in the AsyncOp.
struct Actor {
  Proxy proxy = Proxy::Generic;
  uint32_t component = 0;
  uint32_t value = 0;  // of the component, at this operation
  Views before;        // what happened before it was issued (only async actors)
  Site site;           // where it was issued
  uint64_t time = 0;   // virtual time of issue
};

// --- synchronisation, called by the instruction that synchronises (always moves virtual time, too)
void release(Warp& w, Sync& sync);        // what w did so far happens before whoever acquires from sync
void acquire(Warp& w, const Sync& sync);  // and w.time = max(w.time, sync.time), counted and traced as a wait
void fence_proxy_async(Warp& w);          // fence.proxy.async in any form: generic accesses become visible to async
void tcgen05_fence_before(Warp& w);       // tcgen05.fence::before_thread_sync
void tcgen05_fence_after(Warp& w);        // tcgen05.fence::after_thread_sync

// --- asynchronous operations
Actor issue(Warp& w, Proxy proxy);                     // at issue: borrows a component, copies the views
void finish(Cluster& cluster, const Actor& actor, Sync& sync);  // its effects happen before who acquires from sync
void finish(Cluster& cluster, const Actor& actor, Warp& w);     // ... or before w goes on (wait_group, wait::ld)
void retire(Cluster& cluster, const Actor& actor);              // gives the component back

// --- accesses that do not go through resolve(): tensor memory, rectangle of lanes and columns of cta.tmem
void access_tmem(Warp& w, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column, uint32_t num_columns,
                 AccessKind kind);
void access_tmem(Cluster& cluster, const Actor& actor, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                 uint32_t num_columns, AccessKind kind);
void forget_tmem(Cta& cta, uint32_t column, uint32_t num_columns);  // freshly allocated: holds nothing written

// --- called by resolve() and resolve_async()
void access_memory(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane);
void access_memory(Cluster& cluster, const Actor& actor, const Place& place, uint32_t bytes, AccessKind kind);

}  // namespace ptxe
