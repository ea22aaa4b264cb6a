// Random accesses to a shadow block, beside a model that keeps the history of every unit by itself.
#include "shadow.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

using ptxe::Access;
using ptxe::Run;

namespace {

constexpr uint32_t kUnits = 1000, kLine = 128;

struct Unit {
  Access write;
  std::vector<Access> reads;
};

void expect(bool holds, const char* what, uint32_t unit) {
  if (holds) return;
  std::printf("%s differs at unit %u\n", what, unit);
  std::exit(1);
}

void add_read(Unit& unit, const Access& read) {
  std::vector<Access> kept;
  for (const Access& earlier : unit.reads) {
    if (earlier == read) return;
    if (earlier.component != read.component || earlier.value > read.value) kept.push_back(earlier);
  }
  kept.push_back(read);
  unit.reads = kept;
}

bool same_reads(ptxe::Accesses set, const std::vector<Access>& reads) {
  return std::equal(set.begin(), set.end(), reads.begin(), reads.end());
}

void run(uint32_t seed) {
  std::mt19937 random(seed);
  ptxe::ShadowBlock block(kUnits, kLine, ~0u);
  std::vector<Unit> model(kUnits);
  Access by;
  for (uint32_t round = 0; round < 3000; ++round) {
    const uint32_t begin = random() % kUnits;
    const uint32_t end = std::min<uint32_t>(kUnits, begin + 1 + random() % (random() % 4 ? 16 : 400));
    by.value = 1 + round / 3;
    by.component = by.issuer = static_cast<uint16_t>(random() % 5);
    by.pc = random() % 3;
    const bool writes = random() % 2;
    const auto skip = [&](const Run& run) {
      if (writes) return run.write == by && run.reads == 0;
      return run.reads != 0 && block.reads().of(run.reads).back() == by;
    };
    block.visit(begin, end, skip, [&](Run& run, uint32_t unit) {
      expect(run.write == model[unit].write, "the write", unit);
      expect(same_reads(block.reads().of(run.reads), model[unit].reads), "the set of reads", unit);
      if (!writes) run.reads = block.reads().with(run.reads, by, [](const Access&) { return false; });
      if (writes) run = Run{run.end, by, 0};
    });
    for (uint32_t unit = begin; unit < end; ++unit) {
      if (writes) model[unit] = Unit{by, {}};
      if (!writes) add_read(model[unit], by);
    }
  }
  for (uint32_t unit = 0; unit < kUnits; ++unit) {
    block.visit(unit, unit + 1, [](const Run&) { return false; }, [&](Run& run, uint32_t) {
      expect(run.write == model[unit].write, "at last, the write", unit);
      expect(same_reads(block.reads().of(run.reads), model[unit].reads), "at last, the set of reads", unit);
    });
  }
}

}  // namespace

int main() {
  for (uint32_t seed = 0; seed < 100; ++seed) run(seed);
}
