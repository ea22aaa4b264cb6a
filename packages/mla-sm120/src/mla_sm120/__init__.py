"""MLA decode kernels for SM120 and SM121, as providers of `mla_core`; importing this touches no CUDA."""

from .__about__ import __version__

__all__ = ["__version__"]
