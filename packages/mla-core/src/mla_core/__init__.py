"""Multi-head latent attention decode over a paged cache.

`decode` is the functional call; `plan` does everything but the launch beforehand. Kernels come from providers
(entry-point group `mla_core.decode.v1`); the provider `torch` is always there. Importing this package neither
touches CUDA nor imports a provider's kernel code.
"""

from .__about__ import __version__
from .api import decode
from .flashinfer_compat import trtllm_batch_decode_with_kv_cache_mla
from .merge import merge_states
from .plan import Plan, plan, workspace_nbytes
from .planning import SplitPlan, num_key_tiles, plan_splits, split_key_tiles
from .problem import DecodeProblem
from .reference import decode_reference

__all__ = [
    "DecodeProblem",
    "Plan",
    "SplitPlan",
    "__version__",
    "decode",
    "decode_reference",
    "merge_states",
    "num_key_tiles",
    "plan",
    "plan_splits",
    "split_key_tiles",
    "trtllm_batch_decode_with_kv_cache_mla",
    "workspace_nbytes",
]
