"""The clients under test are the examples; models have random weights and nothing is downloaded.

What runs on the emulator is kept if that is asked for, as in `tests/ptx_emulator`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "tests/gdn_mtp", "tests/ptx_emulator")]

importlib.import_module("emulator_recording").install()


@pytest.fixture(scope="session", autouse=True)
def _settings():
    torch.set_num_threads(1)  # the models are tiny; more threads wait for each other longer than they compute
    transformers.logging.set_verbosity_error()  # it warns that it uses its PyTorch paths, as is meant here
