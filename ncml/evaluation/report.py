"""What an evaluation says: tables and figures, as Markdown, CSV, PNG and JSON, and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.evaluation.numbers import Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

Cell = str | float | Measured | None

OURS, PUBLISHED = "measured here", "published"
"""Where a row's numbers come from: a column `source` says so in every table that has both."""

DPI = 100


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    name: str
    """Of its CSV file."""
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 3

    def text(self, cell: Cell) -> str:
        """A cell as people read it, a measured one with its interval."""
        if cell is None:
            return "–"
        if isinstance(cell, Measured):
            return f"{self.text(cell.value)} [{self.text(cell.low)}, {self.text(cell.high)}]"
        return cell if isinstance(cell, str) else f"{cell:.{self.digits}f}"

    def markdown(self) -> str:
        """The caption, and the table under it."""
        lines = [self.header, ["---"] * len(self.header), *(map(self.text, row) for row in self.rows)]
        return f"**{self.caption}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write(self, folder: Path) -> None:
        """NAME.csv; a measured cell is spread over four columns."""
        spread = [any(isinstance(row[i], Measured) for row in self.rows) for i in range(len(self.header))]
        parts = ("", " low", " high", " n")
        header = [n + part for n, wide in zip(self.header, spread, strict=True) for part in (parts if wide else ("",))]
        with (folder / f"{self.name}.csv").open("w", newline="") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(header)
            for row in self.rows:
                values: list[Any] = []
                for cell, wide in zip(row, spread, strict=True):
                    if isinstance(cell, Measured):
                        values += [cell.value, cell.low, cell.high, cell.n]
                    else:
                        values += [cell, None, None, None] if wide else [cell]
                out.writerow([round(value, 6) if isinstance(value, float) else value for value in values])

    def show(self) -> None:
        """Print it."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid

        grid = Grid(title=self.caption, box=box.SIMPLE, title_justify="left", title_style="bold")
        for i, name in enumerate(self.header):
            grid.add_column(name, justify="right" if i and name != "source" else "left")
        for row in self.rows:
            grid.add_row(*map(self.text, row))
        Console(width=None if Console().is_terminal else 160).print(grid)


@dataclass(frozen=True)
class Figure:
    """A plot and what it shows."""

    name: str
    """Of its PNG file."""
    caption: str
    plot: Plot

    def write(self, folder: Path) -> None:
        """NAME.png, without the transparency that plots come with."""
        raw = io.BytesIO()
        self.plot.savefig(raw, format="png", dpi=DPI)
        Image.open(raw).convert("RGB").save(folder / f"{self.name}.png", optimize=True)


@dataclass(frozen=True)
class Section:
    """What one kind of evaluation found."""

    kind: str
    title: str
    text: Sequence[str]
    """How it was measured, a paragraph each."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON by the label of a model."""
    notes: Sequence[str] = ()
    """What was left out or changed, a sentence each."""

    def write(self, folder: Path, made: Mapping[str, str]) -> None:
        """KIND.md, and a file for each table and figure; `made` is how it was measured, shown under the title."""
        for part in (*self.tables, *self.figures):
            part.write(folder)
        told = f"`{made['command']}`  \n{made['machine']}; {made['date']}; this part took {made['took']}\n"
        parts = [f"## {self.title}\n", told, *(f"{paragraph}\n" for paragraph in self.text)]
        parts += [f"> {note}\n" for note in self.notes]
        parts += [table.markdown() for table in self.tables if table.rows]
        parts += [f"![{figure.caption}]({figure.name}.png)\n\n*{figure.caption}*\n" for figure in self.figures]
        (folder / f"{self.kind}.md").write_text("\n".join(parts))


def _canvas(width: float, height: float, **layout: Any) -> Plot:
    """A plot of so many inches; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(width, height), dpi=DPI, **layout)
    FigureCanvasAgg(plot)
    return plot


def plots(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Plot, list[Any]]:
    """A plot of so many inches, and its axes row by row."""
    plot = _canvas(width, height, layout="constrained")
    return plot, list(plot.subplots(rows, columns, squeeze=False).flat)


def sheet(
    rows: Sequence[tuple[str, NDArray[np.uint8]]], *, below: Sequence[Sequence[str]] = (), scale: int = 2
) -> Plot:
    """Pictures in labelled rows, uint8 [N, H, W, 3] each, and every pixel a square of `scale` dots.

    below: for each row, a text for each picture.
    """
    H, W = rows[0][1].shape[1:3]
    columns = max(len(pictures) for _, pictures in rows)
    left, gap = 12 + 6 * max(len(name) for name, _ in rows), 16 if below else 4  # dots
    width, each = left + columns * W * scale, H * scale + gap
    plot = _canvas(width / DPI, len(rows) * each / DPI)
    for i, (name, pictures) in enumerate(rows):
        strip = np.full((H, columns * W, 3), 255, np.uint8)
        strip[:, : len(pictures) * W] = pictures.swapaxes(0, 1).reshape(H, -1, 3)
        top = 1 - i / len(rows)
        box = (left / width, top - H * scale / each / len(rows), 1 - left / width, H * scale / each / len(rows))
        axis = plot.add_axes(box)
        axis.imshow(strip, interpolation="nearest", aspect="auto", extent=(0, columns, 1, 0))
        axis.axis("off")
        axis.text(-6 / (W * scale), 0.5, name, ha="right", va="center", fontsize=8)
        for j, text in enumerate(below[i] if below else ()):
            axis.text(j + 0.5, 1.03, text, ha="center", va="top", fontsize=7)
    return plot
