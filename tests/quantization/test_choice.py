"""The best rounder for each layer: the one that is really best on the calibration tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bitwright
from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.quantization.choice import CANDIDATES, ChoiceOptions, choose_rounder, output_error
from bitwright.quantization.gptq import GptqOptions, round_by_error_feedback
from bitwright.quantization.stages import Rounded
from bitwright.quantization.statistics import SiteStatistics
from tests.quantization.tiny import Plain


def make_site(width: int = 32, tokens: int = 200, seed: int = 0) -> tuple[SiteStatistics, Tensor]:
    """Correlated activations, a few channels of them strong."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    activations[:, :3] *= 8
    statistics = SiteStatistics(width, with_gram=True)
    statistics.add(activations)
    return statistics, activations


@pytest.mark.parametrize("scheme", ["w2g16-asym", "w3g16", "w4", "nf4g16"])
def test_the_least_error_on_the_tokens_themselves_wins(scheme: str) -> None:
    statistics, activations = make_site()
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    wanted = parse(scheme).weight
    chosen = choose_rounder(weight, statistics, wanted, ChoiceOptions())
    errors = {}
    for name, candidate in CANDIDATES.items():
        made = candidate(weight, statistics, wanted, 0.01)
        tensor = made.tensor if isinstance(made, Rounded) else made
        errors[name] = float((activations.double() @ (weight - tensor.dequantize()).double().T).square().sum())
        assert tensor.group_index is None  # every format can store it
        assert output_error(weight, tensor, statistics) == pytest.approx(errors[name], rel=1e-3)
    found = float((activations.double() @ (weight - chosen.tensor.dequantize()).double().T).square().sum())
    assert found <= min(errors.values()) * (1 + 1e-5)
    assert errors[chosen.notes["rounder"]] == pytest.approx(found, rel=1e-6)
    assert chosen.notes.get("gain", 1.0) == pytest.approx(errors["rtn"] / found, rel=2e-3)


def test_only_what_is_asked_for_is_tried() -> None:
    statistics, _ = make_site()
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    chosen = choose_rounder(weight, statistics, parse("w2g16-asym").weight, ChoiceOptions(candidates="rtn"))
    assert chosen.notes == {"rounder": "rtn", "gain": 1.0}
    with pytest.raises(BitwrightError, match="candidates is 'rtn,best'"):
        ChoiceOptions(candidates="rtn,best")


def test_damping_reaches_those_that_need_it() -> None:
    statistics, _ = make_site()
    weight, scheme = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)), parse("w2g16-asym").weight
    codes = {}
    for damp in (0.01, 0.9):
        chosen = choose_rounder(weight, statistics, scheme, ChoiceOptions(candidates="gptq", damp=damp))
        alone = round_by_error_feedback(weight, statistics, scheme, GptqOptions(act_order=False, damp=damp))
        codes[damp] = chosen.tensor.codes
        assert torch.equal(codes[damp], alone.tensor.codes)
    assert not torch.equal(codes[0.01], codes[0.9])


def test_the_first_of_equals_wins() -> None:
    statistics = SiteStatistics(32, with_gram=True)
    statistics.add(torch.eye(32))  # inputs that have nothing to do with each other: no error can be made up for
    chosen = choose_rounder(torch.randn(8, 32), statistics, parse("w3g16").weight, ChoiceOptions(candidates="rtn,gptq"))
    assert chosen.notes["rounder"] == "rtn"


def test_without_tokens_it_says_so() -> None:
    with pytest.raises(BitwrightError, match="no calibration tokens"):
        choose_rounder(torch.randn(4, 32), None, parse("w4g16").weight, ChoiceOptions())
    with pytest.raises(BitwrightError, match="no calibration tokens"):
        choose_rounder(torch.randn(4, 32), SiteStatistics(32, True), parse("w4g16").weight, ChoiceOptions())


def test_through_the_whole_library() -> None:
    """Rounder by choice beats rounding to nearest; learning beats the rounder."""
    model = Plain(width=16, blocks=2)
    batches = [torch.randn(2, 6, 8) for _ in range(6)]
    errors = {}
    for name, options in (
        ("rtn", {}),
        ("choice", {}),
        ("gptq+learned", {"code_steps": 30, "scale_steps": 10, "code_lr": 0.02}),
    ):
        prepared = bitwright.prepare(model, scheme="w2g16-asym", algorithm=name, options=options)
        for batch in batches:
            prepared(batch)
        quantized = bitwright.convert(prepared)
        with torch.no_grad():
            errors[name] = sum(float((quantized(x) - model(x)).square().mean()) for x in batches)
    assert errors["choice"] < 0.9 * errors["rtn"]
    assert errors["gptq+learned"] < 0.9 * errors["choice"]
