// What the instructions about grids need from the scheduler.
#pragma once

#include "core.h"

namespace ptxe {

// Whether griddepcontrol.wait goes on: the launch before this one has completed. What came before that one may still
// run if it has not waited for it.
bool grid_dependencies_done(const Grid& grid);
// The CTA of `w` lets dependent grids start (griddepcontrol.launch_dependents).
void launch_dependents(Warp& w);
// Takes a cluster that has not started from the grid; false if none is left. `first_cta` is %ctaid of its rank 0.
bool cancel_next_cluster(Warp& w, uint32_t first_cta[3]);

}  // namespace ptxe
