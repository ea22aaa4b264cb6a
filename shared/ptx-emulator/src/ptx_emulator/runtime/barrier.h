// mbarrier objects, as the operations of other files see them. The state lives beside shared memory, keyed by offset.
#pragma once

#include "checker.h"
#include "core.h"

namespace ptxe {

// Asynchronous operations signal an mbarrier through these. `address` is a shared::cluster address.
// complete_tx: `bytes` of the transaction have arrived. The actor's effects happen before whoever sees the phase.
void mbarrier_complete_tx(Cluster& cluster, uint32_t address, uint32_t bytes, const Actor& actor);
// One arrival on behalf of an asynchronous operation (tcgen05.commit, cp.async.mbarrier.arrive).
void mbarrier_arrive(Cluster& cluster, uint32_t address, const Actor& actor);
// Generic arrival by lanes of a warp; used by the mbarrier instructions themselves.
void mbarrier_arrive(Warp& w, uint32_t address, uint32_t count, int lane);

}  // namespace ptxe
