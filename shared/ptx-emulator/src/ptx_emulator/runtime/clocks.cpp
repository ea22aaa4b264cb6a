// Vector clocks, views, and what is known of other clusters.
#include <algorithm>

#include "checker_state.h"

namespace ptxe {

void Clock::join(const Clock& other) {
  if (entries.size() < other.entries.size()) entries.resize(other.entries.size());
  uint32_t* mine = entries.data();
  const uint32_t* theirs = other.entries.data();
  const size_t n = other.entries.size();
  for (size_t k = 0; k < n; ++k) mine[k] = std::max(mine[k], theirs[k]);
}

void Clock::raise(uint32_t component, uint32_t value) {
  if (entries.size() <= component) entries.resize(component + 1);
  entries[component] = std::max(entries[component], value);
}

void Views::join(const Views& other) {
  generic.join(other.generic);
  async.join(other.async);
  tcgen05.join(other.tcgen05);
  fenced.join(other.fenced);
  join_foreign(foreign, other.foreign);
  grid_dependency |= other.grid_dependency;
}

void Views::clear() {
  generic.entries.clear();
  async.entries.clear();
  tcgen05.entries.clear();
  fenced.entries.clear();
  foreign.reset();
  grid_dependency = false;
}

void Sync::clear() {
  views.clear();
  time = 0;
}

namespace {

bool contains(const Clock& big, const Clock& small) {
  for (size_t k = 0; k < small.entries.size(); ++k) {
    if (small.entries[k] && !big.covers(static_cast<uint32_t>(k), small.entries[k])) return false;
  }
  return true;
}

bool contains(const std::vector<Foreign>& big, const std::vector<Foreign>& small) {
  auto at = big.begin();
  for (const Foreign& f : small) {
    while (at != big.end() && at->cluster < f.cluster) ++at;
    if (at == big.end() || at->cluster != f.cluster) return false;
    if (!contains(at->generic, f.generic) || !contains(at->async, f.async)) return false;
  }
  return true;
}

}  // namespace

void join_foreign(ForeignTable& into, const ForeignTable& other) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  // Tables are shared; most joins find that one side already knows all of the other.
  if (contains(*into, *other)) return;
  if (contains(*other, *into)) {
    into = other;
    return;
  }
  auto merged = std::make_shared<std::vector<Foreign>>();
  auto a = into->begin();
  auto b = other->begin();
  while (a != into->end() || b != other->end()) {
    if (b == other->end() || (a != into->end() && a->cluster < b->cluster)) {
      merged->push_back(*a++);
    } else if (a == into->end() || b->cluster < a->cluster) {
      merged->push_back(*b++);
    } else {
      merged->push_back(*a++);
      merged->back().generic.join(b->generic);
      merged->back().async.join(b->async);
      ++b;
    }
  }
  into = std::move(merged);
}

}  // namespace ptxe
