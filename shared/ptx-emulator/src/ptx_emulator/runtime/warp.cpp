// Operations across the lanes of a warp: shfl, vote, match, redux, elect, activemask, bar.warp.sync.
#include <algorithm>
#include <cmath>

#include "core.h"
#include "numeric.h"

namespace ptxe {

namespace {

constexpr uint32_t kCanonicalNan = 0x7fffffff;

// The member mask in a slot. A lane that executes must be a member.
Lanes members_in(Warp& w, uint32_t slot) {
  const Lanes members = w.values<Lanes>(slot)[w.first_lane()];
  if (w.lanes & ~members) {
    report(w, Report::Divergence, __builtin_ctz(w.lanes & ~members),
           "lanes " + lanes_text(w.lanes & ~members) + " execute a .sync instruction whose member mask is lanes " +
               lanes_text(members));
  }
  return members | w.lanes;
}

enum class Shuffle : uint32_t { Up, Down, Butterfly, Index };

struct ShuffleSource {
  int lane;
  bool in_range;
};

ShuffleSource shuffle_source(Shuffle mode, int lane, uint32_t b, uint32_t c) {
  const int segment_mask = static_cast<int>(c >> 8 & 31);
  const int clamp = static_cast<int>(c & 31);
  const int by = static_cast<int>(b & 31);
  const int max_lane = (lane & segment_mask) | (clamp & ~segment_mask);
  const int min_lane = lane & segment_mask;
  int from = lane;
  switch (mode) {
    case Shuffle::Up: from = lane - by; break;
    case Shuffle::Down: from = lane + by; break;
    case Shuffle::Butterfly: from = lane ^ by; break;
    case Shuffle::Index: from = min_lane | (by & ~segment_mask); break;
  }
  const bool in_range = mode == Shuffle::Up ? from >= max_lane : from <= max_lane;
  return {in_range ? from : lane, in_range};
}

enum class Vote : uint32_t { All, Any, Uniform, Ballot };
enum class Reduction : uint32_t { Add, Min, Max, And, Or, Xor };

template <class T>
T reduce(Reduction how, T a, T b) {
  switch (how) {
    case Reduction::Add: return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
    case Reduction::Min: return std::min(a, b);
    case Reduction::Max: return std::max(a, b);
    case Reduction::And: return a & b;
    case Reduction::Or: return a | b;
    case Reduction::Xor: return a ^ b;
  }
  return a;
}

template <class T>
void reduce_lanes(Warp& w, const Instruction& i, Reduction how) {
  const T* in = w.values<T>(i.args[1]);
  T result = in[w.first_lane()];
  for (Lanes rest = w.lanes & (w.lanes - 1); rest; rest &= rest - 1) {
    result = reduce(how, result, in[__builtin_ctz(rest)]);
  }
  T* out = w.values<T>(i.args[0]);
  each_lane(w, [&](int lane) { out[lane] = result; });
}

// Total order of floats that are not NaN, with -0 below +0.
bool is_less(uint32_t a, uint32_t b) {
  const float x = as_float(a), y = as_float(b);
  return x < y || (x == y && (a >> 31) > (b >> 31));
}

uint32_t reduce_floats(Warp& w, const uint32_t* in, bool maximum, bool absolute, bool keep_nan) {
  bool any = false;
  uint32_t result = kCanonicalNan;
  for (Lanes rest = w.lanes; rest; rest &= rest - 1) {
    const uint32_t bits = in[__builtin_ctz(rest)] & (absolute ? 0x7fffffffu : ~0u);
    if (std::isnan(as_float(bits))) {
      if (keep_nan) return kCanonicalNan;
      continue;
    }
    if (!any || (maximum ? is_less(result, bits) : is_less(bits, result))) result = bits;
    any = true;
  }
  return result;
}

}  // namespace

PTXE_OP("shfl") {  // destination, predicate, source, b, c, member mask, mode
  const Step step = gather(w, i, members_in(w, i.args[5]));
  if (step != Step::Execute) return step;
  uint32_t* out = w.values<uint32_t>(i.args[0]);
  const uint32_t* in = w.values<uint32_t>(i.args[2]);
  const uint32_t* b = w.values<uint32_t>(i.args[3]);
  const uint32_t* c = w.values<uint32_t>(i.args[4]);
  const auto mode = static_cast<Shuffle>(i.args[6]);
  Lanes in_range = 0;
  each_lane(w, [&](int lane) {
    const ShuffleSource source = shuffle_source(mode, lane, b[lane], c[lane]);
    out[lane] = in[source.lane];  // of a lane that does not take part: what its register holds
    in_range |= static_cast<Lanes>(source.in_range) << lane;
  });
  w.set_predicate(i.args[1], in_range);
  return Step::Next;
}

PTXE_OP("vote") {  // destination, predicate, whether it is negated, member mask, mode
  const Step step = gather(w, i, members_in(w, i.args[3]));
  if (step != Step::Execute) return step;
  const Lanes votes = (i.args[2] ? ~w.predicate(i.args[1]) : w.predicate(i.args[1])) & w.lanes;
  bool result = false;
  switch (static_cast<Vote>(i.args[4])) {
    case Vote::All: result = votes == w.lanes; break;
    case Vote::Any: result = votes != 0; break;
    case Vote::Uniform: result = votes == w.lanes || votes == 0; break;
    case Vote::Ballot:
      each_lane(w, [&](int lane) { w.values<uint32_t>(i.args[0])[lane] = votes; });
      return Step::Next;
  }
  w.set_predicate(i.args[0], result ? kAllLanes : 0);
  return Step::Next;
}

PTXE_OP("match") {  // destination, predicate, source, bits of the source, member mask, whether all must match
  const Step step = gather(w, i, members_in(w, i.args[4]));
  if (step != Step::Execute) return step;
  auto value = [&](int lane) {
    return i.args[3] == 64 ? w.values<uint64_t>(i.args[2])[lane] : w.values<uint32_t>(i.args[2])[lane];
  };
  uint32_t* out = w.values<uint32_t>(i.args[0]);
  Lanes matching[kLanes] = {};
  each_lane(w, [&](int lane) {
    each_lane(w, [&](int other) { matching[lane] |= static_cast<Lanes>(value(lane) == value(other)) << other; });
  });
  const bool all = matching[w.first_lane()] == w.lanes;
  each_lane(w, [&](int lane) { out[lane] = i.args[5] ? (all ? w.lanes : 0) : matching[lane]; });
  if (i.args[5]) w.set_predicate(i.args[1], all ? kAllLanes : 0);
  return Step::Next;
}

PTXE_OP("redux") {  // destination, source, member mask, reduction, whether signed
  const Step step = gather(w, i, members_in(w, i.args[2]));
  if (step != Step::Execute) return step;
  const auto how = static_cast<Reduction>(i.args[3]);
  if (i.args[4]) {
    reduce_lanes<int32_t>(w, i, how);
  } else {
    reduce_lanes<uint32_t>(w, i, how);
  }
  return Step::Next;
}

PTXE_OP("redux.f32") {  // destination, source, member mask, maximum, absolute, whether a NaN is the result
  const Step step = gather(w, i, members_in(w, i.args[2]));
  if (step != Step::Execute) return step;
  const uint32_t result = reduce_floats(w, w.values<uint32_t>(i.args[1]), i.args[3], i.args[4], i.args[5]);
  each_lane(w, [&](int lane) { w.values<uint32_t>(i.args[0])[lane] = result; });
  return Step::Next;
}

// The lowest member is elected, on every target.
PTXE_OP("elect") {  // lane of the leader, predicate, member mask
  const Step step = gather(w, i, members_in(w, i.args[2]));
  if (step != Step::Execute) return step;
  const int leader = w.first_lane();
  each_lane(w, [&](int lane) { w.values<uint32_t>(i.args[0])[lane] = static_cast<uint32_t>(leader); });
  w.set_predicate(i.args[1], 1u << leader);
  return Step::Next;
}

PTXE_OP("activemask") {  // destination
  each_lane(w, [&](int lane) { w.values<uint32_t>(i.args[0])[lane] = w.lanes; });
  return Step::Next;
}

PTXE_OP("bar.warp.sync") {  // member mask
  const Step step = gather(w, i, members_in(w, i.args[0]));
  return step == Step::Execute ? Step::Next : step;
}

}  // namespace ptxe
