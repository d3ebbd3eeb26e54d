"""Before keys and values are stored in 4 bits or less: do few bits tell this model's tokens apart?

A short text is run once, and the keys and values of each layer are coded and read again. What that costs is measured
beside what tells tokens apart, their distance from the mean token: an offset that all share, as large biases of key
projections make, widens every step of the codes and carries nothing. Numbers that lie normally lose a known share so; a
head that loses ten times as much is unsafe.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.kv_codes import decode_kv, encode_kv, refuse_head
from bitwright.core.kv_scheme import KVCode, KVScheme
from bitwright.models.decoder import Decoder, Step
from bitwright.models.embedded_model import read_text
from bitwright.models.kv_storage import SIDES, Side
from bitwright.models.paged_cache import PAGE

if TYPE_CHECKING:
    from bitwright.models.hf import Tokenizer

__all__ = [
    "SAFETY", "KVSafety", "Unsafe", "check_safety", "has_few_bits", "judge", "observe_decoder",
    "safe_for_decoder", "sample_tokens", "settle",
]  # fmt: skip

SAFETY = ("warn", "widen", "off")
SAMPLE = 3 * PAGE  # tokens of the text
TEXT = 2000  # characters that hold so many
FEW_BITS = 4
LIMIT = 10.0  # times what numbers lose that lie normally
WIDE = (KVCode(bits=8), KVCode(bits=8, rotated=True))


@dataclass(frozen=True, slots=True)
class Unsafe:
    """Keys or values of one layer that few bits would spoil: by how many times more than usual, and why."""

    layer: int
    side: Side
    times: float
    offset: float
    spread: float

    def __str__(self) -> str:
        if self.offset > 4 * self.spread:
            return f"{self.side}s share an offset of norm {self.offset:.0f} and differ by {self.spread:.2g}"
        return f"{self.side}s have outliers, and lose {self.times:.0f} times what is usual"


@dataclass(frozen=True, slots=True)
class KVSafety:
    """What a scheme would do to a model, and the scheme that is recommended: 8-bit codes where few bits are unsafe."""

    asked: KVScheme
    unsafe: tuple[Unsafe, ...]
    recommended: KVScheme

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({each.layer for each in self.unsafe}))


def check_safety(safety: str) -> None:
    """Raises BW201 unless it is one of ``SAFETY``."""
    if safety not in SAFETY:
        raise ArgumentError("BW201", f"kv_safety is {safety!r}", suggestion=f"accepted: {', '.join(SAFETY)}")


def has_few_bits(scheme: KVScheme) -> bool:
    """Whether some layer stores keys or values in 4 bits or less."""
    codes = [code for each in (scheme, *scheme.overrides.values()) for code in (each.key, each.value)]
    return any(code.bits <= FEW_BITS for code in codes)


def sample_tokens(vocabulary: int, context: int | None, tokenizer: Tokenizer | None) -> list[int]:
    """The text, as a model's tokenizer reads it; without one, tokens spread over the vocabulary."""
    count, tokens = min(SAMPLE, context or SAMPLE), []
    if tokenizer is not None:
        tokens = tokenizer(read_text("calibration")[:TEXT], add_special_tokens=False)["input_ids"][:count]
    if len(tokens) < count or max(tokens) >= vocabulary:
        return [(17 + 7919 * place) % vocabulary for place in range(count)]
    return list(tokens)


def observe_decoder(decoder: Decoder, tokens: Sequence[int]) -> dict[Side, list[Tensor]]:
    """Keys and values of every layer, float32 ``[kv_heads, tokens, head_dim]``, as a decoder makes them."""
    cache, count = decoder.new_cache(-(-len(tokens) // PAGE)), len(tokens)
    step = Step(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.arange(count, dtype=torch.int32),
        starts=torch.tensor([0, count], dtype=torch.int32),
        lengths=torch.tensor([count], dtype=torch.int32),
        pages=torch.arange(cache.page_count, dtype=torch.int32)[None],
        outputs=torch.tensor([count - 1], dtype=torch.int32),
    )
    decoder.forward(step, cache)
    found: dict[Side, list[Tensor]] = {"key": [], "value": []}
    for side, places in (("key", cache.keys), ("value", cache.values)):
        for pages in places:
            found[side].append(pages.to("cpu", torch.float32).transpose(0, 1).flatten(1, 2)[:, :count])  # type: ignore[index]
    return found


def safe_for_decoder(decoder: Decoder, scheme: KVScheme, safety: str, tokenizer: Tokenizer | None) -> KVScheme:
    """``scheme``, or with ``widen`` one of more bits in the layers where few are unsafe, which a notice names."""
    if safety == "off" or not has_few_bits(scheme):
        return scheme
    tokens = sample_tokens(decoder.shape.vocabulary, decoder.shape.positions, tokenizer)
    return settle(judge(observe_decoder(decoder, tokens), scheme), safety)


def judge(observed: Mapping[Side, Sequence[Tensor]], scheme: KVScheme) -> KVSafety:
    """Which layers ``scheme`` is unsafe in, from their keys and values (float32 ``[heads, tokens, head_dim]``)."""
    unsafe: list[Unsafe] = []
    overrides = dict(scheme.overrides)
    for layer in range(len(observed["key"])):
        own = scheme.at(layer)
        codes: dict[Side, KVCode] = {"key": own.key, "value": own.value}
        found = [_judge_side(layer, side, observed[side][layer], codes[side]) for side in SIDES]
        unsafe += [each for each in found if each is not None]
        if any(found):
            # Values are never stored wider than keys, which need more bits and which some kernels expect so.
            key = _widest(observed["key"][layer], own.key)
            value = _widest(observed["value"][layer], own.value) if found[1] else own.value
            overrides[layer] = replace(own, key=key, value=value, overrides={})
    return KVSafety(scheme, tuple(unsafe), replace(scheme, overrides=overrides) if unsafe else scheme)


def settle(found: KVSafety, safety: str) -> KVScheme:
    """The scheme to serve with; layers that are unsafe are named in a notice, whether they are widened or not."""
    if not found.unsafe or safety == "off":
        return found.asked
    told = "; ".join(f"layer {each.layer}: {each}" for each in found.unsafe[:5])
    more = f"; and {len(found.unsafe) - 5} more" if len(found.unsafe) > 5 else ""
    name = found.recommended.name
    if safety == "widen":
        warnings.warn(Notice(f"{name} is used in place of {found.asked.name} ({told}{more})"), stacklevel=4)
        return found.recommended
    advice = f"use {name}, which kv_safety='widen' (--kv-safety widen) takes by itself; bitwright calibrate --check"
    what = f"{found.asked.name} is unsafe for this model ({told}{more})"
    warnings.warn(Notice(f"{what}: {advice} tells more"), stacklevel=4)
    return found.asked


def _judge_side(layer: int, side: Side, x: Tensor, code: KVCode) -> Unsafe | None:
    if code.bits > FEW_BITS or code.is_static or not _can_be_coded(x, code):
        return None
    lost, usual = _lost(x, code), _usual(x, code)
    if lost <= LIMIT * usual:
        return None
    mean = x.double().mean(1)
    spread = (x.double() - mean[:, None]).square().sum((0, 2)).mean().sqrt()
    return Unsafe(layer, side, lost / usual, float(mean.norm()), float(spread))


def _can_be_coded(x: Tensor, code: KVCode) -> bool:
    is_whole = code.grain != "channel" or x.shape[1] % code.group == 0
    return is_whole and x.shape[1] > 1 and refuse_head(code, x.shape[2]) is None


def _lost(x: Tensor, code: KVCode) -> float:
    """The squared error of the worst head, beside its squared distance from the mean token."""
    coded = encode_kv(x[None], code)
    error = (decode_kv(coded, code, x.shape[2])[0].double() - x).square().sum((1, 2))
    spread = (x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2))
    return float((error / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _usual(x: Tensor, code: KVCode) -> float:
    """What numbers that lie normally lose, in the mean head."""
    drawn = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
    return _lost(drawn[None], code)


def _widest(x: Tensor, code: KVCode) -> KVCode:
    """The 8-bit code that loses least."""
    wide = [each for each in WIDE if code.bits <= FEW_BITS and refuse_head(each, x.shape[2]) is None]
    return min(wide, key=lambda each: _lost(x, each), default=code)
