"""Several models in one table, from files to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import bitwright
from bitwright.core.errors import BitwrightError, Notice
from bitwright.evaluation.comparison import evaluate
from bitwright.evaluation.subjects import Subject
from bitwright.evaluation.windows import cut_text
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.events import Event
from tests.evaluation.conftest import WORDS, make_model, save_model
from tests.evaluation.test_perplexity import naive_perplexity


@pytest.fixture(scope="session")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    for scheme in ("w8g32", "w4g32", "w2g32"):
        quantize(base, folder / scheme, scheme=scheme, format="native")
    return {scheme: folder / scheme for scheme in ("w8g32", "w4g32", "w2g32")}


def test_the_whole_table(base: Path, quantized: dict[str, Path], text: Path) -> None:
    events: list[Event] = []
    found = evaluate(list(quantized.values()), reference=base, text=text, on_event=events.append)
    assert [row.name for row in found.rows] == [*map(str, quantized.values()), str(base)]
    assert [row.is_reference for row in found.rows] == [False, False, False, True]
    assert found.reference == str(base) and found.dtype == "float32"
    facts = found.text
    assert (facts.available, facts.used, facts.windows, facts.seqlen, facts.predicted) == (200, 200, 4, 64, 196)
    w8, w4, w2, reference = found.rows
    assert w8.kl_mean is not None and w4.kl_mean is not None and w2.kl_mean is not None
    assert 0 < w8.kl_mean < w4.kl_mean < w2.kl_mean and w8.kl_mean < 0.01
    assert w8.top1 is not None and w4.top1 is not None and w2.top1 is not None and w8.top1 > w4.top1 > w2.top1
    assert w8.size_bytes > w4.size_bytes > w2.size_bytes and w8.bits_per_weight == pytest.approx(8.5)
    for row in (w8, w4, w2):
        assert row.kl_mean_ci is not None and row.kl_mean is not None and row.kl_p99 is not None
        assert row.kl_mean_ci[0] <= row.kl_mean <= row.kl_mean_ci[1] and row.kl_p99 >= row.kl_mean
        assert row.seconds > 0 and row.peak_resident_bytes > 1 << 20 and row.probes is None
    assert reference.kl_mean is reference.top1 is reference.kl_p99 is None and reference.bits_per_weight == 32
    assert "another tokenizer" in found.probes_skipped
    units = [event for event in events if event.kind == "unit"]
    assert [event.data["done"] for event in units] == [1, 2, 3, 4] and units[0].data["model"] == str(base)
    assert any(event.kind == "progress" and event.data["windows_done"] == 4 for event in events)


def test_the_reference_measured_as_a_model_is_itself(base: Path, text: Path) -> None:
    """Once computing the reference's logits, once with those of the cache."""
    for _ in range(2):
        row, reference = evaluate([base], reference=base, text=text).rows
        assert row.kl_mean == row.kl_p99 == 0 and row.top1 == 1 and row.kl_mean_ci == (0, 0)
        assert row.perplexity == reference.perplexity and row.perplexity_ci == reference.perplexity_ci


def test_figures_are_those_of_the_definition(base: Path, quantized: dict[str, Path], text: Path) -> None:
    """Against one token at a time in float64; windows of 64 words, the text's words being its tokens."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    windows = cut_text(ids, seqlen=64, source="it")
    for path in (base, quantized["w4g32"]):
        wanted = naive_perplexity(load(path, dtype=torch.float32), windows)
        (row,) = evaluate([path], text=text).rows
        assert row.perplexity == pytest.approx(wanted, rel=1e-5)


def test_models_that_were_trained_with_a_first_token_are_measured_with_it(tmp_path: Path, text: Path) -> None:
    """Each window of 64 tokens then holds 63 words, all predicted; otherwise nothing is added."""
    save_model(tmp_path, words=[*WORDS, "<s>"])
    path = tmp_path / "tokenizer.json"
    first = {"id": "<s>", "ids": [60], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<s>": first}}
    added = {"id": 60, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fields = {"post_processor": template, "added_tokens": [{**added, "special": True}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<s>"}))
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    model = load(tmp_path, dtype=torch.float32)
    for start, number in ((None, 60), (True, 60), (False, None)):
        found = evaluate([tmp_path], text=text, start=start)
        windows = cut_text(ids, seqlen=64, source="it", start=number)
        assert found.rows[0].perplexity == pytest.approx(naive_perplexity(model, windows), rel=1e-5)
        assert found.text.start == (None if number is None else "<s>")
        assert found.text.used == 200 and found.text.predicted == (196 if number is None else 200)


def test_where_a_tokenizer_adds_no_first_token_none_can_be_asked_for(base: Path, text: Path) -> None:
    assert evaluate([base], text=text).text.start is None
    for start in (True, 1):
        with pytest.raises(BitwrightError, match=r"BW201.*start"):
            evaluate([base], text=text, start=start)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_does_not_matter(base: Path, quantized: dict[str, Path], text: Path, batch: int) -> None:
    one, other = (
        evaluate([quantized["w4g32"]], reference=base, text=text, seqlen=20, batch=size).rows[0] for size in (4, batch)
    )
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert other.kl_mean == pytest.approx(one.kl_mean, rel=1e-4) and other.top1 == pytest.approx(one.top1, abs=0.01)


def test_reference_logits_are_computed_once(
    base: Path, quantized: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    original = Subject.load

    def note(self: Subject, dtype: torch.dtype | None) -> torch.nn.Module:
        loaded.append(self.name)
        return original(self, dtype)

    monkeypatch.setattr(Subject, "load", note)
    paths = [quantized["w8g32"], quantized["w4g32"]]
    first = evaluate(paths, reference=base, text=text)
    assert loaded == [str(base), *map(str, paths)]
    second = evaluate(paths, reference=base, text=text)
    assert loaded[3:] == list(map(str, paths))  # nothing but the cache was needed
    for one, other in zip(first.rows, second.rows, strict=True):
        assert (one.perplexity, one.kl_mean, one.top1) == (other.perplexity, other.kl_mean, other.top1)


def test_over_the_limit_the_reference_runs_beside(
    base: Path, quantized: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = evaluate([quantized["w4g32"]], reference=base, text=text).rows[0]
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "0")
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "unused"))
    with pytest.warns(Notice, match="logits are not kept") as said:
        found = evaluate([quantized["w4g32"], quantized["w8g32"]], reference=base, text=text)
    assert found.rows[0].kl_mean == kept.kl_mean and not (tmp_path / "unused").exists()
    assert len(said) == len(found.notices) == 1


def test_models_in_memory(base: Path, quantized: dict[str, Path], text: Path) -> None:
    from_files = evaluate([quantized["w4g32"]], reference=base, text=text)
    modules = [("mine", load(quantized["w4g32"]))]
    in_memory = evaluate(modules, reference=("theirs", load(base)), text=text, tokenizer=base)
    assert [row.name for row in in_memory.rows] == ["mine", "theirs"] and in_memory.reference == "theirs"
    assert in_memory.rows[0].kl_mean == pytest.approx(from_files.rows[0].kl_mean, rel=1e-6)
    assert in_memory.rows[0].perplexity == pytest.approx(from_files.rows[0].perplexity, rel=1e-9)
    assert in_memory.rows[0].bits_per_weight == pytest.approx(4.5, rel=0.1)


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training(base: Path, text: Path) -> None:
    model = make_model(attention_dropout=0.5).train()
    rows = [evaluate([("mine", model)], text=text, tokenizer=base).rows[0] for _ in range(2)]
    assert model.training and rows[0].perplexity == rows[1].perplexity


def test_collapse_is_told_and_names_the_worst_layers(base: Path, text: Path, tmp_path: Path) -> None:
    """A model with other random weights, and a report that blames two of its layers."""
    broken = save_model(tmp_path / "broken", seed=9)
    errors = {"model.layers.1.mlp.up_proj": 0.9, "model.layers.0.mlp.up_proj": 0.2}
    layers = {name: {"relative_error": error} for name, error in errors.items()}
    (broken / "report.json").write_text(json.dumps({"layers": layers}))
    own = tmp_path / "own.txt"
    own.write_text(_text_that_it_likes(base))
    with pytest.warns(Notice, match="BW603") as caught:
        found = evaluate([broken], reference=base, text=own)
    assert found.rows[0].perplexity > 1.5 * found.rows[1].perplexity
    assert len(found.notices) == len(caught) == 1
    assert "worst layers: model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj" in found.notices[0]
    events: list[Event] = []
    evaluate([broken], reference=base, text=own, on_event=events.append)  # a listener is told instead of warned
    assert [event.message for event in events if event.kind == "notice"] == list(found.notices)


def _text_that_it_likes(directory: Path) -> str:
    """Words that the model itself would say next."""
    model = load(directory)
    tokens = [1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1, :60]
        tokens.append(int(torch.multinomial((2 * logits).softmax(-1), 1, generator=generator)))
    return " ".join(f"w{token}" for token in tokens)


def test_records_are_json_even_where_figures_are_infinite(base: Path, text: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    found = evaluate([("sure", model)], reference=base, text=text, on_event=lambda event: None)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert found.rows[0].perplexity == float("inf") and record["rows"][0]["perplexity"] is None
    assert record["rows"][1]["perplexity"] == found.rows[1].perplexity
    assert record["text"]["predicted"] == 196 and record["notices"] == list(found.notices)


def test_nan_names_the_model(base: Path, text: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(BitwrightError, match="BW601") as caught:
        evaluate([("broken", model)], text=text, tokenizer=base)
    assert caught.value.where == "broken" and caught.value.exit_status == 6


@pytest.mark.parametrize(
    ("options", "code", "quoted"),
    [
        ({"batch": 0}, "BW201", "batch is 0"),
        ({"threads": 0}, "BW201", "threads is 0"),
        ({"seqlen": 65}, "BW201", "seqlen 65"),
        ({"seqlen": 1}, "BW201", "seqlen is 1"),
        ({"max_tokens": 1}, "BW201", "max_tokens is 1"),
        ({"probes": -1}, "BW201", "probes is -1"),
        ({"probes": "all"}, "BW201", "probes is 'all'"),
        ({"dtype": torch.int8}, "BW201", "dtype is torch.int8"),
        ({"text": "no such text"}, "BW402", "no such text"),
    ],
)
def test_bad_arguments(base: Path, text: Path, options: dict[str, object], code: str, quoted: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        evaluate([base], **({"text": text} | options))  # type: ignore[arg-type]
    assert caught.value.code == code and quoted in str(caught.value)


@pytest.mark.parametrize(("content", "code"), [("", "BW401"), ("w1", "BW401"), ("  \n", "BW401")])
def test_texts_that_are_too_short(base: Path, tmp_path: Path, content: str, code: str) -> None:
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(BitwrightError, match=code):
        evaluate([base], text=path)


def test_part_of_a_text_is_said_to_be_part(base: Path, text: Path) -> None:
    facts = evaluate([base], text=text, max_tokens=66).text
    assert (facts.available, facts.used, facts.predicted, facts.windows) == (200, 66, 64, 2)


def test_threads_are_those_asked_for_only_while_measuring(base: Path, text: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    evaluate([base], text=text, threads=2, on_event=lambda event: seen.append(torch.get_num_threads()))
    assert set(seen) == {2} and torch.get_num_threads() == before


def test_the_public_name() -> None:
    assert bitwright.eval is evaluate


def test_the_embedded_model_answers_its_probes(model: LlamaForCausalLM) -> None:
    """The default text, its start; a few probes of each kind; and the model held in memory answers the same."""
    found = evaluate(["demo:"], reference="demo:", max_tokens=1024, probes=4)
    row, reference = found.rows
    assert row.kl_mean == 0 and row.top1 == 1 and found.text.source == "heldout" and found.probes_skipped == ""
    assert found.probe_counts == {"qa": 4, "recall": 4, "copy": 4, "sum": 4}
    assert row.probes == reference.probes and row.probes is not None and set(row.probes) == set(found.probe_counts)
    assert 1 < row.perplexity < 100 and row.bits_per_weight == 16
    in_memory = evaluate([("mine", load("demo:", dtype=torch.float32))], tokenizer="demo:", max_tokens=1024, probes=4)
    assert in_memory.rows[0].perplexity == row.perplexity and in_memory.rows[0].probes == row.probes
    skipped = evaluate(["demo:"], max_tokens=512, probes=False)
    assert skipped.rows[0].probes is None and skipped.probes_skipped == "not asked for" and not skipped.probe_counts
