// What the checker keeps: per warp and cluster, and for all clusters of a machine.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <unordered_map>

#include "checker.h"
#include "program.h"
#include "shadow.h"

namespace ptxe {

void join_foreign(ForeignTable& into, const ForeignTable& other);
const char* verb(AccessKind kind);  // read, write, update

// ---------------------------------------------------------------------------------------------- global memory

constexpr uint32_t kPageShift = 16;  // of shadow pages
constexpr uint32_t kPageBytes = 1u << kPageShift;

struct GlobalPage {
  static constexpr uint32_t kLineBytes = 1024;
  static constexpr uint32_t kMaxReaders = 8;  // of other clusters or warps; more are not remembered
  std::mutex lock;
  ShadowBlock shadow{kPageBytes, kLineBytes, kMaxReaders};
};

// Which bytes of a range that was handed over uninitialised have been written, a bit each.
class WrittenBytes {
 public:
  explicit WrittenBytes(uint64_t bytes) : words_((bytes + 63) / 64) {}
  void set(uint64_t begin, uint64_t end);
  // First byte of [begin, end) that nobody has written; `end` if there is none.
  uint64_t first_unset(uint64_t begin, uint64_t end) const;

 private:
  std::vector<std::atomic<uint64_t>> words_;
};

// A global location that synchronises, as one grid sees it.
struct GlobalSync {
  std::vector<Foreign> released;  // by cluster, sorted
  bool grid_dependency = false;
  uint64_t time = 0;
};

// What all clusters of a machine share. Thread-safe.
class SharedChecks : public GroupState {
 public:
  GlobalPage& page(uint64_t number);
  WrittenBytes& written(const MemoryMap::Range& range);
  void take_written(SharedChecks& earlier) { written_ = std::move(earlier.written_); }
  void forget_written(uint64_t base, uint64_t bytes) { written_.erase({base, bytes}); }
  // Whether a finding with these instructions (in either order) is new, and the limit of its kind not reached.
  bool is_new(uint32_t grid, Report kind, uint32_t pc, uint32_t other_pc);

  std::mutex syncs_lock;
  std::map<std::pair<uint64_t, uint32_t>, GlobalSync> syncs;  // by address and grid
  std::atomic<bool> any_sync{false};

 private:
  static constexpr uint32_t kMaxPerKind = 50;  // findings of a kind in a grid
  struct GridFindings {
    std::set<std::pair<uint32_t, uint32_t>> seen;  // instructions
  };
  std::shared_mutex pages_lock_;
  std::unordered_map<uint64_t, std::unique_ptr<GlobalPage>> pages_;
  std::mutex written_lock_;
  std::map<std::pair<uint64_t, uint64_t>, std::unique_ptr<WrittenBytes>> written_;  // by base and size
  std::mutex findings_lock_;
  std::map<std::pair<uint32_t, Report>, GridFindings> findings_;
};

// ---------------------------------------------------------------------------------------------- warps, clusters

// A component of a warp's own for operations that are asynchronous but finish in order.
struct Pipeline {
  uint32_t component = ~0u;  // none yet
  uint32_t value = 0;        // of the next operation
};

struct WarpState {
  Views views;              // tcgen05: what its tcgen05 operations are ordered after
  Clock tcgen05_pending;    // what they would be ordered after with a fence::after_thread_sync; what it releases
  Clock narrow_fenced;      // as Views::fenced, by this warp's fences of any scope
  Views observed;           // by relaxed accesses since the last fence
  bool has_observed = false;
  std::shared_ptr<const Views> snapshot;  // of views, for operations issued since they changed
  Pipeline tensor_core, tmem_stores;
  // tcgen05.ld up to this value of the warp's component have been waited for. They have no pipeline of their own:
  // published kernels use the registers without tcgen05.wait::ld, as ptxas makes them wait. So to leave it out is a
  // matter of tcgen05 order, not a race.
  uint32_t loads_waited = 0;
  std::vector<uint32_t> registers_in_flight;  // instructions whose results have not been waited for
};

// Who accesses, and what happened before.
struct Observer {
  const Views* views;
  uint32_t component, value;
  uint32_t issuer, issuer_value;
  Proxy proxy;
  bool tmem = false;
};

enum class Verdict : uint8_t { Ordered, Race, ProxyRace, Tcgen05Order, GridDependency };

struct Conflict {
  Access other;
  bool other_writes;
  Verdict verdict;
  uint64_t unit;  // of the shadow block where it was found first
  bool waited;    // griddepcontrol.wait happened before
};

// Accesses that follow each other without a gap are taken together: the lanes of a warp's instruction, the rows of a
// copy. Applied when anything else happens.
struct PendingAccess {
  bool any = false;
  Access self;
  AccessKind kind = AccessKind::Read;
  Place place;                  // of its first byte
  uint64_t begin = 0, end = 0;  // global: address; shared: offset
  uint32_t piece_bytes = 0;     // of a lane, or of a part of a copy
  int32_t last_lane = -1;
  Site site;                    // of the first lane
  const WarpState* warp = nullptr;  // null: asynchronous
  Actor actor;
};

// An access to the shared memory of another CTA than the one that executes it.
struct RemoteAccess {
  Access access;  // value 0: none
  AccessKind kind = AccessKind::Read;
  Site site;
  uint64_t offset = 0;
};

struct CtaShadow {
  std::unique_ptr<ShadowBlock> shared, tmem;
  std::vector<RemoteAccess> remote;  // the last one of each component
};

class ClusterChecker : public Checker {
 public:
  ClusterChecker(Cluster& cluster, std::shared_ptr<SharedChecks> shared);
  ~ClusterChecker() override { flush(); }
  static ClusterChecker* of(Cluster& cluster) { return static_cast<ClusterChecker*>(cluster.checker.get()); }

  WarpState& state(const Warp& w) { return warps_[w.component]; }
  uint32_t value(const Warp& w) { return state(w).views.generic.entries[w.component]; }
  void advance(const Warp& w) { ++state(w).views.generic.entries[w.component]; }
  Pipeline& start(Pipeline& pipeline);  // gives it a component on first use
  uint32_t borrow(uint32_t& value);
  void give_back(uint32_t component) { free_.push_back(component); }
  std::shared_ptr<const Views> snapshot(WarpState& s);
  // Makes what relaxed accesses have observed count; of other clusters only with `wide`.
  void apply_observed(WarpState& s, bool wide);
  void publish_global(uint64_t address, const Warp& w, const Clock& generic);
  void observe_global(uint64_t address, Warp& w, Views& into);

  // --- accesses (accesses.cpp)
  void access(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane);
  void access(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane, uint32_t num_lanes);
  void access(const Actor& actor, const Place& place, uint32_t bytes, AccessKind kind);
  void access_tmem(Warp& w, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column, uint32_t num_columns,
                   AccessKind kind);
  void access_tmem(const Actor& actor, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                   uint32_t num_columns, AccessKind kind);
  void free_tmem(Warp& w, Cta& cta, uint32_t column, uint32_t num_columns);
  void forget_tmem(Cta& cta, uint32_t column, uint32_t num_columns);
  void check_remote();
  void check_arrived(const Warp& w, uint32_t pc, Report kind);
  void flush() {
    if (pending_.any) apply_pending();
  }

  std::unordered_map<uint64_t, Sync> local_syncs;  // shared locations, and global ones at cta or cluster scope
  SharedChecks& shared() { return *shared_; }

 private:
  friend class AccessCheck;
  Verdict verdict(const Access& earlier, bool earlier_writes, const Observer& me) const;
  Verdict verdict_other_cluster(const Access& earlier, bool earlier_writes, const Observer& me) const;
  Verdict verdict_other_grid(const Access& earlier, const Observer& me) const;
  Access self(const Warp& w, AccessKind kind) const;
  Access self(const Actor& actor, AccessKind kind) const;
  bool extend_pending(const Place& place, uint64_t begin, uint32_t bytes, const Access& self, AccessKind kind,
                      int32_t lane);
  void start_pending(const Place& place, uint64_t begin, uint32_t bytes, const Access& self, AccessKind kind,
                     const Site& site);
  void apply_pending();
  void note_remote(const Place& place, const Access& access, AccessKind kind, const Site& site);
  uint64_t touch_written(const MemoryMap::Range& range, uint64_t begin, uint64_t end, AccessKind kind);
  void report_access(const std::vector<Conflict>& conflicts, uint64_t unwritten);
  void apply_tmem(const Observer& me, Access self, AccessKind kind, const Site& site, Cta& cta, uint32_t lane,
                  uint32_t num_lanes, uint32_t column, uint32_t num_columns);
  ShadowBlock& shared_shadow(const Cta& cta);
  ShadowBlock& tmem_shadow(const Cta& cta);

  // --- reports (findings.cpp)
  static std::string memory_text(const Place& place, uint64_t at);
  static std::string tmem_text(const Cta& cta, uint64_t unit);
  static std::string conflict_text(const Conflict& conflict, const Access& self);
  std::string actor_text(const Access& access) const;
  Site site_of_access(const Access& access) const;
  void report_conflict(const Conflict& conflict, const Access& self, const char* what_it_does, const Site& site,
                       const std::string& place, bool tmem);
  void report_remote(const RemoteAccess& remote, const Cta& cta);
  void report_uninitialised(const Access& self, const Site& site, const std::string& place);

  Cluster& cluster_;
  std::shared_ptr<SharedChecks> shared_;
  std::vector<WarpState> warps_;
  std::vector<uint32_t> values_;  // of borrowed components, by component
  std::vector<uint32_t> free_;    // ring of borrowed components, oldest first from free_head_
  size_t free_head_ = 0;
  uint32_t num_components_;
  uint32_t num_borrowed_ = 0;
  std::vector<CtaShadow> shadows_;
  PendingAccess pending_;
  uint64_t last_page_ = ~0ull;
  GlobalPage* page_ = nullptr;
};

}  // namespace ptxe
