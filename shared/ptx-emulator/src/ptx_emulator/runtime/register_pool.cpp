// Registers of the warps of a CTA, which setmaxnreg moves: from a warp to the pool of its CTA, and back.
//
// The pool holds what setmaxnreg.dec has released, and nothing at first. A warp that exits releases nothing: the PTX
// ISA knows no other way into the pool. Where the launch does not say how many registers a thread has, ptxas drops
// the instruction, so that here only the warps of a group are held against each other.
#include <algorithm>

#include "checker.h"
#include "program.h"
#include "register_pool.h"

namespace ptxe {

namespace {

constexpr uint32_t kWarpsPerGroup = 4;
constexpr uint32_t kUnit = 8;  // registers per thread, that of a warp's allocation
constexpr uint32_t allocated(uint32_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

struct Change {
  uint32_t count;
  bool increase;
  Stamp stamp;
  Site site;
};

struct WarpRegisters {
  uint32_t count = 0;  // per thread; 0: not known
  std::vector<Change> changes;
  bool waiting = false;  // for the last of them
};

struct RegisterPool : GroupState {
  uint32_t free = 0;  // registers per thread, of one warp
  std::vector<WarpRegisters> warps;
};

RegisterPool& pool_of(const Warp& w) {
  RegisterPool& pool = w.cta->state.get<RegisterPool>();
  if (pool.warps.empty()) {
    pool.warps.resize(w.cta->warps.size());
    for (WarpRegisters& registers : pool.warps) registers.count = w.grid->registers_per_thread;
  }
  return pool;
}

std::string change_text(const Change& change) {
  return std::string(change.increase ? "setmaxnreg.inc" : "setmaxnreg.dec") + " to " + std::to_string(change.count);
}

// "warps 0-3 232, warps 4-7 40": registers per thread.
std::string held_text(const RegisterPool& pool) {
  std::string text;
  for (size_t first = 0, next = 0; first < pool.warps.size(); first = next) {
    while (next < pool.warps.size() && pool.warps[next].count == pool.warps[first].count) ++next;
    text += (text.empty() ? "warp" : ", warp") + (next - first > 1 ? "s " + std::to_string(first) + "-" : " ") +
            std::to_string(next - 1) + " " + std::to_string(pool.warps[first].count);
  }
  return text;
}

std::string explain_pool(Warp& w, const Instruction&) {
  const RegisterPool& pool = pool_of(w);
  const WarpRegisters& own = pool.warps[w.index];
  const Change& change = own.changes.back();
  return std::to_string(allocated(change.count) - allocated(own.count)) + " registers per thread, for " +
         change_text(change) + "; the pool of " + cta_name(*w.cta) + " has " + std::to_string(pool.free) +
         " for one warp. Each thread was launched with " + std::to_string(w.grid->registers_per_thread) +
         " and has now: " + held_text(pool);
}

// The change against the one that the other warps of the group have made in the same place, if they have.
void check_group(Warp& w, const RegisterPool& pool) {
  const auto& own = pool.warps[w.index].changes;
  const size_t number = own.size() - 1;
  const Change& change = own.back();
  const size_t first = w.index / kWarpsPerGroup * kWarpsPerGroup;
  for (size_t other = first; other < std::min<size_t>(first + kWarpsPerGroup, pool.warps.size()); ++other) {
    const auto& theirs = pool.warps[other].changes;
    if (number && (theirs.size() < number || !happened_before(theirs[number - 1].stamp, w))) {
      report(w, Report::Registers, -1,
             change_text(change) + " registers is not ordered behind the setmaxnreg before it by warp " +
                 std::to_string(other) + " of the same warp group; the warps have to synchronise in between.");
      return;
    }
    if (theirs.size() <= number) continue;
    if (theirs[number].count == change.count && theirs[number].increase == change.increase) continue;
    report(w, Report::Registers, -1,
           change_text(change) + " registers, but warp " + std::to_string(other) +
               " of the same warp group has executed " + change_text(theirs[number]) + ".");
    return;
  }
}

void check_direction(Warp& w, const WarpRegisters& own) {
  const Change& change = own.changes.back();
  if (!own.count || change.count == own.count || change.increase == (change.count > own.count)) return;
  report(w, Report::Registers, -1,
         change_text(change) + " registers, but a thread of the warp has " + std::to_string(own.count) +
             (change.increase ? " already." : " only."));
}

// Moves registers between warp and pool; false where the pool has too few.
bool move_registers(RegisterPool& pool, WarpRegisters& own, const Change& change) {
  const uint32_t has = allocated(own.count), wanted = allocated(change.count);
  if (change.increase && wanted > has) {
    if (wanted - has > pool.free) return false;
    pool.free -= wanted - has;
  } else if (!change.increase && wanted < has) {
    pool.free += has - wanted;
  } else if (wanted != has) {
    return true;  // reported
  }
  own.count = change.count;
  return true;
}

}  // namespace

PTXE_OP("setmaxnreg") {  // count, whether .inc
  RegisterPool& pool = pool_of(w);
  WarpRegisters& own = pool.warps[w.index];
  if (!own.waiting) {
    const Step step = gather(w, i, w.live);
    if (step != Step::Execute) return step;
    own.changes.push_back({i.args[0], i.args[1] != 0, stamp(w), site_of(w)});
    check_group(w, pool);
    check_direction(w, own);
  }
  own.waiting = own.count && !move_registers(pool, own, own.changes.back());
  if (own.waiting) return wait_because(w, explain_pool);
  ++w.cluster->progress;
  return Step::Next;
}

void check_registers_at_exit(Cta& cta) {
  const RegisterPool* pool = cta.state.find<RegisterPool>();
  if (!pool) return;
  for (size_t first = 0; first < pool->warps.size(); first += kWarpsPerGroup) {
    const auto begin = pool->warps.begin() + static_cast<std::ptrdiff_t>(first);
    const auto end = begin + static_cast<std::ptrdiff_t>(std::min<size_t>(kWarpsPerGroup, pool->warps.size() - first));
    const auto [least, most] = std::minmax_element(begin, end, [](const WarpRegisters& a, const WarpRegisters& b) {
      return a.changes.size() < b.changes.size();
    });
    if (least->changes.size() == most->changes.size()) continue;
    const Change& change = most->changes[least->changes.size()];
    report(*cta.grid, Report::Registers, change.site,
           change_text(change) + " registers, which warp " + std::to_string(least - pool->warps.begin()) +
               " of the same warp group has not executed.");
  }
}

}  // namespace ptxe
