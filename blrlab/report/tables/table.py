"""A table of text cells, before anyone draws it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from blrlab.report.words import MISSING


@dataclass(frozen=True)
class Column:
    """A column's heading, when it may go, and whether it holds numbers.

    `drop` 0 keeps the column at any width; otherwise the column with the highest number goes first. A
    `group` column names the group its row is in, which is shown once a group. `note` explains the column, and goes
    with it. Cells of a `prose` column are sentences, and may run over several lines.
    """

    title: str
    drop: int = 0
    number: bool = True
    group: bool = False
    note: str = ""
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns. `breaks` are the rows that open a group, `notes` what is said beneath."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    breaks: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def without(self, titles: Iterable[str]) -> Table:
        """Leave out the columns of these titles."""
        gone = set(titles)
        keep = [i for i, column in enumerate(self.columns) if column.title not in gone]
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in keep), rows=rows)

    def without_empty(self, keep: Iterable[str] = ()) -> Table:
        """Leave out the columns in which no row says anything, but for those to keep."""
        kept = set(keep)
        titles = [column.title for column in self.columns if column.title not in kept]
        return self.without(title for title in titles if not set(self.cells(title)) - {"", MISSING})

    def noted(self, *notes: str) -> Table:
        """Add notes beneath."""
        return replace(self, notes=(*self.notes, *notes))

    def told(self) -> tuple[str, ...]:
        """Return what is said beneath: the notes, and those of the columns that are there."""
        return (*self.notes, *(column.note for column in self.columns if column.note))

    def cells(self, title: str) -> list[str]:
        """Return the cells of one column."""
        index = [column.title for column in self.columns].index(title)
        return [row[index] for row in self.rows]

    def say_once(self, titles: Iterable[str]) -> Table:
        """Move every one of these columns whose cells all agree into the title."""
        there = [column.title for column in self.columns if column.title in set(titles)]
        agreed = {title: self.cells(title)[0] for title in there if len(set(self.cells(title))) == 1}
        said = [" ".join(f"{title} {cell}".split()) for title, cell in agreed.items() if cell not in ("", MISSING)]
        return replace(self.without(agreed), title=", ".join([self.title, *said]))

    def shown(self) -> list[tuple[str, ...]]:
        """Return the rows with the cells of `group` columns blank but where a group opens."""
        groups = [column.group for column in self.columns]
        return [
            row
            if index in self.breaks
            else tuple("" if group else cell for cell, group in zip(row, groups, strict=True))
            for index, row in enumerate(self.rows)
        ]
