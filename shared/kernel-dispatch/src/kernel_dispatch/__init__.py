"""What every operation package shares: argument checks, architectures, providers, plans, caches and tuning.

Importing this package neither touches CUDA nor imports a kernel language.
"""

from .__about__ import __version__
from .errors import ArgumentError, ArgumentTypeError, CompilationForbiddenError, NoKernelError

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CompilationForbiddenError",
    "NoKernelError",
    "__version__",
]
