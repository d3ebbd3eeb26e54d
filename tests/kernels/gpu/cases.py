"""Launches of every kind, at the sizes of real layers: what is compiled ahead of time for each generation of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from bitwright.core.kv_scheme import parse_kv
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import attention, fp8, gates, integer, linear, tokens

__all__ = ["CASES", "fitting"]

OUT, IN = 512, 2048


def a16(scheme: str, rows: int, dtype: torch.dtype = torch.float16, *, expanded: bool = False) -> Callable[[], None]:
    def work() -> None:
        layer = parse(scheme)
        weight = linear.pack(QuantizedTensor.quantize(torch.randn(OUT, IN), layer.weight), layer)
        if expanded:
            linear.expand(weight, 0, OUT, dtype)
        else:
            linear.multiply(torch.zeros(rows, IN, dtype=dtype), weight)

    return work


def a8(scheme: str, rows: int, dtype: torch.dtype = torch.float16, *, dense: bool = False) -> Callable[[], None]:
    """``dense``: around the vendor's product, as on every GPU from some hundred rows on, and always on Turing."""

    def work() -> None:
        layer = parse(scheme)
        weight = integer.pack(QuantizedTensor.quantize(torch.randn(OUT, IN), layer.weight), layer)
        with patch.object(integer, "_is_dense", lambda *_: dense):
            integer.run(torch.zeros(rows, IN, dtype=dtype), weight, torch.zeros(OUT, dtype=dtype))

    return work


def cached(name: str, new: int, length: int, dtype: torch.dtype = torch.float16, *, head: int = 128,
           few: bool = False) -> Callable[[], None]:  # fmt: skip
    """Append ``new`` tokens to two sequences and attend, heads as those of Llama-3-8B but for their size; ``few``: in
    blocks of few queries, as before Ampere and where results must not depend on the batch."""

    def work() -> None:
        code = parse_kv(name).key
        data = torch.zeros(
            8, 8, 32, head if code.is_float else head * code.bits // 8, dtype=dtype if code.is_float else torch.uint8
        )
        side = attention.stored_side(code, data, torch.zeros(8, 8, 32, 2 - code.symmetric))
        blocks, rows = attention.arrange([0, new, 2 * new], 4, few=few)
        numbers = (torch.tensor(each, dtype=torch.int32) for each in (blocks, [0, new, 2 * new], [length, length]))
        batch = attention.AttentionBatch(*numbers, torch.zeros(2, 8, dtype=torch.int32), rows, length)
        fresh, place = torch.zeros(2 * new, 8, head, dtype=dtype), torch.zeros(2 * new, dtype=torch.int32)
        turns = (torch.zeros(2 * new, head // 2), torch.zeros(2 * new, head // 2))
        attention.append(fresh, fresh, place, place, side, side, turns)
        attention.attend(attention.turn(torch.zeros(2 * new, 32, head, dtype=dtype), turns), side, side, batch)

    return work


def gated(dtype: torch.dtype) -> Callable[[], None]:
    def work() -> None:
        gates.silu_multiply(*torch.zeros(2, 2 * IN, dtype=dtype).chunk(2, dim=-1))

    return work


def normed(columns: int, dtype: torch.dtype = torch.float16) -> Callable[[], None]:
    def work() -> None:
        x, weight = torch.zeros(2, columns, dtype=dtype), torch.zeros(columns, dtype=dtype)
        tokens.rms_norm(x, weight, 1e-5, x)
        tokens.norm_tokens(
            x, weight, 1e-5, tokens.TokenLayout(slots=columns, present=columns, group=128, groups=columns // 128)
        )

    return work


def fp8_product(scheme: str, rows: int) -> Callable[[], None]:
    def work() -> None:
        layer = parse(scheme)
        weight = fp8.pack(QuantizedTensor.quantize(torch.randn(OUT, IN), layer.weight), layer)
        fp8.run(torch.zeros(rows, IN, dtype=torch.bfloat16), weight)

    return work


CASES: dict[str, Callable[[], None]] = {
    "w4g128 rows 1": a16("w4g128", 1),
    "w4g128 bf16 rows 1": a16("w4g128", 1, torch.bfloat16),
    "w4g128 bf16 rows 64": a16("w4g128", 64, torch.bfloat16),
    "w4g128 rows 200": a16("w4g128", 200),
    "w4g32-asym rows 1": a16("w4g32-asym", 1),
    "A16W4 rows 4": a16("A16W4", 4),
    "A16W8 rows 1": a16("A16W8", 1),
    "w8 bf16 rows 1": a16("w8", 1, torch.bfloat16),
    "w3g64 rows 1": a16("w3g64", 1),
    "w2g64 rows 1": a16("w2g64", 1),
    "nf4g64 rows 1": a16("nf4g64", 1),
    "w4g128 float32 rows 1": a16("w4g128", 1, torch.float32),
    "w4g128 expanded": a16("w4g128", 1, expanded=True),
    "fp8 expanded": a16("fp8", 1, torch.float16, expanded=True),
    "w4g128 bf16 rows 16": a16("w4g128", 16, torch.bfloat16),
    "w4g128 bf16 rows 200": a16("w4g128", 200, torch.bfloat16),
    "w4g128 bf16 expanded": a16("w4g128", 1, torch.bfloat16, expanded=True),
    "w8 bf16 rows 64": a16("w8", 64, torch.bfloat16),
    "w8 bf16 rows 200": a16("w8", 200, torch.bfloat16),
    "w3g64 bf16 rows 64": a16("w3g64", 64, torch.bfloat16),
    "w3g64 bf16 rows 200": a16("w3g64", 200, torch.bfloat16),
    "w2g64 bf16 rows 64": a16("w2g64", 64, torch.bfloat16),
    "w2g64 bf16 rows 200": a16("w2g64", 200, torch.bfloat16),
    "w7g64 bf16 rows 64": a16("w7g64", 64, torch.bfloat16),
    "w3g64 bf16 rows 1": a16("w3g64", 1, torch.bfloat16),
    "nf4g64 bf16 rows 1": a16("nf4g64", 1, torch.bfloat16),
    "fp8 bf16 rows 16": a16("fp8", 16, torch.bfloat16),
    "w8a8 rows 1": a8("w8a8", 1),
    "w8a8 rows 300": a8("w8a8", 300),
    "w4g128-a8 rows 1": a8("w4g128-a8", 1),
    "A8W4 rows 300": a8("A8W4", 300),
    "w4g32-asym-a8 rows 64": a8("w4g32-asym-a8", 64, torch.bfloat16),
    "w4g32-asym-a8 rows 300": a8("w4g32-asym-a8", 300, torch.bfloat16),
    "w4g128-a8 rows 300": a8("w4g128-a8", 300),
    "w8g64-a8 rows 300": a8("w8g64-a8", 300),
    "w8a8 dense": a8("w8a8", 300, dense=True),
    "w8a8 bf16 dense": a8("w8a8", 300, torch.bfloat16, dense=True),
    "w8-asym-a8 float32 dense": a8("w8-asym-a8", 300, torch.float32, dense=True),
    "fp8 product, 8 bits": fp8_product("fp8-afp8", 300),
    "fp8 product, 4 bits": fp8_product("w4g128-asym-afp8", 1),
    "norm": normed(4096),
    "norm bf16": normed(14336, torch.bfloat16),
    "gates": gated(torch.float16),
    "gates bf16": gated(torch.bfloat16),
    "float decode": cached("none", 1, 4096),
    "float bf16 prompt": cached("none", 100, 4096, torch.bfloat16),
    "int8 decode": cached("int8", 1, 4096),
    "int8 prompt": cached("int8", 100, 4096),
    "int4 decode": cached("int4", 1, 4096, torch.bfloat16),
    "int4 prompt": cached("int4", 100, 4096),
    "int4-rotated decode": cached("int4-rotated", 1, 4096, torch.bfloat16),
    "fp8 decode": cached("fp8", 1, 4096),
    "float bf16 decode": cached("none", 1, 4096, torch.bfloat16),
    "int8 bf16 decode": cached("int8", 1, 4096, torch.bfloat16),
    "int8 bf16 prompt": cached("int8", 100, 4096, torch.bfloat16),
    "int4 bf16 prompt": cached("int4", 100, 4096, torch.bfloat16),
    "fp8 bf16 decode": cached("fp8", 1, 4096, torch.bfloat16),
    "fp8 bf16 prompt": cached("fp8", 100, 4096, torch.bfloat16),
    "float prompt, few": cached("none", 100, 4096, few=True),
    "float float32 decode": cached("none", 1, 4096, torch.float32),
    "float float32 prompt, few": cached("none", 100, 4096, torch.float32, few=True),
    "int4 float32 decode": cached("int4", 1, 4096, torch.float32),
    "int8 float32 prompt, few": cached("int8", 100, 4096, torch.float32, few=True),
    "float bf16 prompt, heads of 256": cached("none", 100, 4096, torch.bfloat16, head=256),
    "float decode, heads of 256": cached("none", 1, 4096, head=256),
    "int8 decode, heads of 256": cached("int8", 1, 4096, head=256),
    "float prompt, few, heads of 256": cached("none", 100, 4096, head=256, few=True),
    "int8 bf16 prompt, heads of 64": cached("int8", 100, 4096, torch.bfloat16, head=64),
    "int4 bf16 decode, heads of 96": cached("int4", 1, 4096, torch.bfloat16, head=96),
}
# Before Ampere: no bfloat16, no matrix units in Triton, so few rows at a time and small blocks; and of 8-bit
# activations the vendor's product alone, around which only tokens are quantized.
OLD = ("w4g128 rows 1", "A16W8 rows 1", "w3g64 rows 1", "nf4g64 rows 1", "w4g128 expanded", "fp8 expanded", "norm",
       "float decode", "int8 decode", "fp8 decode", "gates", "float prompt, few", "float float32 decode",
       "float float32 prompt, few", "int4 float32 decode", "float decode, heads of 256", "int8 decode, heads of 256",
       "float prompt, few, heads of 256", "w4g128 float32 rows 1")  # fmt: skip
TURING = ("w8a8 dense", "w8a8 bf16 dense")  # whose models may have bfloat16, though it has none


def fitting(generation: int) -> list[str]:
    """The cases that a generation can run."""
    if generation < 80:
        return [*OLD, *TURING] if generation == 75 else list(OLD)
    return list(CASES) if generation >= 89 else [name for name in CASES if not name.startswith("fp8 product")]
