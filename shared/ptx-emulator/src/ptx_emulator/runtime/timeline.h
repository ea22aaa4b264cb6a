// The timeline: what every warp and every engine does when, in virtual cycles. Recorded only with Options::trace.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "core.h"

namespace ptxe {

enum class SpanKind : uint8_t { Run, Wait, Engine };

// Instructions of a class within a span, and the PTX line of the first.
struct ClassCount {
  uint16_t op_class;
  uint32_t count, line;
};

struct Span {
  SpanKind kind;
  uint32_t name = 0;  // of a wait or an engine: index into Track::names
  uint32_t line = 0;  // PTX line, 0 if unknown
  uint64_t begin = 0, end = 0;
  uint64_t waited = 0;  // cycles of the waits in it
  std::vector<ClassCount> classes = {};  // of a run
};

// A row: a warp, or an engine of a CTA. Spans are in order of time for a warp.
struct Track {
  const Grid* grid;
  uint32_t cta, cluster;
  int32_t warp;  // -1: engine
  std::string engine;
  std::vector<std::string> names;
  std::vector<Span> spans;
  size_t max_spans;
  uint64_t granularity = 0;  // neighbours that last less together are merged
  bool running = false;      // the last span is a run that goes on
  bool notable = false;      // it has a notable class already
  uint16_t notable_class = 0;

  void executed(const Instruction& i, uint64_t end);
  void add(Span span);
  uint32_t name_index(const std::string& name);

 private:
  void coarsen();
};

struct Timeline {
  std::deque<Track> tracks;
  size_t max_spans_per_track = 0;  // from the number of rows of all launches
};

// The row of a warp that starts; null when nothing is traced.
Track* track_of(Warp& w);
std::string timeline_json(const Machine& machine);

}  // namespace ptxe
