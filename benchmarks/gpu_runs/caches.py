"""Attention on paged caches of every kind, against the same attention on one of bf16."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu_runs.timing import Bench, Section, relative_error
from bitwright.core.kv_codes import Coded, decode_kv, encode_kv
from bitwright.core.kv_scheme import KVCode, parse_kv
from bitwright.kernels.gpu import attention

__all__ = ["HEADS", "HEAD_DIM", "KV_HEADS", "measure_attention", "measure_writing", "random_side"]

PAGE = 32
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def measure_attention(bench: Bench) -> Section:
    """Decoding at long contexts, and one prompt."""
    columns = ("batch", "context", "new", "cache", "us", "speedup", "share of copy", "error", "torch's own us")
    section = bench.begin("attention on a paged cache (heads of llama-3-8b)", columns)
    cases = [(1, 8192, 1), (1, 65536, 1), (8, 32768, 1), (1, 32768, 1), (16, 8192, 1), (1, 16384, 1), (1, 4096, 2048),
             (1, 4096, 4096)]  # fmt: skip
    for batch, length, new in bench.within(section, cases[: bench.size(9, 2)]):
        base = 0.0
        for name in ("none", "int8", "int4", "fp8"):
            with bench.attempt(section, (batch, length, new, name)):
                row = _attend(bench, name, bench.size(batch, 2), bench.size(length, 70), bench.size(new, 1))
                seconds, nbytes, error, own = row
                base = seconds if name == "none" else base
                share = nbytes / seconds / bench.ceilings.get("copy", torch.inf)
                section.add(batch, length, new, name, f"{1e6 * seconds:.1f}", f"{base / seconds:.2f}", f"{share:.0%}",
                            f"{error:.1e}", f"{1e6 * own:.1f}" if own else "")  # fmt: skip
    section.notes.append("wanted at 8k to 64k: int8 at least 1.7 and int4 at least 2.8 times the speed of bf16")
    return section


def random_side(bench: Bench, code: KVCode, pages: int) -> attention.StoredSide:
    """Random keys or values."""
    heads, width = bench.size(KV_HEADS, 1), bench.size(HEAD_DIM, 32)
    if code.is_float:
        numbers = torch.randn(pages, heads, PAGE, width, device=bench.device, dtype=torch.float32).to(bench.dtype)
        return attention.stored_side(code, numbers)
    codes = torch.randint(0, 256, (pages, heads, PAGE, width * code.bits // 8), dtype=torch.uint8, device=bench.device)
    if code.kind == "fp8":
        codes &= 0xF7  # no code that is not a number
    scales = torch.rand(pages, heads, PAGE, 2 - code.symmetric, device=bench.device) * 3 / (1 << code.bits)
    if not code.symmetric:
        scales[..., 1] = -scales[..., 0] * (1 << (code.bits - 1))
    return attention.stored_side(code, codes, scales)


def _attend(bench: Bench, name: str, batch: int, length: int, new: int) -> tuple[float, int, float, float]:
    """Seconds, bytes of the cache, error of one sequence, and seconds of torch's attention where it is dense."""
    code, device = parse_kv(name).key, bench.device
    most = -(-length // PAGE)
    heads, width = bench.size(HEADS, 2), bench.size(HEAD_DIM, 32)
    group = heads // bench.size(KV_HEADS, 1)
    table = torch.randperm(batch * most, device=device).view(batch, most).to(torch.int32)
    starts = list(range(0, (batch + 1) * new, new))
    blocks, rows = attention.arrange(starts, group)
    numbers = [torch.tensor(each, dtype=torch.int32, device=device) for each in (blocks, starts, [length] * batch)]
    setup = attention.AttentionBatch(*numbers, table, rows, length)
    q = torch.randn(batch * new, heads, width, device=device).to(bench.dtype)
    keys, values = (random_side(bench, code, batch * most) for _ in range(2))
    nbytes = sum(tensor.nbytes for side in (keys, values) for tensor in {side.data, side.scales})
    found = attention.attend(q, keys, values, setup)
    error = relative_error(found[-1], _exact(q[-1], keys, values, code, table[-1].long(), length))
    more = min(8, bench.copies(nbytes)) - 1
    sides = [
        (keys, values),
        *((random_side(bench, code, batch * most), random_side(bench, code, batch * most)) for _ in range(more)),
    ]
    seconds = bench.seconds([partial(attention.attend, q, k, v, setup) for k, v in sides])
    return seconds, nbytes, error, _torch_seconds(bench, q, batch, new, length) if code.is_float else 0.0


def _exact(q: Tensor, keys: attention.StoredSide, values: attention.StoredSide, code: KVCode, pages: Tensor,
           length: int) -> Tensor:  # fmt: skip
    """Attention of the last query on its whole context, float64."""
    group = q.shape[0] // keys.data.shape[1]
    k, v = (_numbers(side, code, pages, q.shape[-1])[:, :length].repeat_interleave(group, 0) for side in (keys, values))
    weights = (torch.einsum("hd,hld->hl", q.double(), k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hl,hld->hd", weights, v)


def _torch_seconds(bench: Bench, q: Tensor, batch: int, new: int, length: int) -> float:
    """torch's attention on contiguous keys and values of the dtype of ``q``."""
    kv_heads, width = bench.size(KV_HEADS, 1), q.shape[-1]
    wide = q.view(batch, new, -1, width).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, length, width, device=q.device).to(q.dtype) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return bench.seconds([lambda: attend(wide, k, v, is_causal=new == length, enable_gqa=True)])


def measure_writing(bench: Bench) -> Section:
    """New keys and values, turned, coded and written, against copying them."""
    section = bench.begin("writing into the cache", ("tokens", "cache", "us", "copy us", "error", "least error"))
    kv_heads, width, device = bench.size(KV_HEADS, 1), bench.size(HEAD_DIM, 32), bench.device
    cases = product((1, 64, 4096)[: bench.size(9, 1)], ("none", "fp8", "int8", "int4"))
    for tokens, name in bench.within(section, cases):
        code = parse_kv(name).key
        side = random_side(bench, code, -(-tokens // PAGE))
        x = torch.randn(tokens, kv_heads, width, device=device).to(bench.dtype)
        where = torch.arange(tokens, dtype=torch.int32, device=device)
        turns = (torch.rand(tokens, width // 2, device=device), torch.rand(tokens, width // 2, device=device))
        place = (where // PAGE, where % PAGE)
        ours = bench.seconds([partial(attention.append, x, x, *place, side, side, turns)])
        attention.append(x, x, *place, side, side)  # without turns, to be held against what went in
        pages = torch.arange(-(-tokens // PAGE), device=device)
        kept = _numbers(side, code, pages, width)[:, :tokens].transpose(0, 1)
        least = encode_kv(x.transpose(0, 1)[None], code)
        nearest = decode_kv(least, code, width)[0].transpose(0, 1)
        section.add(tokens, name, f"{1e6 * ours:.1f}", f"{1e6 * bench.seconds([x.clone]):.1f}",
                    *(f"{relative_error(each, x.double()):.1e}" for each in (kept, nearest)))  # fmt: skip
    section.notes.append("errors of what is stored, and of what the reference stores; both against what was written")
    return section


def _numbers(side: attention.StoredSide, code: KVCode, pages: Tensor, width: int) -> Tensor:
    """What some pages hold, float64 ``[heads, tokens, width]``."""
    data = side.data[pages].transpose(0, 1).flatten(1, 2)[None]
    scale = low = None
    if not code.is_float:
        scales = side.scales[pages].transpose(0, 1).flatten(1, 2)[None]
        scale, low = (scales, None) if code.symmetric else scales.chunk(2, dim=-1)
    return decode_kv(Coded(data, scale, low), code, width)[0].double()
