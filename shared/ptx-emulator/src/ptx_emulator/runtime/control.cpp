// Branches, divergence and reconvergence, exit and trap.
//
// Lanes that part at a branch meet again at its immediate post-dominator, as the hardware's convergence barriers do.
// In between, the groups of a warp are scheduled one by one, so that lanes waiting for each other make progress.
#include <algorithm>

#include "program.h"

namespace ptxe {

namespace {

constexpr uint32_t kNeverMeets = ~0u;

void merge_parked(Warp& w, const std::shared_ptr<Reconvergence>& at) {
  Group merged{at->arrived, at->pc, at->outer};
  auto is_parked_here = [&](const Group& g) { return g.parked && g.meets == at; };
  w.groups.erase(std::remove_if(w.groups.begin(), w.groups.end(), is_parked_here), w.groups.end());
  w.groups.push_back(std::move(merged));
  w.current = static_cast<uint32_t>(w.groups.size()) - 1;
}

bool settle_one(Warp& w) {
  for (uint32_t g = 0; g < w.groups.size(); ++g) {
    Group& group = w.groups[g];
    if (group.parked || !group.meets || group.pc != group.meets->pc) continue;
    const std::shared_ptr<Reconvergence> at = group.meets;
    group.parked = true;
    at->arrived |= group.lanes;
    if (at->arrived == at->expected) merge_parked(w, at);
    return true;
  }
  return false;
}

}  // namespace

void split_group(Warp& w, Lanes taken, uint32_t target, uint32_t meets) {
  Group& group = w.groups[w.current];
  const Lanes not_taken = group.lanes & ~taken;
  if (!not_taken) {
    group.pc = target;
    return;
  }
  if (meets != kNeverMeets && !(group.meets && group.meets->pc == meets)) {
    auto entry = std::make_shared<Reconvergence>();
    entry->pc = meets;
    entry->expected = group.lanes;
    entry->outer = group.meets;
    group.meets = std::move(entry);
  }
  Group branched{taken, target, group.meets};
  group.lanes = not_taken;
  group.pc += 1;
  w.groups.push_back(std::move(branched));
}

void settle_groups(Warp& w) {
  while (settle_one(w)) {
  }
  if (w.current >= w.groups.size()) w.current = 0;
  if (!w.groups.empty() && w.groups[w.current].parked) {
    for (uint32_t g = 0; g < w.groups.size(); ++g) {
      if (!w.groups[g].parked) w.current = g;
    }
  }
}

void exit_lanes(Warp& w, Lanes lanes) {
  Group& group = w.groups[w.current];
  const std::shared_ptr<Reconvergence> chain = group.meets;
  w.live &= ~lanes;
  group.lanes &= ~lanes;
  if (group.lanes) {
    group.pc += 1;
  } else {
    w.groups.erase(w.groups.begin() + w.current);
    w.current = 0;
  }
  for (std::shared_ptr<Reconvergence> at = chain; at; at = at->outer) {
    at->expected &= ~lanes;
    if (at->expected && at->arrived == at->expected) merge_parked(w, at);
  }
}

// args: target, where the lanes meet again
PTXE_OP("branch") {
  split_group(w, w.lanes, i.args[0], i.args[1]);
  return Step::Jump;
}

// args: slot of the index, where the lanes meet again, targets...
PTXE_OP("branch.indexed") {
  const uint32_t* index = w.values<uint32_t>(i.args[0]);
  const uint32_t num_targets = i.num_args - 2;
  const Lanes lanes = w.lanes;
  for (Lanes rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (index[lane] >= num_targets) {
      report(w, Report::Trap, lane,
             "brx.idx with index " + std::to_string(index[lane]) + " into a table of " + std::to_string(num_targets));
      return Step::Stop;
    }
  }
  const uint32_t own_target = i.args[2 + index[w.first_lane()]];
  Lanes others = 0;
  each_lane(w, [&](int lane) { others |= static_cast<Lanes>(i.args[2 + index[lane]] != own_target) << lane; });
  for (Lanes rest = others; rest;) {
    const uint32_t target = i.args[2 + index[__builtin_ctz(rest)]];
    Lanes same = 0;
    for (Lanes r = rest; r; r &= r - 1) {
      const int lane = __builtin_ctz(r);
      if (i.args[2 + index[lane]] == target) same |= 1u << lane;
    }
    const uint32_t pc = w.groups[w.current].pc;
    split_group(w, same, target, i.args[1]);
    w.groups[w.current].pc = pc;
    rest &= ~same;
  }
  w.groups[w.current].pc = own_target;
  return Step::Jump;
}

PTXE_OP("exit") {
  exit_lanes(w, w.lanes);
  ++w.cluster->progress;
  return Step::Jump;
}

PTXE_OP("trap") {
  report(w, Report::Trap, w.first_lane(), "the kernel executed a trap");
  return Step::Stop;
}

// A C string of the program's global memory.
static std::string text_at(const Machine& machine, uint64_t address) {
  const MemoryMap::Range* range = machine.memory.find(address, 1);
  if (!range) return "?";
  const char* text = reinterpret_cast<const char*>(address);
  return {text, strnlen(text, range->end() - address)};
}

// __assertfail: message, file, line, function
PTXE_OP("assertfail") {
  const int lane = w.first_lane();
  const auto text = [&](uint32_t n) { return text_at(*w.grid->machine, w.values<uint64_t>(i.args[n])[lane]); };
  report(w, Report::Trap, lane,
         "The assertion `" + text(0) + "` of " + text(3) + " failed at " + text(1) + ":" +
             std::to_string(w.values<uint32_t>(i.args[2])[lane]) + ".");
  return Step::Stop;
}

static std::string explain_early_use(Warp&, const Instruction&) {
  return "other threads, with registers that are in flight";
}

Step run_early_use(Warp& w, const Instruction& i, Report kind) {
  const uint32_t first = 2 + i.args[0];
  for (uint32_t k = 2; k < first; ++k) use_registers(w, i.args[k], kind);
  Instruction operation = i;
  operation.run = operation_at(i.args[1]);
  operation.args += first;
  operation.num_args -= first;
  const Step step = operation.run(w, operation);
  // The operation's own words would look for its arguments in this instruction.
  return step == Step::Wait ? wait_because(w, explain_early_use) : step;
}

PTXE_OP("nop") { return Step::Next; }

}  // namespace ptxe
