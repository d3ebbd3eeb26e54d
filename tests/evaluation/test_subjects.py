"""What is checked before any model is loaded: tokenizers, contexts, vocabularies, paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaForCausalLM

from bitwright.core.errors import BitwrightError
from bitwright.evaluation.subjects import check_tokenizers, choose_window, find_subjects, worst_layers
from tests.evaluation.conftest import WORDS, make_model, save_model


def code_of(error: pytest.ExceptionInfo[BitwrightError]) -> str:
    return error.value.code


@pytest.mark.parametrize("models", [[], "demo:", Path("x")])
def test_models_are_a_list(models: object) -> None:
    with pytest.raises(BitwrightError, match="a list of at least one model") as caught:
        find_subjects(models, None)  # type: ignore[arg-type]
    assert code_of(caught) == "BW201"


def test_a_missing_model_is_named_before_anything_is_measured(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="absent") as caught:
        find_subjects([base, tmp_path / "absent"], base)
    assert code_of(caught) == "BW301"


def test_other_vocabularies_are_refused(base: Path) -> None:
    with pytest.raises(BitwrightError, match="predicts 80 tokens") as caught:
        find_subjects([("mine", make_model(vocab_size=80))], base)
    assert code_of(caught) == "BW312"


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(BitwrightError, match="mine does not say how many tokens"):
        find_subjects([("mine", nn.Linear(2, 2))], None)


def test_other_tokenizers_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", words=WORDS[::-1])
    subjects, _ = find_subjects([base, other], None)
    with pytest.raises(BitwrightError, match="differ") as caught:
        check_tokenizers(subjects, None)
    assert code_of(caught) == "BW312" and str(base) in str(caught.value) and str(other) in str(caught.value)


def test_the_layout_of_a_tokenizer_file_does_not_matter(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    fields = json.loads((copy / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(dict(reversed(fields.items())), indent=4))
    subjects, _ = find_subjects([base, copy], None)
    assert check_tokenizers(subjects, None)[1] is False


@pytest.mark.parametrize("content", [b"[1, 2", b"[]", b"\xff\xfe"])
def test_a_broken_tokenizer_differs(base: Path, tmp_path: Path, content: bytes) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "tokenizer.json").write_bytes(content)
    subjects, _ = find_subjects([base, copy], None)
    with pytest.raises(BitwrightError, match="BW312"):
        check_tokenizers(subjects, None)


def test_a_model_without_a_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*")))
    for models in ([copy], [base, copy]):
        subjects, _ = find_subjects(models, None)
        with pytest.raises(BitwrightError, match="no tokenizer") as caught:
            check_tokenizers(subjects, None)
        assert code_of(caught) == "BW312"


def test_models_in_memory_need_a_tokenizer_from_somewhere(model: LlamaForCausalLM, base: Path) -> None:
    subjects, _ = find_subjects([("mine", model)], None)
    with pytest.raises(BitwrightError, match="tokenizer=") as caught:
        check_tokenizers(subjects, None)
    assert code_of(caught) == "BW312"
    assert check_tokenizers(subjects, base)[1] is False
    assert check_tokenizers(subjects, "demo:")[1] is True


def test_windows_fit_every_context(base: Path) -> None:
    subjects, _ = find_subjects([base, ("long", make_model(max_position_embeddings=2048))], None)
    assert choose_window(subjects, None) == 64 and choose_window(subjects[1:], None) == 512
    assert choose_window(subjects, 64) == 64 and choose_window(subjects[1:], 2048) == 2048
    with pytest.raises(BitwrightError, match="seqlen 65 is longer") as caught:
        choose_window(subjects, 65)
    assert code_of(caught) == "BW201" and "--seqlen 64" in str(caught.value) and str(base) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"layers": []}', b'{"layers": {"a": {}}}', b"\xff"])
def test_an_unreadable_report_names_no_layers(tmp_path: Path, content: bytes) -> None:
    assert worst_layers(None) == worst_layers(tmp_path) == []
    (tmp_path / "report.json").write_bytes(content)
    assert worst_layers(tmp_path) == []


def test_the_worst_layers_come_first(tmp_path: Path) -> None:
    errors = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.05}
    layers = {name: {"relative_error": error} for name, error in errors.items()}
    (tmp_path / "report.json").write_text(json.dumps({"layers": layers}))
    assert worst_layers(tmp_path, 3) == ["b", "c", "a"]
