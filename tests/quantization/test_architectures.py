"""Every algorithm on every architecture and dtype, with tied embeddings, through the session that users call."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitwright
from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import is_linear
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.api import quantize as stream
from tests.models.architectures import ARCHITECTURES, MIXTURE, build, sample_ids
from tests.quantization.tiny import TEXT, save_model

EQUALIZERS: dict[str, dict[str, Any]] = {
    "awq": {"grid": 4, "folding": False},
    "teq": {"steps": 2, "folding": False},
    "awq+gptq": {"grid": 4, "folding": False},
    "teq+gptq": {"steps": 2, "folding": False},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"act_order": False, "true_sequential": True},
    "hqq": {},
    "autoround": {"iters": 2},
    "gptq+learned": {"code_steps": 2, "scale_steps": 2},
}
ALGORITHMS = EQUALIZERS | OTHERS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = [list(product(ARCHITECTURES, algorithms, DTYPES)) for algorithms in (EQUALIZERS, OTHERS)]
# Each architecture once by either kind, over all dtypes and algorithms; the others are slow together.
FEW = [case for cases in EVERY for number, case in enumerate(cases) if number % 12 == number // 12 % 12]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in (*EVERY[0], *EVERY[1]) if case not in FEW)]


def quantize(model: nn.Module, algorithm: str, scheme: str = "w6g16") -> nn.Module:
    prepared = bitwright.prepare(model, scheme=scheme, algorithm=algorithm, options=ALGORITHMS[algorithm])
    for seed in range(2):
        prepared(sample_ids(1, 24, seed), use_cache=False)
    return bitwright.convert(prepared)


@pytest.mark.parametrize(("name", "algorithm", "dtype"), CASES)
def test_every_architecture_is_quantized(name: str, algorithm: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype, tied=True)
    quantized = quantize(model, algorithm)
    head = quantized.get_output_embeddings()
    layers = {path: module for path, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    inside = {path for path, module in model.named_modules() if is_linear(module) and module is not model.lm_head}
    assert layers.keys() == inside
    assert head.weight is quantized.get_input_embeddings().weight  # still tied
    with torch.no_grad():
        found = quantized(sample_ids(1, 24, 0), use_cache=False).logits
        expected = model(sample_ids(1, 24, 0), use_cache=False).logits
    assert found.dtype == dtype and torch.isfinite(found).all()
    pair = torch.stack([found.flatten().float(), expected.flatten().float()])
    assert torch.corrcoef(pair)[0, 1] > 0.9
    assert not torch.equal(found, expected)


def test_experts_that_no_token_reached_are_equalized_with_the_others() -> None:
    """The norm before a mixture is divided, so that every expert must be multiplied, seen or not."""
    model = build(MIXTURE)
    reached: set[int] = set()
    hooks = [
        expert.register_forward_pre_hook(lambda _, __, n=number: reached.add(n))
        for number, expert in enumerate(model.model.layers[0].mlp.experts)
    ]
    prepared = bitwright.prepare(
        model, scheme="w8g16", algorithm="awq", options={"grid": 4, "clip": False, "folding": False}
    )
    norm = model.model.layers[0].post_attention_layernorm.weight.detach().clone()
    with torch.no_grad():
        same = torch.full((1, 12), 7)  # tokens that are all alike go to the same two experts
        model(same, use_cache=False)
        prepared(same, use_cache=False)
    assert len(reached) == 2
    for hook in hooks:
        hook.remove()
    quantized = bitwright.convert(prepared)
    assert not torch.equal(quantized.model.layers[0].post_attention_layernorm.weight, norm)
    with torch.no_grad():
        ids = sample_ids(4, 24, 9)
        found, expected = quantized(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    apart = (found - expected).square().mean(-1).sqrt().flatten()
    assert float(apart.median()) < 0.05 * float(expected.square().mean().sqrt())  # some tokens change experts


@pytest.mark.parametrize("family", ["llama", "phi"])
@torch.no_grad()
def test_what_was_folded_or_multiplied_is_stored(tmp_path: Path, family: str) -> None:
    """Streamed from disk: without the divided norms, or the vectors of what could not be folded, all would be lost."""
    model = save_model(tmp_path / "model", family)
    (tmp_path / "text").write_text(TEXT)
    ids, errors = torch.arange(24).reshape(2, 12) % 31, {}
    for algorithm, options in (("rtn", {}), ("awq", {"grid": 4, "folding": False})):
        run = {"calibration": tmp_path / "text", "samples": 4, "seqlen": 32, "options": options}
        stream(tmp_path / "model", tmp_path / algorithm, scheme="w3g16", algorithm=algorithm, **run)
        loaded = load(tmp_path / algorithm)
        errors[algorithm] = float((loaded(ids).logits - model(ids).logits).square().mean())
    scaled = [m for m in loaded.modules() if isinstance(m, QuantizedLinear) and m.input_scale is not None]
    assert len(scaled) == (2 if family == "phi" else 0)
    norm = loaded.get_submodule("model.layers.0.input_layernorm").weight
    assert not torch.equal(norm, model.get_submodule("model.layers.0.input_layernorm").weight)
    assert errors["awq"] < errors["rtn"]


@pytest.mark.parametrize("algorithm", ["awq", "teq"])
def test_without_calibration_nothing_is_touched(algorithm: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        bitwright.convert(bitwright.prepare(build("llama"), scheme="w4g16", algorithm=algorithm))
    assert caught.value.code == "BW401" and algorithm in caught.value.what


@pytest.mark.parametrize("scheme", ["w4g16-asym", "nf4g16"])
@pytest.mark.parametrize("algorithm", ["awq", "teq"])
def test_an_option_that_the_scheme_cannot_take_is_refused(algorithm: str, scheme: str) -> None:
    options = {f"{algorithm}.range": "full", "rtn.range": "full"}
    with pytest.raises(BitwrightError) as caught:
        bitwright.prepare(build("llama"), scheme=scheme, algorithm=algorithm, options=options)
    assert caught.value.code == "BW201" and "range" in caught.value.what
