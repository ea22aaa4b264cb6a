// Accesses: are they ordered after what the shadow memory remembers?
#include <algorithm>

#include "checker_state.h"

namespace ptxe {

namespace {

constexpr uint32_t kSharedLineBytes = 128;
constexpr uint32_t kNoReaderLimit = ~0u;

bool sees_async(Proxy proxy) { return proxy == Proxy::Async || proxy == Proxy::Tcgen05; }

}  // namespace

// ---------------------------------------------------------------------------------------------- order

Verdict ClusterChecker::verdict(const Access& earlier, bool earlier_writes, const Observer& me) const {
  if (!earlier.value) return Verdict::Ordered;
  if (earlier.grid != cluster_.grid->id) return verdict_other_grid(earlier, me);
  if (earlier.cluster != cluster_.linear) return verdict_other_cluster(earlier, earlier_writes, me);
  const bool same_warp = earlier.issuer == me.issuer;
  if (earlier.component == me.component) {
    if (earlier.value > me.value) return Verdict::Race;
    if (me.tmem) return Verdict::Ordered;
  } else if (earlier.component == me.issuer) {
    if (earlier.value > me.issuer_value) return Verdict::Race;
  } else if (!me.views->generic.covers(earlier.component, earlier.value)) {
    return Verdict::Race;
  }
  if (me.tmem) {
    return same_warp || me.views->tcgen05.covers(earlier.component, earlier.value) ? Verdict::Ordered
                                                                                 : Verdict::Tcgen05Order;
  }
  const bool needs_fence = earlier_writes && !earlier.async_proxy && sees_async(me.proxy);
  return !needs_fence || me.views->async.covers(earlier.component, earlier.value) ? Verdict::Ordered
                                                                                  : Verdict::ProxyRace;
}

Verdict ClusterChecker::verdict_other_cluster(const Access& earlier, bool earlier_writes, const Observer& me) const {
  if (!me.views->foreign) return Verdict::Race;
  const auto& table = *me.views->foreign;
  const auto at = std::lower_bound(table.begin(), table.end(), earlier.cluster,
                                   [](const Foreign& f, uint32_t cluster) { return f.cluster < cluster; });
  if (at == table.end() || at->cluster != earlier.cluster) return Verdict::Race;
  if (!at->generic.covers(earlier.component, earlier.value)) return Verdict::Race;
  const bool needs_fence = earlier_writes && !earlier.async_proxy && sees_async(me.proxy);
  return !needs_fence || at->async.covers(earlier.component, earlier.value) ? Verdict::Ordered : Verdict::ProxyRace;
}

namespace {

// Whether an earlier grid may still run when `grid` begins, or when it has executed griddepcontrol.wait. That waits for
// the launch before alone: what came before that one has ended only if it has waited in its turn, and before it let
// its dependents start if these do not wait.
bool open_at_start(const Grid& grid, uint32_t earlier);

bool open_behind_wait(const Grid& grid, uint32_t earlier) {
  if (!grid.pdl || grid.id == 0 || earlier + 1 >= grid.id) return false;
  const Grid& before = grid.machine->grids[grid.id - 1];
  return before.waited ? open_behind_wait(before, earlier) : open_at_start(before, earlier);
}

bool open_at_start(const Grid& grid, uint32_t earlier) {
  if (!grid.pdl || grid.id == 0 || earlier >= grid.id) return false;
  if (earlier + 1 == grid.id) return true;
  const Grid& before = grid.machine->grids[grid.id - 1];
  return before.let_go_unwaited ? open_at_start(before, earlier) : open_behind_wait(before, earlier);
}

}  // namespace

// A later grid can only have come first by starting early, before a griddepcontrol.wait that waits for this one.
Verdict ClusterChecker::verdict_other_grid(const Access& earlier, const Observer& me) const {
  const Grid& grid = *cluster_.grid;
  if (earlier.grid > grid.id) return Verdict::GridDependency;
  const auto may_be_open = me.views->grid_dependency ? open_behind_wait : open_at_start;
  return may_be_open(grid, earlier.grid) ? Verdict::GridDependency : Verdict::Ordered;
}

// ---------------------------------------------------------------------------------------------- one access

// Applies one access to the runs it touches and gathers what is wrong with it.
class AccessCheck {
 public:
  AccessCheck(const ClusterChecker& checker, const Observer& me, const Access& self, AccessKind kind)
      : checker_(checker), me_(me), self_(self), reads_(reads(kind)), writes_(writes(kind)) {}

  void visit(ShadowBlock& shadow, uint32_t begin, uint32_t end, uint64_t base) {
    known_reads_ = 0;
    sets_ = &shadow.reads();
    base_ = base;
    shadow.visit(begin, end, [this](const Run& run) { return skip(run); },
                 [this](Run& run, uint32_t unit) { apply(run, unit); });
  }

  std::vector<Conflict> conflicts;
  uint64_t unwritten = kNone;  // first unit read that nobody has written
  static constexpr uint64_t kNone = ~0ull;

 private:
  static constexpr size_t kMaxConflicts = 8;  // of one access, by different instructions

  // An access that was made before, and changes nothing.
  bool skip(const Run& run) const {
    if (writes_) return run.write == self_ && run.reads == 0;
    if (run.reads == 0 || !run.write.value) return false;
    const auto set = sets_->of(run.reads);
    return set.back() == self_;
  }

  void apply(Run& run, uint32_t unit) {
    if (!(run.write == known_write_)) {
      check(run.write, true, unit);
      known_write_ = run.write;
    }
    if (reads_ && !run.write.value && unwritten == kNone) unwritten = base_ + unit;
    if (writes_) {
      if (run.reads != known_reads_) {
        for (const Access& read : sets_->of(run.reads)) check(read, false, unit);
        known_reads_ = run.reads;
      }
      run.write = self_;
      run.reads = 0;
    } else {
      run.reads = sets_->with(run.reads, self_, [this](const Access& earlier) {
        return checker_.verdict(earlier, false, me_) == Verdict::Ordered;
      });
    }
  }

  void check(const Access& other, bool other_writes, uint32_t unit) {
    if (other.strong && self_.strong) return;
    const Verdict verdict = checker_.verdict(other, other_writes, me_);
    if (verdict == Verdict::Ordered || conflicts.size() >= kMaxConflicts) return;
    for (const Conflict& known : conflicts) {
      if (known.other.pc == other.pc && known.verdict == verdict) return;
    }
    conflicts.push_back(Conflict{other, other_writes, verdict, base_ + unit, me_.views->grid_dependency});
  }

  const ClusterChecker& checker_;
  const Observer& me_;
  const Access& self_;
  const bool reads_, writes_;
  ReadSets* sets_ = nullptr;
  uint64_t base_ = 0;
  Access known_write_;        // checked already
  uint32_t known_reads_ = 0;  // checked already
};

Access ClusterChecker::self(const Warp& w, AccessKind kind) const {
  Access access;
  access.value = warps_[w.component].views.generic.entries[w.component];
  access.pc = w.pc();
  access.cluster = cluster_.linear;
  access.grid = cluster_.grid->id;
  access.component = access.issuer = static_cast<uint16_t>(w.component);
  access.strong = is_strong(kind);
  access.read_modify = kind == AccessKind::Atomic;
  return access;
}

Access ClusterChecker::self(const Actor& actor, AccessKind kind) const {
  Access access;
  access.value = actor.value;
  access.pc = actor.site.pc;
  access.cluster = cluster_.linear;
  access.grid = cluster_.grid->id;
  access.component = static_cast<uint16_t>(actor.component);
  access.issuer = static_cast<uint16_t>(actor.issuer);
  access.async_proxy = sees_async(actor.proxy);
  access.strong = is_strong(kind);
  access.read_modify = kind == AccessKind::Atomic;
  return access;
}

// ---------------------------------------------------------------------------------------------- memory

namespace {

uint64_t begin_of(const Place& place) {
  return place.home == Place::Shared ? place.offset : reinterpret_cast<uint64_t>(place.data);
}

}  // namespace

bool ClusterChecker::extend_pending(const Place& place, uint64_t begin, uint32_t bytes, const Access& self,
                                    AccessKind kind, int32_t lane) {
  PendingAccess& p = pending_;
  if (!p.any || kind != p.kind || place.home != p.place.home || place.cta != p.place.cta) return false;
  if (place.range != p.place.range || !(self == p.self)) return false;
  if (begin >= p.begin && begin + bytes <= p.end) return true;  // lanes that read the same
  if (begin != p.end || bytes != p.piece_bytes) return false;
  if (p.warp && lane != p.last_lane + 1) return false;
  p.end += bytes;
  p.last_lane = lane;
  return true;
}

void ClusterChecker::start_pending(const Place& place, uint64_t begin, uint32_t bytes, const Access& self,
                                   AccessKind kind, const Site& site) {
  flush();
  PendingAccess& p = pending_;
  p.any = true;
  p.self = self;
  p.kind = kind;
  p.place = place;
  p.begin = begin;
  p.end = begin + bytes;
  p.piece_bytes = bytes;
  p.last_lane = site.lane;
  p.site = site;
}

void ClusterChecker::access(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane) {
  if (!place || place.home == Place::Local || !bytes) return;
  const Access by = self(w, kind);
  const uint64_t begin = begin_of(place);
  if (place.cta && place.cta != w.cta) note_remote(place, by, kind, site_of(w, lane));
  if (extend_pending(place, begin, bytes, by, kind, lane)) return;
  start_pending(place, begin, bytes, by, kind, site_of(w, lane));
  pending_.warp = &state(w);
}

void ClusterChecker::access(Warp& w, const Place& place, uint32_t bytes, AccessKind kind, int lane,
                            uint32_t num_lanes) {
  if (!place || place.home == Place::Local || !bytes || !num_lanes) return;
  const Access by = self(w, kind);
  if (place.cta && place.cta != w.cta) note_remote(place, by, kind, site_of(w, lane));
  start_pending(place, begin_of(place), bytes, by, kind, site_of(w, lane));
  pending_.warp = &state(w);
  pending_.end += static_cast<uint64_t>(bytes) * (num_lanes - 1);
  pending_.last_lane = lane + static_cast<int>(num_lanes) - 1;
}

void ClusterChecker::access(const Actor& actor, const Place& place, uint32_t bytes, AccessKind kind) {
  if (!actor.before || !place || place.home == Place::Local || !bytes) return;
  const Access by = self(actor, kind);
  const uint64_t begin = begin_of(place);
  if (place.cta && place.cta->linear != actor.site.cta) note_remote(place, by, kind, actor.site);
  if (extend_pending(place, begin, bytes, by, kind, -1)) return;
  start_pending(place, begin, bytes, by, kind, actor.site);
  pending_.warp = nullptr;
  pending_.actor = actor;
}

void ClusterChecker::apply_pending() {
  PendingAccess& p = pending_;
  p.any = false;
  const Actor& a = p.actor;
  const Observer me = p.warp ? Observer{&p.warp->views, p.self.component, p.self.value, p.self.component, p.self.value,
                                        Proxy::Generic}
                             : Observer{a.before.get(), a.component, a.value, a.issuer, a.issuer_value, a.proxy};
  AccessCheck check(*this, me, p.self, p.kind);
  const bool global = p.place.home == Place::Global;
  if (!global) {
    check.visit(shared_shadow(*p.place.cta), static_cast<uint32_t>(p.begin), static_cast<uint32_t>(p.end), 0);
  }
  for (uint64_t at = p.begin; global && at < p.end;) {
    const uint64_t number = at >> kPageShift;
    if (number != last_page_) {
      last_page_ = number;
      page_ = &shared_->page(number);
    }
    const uint64_t base = number << kPageShift;
    const uint64_t stop = std::min(p.end, base + kPageBytes);
    const std::lock_guard<std::mutex> hold(page_->lock);
    check.visit(page_->shadow, static_cast<uint32_t>(at - base), static_cast<uint32_t>(stop - base), base);
    at = stop;
  }
  if (global) check.unwritten = AccessCheck::kNone;
  if (global && p.place.range && (p.place.range->flags & MemoryMap::kUninitialised)) {
    check.unwritten = touch_written(*p.place.range, p.begin, p.end, p.kind);
  }
  report_access(check.conflicts, check.unwritten);
}

// Marks what a kernel writes of a range that was handed over uninitialised; the first unwritten byte it reads.
uint64_t ClusterChecker::touch_written(const MemoryMap::Range& range, uint64_t begin, uint64_t end, AccessKind kind) {
  WrittenBytes& written = shared_->written(range);
  uint64_t unwritten = AccessCheck::kNone;
  if (reads(kind)) {
    const uint64_t first = written.first_unset(begin - range.base, end - range.base);
    if (first < end - range.base) unwritten = range.base + first;
  }
  if (writes(kind)) written.set(begin - range.base, end - range.base);
  return unwritten;
}

void ClusterChecker::report_access(const std::vector<Conflict>& conflicts, uint64_t unwritten) {
  const PendingAccess& p = pending_;
  const auto site_at = [&](uint64_t unit) {
    Site site = p.site;
    if (p.warp && site.lane >= 0) site.lane += static_cast<int32_t>((unit - p.begin) / p.piece_bytes);
    return site;
  };
  for (const Conflict& conflict : conflicts) {
    report_conflict(conflict, p.self, verb(p.kind), site_at(conflict.unit), memory_text(p.place, conflict.unit), false);
  }
  if (unwritten != AccessCheck::kNone) {
    report_uninitialised(p.self, site_at(unwritten), memory_text(p.place, unwritten));
  }
}

// ---------------------------------------------------------------------------------------------- other CTAs' memory

void ClusterChecker::note_remote(const Place& place, const Access& access, AccessKind kind, const Site& site) {
  auto& remote = shadows_[place.cta->rank].remote;
  if (remote.size() <= access.component) remote.resize(access.component + 1u);
  remote[access.component] = RemoteAccess{access, kind, site, place.offset};
}

// Shared memory is there until the last thread of its CTA exits: an access has to happen before the exit of one of its
// warps. What a warp knew when it exited is in its views.
void ClusterChecker::check_remote() {
  for (const Cta& cta : cluster_.ctas) {
    const auto& remote = shadows_[cta.rank].remote;
    if (remote.empty()) continue;
    Clock before_exit;
    for (const Warp& w : cta.warps) before_exit.join(state(w).views.generic);
    for (const RemoteAccess& r : remote) {
      if (r.access.value && !before_exit.covers(r.access.component, r.access.value)) report_remote(r, cta);
    }
  }
}

ShadowBlock& ClusterChecker::shared_shadow(const Cta& cta) {
  auto& shadow = shadows_[cta.rank].shared;
  if (!shadow) {
    shadow = std::make_unique<ShadowBlock>(static_cast<uint32_t>(cta.shared.size()), kSharedLineBytes, kNoReaderLimit);
  }
  return *shadow;
}

// ---------------------------------------------------------------------------------------------- tensor memory

ShadowBlock& ClusterChecker::tmem_shadow(const Cta& cta) {
  auto& shadow = shadows_[cta.rank].tmem;
  if (!shadow) shadow = std::make_unique<ShadowBlock>(kTmemLanes * kTmemColumns, kTmemLanes, kNoReaderLimit);
  return *shadow;
}

void ClusterChecker::access_tmem(Warp& w, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                                 uint32_t num_columns, AccessKind kind) {
  WarpState& s = state(w);
  Access by = self(w, kind);
  if (writes(kind)) {
    const Pipeline& stores = start(s.tmem_stores);
    by.component = static_cast<uint16_t>(stores.component);
    by.value = stores.value;
  }
  const Observer me{&s.views, by.component, by.value, w.component, value(w), Proxy::Tcgen05, true};
  apply_tmem(me, by, kind, site_of(w), cta, lane, num_lanes, column, num_columns);
}

void ClusterChecker::access_tmem(const Actor& a, Cta& cta, uint32_t lane, uint32_t num_lanes, uint32_t column,
                                 uint32_t num_columns, AccessKind kind) {
  if (!a.before) return;
  const Observer me{a.before.get(), a.component, a.value, a.issuer, a.issuer_value, a.proxy, true};
  apply_tmem(me, self(a, kind), kind, a.site, cta, lane, num_lanes, column, num_columns);
}

void ClusterChecker::apply_tmem(const Observer& me, Access by, AccessKind kind, const Site& site, Cta& cta,
                                uint32_t lane, uint32_t num_lanes, uint32_t column, uint32_t num_columns) {
  by.strong = false;  // an accumulator is read and written, not atomically
  AccessCheck check(*this, me, by, kind);
  ShadowBlock& shadow = tmem_shadow(cta);
  for (uint32_t c = column; c < column + num_columns && c < kTmemColumns; ++c) {
    const uint32_t begin = c * kTmemLanes + lane;
    check.visit(shadow, begin, begin + std::min(num_lanes, kTmemLanes - lane), 0);
  }
  for (const Conflict& conflict : check.conflicts) {
    report_conflict(conflict, by, verb(kind), site, tmem_text(cta, conflict.unit), true);
  }
  if (check.unwritten != AccessCheck::kNone) report_uninitialised(by, site, tmem_text(cta, check.unwritten));
}

// Whatever touched the columns must have happened before. That it is ordered among tcgen05 operations, too, is not
// asked for: published kernels free behind a plain barrier.
void ClusterChecker::free_tmem(Warp& w, Cta& cta, uint32_t column, uint32_t num_columns) {
  const Access by = self(w, AccessKind::Write);
  const Observer me{&state(w).views, w.component, value(w), w.component, value(w), Proxy::Tcgen05, true};
  AccessCheck check(*this, me, by, AccessKind::Write);
  check.visit(tmem_shadow(cta), column * kTmemLanes, (column + num_columns) * kTmemLanes, 0);
  for (const Conflict& conflict : check.conflicts) {
    if (conflict.verdict != Verdict::Race) continue;
    report_conflict(conflict, by, "deallocation", site_of(w), tmem_text(cta, conflict.unit), true);
  }
  forget_tmem(cta, column, num_columns);
}

void ClusterChecker::forget_tmem(Cta& cta, uint32_t column, uint32_t num_columns) {
  tmem_shadow(cta).forget(column * kTmemLanes, (column + num_columns) * kTmemLanes);
}

}  // namespace ptxe
