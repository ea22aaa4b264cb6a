"""What every operation package shares: argument checks, architectures, providers, plans, caches and tuning.

Importing this package neither touches CUDA nor imports a kernel language.
"""

from .__about__ import __version__
from ._tensors import dtype_name, has_data, values_are_readable
from .arch import Arch, as_arch
from .autotune import Tuner, autotune, choose
from .canonical import canonical_json
from .compile_cache import (
    CompileCache,
    CompileKey,
    Lookup,
    default_cache_directory,
    forbid_compilation,
    record_lookups,
    source_hash,
    toolchain_versions,
)
from .debug import debug, debug_mode
from .devices import as_device
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    CompilationForbiddenError,
    NoKernelError,
    ProviderError,
)
from .ops import is_plain, is_watched, needs_op, register_op
from .plan_cache import PlanCache, clear_plans
from .providers import (
    Kernel,
    Problem,
    Provider,
    Registered,
    check_backend,
    check_registered,
    providers,
    registered,
    reload_providers,
)
from .resolution import Explanation, ExplanationRow, Selection, candidates, explain, resolve
from .specs import (
    Layout,
    TensorSpec,
    are_disjoint,
    bind,
    check_index_range,
    check_no_overlap,
    check_scale,
    split_scale,
)
from .tuning import bucket_batch, clear_tuning, generation, load_tuning, tuned_choice
from .warmup import WarmupError, WarmupReport, WarmupRow, load_problems, warmup
from .workspace import GuardedWorkspace, check_workspace, guard_workspace, launch_workspace

__all__ = [
    "Arch",
    "ArgumentError",
    "ArgumentTypeError",
    "CompilationForbiddenError",
    "CompileCache",
    "CompileKey",
    "Explanation",
    "ExplanationRow",
    "GuardedWorkspace",
    "Kernel",
    "Layout",
    "Lookup",
    "NoKernelError",
    "PlanCache",
    "Problem",
    "Provider",
    "ProviderError",
    "Registered",
    "Selection",
    "TensorSpec",
    "Tuner",
    "WarmupError",
    "WarmupReport",
    "WarmupRow",
    "__version__",
    "are_disjoint",
    "as_arch",
    "as_device",
    "autotune",
    "bind",
    "bucket_batch",
    "candidates",
    "canonical_json",
    "check_backend",
    "check_index_range",
    "check_no_overlap",
    "check_registered",
    "check_scale",
    "check_workspace",
    "choose",
    "clear_plans",
    "clear_tuning",
    "debug",
    "debug_mode",
    "default_cache_directory",
    "dtype_name",
    "explain",
    "forbid_compilation",
    "generation",
    "guard_workspace",
    "has_data",
    "is_plain",
    "is_watched",
    "launch_workspace",
    "load_problems",
    "load_tuning",
    "needs_op",
    "providers",
    "record_lookups",
    "register_op",
    "registered",
    "reload_providers",
    "resolve",
    "source_hash",
    "split_scale",
    "toolchain_versions",
    "tuned_choice",
    "values_are_readable",
    "warmup",
]
