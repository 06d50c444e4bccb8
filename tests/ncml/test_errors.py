"""Remedies of words that are not one of some choices."""

import pytest

from ncml.errors import MAX_CHOICES, suggestion


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["score", "generate"], ": did you mean score?"),
        (["left", "right"], ": choose from left, right"),
        ([], ": none is installed"),
    ],
)
def test_the_nearest_choice_is_named_or_all_are(choices: list[str], expected: str) -> None:
    assert suggestion("scor", choices) == expected


def test_of_hundreds_of_choices_some_are_named() -> None:
    choices = [f"line{number}" for number in range(MAX_CHOICES + 170)]
    remedy = suggestion("wall", choices)
    assert remedy.startswith(": choose from line0, line1, ")
    assert remedy.endswith(f", line{MAX_CHOICES - 1} and 170 more")
