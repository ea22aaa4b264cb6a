"""What every operation package shares: argument checks, architectures, providers, plans, caches and tuning.

Importing this package neither touches CUDA nor imports a kernel language.
"""

from .__about__ import __version__
from .arch import Arch, as_arch
from .debug import debug, debug_mode
from .errors import ArgumentError, ArgumentTypeError, CompilationForbiddenError, NoKernelError
from .ops import needs_op, register_op
from .plan_cache import PlanCache, clear_plans, tensor_key
from .providers import (
    Kernel,
    Problem,
    Provider,
    Registered,
    providers,
    registered,
    reload_providers,
)
from .resolution import Explanation, ExplanationRow, Selection, candidates, explain, resolve
from .specs import Layout, TensorSpec, bind, check_index_range, check_no_overlap, check_scale
from .workspace import GuardedWorkspace, check_workspace, guard_workspace

__all__ = [
    "Arch",
    "ArgumentError",
    "ArgumentTypeError",
    "CompilationForbiddenError",
    "Explanation",
    "ExplanationRow",
    "GuardedWorkspace",
    "Kernel",
    "Layout",
    "NoKernelError",
    "PlanCache",
    "Problem",
    "Provider",
    "Registered",
    "Selection",
    "TensorSpec",
    "__version__",
    "as_arch",
    "bind",
    "candidates",
    "check_index_range",
    "check_no_overlap",
    "check_scale",
    "check_workspace",
    "clear_plans",
    "debug",
    "debug_mode",
    "explain",
    "guard_workspace",
    "needs_op",
    "providers",
    "register_op",
    "registered",
    "reload_providers",
    "resolve",
    "tensor_key",
]
