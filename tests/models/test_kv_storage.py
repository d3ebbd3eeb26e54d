"""What a layer stores: the same, bit for bit, however tokens come; in groups of every size; of a single shared head."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, FalconConfig, FalconForCausalLM, T5Config

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import StaticParameters
from bitwright.core.kv_scheme import NAMED_KV, kv_bytes, parse_kv
from bitwright.models.kv_attention import mix
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_packed import PackedTensor
from bitwright.models.kv_storage import SIDES, LayerStore
from tests.models.architectures import build, sample_ids

TOKENS = 1300
# Groups that do not divide the length of a block, longer ones, and groups of keys and values that differ.
ODD_GROUPS = (
    "int4-channel48",
    "int2-channel600",
    "k(int4-channel32)v(int4-channel48)",
    "k(int8)v(int4-channel24)",
    "int4-channel7-w5-s3",
)


def filled(scheme: str, numbers: Tensor, cuts: tuple[int, ...]) -> LayerStore:
    """A store that was given ``numbers`` in pieces of ``cuts`` tokens, the last of what is left."""
    parsed, fixed = parse_kv(scheme), StaticParameters(torch.full((1,), 0.03), torch.full((1,), 0.1))
    store = LayerStore(parsed, {side: fixed for side in SIDES if parsed.is_static})
    pieces = torch.split(numbers, [*cuts, numbers.shape[2] - sum(cuts)], dim=2)
    for piece in pieces:
        store.append(piece, piece.flip(-1))
    return store


def parts_of(store: LayerStore) -> list[Tensor]:
    coded = [
        part for side in SIDES for block in store.runs[side].blocks for part in (block.codes, block.scale, block.low)
    ]
    plain = [tensor for kept in (store.sinks, store.recent) for tensor in kept.values()]
    return [part for part in (*coded, *plain) if part is not None]


@pytest.mark.parametrize("scheme", [*(name for name in NAMED_KV if "static-head" not in name), *ODD_GROUPS])
@pytest.mark.parametrize("cuts", [(1, 1, 1), (500, 13), (31, 1, 600, 3)])
def test_codes_are_the_same_however_tokens_come(scheme: str, cuts: tuple[int, ...]) -> None:
    numbers = torch.randn(1, 2, TOKENS, 64, generator=torch.Generator().manual_seed(0))
    whole, cut = (parts_of(filled(scheme, numbers, pieces)) for pieces in ((), cuts))
    assert len(whole) == len(cut)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


@pytest.mark.parametrize("scheme", [*NAMED_KV, "int2-rotated", "int4-sym-g32", "fp8-rotated-w40-s3", "none/1:int2"])
@pytest.mark.parametrize(("width", "tokens"), [(64, 3), (64, 200), (96, 1023)])
def test_the_planner_agrees_to_the_byte(scheme: str, width: int, tokens: int) -> None:
    parsed, total = parse_kv(scheme), 0
    for layer in range(2):
        own = parsed.at(layer)
        fixed = {
            side: StaticParameters(torch.ones(heads), torch.zeros(heads))
            for side, code in (("key", own.key), ("value", own.value))
            if code.is_static
            for heads in (3 if code.grain == "static_head" else 1,)
        }
        store = LayerStore(own, fixed)  # type: ignore[arg-type]
        numbers = torch.zeros(2, 3, tokens, width, dtype=torch.bfloat16)
        store.append(numbers, numbers)
        total += store.nbytes
    assert total == kv_bytes(parsed, layers=2, kv_heads=3, head_dim=width, tokens=tokens, batch=2)


@pytest.mark.parametrize("config", [T5Config(), BartConfig()])
def test_models_of_encoder_and_decoder_are_refused_by_name(config: Any) -> None:
    with pytest.raises(ArgumentError, match="an encoder and a decoder"):
        QuantizedCache(config, "int8")


@pytest.mark.parametrize("scheme", ODD_GROUPS)
def test_groups_of_every_size_are_whole_in_their_blocks(scheme: str) -> None:
    numbers = torch.randn(1, 2, TOKENS, 64, generator=torch.Generator().manual_seed(1))
    store = filled(scheme, numbers, (700, 1))
    last = numbers[:, :, -1:]
    view = store.append(last, last.flip(-1))
    given = torch.cat([numbers, last], dim=2)
    for side, expected in (("key", given), ("value", given.flip(-1))):
        found = view.whole(side)  # type: ignore[arg-type]
        step = 2 * 4.5 / store.codes[side].code_max  # type: ignore[index]
        assert float((found - expected).abs().max()) <= step / 2 * 1.01
    planned = kv_bytes(store.scheme, layers=1, kv_heads=2, head_dim=64, tokens=TOKENS + 1, float_bytes=4)
    assert store.nbytes == planned
    store.remove(1)
    assert store.length == TOKENS


@pytest.mark.parametrize(
    ("name", "path", "pads"),
    [
        ("mistral", "eager", slice(0, 5)),
        ("mistral", "sdpa", slice(0, 5)),
        ("mistral", "sdpa", slice(40, 60)),
        ("llama", "sdpa", slice(40, 60)),
        ("llama", "sdpa", slice(70, 80)),
    ],
)
@pytest.mark.parametrize("scheme", ["int2", "k(int4-channel4)v(int8)"])
def test_padding_is_refused_wherever_it_is(name: str, path: str, pads: slice, scheme: str) -> None:
    """In layers with a window, too, where the newest token does not see the first in any case."""
    model = build(name)
    model.set_attn_implementation(path)
    ids, mask = sample_ids(2, 80), torch.ones(2, 80, dtype=torch.int64)
    mask[1, pads] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with pytest.raises(ArgumentError, match="padded"), torch.no_grad():
        model(input_ids=ids, past_key_values=QuantizedCache(model, scheme), attention_mask=mask, position_ids=places)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=QuantizedCache(model, scheme), attention_mask=torch.ones_like(mask))


@pytest.mark.parametrize("queries", [1, 200])
def test_weights_that_vanish_in_half_precision_are_no_padding(queries: int) -> None:
    numbers = torch.randn(1, 2, 200, 64, dtype=torch.float16)
    store = LayerStore(parse_kv("int2"), {})
    store.append(numbers[:, :, : 200 - queries], numbers[:, :, : 200 - queries])
    view = store.append(numbers[:, :, 200 - queries :], numbers[:, :, 200 - queries :])
    sums = torch.randn(1, 4, 200, 200).masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
    sums[:, :, 1:, 0] -= 25
    weights = sums.softmax(-1).half()[:, :, 200 - queries :]
    assert not weights[..., -1, 0].any()
    assert mix(view, weights, 2).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_is_refused_in_half_precision(name: str) -> None:
    model = build(name, dtype=torch.float16)
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :5] = 0
    for seen in (mask, torch.ones_like(mask)):
        with nullcontext() if seen.all() else pytest.raises(ArgumentError, match="padded"), torch.no_grad():
            cache = QuantizedCache(model, "int2")
            model(input_ids=sample_ids(2, 80), past_key_values=cache, attention_mask=seen)


@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_a_single_head_that_all_queries_share_stays_packed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True, alibi=False
    )
    torch.manual_seed(0)
    model: Any = FalconForCausalLM(config)
    model.eval()
    model.set_attn_implementation(path)
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for cache in (None, QuantizedCache(model, "int8")):
        if cache is not None:
            monkeypatch.setattr(PackedTensor, "unpack", lambda packed: pytest.fail("the whole cache was made float"))
        with torch.no_grad():
            first = model(input_ids=ids[:, :19], past_key_values=cache, use_cache=True)
            found.append(model(input_ids=ids[:, 19:], past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=0)
