// Shadow memory: who wrote and who read each unit (a byte, or a cell of tensor memory) last.
//
// A block is divided into lines; a line is a list of runs of units with the same history, most often a single one.
// An access touches each run in its range once, splits runs at its ends and merges what became equal, so that bulk
// accesses cost by the line and scattered ones stay exact to the byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptxe {

// One access as the shadow keeps it.
struct Access {
  uint32_t value = 0;      // of the component at the access; 0: no access
  uint32_t pc = 0;
  uint32_t cluster = 0;    // linear in the grid
  uint32_t grid = 0;
  uint16_t component = 0;
  uint16_t issuer = 0;     // component of the warp that executed or issued it
  bool async_proxy = false;
  bool strong = false;     // an atomic or a strong access
  bool read_modify = false;
  bool operator==(const Access& other) const {
    return value == other.value && pc == other.pc && cluster == other.cluster && grid == other.grid &&
           component == other.component && issuer == other.issuer && async_proxy == other.async_proxy &&
           strong == other.strong && read_modify == other.read_modify;
  }
};

// Accesses that lie side by side in memory.
struct Accesses {
  const Access* first;
  size_t count;
  const Access* begin() const { return first; }
  const Access* end() const { return first + count; }
  const Access& back() const { return first[count - 1]; }
  size_t size() const { return count; }
};

struct Run {
  uint32_t end;        // first unit behind it, in the line
  Access write;        // value 0: nobody has written these units
  uint32_t reads = 0;  // set of the reads since that write
};

// Immutable sets of reads by number; 0 is the empty one. Runs with the same history have the same number.
class ReadSets {
 public:
  explicit ReadSets(uint32_t max_readers) : max_readers_(max_readers) { clear(); }

  Accesses of(uint32_t set) const {
    const Slice& s = slices_[set];
    return {items_.data() + s.first, s.count};
  }

  // The set with `read` added; those for which `before(earlier)` holds happened before `read` and are left out, since
  // whatever comes after `read` comes after them. A full set stays as it is.
  template <class Before>
  uint32_t with(uint32_t set, const Access& read, Before&& before) {
    for (const Memo& memo : memos_) {
      if (memo.from == set && memo.read == read) return memo.to;
    }
    const uint32_t made = make(set, read, before);
    memos_[next_memo_] = Memo{set, made, read};
    next_memo_ = (next_memo_ + 1) % kMemos;
    return made;
  }

  size_t size() const { return slices_.size(); }
  void clear();
  uint32_t add_copy(Accesses reads);

 private:
  static constexpr uint32_t kMemos = 4;
  struct Slice {
    uint32_t first, count;
  };
  struct Memo {
    uint32_t from = ~0u, to = 0;
    Access read;
  };

  template <class Before>
  uint32_t make(uint32_t set, const Access& read, Before&& before) {
    const Slice old = slices_[set];
    const auto first = static_cast<uint32_t>(items_.size());
    for (uint32_t k = 0; k < old.count; ++k) {
      const Access earlier = items_[old.first + k];
      if (earlier == read) {
        items_.resize(first);
        return set;
      }
      const bool replaced = earlier.component == read.component && earlier.cluster == read.cluster &&
                            earlier.grid == read.grid && earlier.value <= read.value &&
                            earlier.strong == read.strong;
      if (!replaced && !before(earlier)) items_.push_back(earlier);
    }
    const auto kept = static_cast<uint32_t>(items_.size()) - first;
    if (kept >= max_readers_) {
      items_.resize(first);
      return set;
    }
    items_.push_back(read);
    slices_.push_back(Slice{first, kept + 1});
    return static_cast<uint32_t>(slices_.size()) - 1;
  }

  uint32_t max_readers_;
  std::vector<Access> items_;
  std::vector<Slice> slices_;
  Memo memos_[kMemos];
  uint32_t next_memo_ = 0;
};

class ShadowBlock {
 public:
  ShadowBlock(uint32_t num_units, uint32_t line_units, uint32_t max_readers)
      : line_units_(line_units), reads_(max_readers), lines_((num_units + line_units - 1) / line_units) {}

  // Calls apply(run, first unit) for all runs of [begin, end). `skip(run)` may say that apply would change nothing.
  template <class Skip, class Apply>
  void visit(uint32_t begin, uint32_t end, Skip&& skip, Apply&& apply) {
    if (reads_.size() > collect_at_) collect();
    while (begin < end) {
      const uint32_t line = begin / line_units_;
      const uint32_t base = line * line_units_;
      const uint32_t stop = end < base + line_units_ ? end : base + line_units_;
      visit_line(lines_[line], base, begin - base, stop - base, skip, apply);
      begin = stop;
    }
  }

  void forget(uint32_t begin, uint32_t end);
  ReadSets& reads() { return reads_; }

 private:
  static constexpr size_t kFirstCollection = 4096;  // read sets

  struct Line {
    Run whole{};             // its `end` means nothing
    std::vector<Run> parts;  // empty: all units are as in `whole`
  };

  template <class Skip, class Apply>
  void visit_line(Line& line, uint32_t base, uint32_t begin, uint32_t end, Skip& skip, Apply& apply) {
    std::vector<Run>& parts = line.parts;
    if (parts.empty()) {
      if (skip(line.whole)) return;
      if (begin == 0 && end == line_units_) {
        apply(line.whole, base);
        return;
      }
      parts.push_back(line.whole);
      parts.front().end = line_units_;
    } else {
      const size_t k = find(parts, begin);
      Run& run = parts[k];
      if (run.end >= end && skip(run)) return;
      if (run.end == end && (k == 0 ? 0 : parts[k - 1].end) == begin) {  // just this run, as in the round before
        apply(run, base + begin);
        settle(line, k, k);
        return;
      }
    }
    const size_t first = cut(parts, begin);
    size_t k = first;
    for (uint32_t at = begin; at < end; ++k) {
      if (parts[k].end > end) split(parts, k, end);
      apply(parts[k], base + at);
      at = parts[k].end;
    }
    settle(line, first, k - 1);
  }

  static bool same(const Run& a, const Run& b) { return a.reads == b.reads && a.write == b.write; }
  static size_t find(const std::vector<Run>& parts, uint32_t unit);   // index of the run that has the unit
  static void split(std::vector<Run>& parts, size_t k, uint32_t at);  // parts[k] ends at `at`, the rest follows it
  static size_t cut(std::vector<Run>& parts, uint32_t at);            // index of the run that begins at `at`
  static void settle(Line& line, size_t first, size_t last);  // merges what became equal from `first` to `last`
  void collect();  // drops the read sets that no run has any more

  uint32_t line_units_;
  size_t collect_at_ = kFirstCollection;
  ReadSets reads_;
  std::vector<Line> lines_;
};

}  // namespace ptxe
