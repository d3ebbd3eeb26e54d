"""Rotation: carried out tensor by tensor, it leaves the float model's logits alone, or the model is refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.models.hf import empty_model
from bitwright.models.rotation import FAMILIES, Rotation, plan_rotation, refuse_rotation, rotate_model
from tests.models.architectures import ARCHITECTURES, MIXTURE, build, sample_ids
from tests.quantization.tiny import Plain

ROTATED = [name for name, (family, _) in ARCHITECTURES.items() if family in FAMILIES and name != MIXTURE]


def plan(model: nn.Module, **options: bool) -> Rotation:
    return plan_rotation(model, lambda name: model.get_parameter(name), seed=3, **options)


def test_every_family_is_tested() -> None:
    assert {ARCHITECTURES[name][0] for name in ROTATED} == set(FAMILIES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_rotation_leaves_the_logits_alone(name: str, tied: bool) -> None:
    model = build(name, tied=tied)
    before = model(sample_ids(), use_cache=False).logits
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for heads in (True, False):
        rotated = copy.deepcopy(model)
        rotate_model(rotated, plan(rotated, heads=heads))
        torch.testing.assert_close(rotated(sample_ids(), use_cache=False).logits, before, atol=1e-4, rtol=0)
        for key, value in rotated.state_dict().items():
            is_kept = ("q_norm" in key or "k_norm" in key) or key.endswith(("q_proj.bias", "k_proj.bias"))
            is_kept |= key.endswith("v_proj.bias") and not heads
            assert torch.equal(value, weights[key]) == is_kept, key
        assert rotated.config.tie_word_embeddings is False
        assert rotated.get_output_embeddings().weight is not rotated.get_input_embeddings().weight


@torch.no_grad()
def test_biases_are_rotated_with_what_they_are_added_to() -> None:
    model = build("llama", attention_bias=True, mlp_bias=True).double()
    before = model(sample_ids(), use_cache=False).logits
    rotate_model(model, plan(model))
    torch.testing.assert_close(model(sample_ids(), use_cache=False).logits, before, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_model_on_the_meta_device_is_rotated_tensor_by_tensor() -> None:
    model = build("qwen2", tied=True)
    tensors = dict(model.named_parameters())
    read: list[str] = []

    def look(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    rotation = plan_rotation(empty_model(model.config), look, seed=3)
    assert read and all("norm" in name for name in read)  # nothing large is read to plan
    assert rotation.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    expected = copy.deepcopy(model)
    rotate_model(expected, plan(expected))
    for name, parameter in expected.named_parameters():
        source = tensors[rotation.untied.get(name, name)]
        assert torch.equal(rotation.transform(name, source), parameter), name


@torch.no_grad()
def test_a_wrong_rotation_would_be_seen() -> None:
    model = build("llama")
    before = model(sample_ids(), use_cache=False).logits
    right = plan(model)
    for name in ("model.norm.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        rotated = copy.deepcopy(model)
        rotate_model(rotated, replace(right, steps={**right.steps, name: ()}))
        assert not torch.allclose(rotated(sample_ids(), use_cache=False).logits, before, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_kept(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    before = model(sample_ids(), use_cache=False).logits.float()
    rotate_model(model, plan(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    error = (model(sample_ids(), use_cache=False).logits.float() - before).square().mean().sqrt()
    assert float(error) < {torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]


@torch.no_grad()
def test_outliers_are_spread() -> None:
    model = build("llama")
    model.model.embed_tokens.weight[:, 7] *= 50
    rotate_model(model, plan(model))
    columns = model.model.embed_tokens.weight.square().mean(0).sqrt()
    assert float(columns.max() / columns.median()) < 3


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ROTATED])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    model = build(name)
    reason = refuse_rotation(model)
    named = "mlp.gate" if name == MIXTURE else ARCHITECTURES[name][0]
    assert reason is not None and named in reason
    with pytest.raises(BitwrightError) as caught:
        plan(model)
    assert caught.value.code == "BW201" and named in caught.value.what


def test_models_without_a_configuration_are_refused() -> None:
    reason = refuse_rotation(Plain())
    assert reason is not None and "Plain" in reason


def test_a_norm_that_does_not_commute_is_refused() -> None:
    model = build("llama")
    for norm, what in ((nn.LayerNorm(64, bias=False), "root mean square"), (nn.LayerNorm(64), "bias")):
        changed = copy.deepcopy(model)
        changed.model.layers[1].input_layernorm = norm
        reason = refuse_rotation(changed)
        assert reason is not None and "model.layers.1.input_layernorm" in reason and what in reason
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.extra_proj = nn.Linear(64, 64)
    reason = refuse_rotation(changed)
    assert reason is not None and "extra_proj" in reason
