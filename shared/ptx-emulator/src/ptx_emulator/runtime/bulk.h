// What bulk copies and tensor copies share: bulk async-groups, the copy engine's time, reductions, destinations.
#pragma once

#include <memory>

#include "checker.h"
#include "core.h"
#include "memory.h"

namespace ptxe {

// Copies that one thread has put between two cp.async.bulk.commit_group.
struct BulkGroup {
  uint32_t reading = 0;  // copies that have not read their source
  uint32_t writing = 0;  // copies that have not written their destination
  bool waited = false;   // for the reading at least
  Site site;             // of its last copy
  Sync read, written;
};
using BulkGroupPtr = std::shared_ptr<BulkGroup>;
// The group that the next commit_group of the lane closes.
BulkGroupPtr open_bulk_group(Warp& w, int lane);

// A copy out of shared memory that is tracked by a bulk async-group. The source has been read before the destination
// is written, and both are seen separately (wait_group.read), so each has an actor of its own.
struct GroupedCopy : AsyncOp {
  Actor reader, writer;
  BulkGroupPtr group;
  bool has_read = false;
  std::vector<uint8_t> buffer;

  // At issue. `completion` is the virtual time at which the destination is written.
  void join_group(Warp& w, int lane, uint64_t completion);
  bool step(Cluster& cluster) final;
  virtual void read(Cluster& cluster) = 0;   // source to buffer
  virtual void write(Cluster& cluster) = 0;  // buffer to destination
};

// Reports copies that read the CTA's shared memory and that no thread has waited for.
void check_bulk_groups_at_exit(Cta& cta);

// Takes `bytes` through the copy engine of the warp's CTA; the virtual time at which the last one has arrived.
uint64_t through_copy_engine(Warp& w, uint64_t bytes, const char* name);

// Element types, numbered as tensormap.replace numbers them.
enum class ElementType : uint32_t {
  U8, U16, U32, S32, U64, S64, F16, F32, F32Ftz, F64, BF16, TF32, TF32Ftz, B4x16, B4x16P64, B6x16P32,
};
enum class ReduceOp : uint32_t { Add, Min, Max, Inc, Dec, And, Or, Xor, None };

// destination[k] = op(destination[k], source[k]) for `bytes` of elements, each atomically. Null: no such reduction.
using ReduceFunction = void (*)(uint8_t* destination, const uint8_t* source, uint32_t bytes);
ReduceFunction find_reduction(ReduceOp op, ElementType type);

// The shared::cluster address of an operand. One in .shared::cta must be the CTA's own: reported otherwise.
uint32_t shared_operand(Warp& w, Space space, uint64_t address, int lane);

// A CTA mask in a register of `bits` bits, without the CTAs that the cluster does not have (reported).
uint32_t cta_mask(Warp& w, uint32_t slot, uint32_t bits, int lane);

}  // namespace ptxe
