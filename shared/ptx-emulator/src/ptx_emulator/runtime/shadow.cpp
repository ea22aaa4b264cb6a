#include "shadow.h"

#include <algorithm>
#include <unordered_map>

namespace ptxe {

void ReadSets::clear() {
  items_.clear();
  slices_.assign(1, Slice{0, 0});
  for (Memo& memo : memos_) memo = Memo{};
}

uint32_t ReadSets::add_copy(Accesses reads) {
  slices_.push_back(Slice{static_cast<uint32_t>(items_.size()), static_cast<uint32_t>(reads.size())});
  items_.insert(items_.end(), reads.begin(), reads.end());
  return static_cast<uint32_t>(slices_.size()) - 1;
}

void ShadowBlock::split(std::vector<Run>& parts, size_t k, uint32_t at) {
  Run before = parts[k];
  before.end = at;
  parts.insert(parts.begin() + static_cast<ptrdiff_t>(k), before);
}

size_t ShadowBlock::find(const std::vector<Run>& parts, uint32_t unit) {
  const auto found =
      std::upper_bound(parts.begin(), parts.end(), unit, [](uint32_t u, const Run& run) { return u < run.end; });
  return static_cast<size_t>(found - parts.begin());
}

size_t ShadowBlock::cut(std::vector<Run>& parts, uint32_t at) {
  const size_t k = find(parts, at);
  if (k == parts.size()) return k;
  const uint32_t begin = k == 0 ? 0 : parts[k - 1].end;
  if (begin == at) return k;
  split(parts, k, at);
  return k + 1;
}

void ShadowBlock::settle(Line& line, size_t first, size_t last) {
  std::vector<Run>& parts = line.parts;
  if (first > 0) --first;
  if (last + 1 < parts.size()) ++last;
  size_t kept = first;
  for (size_t k = first + 1; k <= last; ++k) {
    if (same(parts[kept], parts[k])) {
      parts[kept].end = parts[k].end;
    } else {
      if (++kept != k) parts[kept] = parts[k];
    }
  }
  if (kept == last) return;
  parts.erase(parts.begin() + static_cast<ptrdiff_t>(kept) + 1, parts.begin() + static_cast<ptrdiff_t>(last) + 1);
  if (parts.size() > 1) return;
  line.whole = parts.front();
  parts.clear();
}

void ShadowBlock::forget(uint32_t begin, uint32_t end) {
  visit(begin, end, [](const Run&) { return false; },
        [](Run& run, uint32_t) {
          run.write = Access{};
          run.reads = 0;
        });
}

void ShadowBlock::collect() {
  ReadSets old = reads_;
  reads_.clear();
  std::unordered_map<uint32_t, uint32_t> moved{{0, 0}};
  const auto move = [&](Run& run) {
    const auto [at, is_new] = moved.try_emplace(run.reads, 0);
    if (is_new) at->second = reads_.add_copy(old.of(run.reads));
    run.reads = at->second;
  };
  for (Line& line : lines_) {
    if (line.parts.empty()) move(line.whole);
    for (Run& run : line.parts) move(run);
  }
  collect_at_ = std::max(kFirstCollection, 2 * reads_.size());
}

}  // namespace ptxe
