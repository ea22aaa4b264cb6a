// What the checker says about conflicting accesses, and what clusters share.
#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "checker_state.h"

namespace ptxe {

namespace {

template <class... T>
std::string format(const char* pattern, T... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string deed(const Access& access, const char* what, bool tmem) {
  std::string text = access.strong && !access.read_modify ? "strong " : "";
  if (access.component != access.issuer && !tmem) text += access.async_proxy ? "async-proxy " : "asynchronous ";
  return text + what;
}

}  // namespace

const char* verb(AccessKind kind) {
  if (kind == AccessKind::Atomic) return "update";
  return writes(kind) ? "write" : "read";
}

// ---------------------------------------------------------------------------------------------- shared by clusters

GlobalPage& SharedChecks::page(uint64_t number) {
  {
    const std::shared_lock<std::shared_mutex> hold(pages_lock_);
    const auto found = pages_.find(number);
    if (found != pages_.end()) return *found->second;
  }
  const std::lock_guard<std::shared_mutex> hold(pages_lock_);
  auto& page = pages_[number];
  if (!page) page = std::make_unique<GlobalPage>();
  return *page;
}

WrittenBytes& SharedChecks::written(const MemoryMap::Range& range) {
  const std::lock_guard<std::mutex> hold(written_lock_);
  auto& entry = written_[{range.base, range.bytes}];
  if (!entry) entry = std::make_unique<WrittenBytes>(range.bytes);
  return *entry;
}

bool SharedChecks::is_new(uint32_t grid, Report kind, uint32_t pc, uint32_t other_pc) {
  const std::lock_guard<std::mutex> hold(findings_lock_);
  auto& seen = findings_[{grid, kind}].seen;
  return seen.size() < kMaxPerKind && seen.insert(std::minmax(pc, other_pc)).second;
}

namespace {

uint64_t mask_of(uint64_t word, uint64_t begin, uint64_t end) {  // bits of the word inside [begin, end)
  const uint64_t first = word * 64;
  uint64_t mask = ~0ull;
  if (begin > first) mask &= ~0ull << (begin - first);
  if (end < first + 64) mask &= ~0ull >> (first + 64 - end);
  return mask;
}

}  // namespace

void WrittenBytes::set(uint64_t begin, uint64_t end) {
  for (uint64_t word = begin / 64; word * 64 < end; ++word) {
    const uint64_t mask = mask_of(word, begin, end);
    if ((words_[word].load(std::memory_order_relaxed) & mask) == mask) continue;
    words_[word].fetch_or(mask, std::memory_order_relaxed);
  }
}

uint64_t WrittenBytes::first_unset(uint64_t begin, uint64_t end) const {
  for (uint64_t word = begin / 64; word * 64 < end; ++word) {
    const uint64_t missing = ~words_[word].load(std::memory_order_relaxed) & mask_of(word, begin, end);
    if (missing) return word * 64 + static_cast<uint64_t>(__builtin_ctzll(missing));
  }
  return end;
}

// ---------------------------------------------------------------------------------------------- texts

Site ClusterChecker::site_of_access(const Access& access) const {
  const Grid& grid = cluster_.machine->grids[access.grid];
  const uint32_t* c = grid.cluster;
  const uint32_t across[2] = {grid.size[0] / c[0], grid.size[1] / c[1]};
  const uint32_t rank = access.issuer / grid.num_warps;
  const uint32_t x = access.cluster % across[0] * c[0] + rank % c[0];
  const uint32_t y = access.cluster / across[0] % across[1] * c[1] + rank / c[0] % c[1];
  const uint32_t z = access.cluster / across[0] / across[1] * c[2] + rank / c[0] / c[1];
  return Site{x + grid.size[0] * (y + grid.size[1] * z), access.issuer % grid.num_warps, -1, access.pc};
}

std::string ClusterChecker::actor_text(const Access& access) const {
  const Site site = site_of_access(access);
  const Program& program = *cluster_.machine->grids[access.grid].program;
  const uint32_t* size = cluster_.machine->grids[access.grid].size;
  std::string text = format("warp %u of CTA (%u, %u, %u)", site.warp, site.cta % size[0], site.cta / size[0] % size[1],
                            site.cta / size[0] / size[1]);
  if (access.grid == cluster_.grid->id) return text;  // the report has the other site, too
  if (site.pc < program.code.size()) text += format(" at PTX line %u", program.code[site.pc].line);
  text += " of " + program.name + format(" (launch %u)", access.grid);
  return text;
}

std::string ClusterChecker::memory_text(const Place& place, uint64_t at) {
  if (place.home == Place::Shared) {
    return format("shared memory 0x%" PRIx64 " of ", at) + cta_name(*place.cta);
  }
  if (place.range) return place.range->name + format(" + %" PRIu64 " bytes", at - place.range->base);
  return format("global memory 0x%" PRIx64, at);
}

std::string ClusterChecker::tmem_text(const Cta& cta, uint64_t unit) {
  return format("TMEM lane %u, column %u of ", static_cast<unsigned>(unit % kTmemLanes),
                static_cast<unsigned>(unit / kTmemLanes)) +
         cta_name(cta);
}

// ---------------------------------------------------------------------------------------------- reports

namespace {

Report kind_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::ProxyRace: return Report::ProxyRace;
    case Verdict::Tcgen05Order: return Report::Tcgen05Order;
    case Verdict::GridDependency: return Report::GridDependency;
    default: return Report::Race;
  }
}

}  // namespace

std::string ClusterChecker::conflict_text(const Conflict& conflict, const Access& self) {
  const Access& other = conflict.other;
  switch (conflict.verdict) {
    case Verdict::ProxyRace:
      return "The write was made through the generic proxy, and no fence.proxy.async lies between the two.";
    case Verdict::Tcgen05Order:
      return "The warps have synchronised, but tcgen05.wait or tcgen05.fence::before_thread_sync is missing before "
             "that, or tcgen05.fence::after_thread_sync behind it.";
    case Verdict::GridDependency:
      if (other.grid > self.grid) return "No griddepcontrol.wait makes that launch wait for this one.";
      if (!conflict.waited) {
        return "griddepcontrol.wait has not been executed before, so the earlier launch may be running.";
      }
      return format("griddepcontrol.wait waits for launch %u alone, which may end before launch %u does: not every "
                    "launch in between executes griddepcontrol.wait.", self.grid - 1, other.grid);
    default: break;
  }
  if (other.component != other.issuer || self.component != self.issuer) {
    return "Nothing orders the two: an asynchronous operation comes before those who wait for it, and nobody else.";
  }
  if (other.cluster != self.cluster) return "The two are of different clusters, and nothing orders them.";
  return "Nothing orders the two.";
}

void ClusterChecker::report_conflict(const Conflict& conflict, const Access& self, const char* what_it_does,
                                     const Site& site, const std::string& place, bool tmem) {
  const Access& other = conflict.other;
  const Report what = kind_of(conflict.verdict);
  if (!shared_->is_new(cluster_.grid->id, what, self.pc, other.pc)) return;
  const char* other_verb = !conflict.other_writes ? "read" : other.read_modify ? "update" : "write";
  const std::string other_deed = deed(other, other_verb, tmem);
  const char* article = std::strchr("aeiou", other_deed.front()) ? "an " : "a ";
  std::string message = "The " + deed(self, what_it_does, tmem) + " of " + place + " follows " + article + other_deed +
                        " by " + actor_text(other) + ". " +
                        conflict_text(conflict, self);
  const Site other_site = site_of_access(other);
  report(*cluster_.grid, what, site, std::move(message), other.grid == cluster_.grid->id ? &other_site : nullptr);
}

void ClusterChecker::report_remote(const RemoteAccess& remote, const Cta& cta) {
  if (!shared_->is_new(cluster_.grid->id, Report::OutOfBounds, remote.access.pc, ~0u)) return;
  report(*cluster_.grid, Report::OutOfBounds, remote.site,
         "The " + deed(remote.access, verb(remote.kind), false) +
             format(" of shared memory 0x%" PRIx64 " of ", remote.offset) + cta_name(cta) +
             " is not ordered before the end of that CTA: all of its threads may have exited before.");
}

// Once for each instruction: what is computed from its registers would repeat it.
void ClusterChecker::check_arrived(const Warp& w, uint32_t pc, Report kind) {
  const auto& all = state(w).registers_in_flight;
  if (std::find(all.begin(), all.end(), pc) == all.end()) return;
  if (!shared_->is_new(cluster_.grid->id, kind, pc, pc)) return;
  Site issued = site_of(w);
  issued.pc = pc;
  report(*cluster_.grid, kind, site_of(w),
         kind == Report::WgmmaOrder
             ? "An accumulator of wgmma.mma_async is used before wgmma.wait_group: the product may not be complete."
             : "A register that tcgen05.ld loads is used before tcgen05.wait::ld: its value may not have arrived.",
         &issued);
}

void ClusterChecker::report_uninitialised(const Access& self, const Site& site, const std::string& place) {
  if (!shared_->is_new(cluster_.grid->id, Report::Uninitialised, self.pc, ~0u)) return;
  report(*cluster_.grid, Report::Uninitialised, site,
         "The read of " + place + " finds nothing: it has not been written.");
}

}  // namespace ptxe
