// cp.async.bulk, cp.reduce.async.bulk, their groups; st.async and red.async.
//
// Memory is read and written when the copy completes, not when it is issued.
#include "bulk.h"

#include <algorithm>
#include <deque>

#include "barrier.h"

namespace ptxe {

namespace {

constexpr uint64_t kEngineBytesPerCycle = 64;  // of the copy engine of one CTA; plausible, not measured
constexpr uint64_t kEngineLatency = 500;       // virtual cycles until the first bytes arrive; plausible, not measured
constexpr uint32_t kBulkAlignment = 16;
constexpr uint32_t kChunkBytes = 16;  // that a byte mask (.cp_mask) repeats over

struct CopyEngine : GroupState {  // of a CTA
  uint64_t busy_until = 0;
};

// The groups of one thread that nobody has waited for.
struct ThreadGroups {
  BulkGroupPtr open;
  std::deque<BulkGroupPtr> committed;  // null for an empty group
  Sync written;                        // of complete groups that are no longer in the list
};
struct BulkGroups : GroupState {  // of a warp
  ThreadGroups lanes[kLanes];
};

ThreadGroups& groups_of(Warp& w, int lane) { return w.state.get<BulkGroups>().lanes[lane]; }

Actor issue_at(Warp& w, int lane, uint64_t completion, Proxy proxy = Proxy::Async) {
  Actor actor = issue(w, proxy);
  actor.site = site_of(w, lane);
  actor.time = completion;
  return actor;
}

void finish_into(Cluster& cluster, const Actor& actor, Sync& sync) {
  finish(cluster, actor, sync);
  sync.time = std::max(sync.time, actor.time);
}

void check_size(Warp& w, uint32_t bytes, int lane) {
  if (bytes % kBulkAlignment == 0) return;
  report(w, Report::Misaligned, lane,
         "A bulk copy of " + std::to_string(bytes) + " bytes; the size must be a multiple of 16.");
}

// Bytes at a shared::cluster or global address into a buffer; all ones if refused.
void read_bytes(Cluster& cluster, const Actor& actor, Space space, uint64_t address, std::vector<uint8_t>& buffer,
                uint32_t alignment) {
  const auto bytes = static_cast<uint32_t>(buffer.size());
  if (!bytes) return;
  const Place place = resolve_async(cluster, actor, space, address, bytes, alignment, AccessKind::Read, actor.site);
  if (place) {
    std::memcpy(buffer.data(), place.data, bytes);
  } else {
    std::fill(buffer.begin(), buffer.end(), 0xff);
  }
}

void write_bytes(Cluster& cluster, const Actor& actor, Space space, uint64_t address,
                 const std::vector<uint8_t>& buffer, uint32_t alignment, ReduceFunction reduction) {
  const auto bytes = static_cast<uint32_t>(buffer.size());
  if (!bytes) return;
  const AccessKind kind = reduction ? AccessKind::Atomic : AccessKind::Write;
  const Place place = resolve_async(cluster, actor, space, address, bytes, alignment, kind, actor.site);
  if (!place) return;
  if (reduction) {
    reduction(place.data, buffer.data(), bytes);
  } else {
    std::memcpy(place.data, buffer.data(), bytes);
  }
}

// Global to shared memory of one or several CTAs: one step for each of them.
struct BulkLoad : AsyncOp {
  Actor actor;
  uint64_t source = 0;
  uint32_t bytes = 0;
  std::vector<uint32_t> destinations, mbarriers;
  std::vector<uint8_t> buffer;
  size_t next = 0;

  bool step(Cluster& cluster) override {
    if (next == 0) {
      buffer.resize(bytes);
      read_bytes(cluster, actor, Space::Global, source, buffer, kBulkAlignment);
    }
    write_bytes(cluster, actor, Space::SharedCluster, destinations[next], buffer, kBulkAlignment, nullptr);
    mbarrier_complete_tx(cluster, mbarriers[next], bytes, actor);
    if (++next < destinations.size()) return false;
    retire(cluster, actor);
    return true;
  }
  std::string describe() const override {
    return "cp.async.bulk of " + std::to_string(bytes) + " bytes to shared memory";
  }
};

// Shared memory, or registers, to the shared memory of a CTA of the cluster.
struct BulkSend : AsyncOp {
  Actor actor;
  uint32_t source = 0;  // address; unused if the buffer was filled at issue
  uint32_t destination = 0, mbarrier = 0;
  uint32_t alignment = kBulkAlignment;
  bool has_read = false;
  ReduceFunction reduction = nullptr;
  std::vector<uint8_t> buffer;

  bool step(Cluster& cluster) override {
    if (!has_read) {
      read_bytes(cluster, actor, Space::SharedCluster, source, buffer, alignment);
      has_read = true;
      return false;
    }
    write_bytes(cluster, actor, Space::SharedCluster, destination, buffer, alignment, reduction);
    mbarrier_complete_tx(cluster, mbarrier, static_cast<uint32_t>(buffer.size()), actor);
    retire(cluster, actor);
    return true;
  }
  std::string describe() const override {
    return "a copy of " + std::to_string(buffer.size()) + " bytes within the cluster";
  }
};

struct BulkStore : GroupedCopy {
  uint32_t source = 0;
  uint64_t destination = 0;
  uint32_t byte_mask = 0xffff;  // of every 16 bytes
  ReduceFunction reduction = nullptr;

  void read(Cluster& cluster) override {
    read_bytes(cluster, reader, Space::SharedCluster, source, buffer, kBulkAlignment);
  }
  void write(Cluster& cluster) override {
    if (byte_mask == 0xffff) {
      write_bytes(cluster, writer, Space::Global, destination, buffer, kBulkAlignment, reduction);
      return;
    }
    for (uint32_t k = 0; k < buffer.size(); ++k) {
      if (!(byte_mask >> (k % kChunkBytes) & 1)) continue;
      const Place place =
          resolve_async(cluster, writer, Space::Global, destination + k, 1, 1, AccessKind::Write, writer.site);
      if (place) *place.data = buffer[k];
    }
  }
  std::string describe() const override {
    return "cp.async.bulk of " + std::to_string(buffer.size()) + " bytes to global memory";
  }
};

// Bits 0 to `bits` of a 16- or 32-bit register.
uint32_t register_bits(Warp& w, uint32_t slot, uint32_t bits, int lane) {
  return bits == 16 ? w.values<uint16_t>(slot)[lane] : w.values<uint32_t>(slot)[lane];
}

bool all_done(const ThreadGroups& groups, uint32_t allowed, bool read_only) {
  for (size_t k = 0; k + allowed < groups.committed.size(); ++k) {
    const BulkGroup* group = groups.committed[k].get();
    if (group && (read_only ? group->reading : group->writing)) return false;
  }
  return true;
}

// Takes the effects of all groups but the last `allowed`.
void take_groups(Warp& w, ThreadGroups& groups, uint32_t allowed, bool read_only) {
  for (size_t k = 0; k + allowed < groups.committed.size(); ++k) {
    if (!groups.committed[k]) continue;
    groups.committed[k]->waited = true;
    acquire(w, read_only ? groups.committed[k]->read : groups.committed[k]->written);
  }
  while (groups.committed.size() > allowed) {
    const BulkGroupPtr& first = groups.committed.front();
    if (read_only && first) {
      if (first->writing) break;
      groups.written.views.join(first->written.views);
      groups.written.time = std::max(groups.written.time, first->written.time);
    }
    groups.committed.pop_front();
  }
  if (read_only) return;
  acquire(w, groups.written);
  groups.written.clear();
}

}  // namespace

BulkGroupPtr open_bulk_group(Warp& w, int lane) {
  BulkGroupPtr& open = groups_of(w, lane).open;
  if (!open) open = std::make_shared<BulkGroup>();
  return open;
}

void GroupedCopy::join_group(Warp& w, int lane, uint64_t completion) {
  group = open_bulk_group(w, lane);
  ++group->reading;
  ++group->writing;
  group->site = site_of(w, lane);
  reader = issue_at(w, lane, completion - kEngineLatency);
  writer = issue_at(w, lane, completion);
}

bool GroupedCopy::step(Cluster& cluster) {
  if (!has_read) {
    read(cluster);
    finish_into(cluster, reader, group->read);
    retire(cluster, reader);
    --group->reading;
    has_read = true;
    return false;
  }
  write(cluster);
  finish_into(cluster, writer, group->written);
  group->written.views.join(group->read.views);
  retire(cluster, writer);
  --group->writing;
  return true;
}

void check_bulk_groups_at_exit(Cta& cta) {
  auto check = [&](const BulkGroupPtr& group) {
    if (!group || group->waited) return;
    report(*cta.grid, Report::Race, group->site,
           "The CTA ends while this copy may still read its shared memory: no thread waits for it with "
           "cp.async.bulk.wait_group.");
  };
  for (Warp& w : cta.warps) {
    const BulkGroups* of_warp = w.state.find<BulkGroups>();
    if (!of_warp) continue;
    for (const ThreadGroups& groups : of_warp->lanes) {
      check(groups.open);
      for (const BulkGroupPtr& group : groups.committed) check(group);
    }
  }
}

uint64_t through_copy_engine(Warp& w, uint64_t bytes, const char* name) {
  CopyEngine& engine = w.cta->state.get<CopyEngine>();
  const uint64_t begin = std::max(engine.busy_until, w.time);
  engine.busy_until = begin + (bytes + kEngineBytesPerCycle - 1) / kEngineBytesPerCycle;
  trace_engine(*w.cta, "tma", name, w.at->line, begin, engine.busy_until);
  return engine.busy_until + kEngineLatency;
}

uint32_t shared_operand(Warp& w, Space space, uint64_t address, int lane) {
  const auto shared = static_cast<uint32_t>(address);
  if (address >> 32 && !in_shared_window(address)) {
    report(w, Report::OutOfBounds, lane, "An operand that must be in shared memory is not.");
  }
  if (space == Space::Shared && cta_of(*w.cluster, shared) != w.cta) {
    report(w, Report::OutOfBounds, lane, "An operand in .shared::cta is in the shared memory of another CTA.");
  }
  return shared;
}

uint32_t cta_mask(Warp& w, uint32_t slot, uint32_t bits, int lane) {
  const uint32_t mask = register_bits(w, slot, bits, lane) & 0xffff;
  const auto num_ctas = static_cast<uint32_t>(w.cluster->ctas.size());
  const uint32_t existing = num_ctas >= 16 ? 0xffffu : (1u << num_ctas) - 1;
  if (mask & ~existing) {
    report(w, Report::OutOfBounds, lane,
           "The CTA mask " + std::to_string(mask) + " names CTAs that a cluster of " + std::to_string(num_ctas) +
               " does not have.");
  }
  return mask & existing;
}

// destination, space, source, bytes, mbarrier, mask, bits of the mask (0: no multicast)
PTXE_OP("bulk.load") {
  const AddressArgs destination(i, 0), source(i, 5), mbarrier(i, 10);
  const auto space = static_cast<Space>(i.args[4]);
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<BulkLoad>();
    op->source = source.at(w, lane);
    op->bytes = w.values<uint32_t>(i.args[9])[lane];
    check_size(w, op->bytes, lane);
    const uint32_t to = shared_operand(w, space, destination.at(w, lane), lane);
    const uint32_t signal = shared_operand(w, space, mbarrier.at(w, lane), lane);
    const uint32_t mask = i.args[15] ? cta_mask(w, i.args[14], i.args[15], lane) : 0;
    for (const Cta& cta : w.cluster->ctas) {
      if (!(mask >> cta.rank & 1)) continue;
      op->destinations.push_back(own_shared_address(cta, to & kOffsetMask));
      op->mbarriers.push_back(own_shared_address(cta, signal & kOffsetMask));
    }
    if (!i.args[15]) {
      op->destinations.push_back(to);
      op->mbarriers.push_back(signal);
    }
    if (op->destinations.empty()) return;
    count(w, Count::TmaLoadBytes, op->bytes);
    op->actor = issue_at(w, lane, through_copy_engine(w, op->bytes, "bulk load"));
    start_async(w, std::move(op));
  });
  return Step::Next;
}

// destination, source, bytes, mbarrier, reduction, type
PTXE_OP("bulk.send") {
  const AddressArgs destination(i, 0), source(i, 4), mbarrier(i, 9);
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<BulkSend>();
    const uint32_t bytes = w.values<uint32_t>(i.args[8])[lane];
    check_size(w, bytes, lane);
    op->buffer.resize(bytes);
    op->source = shared_operand(w, Space::Shared, source.at(w, lane), lane);
    op->destination = shared_operand(w, Space::SharedCluster, destination.at(w, lane), lane);
    op->mbarrier = shared_operand(w, Space::SharedCluster, mbarrier.at(w, lane), lane);
    op->reduction = find_reduction(static_cast<ReduceOp>(i.args[13]), static_cast<ElementType>(i.args[14]));
    op->actor = issue_at(w, lane, through_copy_engine(w, bytes, "bulk send"));
    start_async(w, std::move(op));
  });
  return Step::Next;
}

// destination, source, bytes, byte mask, bits of the byte mask (0: all bytes), reduction, type
PTXE_OP("bulk.store") {
  const AddressArgs destination(i, 0), source(i, 4);
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<BulkStore>();
    const uint32_t bytes = w.values<uint32_t>(i.args[8])[lane];
    check_size(w, bytes, lane);
    op->buffer.resize(bytes);
    op->source = shared_operand(w, Space::Shared, source.at(w, lane), lane);
    op->destination = destination.at(w, lane);
    if (i.args[10]) op->byte_mask = register_bits(w, i.args[9], i.args[10], lane) & 0xffff;
    op->reduction = find_reduction(static_cast<ReduceOp>(i.args[11]), static_cast<ElementType>(i.args[12]));
    const auto kept = static_cast<uint64_t>(__builtin_popcount(op->byte_mask));
    count(w, Count::TmaStoreBytes, bytes / kChunkBytes * kept);
    op->join_group(w, lane, through_copy_engine(w, bytes, op->reduction ? "bulk reduce" : "bulk store"));
    start_async(w, std::move(op));
  });
  return Step::Next;
}

PTXE_OP("bulk.prefetch") {  // source, bytes: only that the memory is there
  const AddressArgs source(i, 0);
  each_lane(w, [&](int lane) {
    const uint32_t bytes = w.values<uint32_t>(i.args[4])[lane];
    check_size(w, bytes, lane);
    if (bytes) locate(w, Space::Global, source.at(w, lane), bytes, kBulkAlignment, lane);
  });
  return Step::Next;
}

PTXE_OP("bulk.commit_group") {
  each_lane(w, [&](int lane) {
    ThreadGroups& groups = groups_of(w, lane);
    groups.committed.push_back(std::move(groups.open));
    groups.open = nullptr;
  });
  return Step::Next;
}

static std::string explain_groups(Warp&, const Instruction& i) {
  return "its bulk async-groups, all but the last " + std::to_string(i.args[0]) +
         (i.args[1] ? ", to have read their sources" : ", to complete");
}

PTXE_OP("bulk.wait_group") {  // groups that may be pending, whether only the reading is waited for
  const uint32_t allowed = i.args[0];
  const bool read_only = i.args[1];
  bool done = true;
  each_lane(w, [&](int lane) { done = done && all_done(groups_of(w, lane), allowed, read_only); });
  if (!done) return wait_because(w, explain_groups);
  if (w.track) w.waits_for = "bulk async-groups";
  each_lane(w, [&](int lane) { take_groups(w, groups_of(w, lane), allowed, read_only); });
  return Step::Next;
}

// In the generic proxy: the PTX ISA counts only cp.async.bulk and cp.reduce.async.bulk to the async proxy.
// destination, mbarrier, bytes of an element, elements, reduction, type, then slot and its bits for each element
PTXE_OP("st.async") {
  const AddressArgs destination(i, 0), mbarrier(i, 4);
  const uint32_t element_bytes = i.args[8], num_elements = i.args[9];
  each_lane(w, [&](int lane) {
    auto op = std::make_unique<BulkSend>();
    op->buffer.resize(element_bytes * num_elements);
    for (uint32_t k = 0; k < num_elements; ++k) {
      const uint32_t slot = i.args[12 + 2 * k], lane_bytes = i.args[13 + 2 * k] / 8;
      std::memcpy(op->buffer.data() + k * element_bytes, w.registers + slot + static_cast<uint32_t>(lane) * lane_bytes,
                  element_bytes);
    }
    op->has_read = true;
    op->alignment = element_bytes * num_elements;
    op->destination = shared_operand(w, Space::SharedCluster, destination.at(w, lane), lane);
    op->mbarrier = shared_operand(w, Space::SharedCluster, mbarrier.at(w, lane), lane);
    if (cta_of(*w.cluster, op->destination) != cta_of(*w.cluster, op->mbarrier)) {
      report(w, Report::BarrierMisuse, lane, "The destination and the mbarrier are in different CTAs.");
    }
    op->reduction = find_reduction(static_cast<ReduceOp>(i.args[10]), static_cast<ElementType>(i.args[11]));
    op->actor = issue_at(w, lane, w.time + kEngineLatency, Proxy::Generic);
    start_async(w, std::move(op));
  });
  return Step::Next;
}

}  // namespace ptxe
