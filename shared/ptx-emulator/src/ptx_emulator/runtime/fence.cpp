// fence, membar, proxy fences.
#include "checker.h"
#include "memory.h"

namespace ptxe {

namespace {

constexpr uint32_t kTensorMapBytes = 128;

enum FenceSides : uint32_t { kAcquire = 1, kRelease = 2 };

void fence(Warp& w, uint32_t sides, uint32_t scope) {
  const Order order = sides == kAcquire ? Order::Acquire : sides == kRelease ? Order::Release : Order::AcquireRelease;
  fence_memory(w, order, static_cast<Scope>(scope));
}

}  // namespace

PTXE_OP("fence") {  // sides, scope
  fence(w, i.args[0], i.args[1]);
  return Step::Next;
}

PTXE_OP("fence.proxy.async") {
  fence_proxy_async(w);
  return Step::Next;
}

// A fence between the generic and the tensormap proxy. Tensor maps are read when a copy is issued, so there is
// nothing to wait for; the release and acquire sides order as those of a generic fence do.
PTXE_OP("fence.proxy.tensormap") {  // sides, scope, address
  if (i.args[0] & kAcquire) {
    const AddressArgs address(i, 2);
    each_lane(w, [&](int lane) {
      locate(w, Space::Generic, address.at(w, lane), kTensorMapBytes, kTensorMapBytes, lane);
    });
  }
  fence(w, i.args[0], i.args[1]);
  return Step::Next;
}

// Nothing to order: accesses through aliases of an address meet in the same memory here, and an mbarrier's state
// is not in memory.
PTXE_OP("fence.nothing") { return Step::Next; }

}  // namespace ptxe
