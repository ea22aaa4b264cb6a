// Operations made from a function of one lane: the result of F(a, b, ...) for every executing lane.
#pragma once

#include <cfenv>
#include <cstddef>
#include <utility>

#include "core.h"
#include "numeric.h"

// Lane vectors of one operation do not overlap, except element by element.
#if defined(__clang__)
#define PTXE_VECTOR_LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define PTXE_VECTOR_LOOP _Pragma("GCC ivdep")
#endif

namespace ptxe {

// As each_lane, for functions that read and write lane vectors of one operation only.
template <class F>
inline void each_lane_vector(const Warp& w, F f) {
  if (w.lanes == kAllLanes) {
    PTXE_VECTOR_LOOP
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (Lanes rest = w.lanes; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// One bit per lane, for all lanes: f(lane) is a bool. Lanes that do not execute give a meaningless bit.
template <class F>
inline Lanes lane_mask(F f) {
  Lanes mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<Lanes>(f(lane)) << lane;
  return mask;
}

template <class T>
[[gnu::noinline]] void copy_lanes(Lanes lanes, T* to, const T* from) {
  for (Lanes rest = lanes; rest; rest &= rest - 1) to[__builtin_ctz(rest)] = from[__builtin_ctz(rest)];
}

// Arguments: destination, sources. F has no effect but its result: it is computed for all lanes, which takes less
// code than a second loop over those that execute.
template <auto F>
struct Lanewise;

template <class R, class... A, R (*F)(A...)>
struct Lanewise<F> {
  static constexpr size_t kNumSources = sizeof...(A);
  static Step run(Warp& w, const Instruction& i) {
    apply(w, i, std::index_sequence_for<A...>{});
    return Step::Next;
  }

 private:
  template <size_t... K>
  static void apply(Warp& w, const Instruction& i, std::index_sequence<K...>) {
    loop(w.lanes, w.values<R>(i.args[0]), w.values<A>(i.args[K + 1])...);
  }
  static void loop(Lanes lanes, R* out, const A*... in) {
    R all[kLanes];
    R* to = lanes == kAllLanes ? out : all;
    PTXE_VECTOR_LOOP
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = F(in[lane]...);
    if (lanes != kAllLanes) copy_lanes(lanes, out, all);
  }
};

inline int host_rounding(Rounding mode) {
  switch (mode) {
    case Rounding::Zero: return FE_TOWARDZERO;
    case Rounding::Down: return FE_DOWNWARD;
    case Rounding::Up: return FE_UPWARD;
    default: return FE_TONEAREST;
  }
}

// Arguments: destination, sources, rounding mode. F computes in the host's rounding mode. Sources and results pass
// through memory that fesetround() might touch for all the compiler knows, so the arithmetic stays between the calls.
template <auto F>
struct Rounded {
  static Step run(Warp& w, const Instruction& i) {
    const auto mode = static_cast<Rounding>(i.args[1 + Lanewise<F>::kNumSources]);
    if (mode == Rounding::Nearest) return Lanewise<F>::run(w, i);
    std::fesetround(host_rounding(mode));
    const Step step = directed(w, i);
    std::fesetround(FE_TONEAREST);
    return step;
  }

 private:
  [[gnu::noinline]] static Step directed(Warp& w, const Instruction& i) { return Lanewise<F>::run(w, i); }
};

}  // namespace ptxe
