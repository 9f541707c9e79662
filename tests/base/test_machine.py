"""Facts of the machine, as far as every machine has them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import waterfill
from waterfill.base import machine


@pytest.mark.skipif(sys.platform == "darwin", reason="which is asked otherwise")
def test_the_processor_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU @ 2.0GHz \nmodel name\t: another\n")
    assert machine.cpu_name(cpuinfo) == "A CPU @ 2.0GHz"
    cpuinfo.write_text("Features\t: fp asimd\n")
    assert machine.cpu_name(cpuinfo) == machine.cpu_name(tmp_path / "none") != "A CPU @ 2.0GHz"


def test_versions_are_those_of_distributions() -> None:
    assert machine.package_version("waterfill") == waterfill.__version__
    assert machine.package_version("no-such-package") is None
