"""A table as text, and how it is shown in a terminal: numbers whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

TEXT_WIDTH = 8
"""What a column of text keeps where a terminal is narrow, before columns of numbers are left out."""
BETWEEN = 2
"""Terminal columns that each column takes beside its cells."""


@dataclass(frozen=True)
class Cells:
    """A table as text: as many cells in each row as there are columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


@dataclass(frozen=True)
class CellsTable:
    """Cells for a terminal, see `cells_table`: which columns there is room for is decided as it is printed.

    `texts` are the indices of columns of text, `spare` of those that may be left out, least worth first;
    `most` bounds widths by index.
    """

    cells: Cells
    title: str
    texts: frozenset[int]
    spare: tuple[int, ...]
    most: Mapping[int, int]
    elsewhere: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = {index: self._width(index) for index in range(len(self.cells.columns))}
        least = {i: min(width, TEXT_WIDTH) if i in self.texts else width for i, width in widths.items()}
        out: list[int] = []
        for index in self.spare:
            if sum(least.values()) + BETWEEN * len(least) <= options.max_width:
                break
            out.append(index)
            del widths[index], least[index]
        excess = sum(widths.values()) + BETWEEN * len(widths) - options.max_width
        while excess > 0 and any(widths[index] > least[index] for index in widths):
            widths[max(widths, key=lambda index: widths[index] - least[index])] -= 1
            excess -= 1
        yield self._table(widths, out)

    def _width(self, index: int) -> int:
        texts = (*self.cells.columns[index].split("\n"), *(row[index] for row in self.cells.rows))
        return min(max(map(cell_len, texts)), self.most.get(index, 10**6))

    def _table(self, widths: Mapping[int, int], out: Sequence[int]) -> Table:
        note = self.cells.note
        if out:
            names = ", ".join(self.cells.columns[index].replace("\n", "") for index in out)
            note = "; ".join(filter(None, (note, f"no room for {names}: {self.elsewhere}")))
        table = Table(
            title=Text(self.title),
            caption=Text(note) if note else None,
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for index, width in widths.items():
            left = index in self.texts
            table.add_column(
                self.cells.columns[index],
                justify="left" if left else "right",
                no_wrap=left,
                overflow="ellipsis" if left else "fold",
                width=width,
            )
        for row in self.cells.rows:
            table.add_row(*(Text(row[index]) for index in widths))
        return table


def cells_table(
    cells: Cells,
    title: str,
    left: Sequence[str] = (),
    widths: Mapping[str, int] | None = None,
    spare: Sequence[str] | None = None,
    elsewhere: str = "a wider terminal shows them",
) -> CellsTable:
    """Cells for a terminal: columns of numbers flush right, those named in `left`, of text, flush left.

    Where a terminal is too narrow texts are cut, never numbers: `spare` columns are left out as a whole, the
    first one first (where none are named, columns of numbers from the last one to the third), and the line
    under the table says `elsewhere` they are. What is left is at worst broken into lines. `widths` bounds
    columns by name.
    """
    names = list(enumerate(cells.columns))
    texts = frozenset(index for index, name in names if name in left)
    if spare is None:
        leaving = [index for index, _ in reversed(names) if index > 1 and index not in texts]
    else:
        leaving = [index for wanted in spare for index, name in names if name == wanted]
    most = {index: (widths or {})[name] for index, name in names if name in (widths or {})}
    return CellsTable(cells, title, texts, tuple(leaving), most, elsewhere)


def in_lines(name: str) -> str:
    """A metric's name over several lines, or few columns would fit."""
    return name.replace(".", ".\n").replace("_", "_\n")
