"""The catalogue: every code used somewhere is explained, and every error says what, where, why and what to try."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitwright.core.errors import CATALOGUE, ArgumentError, BitwrightError, Notice, explain

SOURCES = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("code", sorted(CATALOGUE))
def test_every_code_is_explained(code: str) -> None:
    text = explain(code)
    assert text.startswith(f"{code}: {CATALOGUE[code].title} (exit status {code[2]})\n\n")
    assert CATALOGUE[code].text.endswith(".") and len(CATALOGUE[code].text) > len(CATALOGUE[code].title)
    assert explain(code.lower()) == explain(code.removeprefix("BW")) == text
    assert BitwrightError(code, "it").exit_status == int(code[2]) in {2, 3, 4, 5, 6}


def test_the_catalogue_is_in_order() -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)
    assert all(re.fullmatch(r"BW[2-6]\d\d", code) for code in CATALOGUE)


def test_codes_in_the_sources_exist() -> None:
    used = {code for path in SOURCES.rglob("*.py") for code in re.findall(r'"(BW\d+)"', path.read_text())}
    assert used and used <= set(CATALOGUE)


def test_unknown_codes() -> None:
    with pytest.raises(ArgumentError, match="there is no error code 'BW999'") as caught:
        explain("BW999")
    assert all(code in str(caught.value) for code in CATALOGUE)
    with pytest.raises(KeyError, match="BW999"):
        BitwrightError("BW999", "it")


def test_an_error_is_one_block() -> None:
    error = BitwrightError("BW203", "what", where="where", why="why", suggestion="this")
    assert str(error) == error.render() == "error[BW203]: what\n  where: where\n  why: why\n  try: this"
    assert str(BitwrightError("BW203", "what")) == "error[BW203]: what"


def test_usage_errors_are_value_errors_too() -> None:
    assert issubclass(ArgumentError, ValueError) and issubclass(ArgumentError, BitwrightError)
    assert issubclass(Notice, UserWarning) and not issubclass(BitwrightError, ValueError)
