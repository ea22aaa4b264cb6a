// tcgen05.alloc, dealloc, relinquish_alloc_permit.
#include <algorithm>

#include "memory.h"
#include "tcgen05.h"

namespace ptxe {

void check_tmem_at_exit(Cta& cta);

namespace {

constexpr uint32_t kMinColumns = 32;  // also the unit of allocation
constexpr uint32_t kNoColumn = ~0u;

struct AllocWarp : GroupState {
  bool arrived = false;  // has its columns, but the other CTA of the pair is not there yet
  uint32_t ticket = 0;   // number of this allocation in the CTA
  uint32_t column = 0;
};

bool valid_columns(uint32_t n) { return n >= kMinColumns && n <= kTmemColumns && (n & (n - 1)) == 0; }

std::string columns_text(uint32_t column, uint32_t n) {
  return std::to_string(n) + " columns at column " + std::to_string(column);
}

uint32_t find_free(const Tcgen05Cta& state, uint32_t n) {
  for (uint32_t first = 0; first + n <= kTmemColumns; first += kMinColumns) {
    uint32_t free = 0;
    while (free < n && !state.allocated[first + free]) ++free;
    if (free == n) return first;
  }
  return kNoColumn;
}

void mark(Tcgen05Cta& state, uint32_t column, uint32_t n, bool allocated) {
  for (uint32_t c = column; c < column + n; ++c) state.allocated[c] = allocated;
}

// Both CTAs of a pair must come to an allocation of cta_group::2 before either goes on.
bool pair_is_here(Warp& w, const CtaGroup& group) {
  Cta& peer = *group.ctas[group.ctas[0] == w.cta ? 1 : 0];
  const uint32_t ticket = w.state.get<AllocWarp>().ticket;
  return tcgen05_state(peer).pair_allocs >= ticket;
}

std::string explain_pair(Warp& w, const Instruction&) {
  return "tcgen05.alloc.cta_group::2 of " + cta_name(w.cluster->ctas[w.cta->rank ^ 1]) + ", the other one of the pair";
}

std::string explain_alloc(Warp& w, const Instruction& i) {
  const uint32_t columns = w.values<uint32_t>(i.args[6])[w.first_lane()];
  const Tcgen05Cta& state = tcgen05_state(*w.cta);
  const std::string text = "tcgen05.alloc of " + std::to_string(columns) + " columns: " +
                           std::to_string(state.allocated.count()) + " of " + std::to_string(kTmemColumns) +
                           " columns of tensor memory are allocated";
  // Another warp could have deallocated them, so that only the deadlock shows that too much was asked for.
  if (std::all_of(state.allocations.begin(), state.allocations.end(),
                  [&](const TmemAllocation& a) { return a.site.warp == w.index; })) {
    report(w, Report::TmemMisuse, -1, text + ", all by this warp, and nobody deallocates them");
  }
  return text;
}

void store_address(Warp& w, const Instruction& i, uint32_t column) {
  const int lane = w.first_lane();
  const AddressArgs args(i, 2);
  const auto space = static_cast<Space>(i.args[1]);
  const Place place = resolve(w, space, args.at(w, lane), 4, 4, AccessKind::Write, lane);
  if (place) std::memcpy(place.data, &column, 4);  // lane 0 in the upper half
}

}  // namespace

CtaGroup cta_group(Warp& w, uint32_t size) {
  CtaGroup group;
  const uint32_t first = size == 2 ? w.cta->rank & ~1u : w.cta->rank;
  if (first + size > w.cluster->ctas.size()) {
    report(w, Report::TmemMisuse, -1,
           "cta_group::2 needs a cluster with an even number of CTAs; this one has " +
               std::to_string(w.cluster->ctas.size()));
    return group;
  }
  group.size = size;
  for (uint32_t n = 0; n < size; ++n) group.ctas[n] = &w.cluster->ctas[first + n];
  return group;
}

std::string tmem_refusal(Cta& cta, uint32_t column, uint32_t num_columns) {
  const Tcgen05Cta& state = tcgen05_state(cta);
  for (uint32_t c = column; c < column + num_columns; ++c) {
    if (c >= kTmemColumns) {
      return "column " + std::to_string(c) + " of tensor memory does not exist; it has " +
             std::to_string(kTmemColumns);
    }
    if (!state.allocated[c]) {
      return "column " + std::to_string(c) + " of the tensor memory of " + cta_name(cta) +
             " is not allocated";
    }
  }
  return {};
}

void check_tmem_at_exit(Cta& cta) {
  Tcgen05Cta& state = tcgen05_state(cta);
  for (const TmemAllocation& a : state.allocations) {
    report(*cta.grid, Report::TmemMisuse, a.site,
           "the " + columns_text(a.column, a.num_columns) +
               " of tensor memory allocated here were not deallocated before " + cta_name(cta) +
               " ended");
  }
  state.allocations.clear();
}

// cta_group, space, address (4), columns
PTXE_OP("tcgen05.alloc") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const uint32_t columns = w.values<uint32_t>(i.args[6])[w.first_lane()];
  const CtaGroup group = cta_group(w, i.args[0]);
  Tcgen05Cta& state = tcgen05_state(*w.cta);
  if (!group.size) return Step::Next;
  if (!valid_columns(columns)) {
    report(w, Report::TmemMisuse, -1,
           "tcgen05.alloc of " + std::to_string(columns) + " columns: it must be a power of two from 32 to 512");
    store_address(w, i, 0);
    return Step::Next;
  }
  if (state.relinquished) {
    report(w, Report::TmemMisuse, -1,
           "tcgen05.alloc after tcgen05.relinquish_alloc_permit of " + cta_name(*w.cta));
  }
  AllocWarp& own = w.state.get<AllocWarp>();
  if (!own.arrived) {
    own.column = find_free(state, columns);
    if (own.column == kNoColumn) return wait_because(w, explain_alloc);
    // Before the peer can go on: the two allocate together, and its MMAs write to this CTA as well.
    mark(state, own.column, columns, true);
    state.allocations.push_back({own.column, columns, site_of(w)});
    forget_tmem(*w.cta, own.column, columns);
    own.arrived = true;
    if (group.size == 2) own.ticket = ++state.pair_allocs;
    ++w.cluster->progress;
  }
  if (group.size == 2 && !pair_is_here(w, group)) return wait_because(w, explain_pair);
  own.arrived = false;
  store_address(w, i, own.column);
  ++w.cluster->progress;
  return Step::Next;
}

// cta_group, address, columns
PTXE_OP("tcgen05.dealloc") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  const int lane = w.first_lane();
  const TmemAddress address(w.values<uint32_t>(i.args[1])[lane]);
  const uint32_t columns = w.values<uint32_t>(i.args[2])[lane];
  if (!cta_group(w, i.args[0]).size) return Step::Next;
  Tcgen05Cta& state = tcgen05_state(*w.cta);
  const auto found = std::find_if(state.allocations.begin(), state.allocations.end(), [&](const TmemAllocation& a) {
    return a.column == address.column && address.lane == 0;
  });
  if (found == state.allocations.end() || found->num_columns != columns) {
    std::string message = "tcgen05.dealloc of " + columns_text(address.column, columns) + " (lane " +
                          std::to_string(address.lane) + "), ";
    message += found == state.allocations.end()
                   ? "where " + cta_name(*w.cta) + " has no allocation"
                   : "where " + std::to_string(found->num_columns) + " columns were allocated";
    report(w, Report::TmemMisuse, -1, message);
    return Step::Next;
  }
  free_tmem(w, *w.cta, found->column, found->num_columns);
  mark(state, found->column, found->num_columns, false);
  state.allocations.erase(found);
  ++w.cluster->progress;
  return Step::Next;
}

// cta_group
PTXE_OP("tcgen05.relinquish_alloc_permit") {
  const Step step = gather(w, i, w.live);
  if (step != Step::Execute) return step;
  tcgen05_state(*w.cta).relinquished = true;
  return Step::Next;
}

}  // namespace ptxe
