// mbarrier objects, as the operations of other files see them. The state lives beside shared memory, keyed by offset.
#pragma once

#include "checker.h"
#include "core.h"

namespace ptxe {

// Asynchronous operations signal an mbarrier through these. `address` is a shared::cluster address.
// complete_tx: `bytes` of the transaction have arrived. The actor's effects happen before whoever sees the phase,
// and actor.time is the virtual time at which they are complete.
void mbarrier_complete_tx(Cluster& cluster, uint32_t address, uint32_t bytes, const Actor& actor);
// One arrival on behalf of an asynchronous operation (tcgen05.commit, cp.async.mbarrier.arrive).
void mbarrier_arrive(Cluster& cluster, uint32_t address, const Actor& actor);
// Generic arrival by lanes of a warp; used by the mbarrier instructions themselves.
void mbarrier_arrive(Warp& w, uint32_t address, uint32_t count, int lane);
// Raises the pending count of the current phase, as cp.async.mbarrier.arrive without .noinc does before its arrival.
void mbarrier_add_pending(Warp& w, uint32_t address, uint32_t count, int lane);

// Called when all threads of a CTA have exited and its asynchronous operations are complete.
void check_barriers_at_exit(Cta& cta);
// A try_wait may give up after a time limit. When nothing else can run, this lets every waiting try_wait return
// false once; false if none waits. All stuck again without progress in between is a deadlock.
bool wake_try_waits(Cluster& cluster);

}  // namespace ptxe
