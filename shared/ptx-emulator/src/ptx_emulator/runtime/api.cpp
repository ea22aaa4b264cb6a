// The C interface that Python calls. Text goes out as JSON; ownership of every returned pointer stays here.
#include <algorithm>

#include "program.h"

namespace ptxe {

namespace {

const char* const kReportNames[] = {
    "out-of-bounds", "misaligned",     "uninitialised", "race",        "proxy-race",
    "tcgen05-order", "deadlock",       "divergence",    "barrier",     "tmem",
    "tmem-lanes",    "grid-dependency", "unsupported",  "trap",        "wgmma-order",
    "registers",
};

void append_quoted(std::string& out, const std::string& text) {
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  out += '"';
}

void append_site(std::string& out, const Site& site, const Grid& grid) {
  const Program& program = *grid.program;
  const bool known = site.pc < program.code.size();
  out += "{\"cta\":[" + std::to_string(site.cta % grid.size[0]) + "," +
         std::to_string(site.cta / grid.size[0] % grid.size[1]) + "," +
         std::to_string(site.cta / grid.size[0] / grid.size[1]) + "],\"warp\":" + std::to_string(site.warp);
  out += ",\"lane\":" + std::to_string(site.lane);
  out += ",\"line\":" + std::to_string(known ? program.code[site.pc].line : 0) + "}";
}

std::string findings_json(const Machine& machine) {
  std::string out = "[";
  for (const Finding& f : machine.findings) {
    if (out.size() > 1) out += ",";
    out += "{\"kind\":\"" + std::string(kReportNames[static_cast<size_t>(f.kind)]) + "\",\"kernel\":";
    append_quoted(out, f.program->name);
    out += ",\"grid\":" + std::to_string(f.grid) + ",\"times\":" + std::to_string(f.times) + ",\"message\":";
    append_quoted(out, f.message);
    out += ",\"site\":";
    append_site(out, f.site, machine.grids[f.grid]);
    if (f.has_other) {
      out += ",\"other\":";
      append_site(out, f.other, machine.grids[f.grid]);
    }
    out += "}";
  }
  return out + "]";
}

std::string operations_text() {
  std::string out;
  for (const std::string& name : operation_names()) out += name + "\n";
  return out;
}

thread_local std::string returned_text;

constexpr size_t kParamAlignment = 64;

}  // namespace

// One instruction as Python packs it.
struct PackedInstruction {
  uint32_t operation, first_arg, num_args;
  int32_t guard;
  uint32_t guard_negated, aligned, op_class, line;
};
struct PackedConstant {
  uint32_t slot, bits;
  uint64_t value, high;
};
struct PackedSpecial {
  uint32_t slot, bits;
  const char* name;
  uint64_t number;
};
struct PackedLaunch {
  uint32_t size[3], block[3], cluster[3];
  uint32_t dynamic_shared_bytes, registers_per_thread, pdl, num_params_bytes;
  const uint8_t* params;
};
struct PackedOptions {
  uint32_t sm, max_shared_bytes, num_sms;
  uint32_t warps, asyncs, workers, check, trace, early_dependents;
  uint64_t seed;
};

}  // namespace ptxe

using namespace ptxe;

extern "C" {

const char* ptxe_operations() {
  returned_text = operations_text();
  return returned_text.c_str();
}

// Null if a special register is unknown; its name is then in ptxe_error.
Program* ptxe_program(const char* name, const PackedInstruction* code, uint64_t num_instructions, const uint32_t* args,
                      uint64_t num_args, const PackedConstant* constants, uint64_t num_constants,
                      const PackedSpecial* specials, uint64_t num_specials, uint32_t register_bytes,
                      uint32_t local_bytes, uint32_t shared_base, uint32_t static_shared_bytes,
                      uint64_t notable_classes) {
  auto program = std::make_unique<Program>();
  program->name = name;
  program->args.assign(args, args + num_args);
  program->register_bytes = register_bytes;
  program->local_bytes = local_bytes;
  program->shared_base = shared_base;
  program->static_shared_bytes = static_shared_bytes;
  program->notable_classes = notable_classes;
  for (uint64_t k = 0; k < num_instructions; ++k) {
    const PackedInstruction& p = code[k];
    program->code.push_back(Instruction{operation_at(p.operation), program->args.data() + p.first_arg, p.num_args,
                                        p.guard, p.guard_negated != 0, p.aligned != 0,
                                        static_cast<uint16_t>(p.op_class), p.line});
  }
  for (uint64_t k = 0; k < num_constants; ++k) {
    program->constants.push_back(Constant{constants[k].slot, constants[k].bits, constants[k].value, constants[k].high});
  }
  for (uint64_t k = 0; k < num_specials; ++k) {
    const SpecialValue value = find_special(specials[k].name);
    if (!value) {
      returned_text = specials[k].name;
      return nullptr;
    }
    program->specials.push_back(Special{specials[k].slot, specials[k].bits, value, specials[k].number});
  }
  return program.release();
}

const char* ptxe_error() { return returned_text.c_str(); }
void ptxe_free_program(Program* program) { delete program; }

Machine* ptxe_machine(const PackedOptions* o) {
  auto machine = std::make_unique<Machine>();
  machine->target = Target{o->sm, o->max_shared_bytes, o->num_sms};
  machine->options.warps = static_cast<WarpPolicy>(o->warps);
  machine->options.asyncs = static_cast<AsyncPolicy>(o->asyncs);
  machine->options.workers = std::max(1u, o->workers);
  machine->options.check = o->check != 0;
  machine->options.trace = o->trace != 0;
  machine->options.early_dependents = o->early_dependents != 0;
  machine->options.seed = o->seed;
  return machine.release();
}
void ptxe_free_machine(Machine* machine) { delete machine; }

void ptxe_add_range(Machine* machine, const char* name, uint64_t base, uint64_t bytes, uint32_t flags) {
  machine->memory.add(name, base, bytes, flags);
  forget_written(*machine, base, bytes);
}

// What the kernels of another machine have written of uninitialised ranges counts as written here; before any launch.
void ptxe_inherit(Machine* machine, Machine* earlier) { inherit_written(*machine, *earlier); }

void ptxe_enqueue(Machine* machine, const Program* program, const PackedLaunch* launch) {
  Grid& grid = machine->grids.emplace_back();
  grid.machine = machine;
  grid.program = program;
  grid.id = static_cast<uint32_t>(machine->grids.size()) - 1;
  std::copy_n(launch->size, 3, grid.size);
  std::copy_n(launch->block, 3, grid.block);
  std::copy_n(launch->cluster, 3, grid.cluster);
  grid.dynamic_shared_bytes = launch->dynamic_shared_bytes;
  grid.registers_per_thread = launch->registers_per_thread;
  grid.num_warps = (grid.block[0] * grid.block[1] * grid.block[2] + kLanes - 1) / kLanes;
  const uint32_t* c = grid.cluster;
  grid.num_clusters = grid.size[0] * grid.size[1] * grid.size[2] / (c[0] * c[1] * c[2]);
  grid.pdl = launch->pdl != 0;
  grid.params.resize(launch->num_params_bytes + kParamAlignment);
  const auto start = reinterpret_cast<uintptr_t>(grid.params.data());
  grid.params_base = grid.params.data() + (kParamAlignment - start % kParamAlignment) % kParamAlignment;
  std::copy_n(launch->params, launch->num_params_bytes, grid.params_base);
  machine->memory.add("kernel parameters", reinterpret_cast<uint64_t>(grid.params_base), launch->num_params_bytes,
                      MemoryMap::kReadOnly);
  grid.tallies.resize(machine->options.workers);
  for (Tally& tally : grid.tallies) {
    tally.executed.resize(grid.num_warps * program->code.size());
    tally.counts.resize(grid.num_warps * static_cast<size_t>(Count::NumCounts));
  }
}

void ptxe_synchronize(Machine* machine) { synchronize(*machine); }

// Ends ptxe_synchronize soon; from another thread.
void ptxe_stop(Machine* machine) { machine->stopped = true; }

// May be called from another thread while ptxe_synchronize runs.
void ptxe_progress(const Machine* machine, uint64_t* finished_clusters, uint64_t* num_clusters) {
  *finished_clusters = *num_clusters = 0;
  for (const Grid& grid : machine->grids) {
    *finished_clusters += grid.finished_clusters.load();
    *num_clusters += grid.num_clusters;
  }
}

const char* ptxe_findings(const Machine* machine) {
  returned_text = findings_json(*machine);
  return returned_text.c_str();
}
const char* ptxe_timeline(const Machine* machine) {
  returned_text = timeline_json(*machine);
  return returned_text.c_str();
}

// Executed instructions [num_warps][num_instructions] and counts [num_warps][NumCounts] of launch `grid`, summed
// over the workers.
void ptxe_counts(const Machine* machine, uint32_t grid, uint64_t* executed, uint64_t* counts) {
  for (const Tally& tally : machine->grids[grid].tallies) {
    for (size_t k = 0; k < tally.executed.size(); ++k) executed[k] += tally.executed[k];
    for (size_t k = 0; k < tally.counts.size(); ++k) counts[k] += tally.counts[k];
  }
}

}  // extern "C"
