// The start and the end of a cluster: shared memory, registers, special registers.
#include <algorithm>
#include <unordered_map>

#include "bulk.h"
#include "program.h"
#include "register_pool.h"

namespace ptxe {

void check_barriers_at_exit(Cta& cta);  // mbarrier.cpp
void check_tmem_at_exit(Cta& cta);      // tcgen05_alloc.cpp

namespace {

constexpr uint32_t kRegisterAlignment = 64;

struct Coordinates {
  uint32_t x, y, z;
};

Coordinates unravel(uint32_t linear, const uint32_t size[3]) {
  return {linear % size[0], linear / size[0] % size[1], linear / size[0] / size[1]};
}

Coordinates thread_index(const Warp& w, int lane) {
  return unravel(w.index * kLanes + static_cast<uint32_t>(lane), w.grid->block);
}
Coordinates rank_index(const Warp& w) { return unravel(w.cta->rank, w.grid->cluster); }

// A special register that is fixed for the life of a thread; `number` is what follows the colon of its name.
#define PTXE_SPECIAL(expression) [](const Warp& w, int lane, uint64_t number) -> uint64_t { \
    (void)w; (void)lane; (void)number; return expression; }

const std::unordered_map<std::string, SpecialValue>& special_table() {
  static const std::unordered_map<std::string, SpecialValue> table = {
      {"tid.x", PTXE_SPECIAL(thread_index(w, lane).x)},
      {"tid.y", PTXE_SPECIAL(thread_index(w, lane).y)},
      {"tid.z", PTXE_SPECIAL(thread_index(w, lane).z)},
      {"ntid.x", PTXE_SPECIAL(w.grid->block[0])},
      {"ntid.y", PTXE_SPECIAL(w.grid->block[1])},
      {"ntid.z", PTXE_SPECIAL(w.grid->block[2])},
      {"ctaid.x", PTXE_SPECIAL(w.cta->index[0])},
      {"ctaid.y", PTXE_SPECIAL(w.cta->index[1])},
      {"ctaid.z", PTXE_SPECIAL(w.cta->index[2])},
      {"nctaid.x", PTXE_SPECIAL(w.grid->size[0])},
      {"nctaid.y", PTXE_SPECIAL(w.grid->size[1])},
      {"nctaid.z", PTXE_SPECIAL(w.grid->size[2])},
      {"laneid", PTXE_SPECIAL(static_cast<uint64_t>(lane))},
      {"warpid", PTXE_SPECIAL(w.index)},
      {"nwarpid", PTXE_SPECIAL(w.grid->num_warps)},
      {"cluster_ctaid.x", PTXE_SPECIAL(rank_index(w).x)},
      {"cluster_ctaid.y", PTXE_SPECIAL(rank_index(w).y)},
      {"cluster_ctaid.z", PTXE_SPECIAL(rank_index(w).z)},
      {"cluster_nctaid.x", PTXE_SPECIAL(w.grid->cluster[0])},
      {"cluster_nctaid.y", PTXE_SPECIAL(w.grid->cluster[1])},
      {"cluster_nctaid.z", PTXE_SPECIAL(w.grid->cluster[2])},
      {"cluster_ctarank", PTXE_SPECIAL(w.cta->rank)},
      {"cluster_nctarank", PTXE_SPECIAL(w.cluster->ctas.size())},
      {"clusterid.x", PTXE_SPECIAL(w.cta->index[0] / w.grid->cluster[0])},
      {"clusterid.y", PTXE_SPECIAL(w.cta->index[1] / w.grid->cluster[1])},
      {"clusterid.z", PTXE_SPECIAL(w.cta->index[2] / w.grid->cluster[2])},
      {"nclusterid.x", PTXE_SPECIAL(w.grid->size[0] / w.grid->cluster[0])},
      {"nclusterid.y", PTXE_SPECIAL(w.grid->size[1] / w.grid->cluster[1])},
      {"nclusterid.z", PTXE_SPECIAL(w.grid->size[2] / w.grid->cluster[2])},
      {"is_explicit_cluster", PTXE_SPECIAL(w.cluster->ctas.size() > 1)},
      {"gridid", PTXE_SPECIAL(w.grid->id)},
      {"smid", PTXE_SPECIAL(w.cta->linear % w.grid->machine->target.num_sms)},
      {"nsmid", PTXE_SPECIAL(w.grid->machine->target.num_sms)},
      {"lanemask_eq", PTXE_SPECIAL(1u << lane)},
      {"lanemask_lt", PTXE_SPECIAL((1u << lane) - 1)},
      {"lanemask_le", PTXE_SPECIAL((2ull << lane) - 1)},
      {"lanemask_gt", PTXE_SPECIAL(0xffffffffull & ~((2ull << lane) - 1))},
      {"lanemask_ge", PTXE_SPECIAL(0xffffffffull & ~((1ull << lane) - 1))},
      {"dynamic_smem_size", PTXE_SPECIAL(w.grid->dynamic_shared_bytes)},
      {"total_smem_size", PTXE_SPECIAL(w.cta->shared.size() - w.cta->shared_base)},
      {"aggr_smem_size", PTXE_SPECIAL(w.cta->shared.size())},
      {"reserved_smem_offset_begin", PTXE_SPECIAL(0)},
      {"reserved_smem_offset_end", PTXE_SPECIAL(w.cta->shared_base)},
      {"reserved_smem_offset_cap", PTXE_SPECIAL(w.cta->shared_base)},
      {"shared", PTXE_SPECIAL(own_shared_address(*w.cta, static_cast<uint32_t>(number)))},
      {"param", PTXE_SPECIAL(reinterpret_cast<uint64_t>(w.grid->params_base) + number)},
  };
  return table;
}

void write_lane(Warp& w, uint32_t slot, uint32_t bits, int lane, uint64_t value, uint64_t high = 0) {
  switch (bits) {
    case 1:
      w.predicate(slot) = (w.predicate(slot) & ~(1u << lane)) | static_cast<Lanes>(value & 1) << lane;
      break;
    case 16: w.values<uint16_t>(slot)[lane] = static_cast<uint16_t>(value); break;
    case 32: w.values<uint32_t>(slot)[lane] = static_cast<uint32_t>(value); break;
    case 64: w.values<uint64_t>(slot)[lane] = value; break;
    default:
      w.values<uint64_t>(slot)[2 * lane] = value;
      w.values<uint64_t>(slot)[2 * lane + 1] = high;
  }
}

void start_registers(Warp& w) {
  const Program& program = *w.grid->program;
  for (const Constant& constant : program.constants) {
    for (int lane = 0; lane < kLanes; ++lane) {
      write_lane(w, constant.slot, constant.bits, lane, constant.value, constant.high);
    }
  }
  for (const Special& special : program.specials) {
    for (int lane = 0; lane < kLanes; ++lane) {
      write_lane(w, special.slot, special.bits, lane, special.value(w, lane, special.number));
    }
  }
}

void start_warp(Cta& cta, uint32_t index) {
  Warp& w = cta.warps[index];
  Grid& grid = *cta.grid;
  w.cta = &cta;
  w.cluster = cta.cluster;
  w.grid = &grid;
  w.index = index;
  w.executed = grid.tallies[worker_index].executed.data() + index * grid.program->code.size();
  w.component = cta.rank * grid.num_warps + index;
  const uint32_t threads = std::min<uint32_t>(kLanes, cta.num_threads - index * kLanes);
  w.live = threads == kLanes ? kAllLanes : (1u << threads) - 1;
  w.lanes = w.live;
  w.groups.push_back(Group{w.live, 0, nullptr});
  w.register_file.resize(grid.program->register_bytes + kRegisterAlignment);
  const auto base = reinterpret_cast<uintptr_t>(w.register_file.data());
  w.registers = w.register_file.data() + (kRegisterAlignment - base % kRegisterAlignment) % kRegisterAlignment;
  w.local.resize(static_cast<size_t>(grid.program->local_bytes) * kLanes);
  start_registers(w);
  w.track = track_of(w);
}

}  // namespace

SpecialValue find_special(const std::string& name) {
  const auto found = special_table().find(name);
  return found == special_table().end() ? nullptr : found->second;
}

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::unique_ptr<Cluster> make_cluster(Grid& grid, uint32_t linear) {
  auto cluster = std::make_unique<Cluster>();
  const uint32_t* c = grid.cluster;
  const uint32_t num_ctas = c[0] * c[1] * c[2];
  const uint32_t clusters[3] = {grid.size[0] / c[0], grid.size[1] / c[1], grid.size[2] / c[2]};
  const Coordinates at = unravel(linear, clusters);
  cluster->grid = &grid;
  cluster->machine = grid.machine;
  cluster->linear = linear;
  cluster->random_state = grid.machine->options.seed * 0x100000001b3ull + grid.id * 65537ull + linear;
  cluster->ctas.resize(num_ctas);
  for (uint32_t rank = 0; rank < num_ctas; ++rank) {
    Cta& cta = cluster->ctas[rank];
    const Coordinates inside = unravel(rank, c);
    cta.cluster = cluster.get();
    cta.grid = &grid;
    cta.index[0] = at.x * c[0] + inside.x;
    cta.index[1] = at.y * c[1] + inside.y;
    cta.index[2] = at.z * c[2] + inside.z;
    cta.linear = cta.index[0] + grid.size[0] * (cta.index[1] + grid.size[1] * cta.index[2]);
    cta.rank = rank;
    cta.num_threads = grid.block[0] * grid.block[1] * grid.block[2];
    cta.shared_base = grid.program->shared_base;
    cta.shared.resize(cta.shared_base + grid.program->static_shared_bytes + grid.dynamic_shared_bytes);
    if (grid.machine->target.sm >= 100 && grid.machine->target.sm < 120) cta.tmem.resize(kTmemLanes * kTmemColumns);
    cta.warps.resize(grid.num_warps);
  }
  cluster->live_warps = num_ctas * grid.num_warps;
  if (grid.machine->options.check) cluster->checker = make_checker(*cluster);
  for (Cta& cta : cluster->ctas) {
    for (uint32_t index = 0; index < grid.num_warps; ++index) start_warp(cta, index);
  }
  return cluster;
}

void end_cta(Cta& cta) {
  check_barriers_at_exit(cta);
  check_bulk_groups_at_exit(cta);
  check_tmem_at_exit(cta);
  check_registers_at_exit(cta);
}

}  // namespace ptxe
