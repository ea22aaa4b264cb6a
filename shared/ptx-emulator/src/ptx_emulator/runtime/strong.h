// Order that strong accesses to one location make: what a release wrote, an acquire that reads it is ordered after.
#pragma once

#include "memory.h"

namespace ptxe {

// As `semantics` of the lowering; Weak accesses order nothing.
enum class Semantics : uint32_t { Weak, Relaxed, Acquire, Release, AcquireRelease };
inline bool acquires(Semantics s) { return s == Semantics::Acquire || s == Semantics::AcquireRelease; }
inline bool releases(Semantics s) { return s == Semantics::Release || s == Semantics::AcquireRelease; }

// To be called before the data are stored. A plain store (not `modifies`) starts the location's order anew, a
// read-modify-write adds to it.
void order_store(Warp& w, uint8_t* data, Place::Home home, Semantics semantics, bool modifies);
// To be called after the data have been read.
void order_load(Warp& w, uint8_t* data, Place::Home home, Semantics semantics);

}  // namespace ptxe
