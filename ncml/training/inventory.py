"""What a dataset was found to hold, told before a run begins. Knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

NAMED = 3
"""How many sizes, files or classes a line names before it counts the others."""

FEW = 50
"""Pictures of a class below which it can hardly be learnt."""


@dataclass
class Inventory:
    """Counted while pictures are read."""

    files: int = 0
    """Pictures and files that are none."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Pictures by width x height, as they were before they were brought to the model's size."""
    enlarged: int = 0
    """Pictures smaller than the model's size."""
    copies: int = 0
    """Pictures that equal an earlier one at the model's size, pixel by pixel."""
    unreadable: list[str] = field(default_factory=list)
    """Files that could not be read."""
    classes: dict[str, int] = field(default_factory=dict)
    """Pictures of each class."""

    @property
    def pictures(self) -> int:
        """How many could be read."""
        return self.files - len(self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `Inventory.from_json` is the inverse."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Inventory:
        """The inverse of `to_json`."""
        return replace(cls(**value), sizes=Counter(value["sizes"]))

    def lines(self, height: int, width: int) -> list[str]:
        """The report, a sentence a line; height and width are the model's."""
        said = [
            f"{counted(self.pictures, 'picture')}, of {_some([f'{s} ({n:,})' for s, n in self.sizes.most_common()])}"
        ]
        if self.sizes.keys() != {f"{width}x{height}"}:
            said.append(f"each is cut to its centre and brought to {width}x{height}")
        if self.enlarged:
            said.append(f"{self.enlarged:,} smaller than that: enlarged, so the model learns them blurred")
        if self.classes:
            listed = sorted(self.classes.items(), key=lambda item: -item[1])
            said.append(f"{counted(len(listed), 'class', 'classes')}: {_some([f'{c} ({n:,})' for c, n in listed], 12)}")
            few = [f"{name} ({n})" for name, n in listed if n < FEW]
            if few:
                said.append(f"too few pictures to learn by class: {_some(few)}")
        else:
            said.append("no classes (a subfolder for each would make them)")
        if self.copies:
            said.append(f"{counted(self.copies, 'picture')} the same as an earlier one: held-out measures may flatter")
        if self.unreadable:
            said.append(f"{counted(len(self.unreadable), 'file')} left out, unreadable: {_some(self.unreadable)}")
        return said


def counted(count: int, thing: str, many: str | None = None) -> str:
    """1 picture, 2,000 pictures."""
    return f"{count:,} {thing if count == 1 else many or thing + 's'}"


def _some(names: Sequence[str], most: int = NAMED) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
