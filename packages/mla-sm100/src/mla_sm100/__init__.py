"""MLA decode kernels for SM100, SM103 and SM110, providers of `mla_core`; importing this touches no CUDA."""

from .__about__ import __version__

__all__ = ["__version__"]
