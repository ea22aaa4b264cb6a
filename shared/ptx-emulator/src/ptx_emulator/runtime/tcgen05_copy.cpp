// tcgen05.cp: shared memory to tensor memory; and tcgen05.commit.
//
// The source is a K-major matrix of a shared memory descriptor, row r of which goes to lanes
//   128x256b, 128x128b          r
//   4x256b                      32*r, one lane in each quarter
//   64x128b warpx2::02_13       r and r+64
//   64x128b warpx2::01_23       r%32 + 64*(r/32), and 32 further
//   32x128b warpx4              r, r+32, r+64, r+96
// of the lane in the address, eight columns for 256 bits and four for 128. With cta_group::2 each CTA copies from its
// own shared memory to its own tensor memory.
#include <algorithm>

#include "barrier.h"
#include "matrix_descriptor.h"
#include "memory.h"
#include "tcgen05.h"

namespace ptxe {

namespace {

enum CopyShape : uint32_t { k128x256b, k4x256b, k128x128b, k64x128b02_13, k64x128b01_23, k32x128b };  // as COPIES

struct CopyForm {
  const char* name;
  uint32_t rows, chunks;
  uint32_t num_copies;
  uint32_t run, run_step;    // `run` consecutive rows in consecutive lanes, the next `run_step` lanes on
  uint32_t copy_step;        // lanes between the copies
};
const CopyForm& copy_form(CopyShape shape) {
  static const CopyForm forms[] = {
      {"128x256b", 128, 2, 1, 128, 0, 0},
      {"4x256b", 4, 2, 1, 1, 32, 0},
      {"128x128b", 128, 1, 1, 128, 0, 0},
      {"64x128b.warpx2::02_13", 64, 1, 2, 64, 0, 64},
      {"64x128b.warpx2::01_23", 64, 1, 2, 32, 64, 32},
      {"32x128b.warpx4", 32, 1, 4, 32, 0, 32},
  };
  return forms[shape];
}

struct CopyOp : AsyncOp {
  Actor actor;
  CtaGroup group;
  const CopyForm* form;
  MatrixDescriptor from;
  TmemAddress to{0};

  std::string describe() const override {
    return std::string("tcgen05.cp.") + form->name + " of CTA " + std::to_string(actor.site.cta);
  }

  bool step(Cluster& cluster) override {
    for (uint32_t member = 0; member < group.size; ++member) copy(cluster, *group.ctas[member]);
    retire(cluster, actor);
    ++cluster.progress;
    return true;
  }

 private:
  uint32_t lane_of(uint32_t row, uint32_t repeat) const {
    return to.lane + row % form->run + row / form->run * form->run_step + repeat * form->copy_step;
  }

  void copy(Cluster& cluster, Cta& cta) {
    const uint32_t columns = form->chunks * 4;
    std::string why = tmem_refusal(cta, to.column, columns);
    if (lane_of(form->rows - 1, form->num_copies - 1) >= kTmemLanes) {
      why = "lane " + std::to_string(to.lane) + " leaves no room for it";
    }
    if (!why.empty()) {
      report(*cta.grid, Report::TmemMisuse, actor.site,
             std::string("tcgen05.cp.") + form->name + " is refused: " + why);
      return;
    }
    uint32_t offsets[256];
    for (uint32_t row = 0, n = 0; row < form->rows; ++row) {
      for (uint32_t c = 0; c < form->chunks; ++c) offsets[n++] = row_chunk_offset(from, row, c);
    }
    const bool granted = read_chunks(cluster, actor, cta, offsets, form->rows * form->chunks);
    for (uint32_t repeat = 0; repeat < form->num_copies; ++repeat) {
      for (uint32_t row = 0; row < form->rows; row += form->run) {
        access_tmem(cluster, actor, cta, lane_of(row, repeat), form->run, to.column, columns, AccessKind::Write);
      }
    }
    for (uint32_t row = 0, n = 0; row < form->rows; ++row) {
      for (uint32_t c = 0; c < form->chunks; ++c, ++n) {
        uint32_t words[4] = {~0u, ~0u, ~0u, ~0u};
        if (granted) std::memcpy(words, cta.shared.data() + offsets[n], sizeof words);
        for (uint32_t repeat = 0; repeat < form->num_copies; ++repeat) {
          const uint32_t lane = lane_of(row, repeat);
          for (uint32_t word = 0; word < 4; ++word) tmem_column(cta, to.column + 4 * c + word)[lane] = words[word];
        }
      }
    }
  }
};

// An arrival on one mbarrier, or on the mbarrier at the same offset in several CTAs, once all earlier operations of
// the pipeline are complete.
struct CommitOp : AsyncOp {
  Actor actor;
  CtaGroup group;
  std::vector<uint32_t> mbarriers;  // shared::cluster addresses

  std::string describe() const override {
    return "tcgen05.commit of CTA " + std::to_string(actor.site.cta);
  }

  bool step(Cluster& cluster) override {
    actor.time = std::max(actor.time, tcgen05_state(group.leader()).mma_busy_until);
    for (const uint32_t address : mbarriers) mbarrier_arrive(cluster, address, actor);
    retire(cluster, actor);
    ++cluster.progress;
    return true;
  }
};

void issue_copy(Warp& w, const Instruction& i, int lane) {
  auto op = std::make_unique<CopyOp>();
  op->form = &copy_form(static_cast<CopyShape>(i.args[0]));
  op->group = cta_group(w, i.args[1]);
  if (!op->group.size) return;
  op->to = TmemAddress(static_cast<uint32_t>(AddressArgs(i, 2).at(w, lane)));
  op->from = decode_tcgen05_descriptor(w.values<uint64_t>(i.args[6])[lane]);
  if (op->from.swizzle == Swizzle::Bytes128Atom32) op->from.refused = "atoms of 32 bytes are for MN-major tiles";
  if (op->from.refused) {
    report(w, Report::Unsupported, lane,
           std::string("the shared memory descriptor of tcgen05.cp: ") + op->from.refused);
    return;
  }
  op->actor = issue(w, Proxy::Tcgen05);
  op->order = pipeline_order(op->group);
  start_async(w, std::move(op));
}

void issue_commit(Warp& w, const Instruction& i, int lane) {
  auto op = std::make_unique<CommitOp>();
  op->group = cta_group(w, i.args[0]);
  if (!op->group.size) return;
  const auto address = static_cast<uint32_t>(AddressArgs(i, 1).at(w, lane));
  if (i.args[5]) {
    const uint32_t mask = i.args[7] == 16 ? w.values<uint16_t>(i.args[6])[lane]
                                          : w.values<uint32_t>(i.args[6])[lane] & 0xffff;
    if (mask >> w.cluster->ctas.size()) {
      report(w, Report::BarrierMisuse, lane,
             "the CTA mask of tcgen05.commit is " + std::to_string(mask) + ", but the cluster has " +
                 std::to_string(w.cluster->ctas.size()) + " CTAs");
    }
    for (Cta& cta : w.cluster->ctas) {
      if (mask >> cta.rank & 1) op->mbarriers.push_back(own_shared_address(cta, address & kOffsetMask));
    }
  } else {
    op->mbarriers.push_back(address);
  }
  op->actor = issue(w, Proxy::Tcgen05);
  op->order = pipeline_order(op->group);
  start_async(w, std::move(op));
}

}  // namespace

// shape, cta_group, taddr (4), descriptor
PTXE_OP("tcgen05.cp") {
  each_lane(w, [&](int lane) { issue_copy(w, i, lane); });
  return Step::Next;
}

// cta_group, mbarrier (4), multicast?, CTA mask, bits of the mask
PTXE_OP("tcgen05.commit") {
  each_lane(w, [&](int lane) { issue_commit(w, i, lane); });
  return Step::Next;
}

}  // namespace ptxe
