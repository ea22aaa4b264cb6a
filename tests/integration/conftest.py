"""The clients under test are the examples; models have random weights and nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session", autouse=True)
def _settings():
    torch.set_num_threads(1)  # the models are tiny; more threads wait for each other longer than they compute
    transformers.logging.set_verbosity_error()  # it warns that it uses its PyTorch paths, as is meant here
