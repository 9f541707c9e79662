"""Adapters that PEFT has saved, put beside the packed layers of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.reading import UnfitFileError, read_small

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(folder: Path) -> None:
    """Refuse what is no adapter, before a model is loaded for it.

    Raises:
        WaterfillError: PEFT's two files are not there, or the first is no JSON object.
    """
    try:
        known = isinstance(json.loads(read_small(folder / CONFIG)), dict) and (folder / WEIGHTS).is_file()
    except (OSError, ValueError, RecursionError, UnfitFileError):
        known = False
    if not known:
        raise WaterfillError(
            f"{folder} is no adapter that PEFT has saved with safetensors; give a folder with {CONFIG} and {WEIGHTS}"
        )


def put_adapter(model: Any, folder: Path) -> None:
    """Put the adapter's layers into a loaded model, to run with.

    Raises:
        WaterfillError: peft is not installed, or the adapter is of another model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise WaterfillError('adapters need peft, which is not installed: pip install "waterfill[tune]"') from error
    try:
        PeftModel.from_pretrained(model, folder).eval()
    except Exception as error:  # each of PEFT's methods fails in its own way on weights of other shapes
        raise WaterfillError(
            f"the adapter {folder} does not fit this model ({first_line(error)}); give one that was trained beside it, "
            "or beside its original"
        ) from error
