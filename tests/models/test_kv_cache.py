"""The quantized cache inside models of transformers: every family, every attention path, every change of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import kv_bytes, parse_kv
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_packed import PackedTensor
from tests.models.architectures import ARCHITECTURES, build, sample_ids

SCHEMES = (
    "int8",
    "int4-rotated",
    "k8v4",
    "fp8",
    "int8-sym",
    "k(int2-channel4)v(int2-g8)-w8-s2",
    "k(int4-channel4)v(int8)",
    "k(float)v(int8)",
)


class RoundedCache(DynamicCache):
    """The cache of transformers with every token's keys and values rounded to 8 bits, restated in float64."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def rounded(x: Tensor) -> Tensor:
    low, high = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True)
    scale = (high - low) / 255
    return (((x.double() - low) / scale).round() * scale + low).to(x.dtype)


def logits(model: Any, ids: Tensor, cache: Any, *, cuts: tuple[int, ...] = (), **more: Any) -> Tensor:
    """Logits of all positions, the ids fed in pieces that end at ``cuts``."""
    found, start = [], 0
    with torch.no_grad():
        for end in (*cuts, ids.shape[1]):
            output = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **more)
            found.append(output.logits)
            start = end
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mixture"])
@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_every_family_computes_with_the_rounded_numbers(name: str, path: str) -> None:
    if (name, path) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such path")
    model = build(name)
    model.set_attn_implementation(path)
    ids = sample_ids(2, 24)
    cache = QuantizedCache(model, "int8")
    expected = logits(model, ids, RoundedCache(config=model.config), cuts=(9, 10))
    found = logits(model, ids, cache, cuts=(9, 10))
    assert cache.get_seq_length() == 24
    # Where float32 and float64 round a tie to different codes, a number moves by a step, and a row of logits with it.
    apart = (found - expected).abs()
    assert float(apart.quantile(0.8)) < 2e-3
    assert float(apart.max()) < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eager_and_sdpa_agree(scheme: str) -> None:
    ids = sample_ids(2, 30)
    found = []
    for path in ("eager", "sdpa"):
        model = build("qwen2")
        model.set_attn_implementation(path)
        found.append(logits(model, ids, QuantizedCache(model, scheme), cuts=(17, 18, 19)))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_how_a_prompt_is_cut_changes_nothing(scheme: str, path: str) -> None:
    model = build("llama")
    model.set_attn_implementation(path)
    ids = sample_ids(1, 40)
    whole = logits(model, ids, QuantizedCache(model, scheme))
    for cuts in ((1, 2, 3), (11, 30), tuple(range(1, 40))):
        torch.testing.assert_close(
            logits(model, ids, QuantizedCache(model, scheme), cuts=cuts), whole, atol=2e-2, rtol=0
        )


def test_other_attention_functions_get_ordinary_tensors() -> None:
    model = build("llama")
    keys, values = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    packed, _ = QuantizedCache(model, "int8").update(keys, values, 0)
    assert isinstance(packed, PackedTensor)
    assert packed.shape == keys.shape
    assert packed.dtype == keys.dtype
    assert "int8" in repr(packed)
    for change in (lambda x: x * 2, lambda x: x.transpose(1, 2), lambda x: torch.cat([x, x]), lambda x: x[:, :1]):
        changed = change(packed)
        assert type(changed) is Tensor
        torch.testing.assert_close(changed, change(keys), atol=0.05, rtol=0)


def padded() -> tuple[Tensor, dict[str, Tensor]]:
    ids = sample_ids(2, 12)
    ids[1, :5] = 0
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("path", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", ["int2", "int8-w8", "int8-w8-s2", "k(int4-channel4)v(int8)"])
def test_padding_is_refused_where_places_count(scheme: str, path: str) -> None:
    model = build("llama")
    model.set_attn_implementation(path)
    ids, more = padded()
    with pytest.raises(ArgumentError, match="padded on the left"):
        logits(model, ids, QuantizedCache(model, scheme), **more)
    cache = QuantizedCache(model, scheme)
    logits(model, ids, cache, cuts=(5, 6))
    logits(model, sample_ids(2, 1), cache)


@pytest.mark.parametrize("scheme", ["int8", "int4-rotated", "k8v4-rotated"])
def test_padding_on_the_left_changes_no_code(scheme: str) -> None:
    """E17. The short row is compared with what it is alone."""
    model = build("llama")
    ids, more = padded()
    alone, together = QuantizedCache(model, scheme), QuantizedCache(model, scheme)
    expected = logits(model, ids[1:, 5:], alone)
    found = logits(model, ids, together, **more)
    torch.testing.assert_close(found[1:, 5:], expected, atol=1e-3, rtol=0)
    for side in ("key", "value"):
        one, other = (cache.layers[0].store.runs[side].blocks[0] for cache in (alone, together))
        assert torch.equal(one.codes[0], other.codes[1, :, 5:])
        assert torch.equal(one.scale[0], other.scale[1, :, 5:])
        assert torch.equal(one.low[0], other.low[1, :, 5:])


def test_the_thousandth_token_leaves_the_first_as_it_was() -> None:
    """E20."""
    cache = QuantizedCache(build("llama"), "int4-rotated")
    first = None
    for _ in range(1000):
        keys, _values = cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
        first = keys[:, :, :1].clone() if first is None else first
    assert cache.get_seq_length() == 1000
    assert torch.equal(keys[:, :, :1], first)


@pytest.mark.parametrize("scheme", ["none", *SCHEMES, "int8/1:int4"])
@pytest.mark.parametrize("tokens", [1, 511, 513, 1300])
def test_a_cache_takes_what_the_planner_says(scheme: str, tokens: int) -> None:
    model = build("llama")
    cache = QuantizedCache(model, scheme)
    for layer in range(2):
        cache.update(torch.randn(3, 2, tokens, 16), torch.randn(3, 2, tokens, 16), layer)
    expected = kv_bytes(parse_kv(scheme), layers=2, kv_heads=2, head_dim=16, tokens=tokens, batch=3, float_bytes=4)
    assert cache.nbytes == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sequences_are_chosen_repeated_and_reordered_packed(scheme: str) -> None:
    model = build("llama")
    ids = sample_ids(3, 30)
    cache = QuantizedCache(model, scheme)
    logits(model, ids, cache)
    before = cache.nbytes
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert cache.nbytes == before * 2 // 3
    chosen = ids[[2, 0]]
    other = QuantizedCache(model, scheme)
    logits(model, chosen, other)
    following = sample_ids(2, 3, seed=5)
    torch.testing.assert_close(logits(model, following, cache), logits(model, following, other), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4-rotated", "int8-w8-s2"])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(scheme: str) -> None:
    model = build("llama")
    ids = sample_ids(1, 40)
    cache = QuantizedCache(model, scheme)
    logits(model, ids, cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 37
    straight = QuantizedCache(model, scheme)
    logits(model, ids[:, :37], straight)
    new = sample_ids(1, 2, seed=3)
    tolerance = 1e-3 if scheme != "int8-w8-s2" else 0.1  # tokens that were coded stay so
    torch.testing.assert_close(logits(model, new, cache), logits(model, new, straight), atol=tolerance, rtol=0)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    cache.reset()
    assert cache.nbytes == 0


def test_a_group_with_one_scale_is_not_cut() -> None:
    cache = QuantizedCache(build("llama"), "k(int4-channel4)v(int8)")
    cache.update(torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16), 0)
    with pytest.raises(ArgumentError, match="cropped"):
        cache.layers[0].crop(-3)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_layers_with_a_window_drop_what_no_query_sees(name: str) -> None:
    model = build(name, max_position_embeddings=2048)
    ids = sample_ids(1, 1100)
    cache = QuantizedCache(model, "int8")
    expected = logits(model, ids, RoundedCache(config=model.config), cuts=(700, 1000))
    found = logits(model, ids, cache, cuts=(700, 1000))
    assert cache.get_seq_length() == 1100
    sliding = [layer for layer in cache.layers if layer.is_sliding]
    assert sliding
    assert all(layer.store.dropped >= 512 for layer in sliding)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-3)
    with pytest.raises(ArgumentError, match="sliding window"):
        cache.crop(-1000)


def flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """As flash attention functions take their arguments: tokens before heads, no mask, heads not repeated."""
    key, value = (part.transpose(1, 2).transpose(1, 2).repeat_interleave(2, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
    return (scores.masked_fill(ahead, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


def test_a_flash_path_computes_with_the_rounded_numbers() -> None:
    AttentionInterface.register("tokens_first", flash)
    model, ids = build("llama"), sample_ids(1, 20)
    expected = logits(model, ids, QuantizedCache(model, "int8"), cuts=(12, 13))
    model.set_attn_implementation("tokens_first")
    found = logits(model, ids, QuantizedCache(model, "int8"), cuts=(12, 13))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ImportError, match="FlashAttention2"):  # the package itself runs on GPUs alone
        model.set_attn_implementation("flash_attention_2")


def test_a_static_cache_beside_it_is_refused() -> None:
    model = build("llama")
    settings: dict[str, Any] = {"max_new_tokens": 3, "cache_implementation": "static"}
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(sample_ids(1, 5), past_key_values=QuantizedCache(model, "int8"), **settings)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": False}])
def test_generate_takes_the_cache(more: dict[str, Any]) -> None:
    model = build("qwen2")
    ids = sample_ids(1, 9)
    found = model.generate(
        ids, past_key_values=QuantizedCache(model, "int8"), max_new_tokens=12, pad_token_id=0, **more
    )
    expected = model.generate(ids, max_new_tokens=12, pad_token_id=0, **more)
    assert found.shape == expected.shape
    assert float((found == expected).float().mean()) > 0.8


def test_assisted_generation_crops_the_cache() -> None:
    model = build("qwen2")
    ids = sample_ids(1, 9)
    settings: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    found = model.generate(ids, past_key_values=QuantizedCache(model, "int8"), prompt_lookup_num_tokens=3, **settings)
    expected = model.generate(ids, past_key_values=QuantizedCache(model, "int8"), **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    ids = sample_ids(2, 20)
    found = logits(model, ids, QuantizedCache(model, "int8"))
    assert found.dtype == dtype
    torch.testing.assert_close(found, logits(model, ids, DynamicCache(config=model.config)), atol=1.0, rtol=0.1)


def test_what_cannot_be_is_refused_by_name() -> None:
    model = build("llama")
    with pytest.raises(ArgumentError, match="layers \\[7\\]"):
        QuantizedCache(model, "int8/7:int4")
    with pytest.raises(ArgumentError, match="groups of 5"):
        QuantizedCache(model, "int8-g5").update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    with pytest.raises(BitwrightError) as refused:
        QuantizedCache(model, "int8-static")
    assert refused.value.code == "BW404"
    assert "bitwright calibrate" in refused.value.suggestion
    with pytest.raises(BitwrightError, match="layer 1 makes"):
        QuantizedCache(model, "int8").update(torch.full((1, 2, 1, 16), torch.nan), torch.zeros(1, 2, 1, 16), 1)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ArgumentError, match="linear_attention"):
        QuantizedCache(model, "int8")


def test_no_step_makes_all_keys_float_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", max_position_embeddings=4096)
    cache = QuantizedCache(model, "int8")
    logits(model, sample_ids(1, 2000), cache)
    monkeypatch.setattr(PackedTensor, "unpack", lambda packed: pytest.fail("the whole cache was made float"))
    for path in ("sdpa", "eager"):
        model.set_attn_implementation(path)
        logits(model, sample_ids(1, 1), cache)
        logits(model, sample_ids(1, 3), cache)
