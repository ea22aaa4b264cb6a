// Spans: merged where there are too many, so that a long run stays a file that a viewer opens.
#include "timeline.h"

#include <algorithm>

#include "program.h"

namespace ptxe {

namespace {

constexpr size_t kMaxSpans = 500000;     // of all rows together, as long as each has its least
constexpr size_t kMinSpansPerTrack = 64;
constexpr size_t kMaxSpansPerTrack = 20000;
constexpr size_t kEngines = 2;            // rows of a CTA besides its warps
constexpr uint64_t kFirstGranularity = 64;  // cycles
constexpr uint64_t kMinPhase = 24;        // cycles that a run lasts at least before it is split by what it does

struct EngineTracks : GroupState {
  std::vector<std::pair<std::string, Track*>> tracks;
};

size_t spans_per_track(const Machine& machine) {
  size_t rows = 0;
  for (const Grid& grid : machine.grids) {
    rows += size_t{grid.size[0]} * grid.size[1] * grid.size[2] * (grid.num_warps + kEngines);
  }
  return std::clamp(kMaxSpans / std::max<size_t>(rows, 1), kMinSpansPerTrack, kMaxSpansPerTrack);
}

Track* new_track(Cta& cta, int32_t warp, const std::string& engine) {
  Machine& machine = *cta.cluster->machine;
  const std::lock_guard<std::mutex> hold(machine.lock);
  Timeline& timeline = machine.timeline;
  if (!timeline.max_spans_per_track) timeline.max_spans_per_track = spans_per_track(machine);
  timeline.tracks.push_back(Track{cta.grid, cta.linear, cta.cluster->linear, warp, engine, {}, {},
                                  timeline.max_spans_per_track});
  return &timeline.tracks.back();
}

void add_classes(Span& into, const Span& from) {
  for (const ClassCount& more : from.classes) {
    const auto known = std::find_if(into.classes.begin(), into.classes.end(),
                                    [&](const ClassCount& c) { return c.op_class == more.op_class; });
    if (known == into.classes.end()) {
      into.classes.push_back(more);
    } else {
      known->count += more.count;
    }
  }
}

// What two neighbours become: a wait stays one only beside the same wait.
void merge(Span& into, const Span& next) {
  if (into.kind != next.kind || into.name != next.name) {
    if (into.kind == SpanKind::Wait) {
      into.kind = SpanKind::Run;
      into.line = next.line;
    }
    into.name = 0;
  }
  if (next.begin > into.end) into.waited += next.begin - into.end;  // an engine was idle
  into.end = std::max(into.end, next.end);
  into.waited += next.waited;
  add_classes(into, next);
}

void append(std::string& out, uint64_t number) { out += std::to_string(number); }

void append_span(std::string& out, const Span& span) {
  out += '[';
  append(out, static_cast<uint64_t>(span.kind));
  for (const uint64_t number : {uint64_t{span.name}, uint64_t{span.line}, span.begin, span.end, span.waited}) {
    out += ',';
    append(out, number);
  }
  out += ",[";
  for (const ClassCount& c : span.classes) {
    if (&c != span.classes.data()) out += ',';
    append(out, c.op_class);
    out += ',';
    append(out, c.count);
    out += ',';
    append(out, c.line);
  }
  out += "]]";
}

}  // namespace

uint32_t Track::name_index(const std::string& name) {
  const auto known = std::find(names.begin(), names.end(), name);
  if (known != names.end()) return static_cast<uint32_t>(known - names.begin());
  names.push_back(name);
  return static_cast<uint32_t>(names.size()) - 1;
}

void Track::executed(const Instruction& i, uint64_t end) {
  const bool is_notable = grid->program->notable_classes >> i.op_class & 1;
  const bool other = is_notable && notable && notable_class != i.op_class;
  if (running && other && spans.back().end - spans.back().begin >= kMinPhase) running = false;
  if (!running) {
    add(Span{SpanKind::Run, 0, i.line, end - 1, end});
    running = true;
    notable = false;
  }
  if (is_notable) {
    notable = true;
    notable_class = i.op_class;
  }
  Span& span = spans.back();
  span.end = end;
  for (ClassCount& c : span.classes) {
    if (c.op_class == i.op_class) {
      ++c.count;
      return;
    }
  }
  span.classes.push_back({i.op_class, 1, i.line});
}

void Track::add(Span span) {
  running = false;
  if (spans.size() >= max_spans) coarsen();
  if (granularity && !spans.empty() && warp >= 0 && span.end - spans.back().begin < granularity) {
    merge(spans.back(), span);
  } else {
    spans.push_back(std::move(span));
  }
}

void Track::coarsen() {
  while (spans.size() > max_spans / 2) {
    granularity = std::max(kFirstGranularity, 2 * granularity);
    size_t kept = 0;
    for (size_t k = 1; k < spans.size(); ++k) {
      if (spans[k].end - spans[kept].begin < granularity) {
        merge(spans[kept], spans[k]);
      } else if (++kept != k) {
        spans[kept] = std::move(spans[k]);
      }
    }
    spans.resize(kept + 1);
  }
}

Track* track_of(Warp& w) {
  if (!w.grid->machine->options.trace) return nullptr;
  return new_track(*w.cta, static_cast<int32_t>(w.index), "");
}

void trace_wait(Warp& w, uint64_t begin, uint64_t end) {
  if (!w.track) return;
  Span span{SpanKind::Wait, w.track->name_index(w.waits_for), w.at ? w.at->line : 0, begin, end};
  span.waited = end - begin;
  w.track->add(std::move(span));
}

void trace_engine(Cta& cta, const char* engine, const char* name, uint32_t line, uint64_t begin, uint64_t end) {
  if (!cta.cluster->machine->options.trace) return;
  auto& tracks = cta.state.get<EngineTracks>().tracks;
  auto found = std::find_if(tracks.begin(), tracks.end(), [&](const auto& t) { return t.first == engine; });
  if (found == tracks.end()) found = tracks.insert(found, {engine, new_track(cta, -1, engine)});
  Track& track = *found->second;
  track.add(Span{SpanKind::Engine, track.name_index(name), line, begin, end});
}

std::string timeline_json(const Machine& machine) {
  std::string out = "[";
  for (const Track& track : machine.timeline.tracks) {
    if (out.size() > 1) out += ',';
    out += "{\"launch\":" + std::to_string(track.grid->id) + ",\"cta\":" + std::to_string(track.cta);
    out += ",\"cluster\":" + std::to_string(track.cluster) + ",\"warp\":" + std::to_string(track.warp);
    out += ",\"engine\":\"" + track.engine + "\",\"names\":[";
    for (const std::string& name : track.names) {
      out += (&name == track.names.data() ? "\"" : ",\"") + name + "\"";
    }
    out += "],\"spans\":[";
    for (const Span& span : track.spans) {
      if (&span != track.spans.data()) out += ',';
      append_span(out, span);
    }
    out += "]}";
  }
  return out + "]";
}

}  // namespace ptxe
