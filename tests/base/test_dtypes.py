"""The table of element types agrees with what numpy and torch say of theirs, and with what safetensors writes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save

from waterfill.base.dtypes import ITEM_BYTES, NUMPY_DTYPES, TORCH_DTYPES, WEIGHT_DTYPES


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_everybody_means_the_same_by_a_name(name: str) -> None:
    dtype = TORCH_DTYPES[name]
    assert dtype.itemsize == np.dtype(NUMPY_DTYPES[name]).itemsize == ITEM_BYTES[name]
    file = save({"x": torch.zeros(3, dtype=dtype)})
    assert json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["x"]["dtype"] == name


def test_weights_are_the_floating_point_ones() -> None:
    assert set(WEIGHT_DTYPES) == {name for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}


def test_sizes_need_no_torch() -> None:
    script = "import sys; from waterfill.base.dtypes import ITEM_BYTES, NUMPY_DTYPES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
