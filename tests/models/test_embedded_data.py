"""The embedded model's texts and probes, as the package reads them."""

from __future__ import annotations

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.models.embedded_model import TEXTS, embedded_directory, read_probes, read_text


def test_both_texts_are_there_and_differ() -> None:
    heldout, calibration = (read_text(name) for name in TEXTS)
    assert min(len(heldout), len(calibration)) > 100_000
    assert heldout[:1000] != calibration[:1000]


def test_probes_have_a_kind_a_prompt_and_an_answer() -> None:
    probes = read_probes()
    assert {probe.kind for probe in probes} >= {"qa", "copy", "recall"}
    assert all(probe.prompt and probe.answer for probe in probes)
    lines = (embedded_directory() / "probes.jsonl").read_text(encoding="utf-8").count("\n")
    assert len(probes) == lines


def test_another_text_is_refused_by_name() -> None:
    with pytest.raises(BitwrightError, match=r"BW402.*'training'(?s:.*)heldout, calibration"):
        read_text("training")
