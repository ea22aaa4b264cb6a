// Synchronisation and asynchronous operations: how the views of warps change.
#include "checker.h"

#include <algorithm>

#include "checker_state.h"

namespace ptxe {

namespace {

constexpr uint32_t kBorrowedComponents = 64;  // at least; more are made when all are in flight
constexpr uint32_t kReuseDistance = 32;       // components given back before one of them is taken again

void carry_time(Warp& w, const Sync& sync) {
  if (sync.time <= w.time) return;
  count(w, Count::BarrierWaitCycles, sync.time - w.time);
  trace_wait(w, w.time, sync.time);
  w.time = sync.time;
}

void join_released(Views& into, const WarpState& s) {
  into.generic.join(s.views.generic);
  into.async.join(s.views.async);
  into.tcgen05.join(s.tcgen05_pending);
  into.fenced.join(s.views.fenced);
  join_foreign(into.foreign, s.views.foreign);
  into.grid_dependency |= s.views.grid_dependency;
}

void join_acquired(WarpState& s, const Views& from) {
  s.views.generic.join(from.generic);
  s.views.async.join(from.async);
  s.tcgen05_pending.join(from.tcgen05);
  s.views.fenced.join(from.fenced);
  join_foreign(s.views.foreign, from.foreign);
  s.views.grid_dependency |= from.grid_dependency;
  s.snapshot.reset();
}

bool acquires(Order order) { return order == Order::Acquire || order == Order::AcquireRelease; }
bool releases(Order order) { return order == Order::Release || order == Order::AcquireRelease; }
bool is_wide(Scope scope) { return scope >= Scope::Gpu; }

uint64_t address_of(const Place& place) { return reinterpret_cast<uint64_t>(place.data); }

}  // namespace

// ---------------------------------------------------------------------------------------------- cluster

ClusterChecker::ClusterChecker(Cluster& cluster, std::shared_ptr<SharedChecks> shared)
    : cluster_(cluster), shared_(std::move(shared)), shadows_(cluster.ctas.size()) {
  const Grid& grid = *cluster.grid;
  const auto num_warps = static_cast<uint32_t>(cluster.ctas.size()) * grid.num_warps;
  warps_.resize(num_warps);
  for (uint32_t component = 0; component < num_warps; ++component) {
    Views& views = warps_[component].views;
    views.generic.entries.assign(num_warps, 0);
    views.generic.entries[component] = 1;
    views.grid_dependency = !grid.pdl || grid.id == 0;
  }
  num_components_ = num_warps;
}

namespace {

std::shared_ptr<SharedChecks>& shared_checks(Machine& machine) {
  struct Holder : GroupState {
    std::shared_ptr<SharedChecks> checks = std::make_shared<SharedChecks>();
  };
  auto& entry = machine.shared_state["checker"];
  if (!entry) entry = std::make_unique<Holder>();
  return static_cast<Holder&>(*entry).checks;
}

}  // namespace

std::unique_ptr<Checker> make_checker(Cluster& cluster) {
  return std::make_unique<ClusterChecker>(cluster, shared_checks(*cluster.machine));
}

void inherit_written(Machine& machine, Machine& earlier) {
  shared_checks(machine)->take_written(*shared_checks(earlier));
}

void forget_written(Machine& machine, uint64_t base, uint64_t bytes) {
  shared_checks(machine)->forget_written(base, bytes);
}

void finish_checks(Cluster& cluster) {
  ClusterChecker* c = ClusterChecker::of(cluster);
  if (!c) return;
  c->flush();
  c->check_remote();
}

Pipeline& ClusterChecker::start(Pipeline& pipeline) {
  if (pipeline.component == ~0u) {
    pipeline.component = num_components_++;
    pipeline.value = 1;
  }
  return pipeline;
}

uint32_t ClusterChecker::borrow(uint32_t& value) {
  uint32_t component;
  if (num_borrowed_ >= kBorrowedComponents && free_.size() - free_head_ > kReuseDistance) {
    component = free_[free_head_++];
    if (free_head_ > 2 * kBorrowedComponents) {
      free_.erase(free_.begin(), free_.begin() + static_cast<ptrdiff_t>(free_head_));
      free_head_ = 0;
    }
  } else {
    component = num_components_++;
    ++num_borrowed_;
    values_.resize(num_components_);
  }
  value = ++values_[component];
  return component;
}

std::shared_ptr<const Views> ClusterChecker::snapshot(WarpState& s) {
  if (!s.snapshot) s.snapshot = std::make_shared<const Views>(s.views);
  return s.snapshot;
}

void ClusterChecker::apply_observed(WarpState& s, bool wide) {
  if (!s.has_observed) return;
  Views& seen = s.observed;
  s.views.generic.join(seen.generic);
  s.views.async.join(seen.async);
  s.tcgen05_pending.join(seen.tcgen05);
  s.views.fenced.join(seen.fenced);
  s.views.grid_dependency |= seen.grid_dependency;
  s.snapshot.reset();
  const bool keep = !wide && seen.foreign;
  if (wide) join_foreign(s.views.foreign, seen.foreign);
  const ForeignTable left = keep ? seen.foreign : nullptr;
  seen.clear();
  seen.foreign = left;
  s.has_observed = keep;
}

void ClusterChecker::publish_global(uint64_t address, const Warp& w, const Clock& generic) {
  const Views& views = state(w).views;
  SharedChecks& all = *shared_;
  const std::lock_guard<std::mutex> hold(all.syncs_lock);
  all.any_sync = true;
  GlobalSync& sync = all.syncs[{address, cluster_.grid->id}];
  sync.time = std::max(sync.time, w.time);
  sync.grid_dependency |= views.grid_dependency;
  const auto entry = [&](uint32_t cluster) -> Foreign& {
    auto at = std::lower_bound(sync.released.begin(), sync.released.end(), cluster,
                               [](const Foreign& f, uint32_t c) { return f.cluster < c; });
    if (at == sync.released.end() || at->cluster != cluster) at = sync.released.insert(at, Foreign{cluster, {}, {}});
    return *at;
  };
  Foreign& own = entry(cluster_.linear);
  own.generic.join(generic);
  own.async.join(views.async);
  if (!views.foreign) return;
  for (const Foreign& known : *views.foreign) {
    Foreign& theirs = entry(known.cluster);
    theirs.generic.join(known.generic);
    theirs.async.join(known.async);
  }
}

void ClusterChecker::observe_global(uint64_t address, Warp& w, Views& into) {
  SharedChecks& all = *shared_;
  if (!all.any_sync) return;
  const std::lock_guard<std::mutex> hold(all.syncs_lock);
  const auto found = all.syncs.find({address, cluster_.grid->id});
  if (found == all.syncs.end()) return;
  const GlobalSync& sync = found->second;
  w.time = std::max(w.time, sync.time);
  into.grid_dependency |= sync.grid_dependency;
  auto others = std::make_shared<std::vector<Foreign>>();
  for (const Foreign& known : sync.released) {
    if (known.cluster == cluster_.linear) {
      into.generic.join(known.generic);
      into.async.join(known.async);
    } else {
      others->push_back(known);
    }
  }
  if (!others->empty()) join_foreign(into.foreign, others);
}

// ---------------------------------------------------------------------------------------------- synchronisation

void release(Warp& w, Sync& sync) {
  sync.time = std::max(sync.time, w.time);
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  c->apply_observed(s, true);
  join_released(sync.views, s);
  c->advance(w);
}

void acquire(Warp& w, const Sync& sync) {
  count(w, Count::BarrierWaits, 1);
  carry_time(w, sync);
  w.waits_for.clear();
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  join_acquired(c->state(w), sync.views);
}

void release_fenced(Warp& w, Sync& sync) {
  sync.time = std::max(sync.time, w.time);
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  WarpState& s = c->state(w);
  sync.views.generic.join(s.views.fenced);
  sync.views.generic.join(s.narrow_fenced);
  sync.views.fenced.join(s.views.fenced);
  sync.views.async.join(s.views.async);
  sync.views.tcgen05.join(s.tcgen05_pending);
  join_foreign(sync.views.foreign, s.views.foreign);
  sync.views.grid_dependency |= s.views.grid_dependency;
}

void observe_relaxed(Warp& w, const Sync& sync) {
  w.time = std::max(w.time, sync.time);
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  WarpState& s = c->state(w);
  s.observed.join(sync.views);
  s.has_observed = true;
}

void fence_proxy_async(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  s.views.async.join(s.views.generic);
  if (s.views.foreign) {
    auto fenced = std::make_shared<std::vector<Foreign>>(*s.views.foreign);
    for (Foreign& known : *fenced) known.async.join(known.generic);
    s.views.foreign = std::move(fenced);
  }
  s.snapshot.reset();
  c->advance(w);
}

void tcgen05_fence_before(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  s.tcgen05_pending.join(s.views.tcgen05);
  s.tcgen05_pending.raise(w.component, s.loads_waited);
}

void tcgen05_fence_after(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  s.views.tcgen05.join(s.tcgen05_pending);
  s.snapshot.reset();
}

void grid_dependency_wait(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  c->state(w).views.grid_dependency = true;
  c->state(w).snapshot.reset();
}

bool knows_grid_dependency(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  return !c || c->state(w).views.grid_dependency;
}

void publish(Warp& w, const Place& place, Order order, Scope scope, bool modifies) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c || place.home == Place::Local || !place) return;
  c->flush();
  WarpState& s = c->state(w);
  const bool wide = is_wide(scope) && place.home == Place::Global;
  const Clock& covered = releases(order) ? s.views.generic : s.views.fenced;
  if (!modifies) c->local_syncs.erase(address_of(place));
  if (wide) {
    if (releases(order) || !covered.entries.empty()) c->publish_global(address_of(place), w, covered);
  } else if (releases(order)) {
    Sync& sync = c->local_syncs[address_of(place)];
    sync.time = std::max(sync.time, w.time);
    join_released(sync.views, s);
  } else if (!covered.entries.empty() || !s.narrow_fenced.entries.empty()) {
    release_fenced(w, c->local_syncs[address_of(place)]);
  }
  if (releases(order)) c->advance(w);
}

void observe(Warp& w, const Place& place, Order order, Scope scope) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c || place.home == Place::Local || !place) return;
  c->flush();
  WarpState& s = c->state(w);
  Views& seen = s.observed;
  if (const auto found = c->local_syncs.find(address_of(place)); found != c->local_syncs.end()) {
    w.time = std::max(w.time, found->second.time);
    seen.join(found->second.views);
    s.has_observed = true;
  }
  if (place.home == Place::Global && c->shared().any_sync) {
    c->observe_global(address_of(place), w, seen);
    s.has_observed = true;
  }
  if (acquires(order)) c->apply_observed(s, is_wide(scope));
}

void fence_memory(Warp& w, Order order, Scope scope) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  if (acquires(order)) c->apply_observed(s, is_wide(scope));
  if (!releases(order)) return;
  if (is_wide(scope)) {
    s.views.fenced.join(s.views.generic);
  } else {
    s.narrow_fenced.join(s.views.generic);
  }
  s.snapshot.reset();
  c->advance(w);
}

// ---------------------------------------------------------------------------------------------- asynchronous

Actor issue(Warp& w, Proxy proxy) {
  Actor actor;
  actor.proxy = proxy;
  actor.site = site_of(w);
  actor.time = w.time;
  actor.issuer = w.component;
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return actor;
  c->flush();
  WarpState& s = c->state(w);
  actor.issuer_value = c->value(w);
  actor.before = c->snapshot(s);
  if (proxy == Proxy::Tcgen05) {
    Pipeline& pipeline = c->start(s.tensor_core);
    actor.pipelined = true;
    actor.component = pipeline.component;
    actor.value = pipeline.value++;
  } else {
    actor.component = c->borrow(actor.value);
  }
  c->advance(w);
  return actor;
}

void finish(Cluster& cluster, const Actor& actor, Sync& sync) {
  sync.time = std::max(sync.time, actor.time);
  ClusterChecker* c = ClusterChecker::of(cluster);
  if (!c || !actor.before) return;
  c->flush();
  sync.views.join(*actor.before);
  sync.views.generic.raise(actor.issuer, actor.issuer_value);
  sync.views.generic.raise(actor.component, actor.value);
  if (actor.proxy == Proxy::Tcgen05) sync.views.tcgen05.raise(actor.component, actor.value);
}

void finish(Cluster& cluster, const Actor& actor, Warp& w) {
  ClusterChecker* c = ClusterChecker::of(cluster);
  if (!c || !actor.before) return;
  c->flush();
  WarpState& s = c->state(w);
  s.views.generic.raise(actor.component, actor.value);
  s.views.tcgen05.raise(actor.component, actor.value);
  if (actor.issuer != w.component) {
    s.views.generic.join(actor.before->generic);
    s.views.generic.raise(actor.issuer, actor.issuer_value);
  }
  s.snapshot.reset();
}

void retire(Cluster& cluster, const Actor& actor) {
  ClusterChecker* c = ClusterChecker::of(cluster);
  if (!c || !actor.before) return;
  c->flush();
  if (!actor.pipelined) c->give_back(actor.component);
}

Stamp stamp(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  return c ? Stamp{w.component, c->value(w)} : Stamp{};
}

bool happened_before(const Stamp& stamp, const Actor& actor) {
  if (!stamp.value) return false;
  if (stamp.component == actor.issuer) return stamp.value <= actor.issuer_value;
  return actor.before && actor.before->generic.covers(stamp.component, stamp.value);
}

bool happened_before(const Stamp& stamp, Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  return !c || stamp.component == w.component || c->state(w).views.generic.covers(stamp.component, stamp.value);
}

bool visible_to_async(const Stamp& stamp, const Actor& actor) {
  return stamp.value && actor.before && actor.before->async.covers(stamp.component, stamp.value);
}

void tcgen05_load(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  std::vector<uint32_t>& loads = c->state(w).registers_in_flight;
  if (std::find(loads.begin(), loads.end(), w.pc()) == loads.end()) loads.push_back(w.pc());
}

void registers_in_flight(Warp& w, std::vector<uint32_t> pcs) {
  if (ClusterChecker* c = ClusterChecker::of(*w.cluster)) c->state(w).registers_in_flight = std::move(pcs);
}

void use_registers(Warp& w, uint32_t pc, Report kind) {
  if (ClusterChecker* c = ClusterChecker::of(*w.cluster)) c->check_arrived(w, pc, kind);
}

void tcgen05_wait_ld(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  c->state(w).loads_waited = c->value(w);
  c->state(w).registers_in_flight.clear();
  c->advance(w);
}

void tcgen05_wait_st(Warp& w) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (!c) return;
  c->flush();
  WarpState& s = c->state(w);
  Pipeline& stores = s.tmem_stores;
  if (stores.component == ~0u) return;
  s.views.generic.raise(stores.component, stores.value);
  s.views.tcgen05.raise(stores.component, stores.value);
  ++stores.value;
  s.snapshot.reset();
}

// ---------------------------------------------------------------------------------------------- accesses

void access_memory(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane) {
  if (ClusterChecker* c = ClusterChecker::of(*w.cluster)) c->access(w, place, bytes, kind, lane);
}

void access_lanes(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane, uint32_t num_lanes) {
  if (ClusterChecker* c = ClusterChecker::of(*w.cluster)) c->access(w, place, bytes, kind, lane, num_lanes);
}

void access_memory(Cluster& cluster, const Actor& actor, const Place& place, uint32_t bytes, AccessKind kind) {
  if (ClusterChecker* c = ClusterChecker::of(cluster)) c->access(actor, place, bytes, kind);
}

void access_tmem(Warp& w, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column, uint32_t num_columns,
                 AccessKind kind) {
  ClusterChecker* c = ClusterChecker::of(*w.cluster);
  if (c) c->access_tmem(w, cta, lane, num_lanes, column, num_columns, kind);
}

void access_tmem(Cluster& cluster, const Actor& actor, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                 uint32_t num_columns, AccessKind kind) {
  ClusterChecker* c = ClusterChecker::of(cluster);
  if (c) c->access_tmem(actor, cta, lane, num_lanes, column, num_columns, kind);
}

void free_tmem(Warp& w, Cta& cta, uint32_t column, uint32_t num_columns) {
  if (ClusterChecker* c = ClusterChecker::of(*w.cluster)) c->free_tmem(w, cta, column, num_columns);
}

void forget_tmem(Cta& cta, uint32_t column, uint32_t num_columns) {
  if (ClusterChecker* c = ClusterChecker::of(*cta.cluster)) c->forget_tmem(cta, column, num_columns);
}

}  // namespace ptxe
