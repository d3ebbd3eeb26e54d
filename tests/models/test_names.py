"""Names of tensors in files and in models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.models.names import match_names, shared_names, state_names
from tests.quantization.tiny import FAMILIES, build_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_matches_its_own_state(family: str) -> None:
    model = build_model(family)
    names = state_names(model)
    assert match_names(model, names) == {name: name for name in names}
    assert names == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in shared_names(model)
    }


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
def test_a_tied_head_has_one_name_and_may_be_stored_under_either(family: str) -> None:
    model = build_model(family, tie_word_embeddings=True)
    (second, first), *others = shared_names(model).items()
    assert second == "lm_head.weight" and first in state_names(model) and second not in state_names(model)
    assert not others
    names = set(state_names(model))
    assert match_names(model, names | {second})[first] == first  # both, as old files do
    assert match_names(model, names - {first} | {second})[first] == second


def test_the_base_models_prefix_may_be_there_or_not() -> None:
    model = build_model("gpt2")
    names = set(state_names(model))
    bare = {name.removeprefix("transformer.") for name in names}
    assert match_names(model, bare) == {name: name.removeprefix("transformer.") for name in names}
    llama = build_model("llama")
    prefixed = {name if name.startswith("model.") else f"model.{name}" for name in state_names(llama)}
    assert match_names(llama, prefixed)["lm_head.weight"] == "model.lm_head.weight"


def test_the_head_of_gpt_neox_goes_by_its_old_name() -> None:
    model = build_model("gpt_neox")
    names = set(state_names(model))
    assert match_names(model, names - {"lm_head.weight"} | {"embed_out.weight"})["lm_head.weight"] == "embed_out.weight"


@pytest.mark.parametrize(
    ("family", "constant"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
    ],
)
def test_constants_of_old_files_are_ignored(family: str, constant: str) -> None:
    model = build_model(family)
    assert constant not in match_names(model, [*state_names(model), constant]).values()


def test_real_biases_are_not_taken_for_constants() -> None:
    model = build_model("qwen2")
    names = [name for name in state_names(model) if not name.endswith("q_proj.bias")]
    with pytest.raises(BitwrightError) as caught:
        match_names(model, names)
    assert caught.value.code == "BW303" and "2 tensors" in caught.value.what and "q_proj.bias" in caught.value.what


def test_missing_and_surplus_tensors_are_listed_five_at_most() -> None:
    model = build_model("llama")
    names = set(state_names(model))
    gone = {name for name in names if ".0." in name}
    with pytest.raises(BitwrightError) as caught:
        match_names(model, names - gone)
    assert caught.value.code == "BW303" and f"{len(gone)} tensors are missing" in caught.value.what
    assert caught.value.what.count("model.layers.0") == 5 and "..." in caught.value.what
    with pytest.raises(BitwrightError) as caught:
        match_names(model, names | {f"extra.{number}" for number in range(7)})
    assert "7 tensors" in caught.value.what and "extra.0" in caught.value.what
    with pytest.raises(BitwrightError):
        match_names(model, ())


def test_buffers_count_if_they_are_saved() -> None:
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(3))
    model.register_buffer("computed", torch.zeros(3), persistent=False)
    assert state_names(model) == {"kept": (3,)} and match_names(model, ["kept"]) == {"kept": "kept"}
