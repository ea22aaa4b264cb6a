// What fences add to the order between relaxed accesses: release and acquire patterns made of a fence and a relaxed
// access to a synchronisation object.
#pragma once

#include "checker.h"
#include "core.h"

namespace ptxe {

// A relaxed write to `sync` (a relaxed store, atomic or arrival): what the warp did before its last fence happens
// before whoever acquires from sync.
void release_fenced(Warp& w, Sync& sync);
// A relaxed read of `sync` (a relaxed load, atomic or wait): the next fence of the warp acquires it.
void observe_relaxed(Warp& w, const Sync& sync);

}  // namespace ptxe
