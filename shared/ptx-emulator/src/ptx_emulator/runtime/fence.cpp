// fence, membar, proxy fences, and what fences add to relaxed accesses.
#include "fence.h"

#include <algorithm>

#include "memory.h"

namespace ptxe {

namespace {

struct Fenced : GroupState {  // of a warp
  Sync before;        // what the warp had done at its last fence
  Sync observed;      // what its relaxed reads have seen since
  bool any = false;   // a fence has been executed
};

// The order among fences themselves. Fences of a cluster are taken to be in the order in which they are executed,
// each with all before it: a fence, a relaxed write, a relaxed read, a fence, is then ordered wherever the flag is
// and however it is accessed. It is more order than the memory model gives, so races may be missed where fences are
// used, but none is made up.
struct FenceOrder : GroupState {  // of a cluster
  Sync all;
};

Fenced& fenced_of(Warp& w) { return w.cta->warp_state[&w].get<Fenced>(); }

constexpr uint32_t kTensorMapBytes = 128;

void acquire_side(Warp& w) {
  Fenced& fenced = fenced_of(w);
  Sync& all = w.cluster->state.get<FenceOrder>().all;
  all.time = 0;  // a fence waits for nobody
  fenced.observed.time = 0;
  acquire(w, fenced.observed);
  acquire(w, all);
  fenced.observed.clear();
}

void release_side(Warp& w) {
  Fenced& fenced = fenced_of(w);
  fenced.before.clear();
  release(w, fenced.before);
  fenced.any = true;
  release(w, w.cluster->state.get<FenceOrder>().all);
}

enum FenceSides : uint32_t { kAcquire = 1, kRelease = 2 };

}  // namespace

void release_fenced(Warp& w, Sync& sync) {
  sync.time = std::max(sync.time, w.time);
  const Fenced& fenced = fenced_of(w);
  if (fenced.any) sync.views.join(fenced.before.views);
}

void observe_relaxed(Warp& w, const Sync& sync) {
  if (sync.time > w.time) w.time = sync.time;
  fenced_of(w).observed.views.join(sync.views);
}

PTXE_OP("fence") {  // sides
  if (i.args[0] & kAcquire) acquire_side(w);
  if (i.args[0] & kRelease) release_side(w);
  return Step::Next;
}

PTXE_OP("fence.proxy.async") {
  fence_proxy_async(w);
  return Step::Next;
}

// A fence between the generic and the tensormap proxy. Tensor maps are read when a copy is issued, so there is
// nothing to wait for; the release and acquire sides order as those of a generic fence do.
PTXE_OP("fence.proxy.tensormap") {  // sides, address
  if (i.args[0] & kAcquire) {
    const AddressArgs address(i, 1);
    each_lane(w, [&](int lane) {
      locate(w, Space::Generic, address.at(w, lane), kTensorMapBytes, kTensorMapBytes, lane);
    });
    acquire_side(w);
  }
  if (i.args[0] & kRelease) release_side(w);
  return Step::Next;
}

// Nothing to order: accesses through aliases of an address meet in the same memory here, and an mbarrier's state
// is not in memory.
PTXE_OP("fence.nothing") { return Step::Next; }

}  // namespace ptxe
