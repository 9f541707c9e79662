"""The one look of every table on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def plain_table(*columns: tuple[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title, justify in columns:
        table.add_column(title, justify=justify, no_wrap=True)
    return table
