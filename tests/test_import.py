"""What importing costs: help and usage errors do without torch, and transformers still learns of the plug-in."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import waterfill
from waterfill import api

HELP = """
import sys
from waterfill.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code)
print(sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))
"""

FIRST_USE = """
import sys
import waterfill
assert "plan" in dir(waterfill)
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
from waterfill import plan, Plan
assert plan is waterfill.plan is sys.modules["waterfill.api"].plan
assert Plan is sys.modules["waterfill.planning.plan"].Plan
"""

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from waterfill.running.hf.plugin import WaterfillConfig
from waterfill.running.hf.plugin import WaterfillQuantizer
assert AUTO_QUANTIZER_MAPPING["waterfill"] is WaterfillQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["waterfill"] is WaterfillConfig
import json, transformers.quantizers
assert type(transformers.quantizers.__loader__) is type(json.__loader__)
"""


def run(script: str, *arguments: str) -> str:
    """What a script prints, in a process that has imported nothing yet."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["plan", "--help"], 0),
        (["plan"], 2),
        (["pack", "MODEL", "OUT", "--sise", "3MB", "--json"], 2),
        (["nonsense"], 2),
    ],
)
def test_help_and_usage_errors_import_nothing_large(arguments: list[str], code: int) -> None:
    *_, last, imported = [*([] if code else ["0"]), *run(HELP, *arguments).splitlines()]
    assert imported == "[]"
    assert code == 0 or last == "2"


def test_verbs_wait_for_their_first_use() -> None:
    assert run(FIRST_USE) == "", "its assertions hold"


def test_every_public_name_is_there() -> None:
    for name in waterfill.__all__:
        assert not isinstance(getattr(waterfill, name), ModuleType), name
        assert name in dir(waterfill)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        waterfill.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_names_can_be_replaced_and_put_back() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waterfill, "load", "another")
        assert waterfill.load == "another"
    assert waterfill.load is api.load
    del waterfill.load
    assert waterfill.load is api.load


@pytest.mark.parametrize(
    "order",
    [
        "import waterfill, transformers",
        "import transformers, waterfill",
        "import transformers.modeling_utils, waterfill",
        "import waterfill.running.hf.plugin",
        "import waterfill.running.hf.install",
    ],
)
def test_transformers_knows_the_plug_in_whatever_is_imported_first(order: str) -> None:
    assert run(order + REGISTERED) == "", "its assertions hold"
