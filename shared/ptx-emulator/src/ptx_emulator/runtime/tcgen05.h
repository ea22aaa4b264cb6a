// What the tcgen05 operations share: which columns are allocated, CTA pairs, the pipeline that executes in order.
#pragma once

#include <bitset>
#include <string>
#include <vector>

#include "checker.h"
#include "core.h"

namespace ptxe {

struct TmemAddress {
  uint32_t lane, column;
  explicit TmemAddress(uint32_t bits) : lane(bits >> 16), column(bits & 0xffff) {}
};

struct TmemAllocation {
  uint32_t column, num_columns;
  Site site;
};

struct Tcgen05Cta : GroupState {
  std::vector<TmemAllocation> allocations;
  std::bitset<kTmemColumns> allocated;
  bool relinquished = false;
  uint32_t pair_allocs = 0;     // tcgen05.alloc.cta_group::2 reached by this CTA
  uint64_t mma_busy_until = 0;  // virtual time
};
inline Tcgen05Cta& tcgen05_state(Cta& cta) { return cta.state.get<Tcgen05Cta>(); }

// The CTAs of cta_group::1 or ::2 that `cta` belongs to: the pair differs in the last bit of the rank.
struct CtaGroup {
  Cta* ctas[2] = {nullptr, nullptr};
  uint32_t size = 0;
  Cta& leader() const { return *ctas[0]; }
};
// Reports and returns size 0 if the cluster has no such pair.
CtaGroup cta_group(Warp& w, uint32_t size);

// tcgen05.mma, cp, shift and commit of a CTA (pair) complete in the order in which they were issued.
inline uint64_t pipeline_order(const CtaGroup& group) { return 0x7463303500000000ull + group.leader().rank; }

// Why columns of a CTA's tensor memory cannot be accessed, or an empty string.
std::string tmem_refusal(Cta& cta, uint32_t column, uint32_t num_columns);

}  // namespace ptxe
