"""The output of an evaluation: tables and figures, as Markdown, CSV, PNG and JSON, and on the terminal."""

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

from ncml.evaluation.bootstrap import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

Cell = str | float | Estimate | None

OURS, PUBLISHED = "measured here", "published"
"""Sources of a row's numbers, in the column `source` of every table that has both."""

DPI, SCALE = 100, 2


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    name: str
    """Name of its CSV file."""
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 3

    def text(self, cell: Cell) -> str:
        """Format a cell for readers, an estimate with its interval."""
        if cell is None:
            return "–"
        if isinstance(cell, Estimate):
            return f"{self.text(cell.value)} [{self.text(cell.low)}, {self.text(cell.high)}]"
        return cell if isinstance(cell, str) else f"{cell:.{self.digits}f}"

    def markdown(self) -> str:
        """Format the caption and the table."""
        lines = [self.header, ["---"] * len(self.header), *(map(self.text, row) for row in self.rows)]
        return f"**{self.caption}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write NAME.csv; an estimate takes four columns."""
        is_estimate = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.header))]
        header: list[str] = []
        for name, wide in zip(self.header, is_estimate, strict=True):
            header += [name, f"{name} low", f"{name} high", f"{name} n"] if wide else [name]
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for row in self.rows:
                values: list[Any] = []
                for cell, wide in zip(row, is_estimate, strict=True):
                    if isinstance(cell, Estimate):
                        values += [cell.value, cell.low, cell.high, cell.n]
                    else:
                        values += [cell, None, None, None] if wide else [cell]
                writer.writerow([round(value, 6) if isinstance(value, float) else value for value in values])

    def show(self) -> None:
        """Print the table."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid

        grid = Grid(title=self.caption, box=box.SIMPLE, title_justify="left", title_style="bold")
        for i, name in enumerate(self.header):
            grid.add_column(name, justify="right" if i and name != "source" else "left")
        for row in self.rows:
            grid.add_row(*map(self.text, row))
        Console(width=None if Console().is_terminal else 200).print(grid)


@dataclass(frozen=True)
class Figure:
    """A plot with its caption."""

    name: str
    """Name of its PNG file."""
    caption: str
    plot: Plot

    def write(self, folder: Path) -> None:
        """Write NAME.png, without the plot's alpha channel."""
        raw = io.BytesIO()
        self.plot.savefig(raw, format="png", dpi=DPI)
        Image.open(raw).convert("RGB").save(folder / f"{self.name}.png", optimize=True)


@dataclass(frozen=True)
class Section:
    """The result of one kind of evaluation."""

    kind: str
    title: str
    text: Sequence[str]
    """How it was measured, one paragraph each."""
    findings: Sequence[str] = ()
    """What was found, the unfavourable first, one sentence each; a page begins with them."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON by the label of a model."""
    notes: Sequence[str] = ()
    """What was left out or changed, one sentence each."""

    def write(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """Write KIND.md, and a file for each table and figure; the provenance is shown under the title."""
        for part in (*self.tables, *self.figures):
            part.write(folder)
        models, machine, date, took = (provenance[name] for name in ("models", "machine", "date", "took"))
        made = f"{models}; {machine}; {date}; this part took {took}"
        parts = [f"## {self.title}\n"]
        parts += ["".join(f"- {finding}\n" for finding in self.findings)] if self.findings else []
        parts += [f"`{provenance['command']}`  \n{made}\n"]
        parts += [f"{paragraph}\n" for paragraph in self.text]
        parts += [f"> {note}\n" for note in self.notes]
        parts += [table.markdown() for table in self.tables if table.rows]
        parts += [f"![{figure.caption}]({figure.name}.png)\n\n*{figure.caption}*\n" for figure in self.figures]
        (folder / f"{self.kind}.md").write_text("\n".join(parts), encoding="utf-8")


def _make_plot(width: float, height: float, **layout: Any) -> Plot:
    """Make a plot of this size in inches, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(width, height), dpi=DPI, **layout)
    FigureCanvasAgg(plot)
    return plot


def make_axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Plot, list[Any]]:
    """Make a plot of this size in inches, and its axes row by row."""
    plot = _make_plot(width, height, layout="constrained")
    return plot, list(plot.subplots(rows, columns, squeeze=False).flat)


def draw_sheet(rows: Sequence[tuple[str, NDArray[np.uint8]]], *, below: Sequence[Sequence[str]] = ()) -> Plot:
    """Draw images in labelled rows, uint8 [N, H, W, 3] each, every pixel a square of `SCALE` dots.

    below: for each row, a text for each image.
    """
    H, W = rows[0][1].shape[1:3]
    columns = max(len(images) for _, images in rows)
    left, gap = 12 + 6 * max(len(name) for name, _ in rows), 16 if below else 4  # dots
    width, row_height = left + columns * W * SCALE, H * SCALE + gap
    plot = _make_plot(width / DPI, len(rows) * row_height / DPI)
    for i, (name, images) in enumerate(rows):
        strip = np.full((H, columns * W, 3), 255, np.uint8)
        strip[:, : len(images) * W] = images.swapaxes(0, 1).reshape(H, -1, 3)
        top = 1 - i / len(rows)
        box = (
            left / width,
            top - H * SCALE / row_height / len(rows),
            1 - left / width,
            H * SCALE / row_height / len(rows),
        )
        axis = plot.add_axes(box)
        axis.imshow(strip, interpolation="nearest", aspect="auto", extent=(0, columns, 1, 0))
        axis.axis("off")
        axis.text(-6 / (W * SCALE), 0.5, name, ha="right", va="center", fontsize=8)
        for j, text in enumerate(below[i] if below else ()):
            axis.text(j + 0.5, 1.03, text, ha="center", va="top", fontsize=7)
    return plot
