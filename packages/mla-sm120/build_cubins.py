"""Build hook: where nvcc is installed, the wheel holds cubins for every architecture that it compiles for.

An nvcc on the PATH that does not compile the sources, as one of CUDA 11 or without a host compiler that it
takes, is passed over with a warning; one that the environment variable NVCC names is an error.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).with_name("src") / "mla_sm120"


class CubinBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles into a temporary folder, from which the files go into the wheel; the tree stays as it is."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the cubins, unless the wheel is for an editable install, which reads the sources themselves."""
        spec = importlib.util.spec_from_file_location("mla_sm120_sources", SOURCE / "sources.py")
        assert spec is not None
        assert spec.loader is not None
        sources = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sources)
        nvcc = sources.find_nvcc()
        if version == "editable" or nvcc is None:
            return
        self._folder = tempfile.TemporaryDirectory()
        try:
            built = sources.build_cubins(nvcc, Path(self._folder.name))
        except (OSError, RuntimeError) as error:
            if "NVCC" in os.environ:  # what was asked for
                raise
            self.app.display_warning(
                f"mla-sm120: the wheel holds no cubins, NVRTC will compile at first use: {nvcc}: {error}"
            )
            return
        for path in built:
            build_data["force_include"][str(path)] = f"mla_sm120/cubins/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()
