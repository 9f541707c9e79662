"""Imports go down, and nothing goes in circles: the rules of docs/design.md, section 2."""

from __future__ import annotations

import pytest

from tests.support.layers import FLOORS, SOURCE, TOP, faults, modules, room_of


@pytest.mark.parametrize("rule", faults())
def test_the_house_keeps_its_rules(rule: str) -> None:
    assert faults()[rule] == []


def test_every_file_has_a_room() -> None:
    known = {room for floor in FLOORS for room in floor} | {TOP}
    assert {room_of(name) for name in modules()} == known


def test_every_folder_says_what_it_is_for() -> None:
    for folder in {path.parent for path in SOURCE.rglob("*.py")}:
        assert (folder / "__init__.py").read_text("utf-8").startswith('"""'), folder
