"""The pass over the whole model at the end of a run: what it is given, what becomes of its result, and resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import WORK_DIRECTORY
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization import finishing
from bitwright.quantization.algorithms import ALGORITHMS
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows, tokenize
from bitwright.quantization.events import Event, Stopped
from bitwright.quantization.logits import LogitsOptions, LogitsTask, LogitsUpdates, tune_logits
from bitwright.quantization.rtn import RTN
from bitwright.quantization.session import convert, prepare
from bitwright.quantization.stages import Algorithm, Stage
from tests.quantization.tiny import TEXT, build_model, digests, file_tensors, save_model

SAMPLES, SEQLEN, SEED = 6, 16, 5
SHORT = {"steps": 6, "batch": 2, "check_every": 2, "held_back": 0.3}


@pytest.fixture(params=["qwen2", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", request.param, num_hidden_layers=3)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def add(finish: Callable[..., Any], options: type) -> None:
        row = Algorithm(round=RTN, finish=Stage("finish", options, finish), calibrated=True)
        monkeypatch.setitem(ALGORITHMS, "toy", row)

    return add


def run(place: Path, output: str = "out", **changes: Any) -> Path:
    arguments: dict[str, Any] = {"samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "scheme": "w2g32"}
    arguments |= {"calibration": place / "text", "format": "native", "algorithm": "toy", **changes}
    quantize(place / "model", place / output, **arguments)
    return place / output


@dataclass(frozen=True)
class NoOptions:
    """For passes that have none."""


def test_the_pass_is_given_the_rounded_model_and_the_float_models_logits(
    place: Path, register: Callable[..., None]
) -> None:
    model = load(place / "model")
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    windows = cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, source="text").windows
    seen: list[Tensor] = []

    @torch.no_grad()
    def look(task: LogitsTask, options: NoOptions, **_: object) -> LogitsUpdates | None:
        assert torch.equal(torch.stack(tuple(task.windows)), windows)
        for number, window in enumerate(windows):
            expected = model(input_ids=window[None], use_cache=False).logits[0]
            torch.testing.assert_close(task.reference(number), expected, rtol=1e-4, atol=1e-4)
            seen.append(task.model(input_ids=window[None], use_cache=False).logits[0])
        assert task.float_weight is not None
        for name, weight in model.named_parameters():
            if "layers.1.mlp.up_proj.weight" in name or "h.1.mlp.c_fc.weight" in name:
                expected = weight if "up_proj" in name else weight.T
                assert torch.equal(task.float_weight(name.removesuffix(".weight")), expected)
        return None

    register(look, NoOptions)
    output = run(place)
    rounded = load(output)
    for window, logits in zip(windows, seen, strict=True):
        torch.testing.assert_close(rounded(input_ids=window[None]).logits[0], logits, rtol=1e-5, atol=1e-5)
    assert len(seen) == SAMPLES and not (output / WORK_DIRECTORY).exists()
    assert digests(output).keys() == digests(run(place, "plain", algorithm="rtn")).keys()


@pytest.mark.parametrize("is_resident", [True, False], ids=["whole", "streamed"])
def test_what_the_pass_changes_is_stored_and_brings_the_model_nearer(
    place: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, is_resident: bool
) -> None:
    monkeypatch.setattr(finishing, "RESIDENT_BYTES", 1 << 30 if is_resident else 0)
    register(tune_logits, LogitsOptions)
    notices: list[str] = []

    def listen(event: Event) -> None:
        notices.extend([event.message] if event.kind == "notice" else [])

    options = {"steps": 30, "batch": 4, "check_every": 10, "lr": 0.01}
    tuned = run(place, options=options, on_event=listen)
    before, after = (float(text) for text in next(n for n in notices if "held back" in n).split()[-4:-1:2])
    assert after < before
    plain = run(place, "plain", options={"steps": 0})
    changed = [
        name for name, tensor in file_tensors(plain).items() if not torch.equal(tensor, file_tensors(tuned)[name])
    ]
    assert changed and not any(name.endswith(".codes") for name in changed)
    assert divergence(place, tuned) < divergence(place, plain)


@torch.no_grad()
def divergence(place: Path, output: Path) -> float:
    model, quantized = load(place / "model"), load(output)
    ids = tokenize(load_tokenizer(place / "model"), TEXT)[None, :64]
    wanted, found = (torch.log_softmax(each(input_ids=ids).logits.double(), -1) for each in (model, quantized))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_a_quantized_head_is_compared_with_the_float_one(place: Path, register: Callable[..., None]) -> None:
    """The divergence at the start of the pass is that of the model as it was rounded, its head included."""
    found: list[float] = []

    def look(task: LogitsTask, options: LogitsOptions, **rest: Any) -> LogitsUpdates | None:
        updates = tune_logits(task, options, **rest)
        assert updates is not None
        found.append(updates.before)
        return updates

    register(look, LogitsOptions)
    overrides, options = ["lm_head=w2g32"], {"steps": 10, "check_every": 5, "held_back": 0.85, "batch": 2}
    run(place, overrides=overrides, options=options)
    plain = load(run(place, "plain", overrides=overrides, algorithm="rtn"))
    assert isinstance(plain.get_submodule("lm_head"), QuantizedLinear)
    model = load(place / "model")
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    windows = cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, source="text").windows
    prepared = prepare(model, scheme="w2g32", algorithm="toy", options=options, seed=SEED, overrides=overrides)
    for window in windows:
        prepared(input_ids=window[None], use_cache=False)
    convert(prepared)
    with torch.no_grad():
        wanted = torch.log_softmax(model(input_ids=windows).logits.double(), -1)
        given = torch.log_softmax(plain(input_ids=windows).logits.double(), -1)
    divergences = (wanted.exp() * (wanted - given)).sum(-1).mean(-1)
    without_one = (divergences.sum() - divergences) / (SAMPLES - 1)  # one of six is trained on
    assert len(found) == 2
    for value in found:
        assert (without_one - value).abs().min() < 2e-3 * value


def test_an_interrupted_pass_is_resumed_to_the_same_bytes(place: Path, register: Callable[..., None]) -> None:
    register(tune_logits, LogitsOptions)
    arguments: Mapping[str, Any] = {"options": SHORT}
    whole = run(place, "whole", **arguments)
    stops = 0
    while True:
        try:
            resumed = run(place, **arguments, should_stop=lambda: True)
            break
        except Stopped:
            stops += 1
    # outer, three blocks, each of three looks at the pass, the pass, two of three blocks written anew
    assert stops == 10 and digests(resumed) == digests(whole)


def test_a_pass_that_dies_goes_on_from_its_last_look(place: Path, register: Callable[..., None]) -> None:
    register(tune_logits, LogitsOptions)
    whole = run(place, "whole", options=SHORT)
    resumed_with: list[object] = []

    def die(task: LogitsTask, options: LogitsOptions, *, state: Any, on_check: Any, **rest: Any) -> Any:
        def check(values: Mapping[str, Tensor], divergence: float) -> None:
            on_check(values, divergence)
            if state is None:
                raise KeyboardInterrupt

        resumed_with.append(state)
        return tune_logits(task, options, state=state, on_check=check, **rest)

    register(die, LogitsOptions)
    with pytest.raises(KeyboardInterrupt):
        run(place, options=SHORT)
    resumed = run(place, options=SHORT)
    assert resumed_with[0] is None and resumed_with[1] is not None
    assert digests(resumed) == digests(whole)


def test_a_prepared_model_is_finished_to_the_same_numbers(place: Path, register: Callable[..., None]) -> None:
    """Streamed from disk, and in memory: the same codes, scales and norms."""
    register(tune_logits, LogitsOptions)
    options = {"steps": 4, "batch": 3, "check_every": 2, "lr": 0.01}
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    windows = cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, source="text").windows
    prepared = prepare(load(place / "model"), scheme="w2g32", algorithm="toy", options=options, seed=SEED)
    for window in windows:
        prepared(input_ids=window[None], use_cache=False)
    in_memory, streamed = convert(prepared), load(run(place, options=options))
    for name, module in streamed.named_modules():
        if isinstance(module, QuantizedLinear):
            other = in_memory.get_submodule(name)
            assert isinstance(other, QuantizedLinear)
            assert torch.equal(module.unpack().codes, other.unpack().codes)
            torch.testing.assert_close(module.dequantize(), other.dequantize(), rtol=2e-3, atol=1e-5)
    for name, parameter in streamed.named_parameters():
        torch.testing.assert_close(parameter, in_memory.get_parameter(name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "batches",
    [
        [{"inputs_embeds": torch.zeros(1, 8, 32)}] * 2,
        [{"input_ids": torch.ones(1, 8, dtype=torch.int64), "attention_mask": torch.tensor([[1, 0] + [1] * 6])}] * 2,
        [{"input_ids": torch.ones(1, length, dtype=torch.int64)} for length in (8, 9)],
    ],
    ids=["embeddings", "masked", "two lengths"],
)
def test_batches_that_are_no_windows_are_refused(register: Callable[..., None], batches: list[Any]) -> None:
    register(tune_logits, LogitsOptions)
    prepared = prepare(build_model("llama"), scheme="w4g32", algorithm="toy")
    for batch in batches:
        prepared(**batch)
    with pytest.raises(BitwrightError) as caught:
        convert(prepared)
    assert caught.value.code == "BW401"
