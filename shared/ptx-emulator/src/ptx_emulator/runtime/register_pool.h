// What setmaxnreg leaves to be checked when a CTA ends.
#pragma once

#include "core.h"

namespace ptxe {

// All warps of a group must have executed the same instructions.
void check_registers_at_exit(Cta& cta);

}  // namespace ptxe
