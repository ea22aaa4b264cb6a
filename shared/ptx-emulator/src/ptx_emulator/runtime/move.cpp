// Moves, packing and unpacking, predicates.
#include "lanewise.h"

namespace ptxe {
namespace {

__extension__ typedef unsigned __int128 u128;

template <class T> T same(T a) { return a; }
const Register kMoves[] = {
    {"mov.8", Lanewise<&same<uint8_t>>::run},   {"mov.16", Lanewise<&same<uint16_t>>::run},
    {"mov.32", Lanewise<&same<uint32_t>>::run}, {"mov.64", Lanewise<&same<uint64_t>>::run},
    {"mov.128", Lanewise<&same<u128>>::run},
};

// The first element is the lowest.
template <class Whole, class Part> Whole pack2(Part low, Part high) {
  return static_cast<Whole>(static_cast<Whole>(high) << 8 * sizeof(Part) | low);
}
template <class Whole, class Part> Whole pack4(Part a, Part b, Part c, Part d) {
  constexpr int kBits = 8 * sizeof(Part);
  return static_cast<Whole>(d) << 3 * kBits | static_cast<Whole>(c) << 2 * kBits | static_cast<Whole>(b) << kBits | a;
}
const Register kPack[] = {
    {"pack.16.8", Lanewise<&pack2<uint16_t, uint8_t>>::run},
    {"pack.32.16", Lanewise<&pack2<uint32_t, uint16_t>>::run},
    {"pack.32.8", Lanewise<&pack4<uint32_t, uint8_t>>::run},
    {"pack.64.32", Lanewise<&pack2<uint64_t, uint32_t>>::run},
    {"pack.64.16", Lanewise<&pack4<uint64_t, uint16_t>>::run},
    {"pack.128.64", Lanewise<&pack2<u128, uint64_t>>::run},
    {"pack.128.32", Lanewise<&pack4<u128, uint32_t>>::run},
};

// Source, destinations from the lowest part up.
template <class Whole, class Part> Step unpack(Warp& w, const Instruction& i) {
  const Whole* whole = w.values<Whole>(i.args[0]);
  for (uint32_t n = 1; n < i.num_args; ++n) {
    Part* part = w.values<Part>(i.args[n]);
    const uint32_t shift = 8 * sizeof(Part) * (n - 1);
    each_lane_vector(w, [&](int lane) { part[lane] = static_cast<Part>(whole[lane] >> shift); });
  }
  return Step::Next;
}
const Register kUnpack[] = {
    {"unpack.16.8", &unpack<uint16_t, uint8_t>},   {"unpack.32.16", &unpack<uint32_t, uint16_t>},
    {"unpack.32.8", &unpack<uint32_t, uint8_t>},   {"unpack.64.32", &unpack<uint64_t, uint32_t>},
    {"unpack.64.16", &unpack<uint64_t, uint16_t>}, {"unpack.128.64", &unpack<u128, uint64_t>},
    {"unpack.128.32", &unpack<u128, uint32_t>},
};

template <class F> Step predicate2(Warp& w, const Instruction& i, F f) {
  w.set_predicate(i.args[0], f(w.predicate(i.args[1]), w.predicate(i.args[2])));
  return Step::Next;
}
PTXE_OP("pred.and") {
  return predicate2(w, i, [](Lanes a, Lanes b) { return a & b; });
}
PTXE_OP("pred.or") {
  return predicate2(w, i, [](Lanes a, Lanes b) { return a | b; });
}
PTXE_OP("pred.xor") {
  return predicate2(w, i, [](Lanes a, Lanes b) { return a ^ b; });
}
PTXE_OP("pred.not") {
  w.set_predicate(i.args[0], ~w.predicate(i.args[1]));
  return Step::Next;
}
PTXE_OP("pred.mov") {
  w.set_predicate(i.args[0], w.predicate(i.args[1]));
  return Step::Next;
}

}  // namespace
}  // namespace ptxe
