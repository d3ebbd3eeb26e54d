"""The native loops of the grid give what torch's give, bit for bit, and leave aside what is not theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import BitwrightError
from bitwright.core.grid import FitOptions, Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import native_grid, native_library
from bitwright.kernels.native_grid import LOOPS

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason=str(native_library.missing()))

SHAPES = [(1, 1), (3, 7), (5, 16), (2, 33), (7, 100), (64, 96), (130, 257), (1, 5000)]
SCHEMES = [
    "w4g32",
    "w4g128-asym",
    "w8",
    "w8-asym",
    "w3g5",
    "w2g16-asym",
    "w5g48-sbf16",
    "w4g17-asym-fz-sf32",
    "w6g64",
    "w8g64-asym-fz",
    "w4g32-asym-signed",
    "w1g8-asym",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def alone(loops: list[grid.Loops], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_loops", loops)
        yield


def both(work: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """What the native loops make, each of which is used, and what torch makes."""
    with alone([LOOPS], monkeypatch):
        ours = work()
    with alone([], monkeypatch):
        return ours, work()


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_rounding_is_that_of_torch(
    isa: str, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = parse(scheme).weight
    assert LOOPS.accepts(torch.empty(1, 1, dtype=dtype), form, dtype)
    for rows, columns in SHAPES:
        weight = (torch.randn(rows, columns) * 10 ** float(torch.empty(()).uniform_(-3, 3))).to(dtype)
        weight[0, : columns // 3] = 0
        ranges = ("restricted",) if not form.symmetric else ("restricted", "full", "centred")
        for options in [FitOptions(symmetric_range=kind) for kind in ranges] + [FitOptions(search=True)]:
            made = []
            for loops in ([LOOPS], []):
                with alone(loops, monkeypatch):
                    tensor = QuantizedTensor.quantize(weight, form, options)
                    made.append((tensor.codes, tensor.dense_scale(), tensor.zero, *map(tensor.dequantize, DTYPES)))
            for ours, theirs in zip(*made, strict=True):
                assert (ours is None and theirs is None) or torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_stay_within_their_range_for_any_scale(isa: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where numbers are thousands of scales away, a scale is 0, negative or tiny, or a quotient overflows."""
    form = parse(scheme).weight
    values = torch.cat([torch.randn(4, 90), torch.randn(4, 90) * 1e30, torch.randn(4, 90) * 1e-30])
    size = form.group or 90
    scale = torch.randn(12, -(-90 // size)) * 10 ** torch.empty(12, -(-90 // size)).uniform_(-12, 3)
    scale[::3] = 0
    zero = None if form.symmetric else torch.randint(form.code_min, form.code_max + 1, scale.shape).to(form.code_dtype)
    zero = torch.rand(scale.shape) * 7 - 3 if form.zero == "float" else zero
    parameters = Parameters(scale, zero)
    ours, theirs = both(lambda: grid.encode(values, parameters=parameters, scheme=form), monkeypatch)
    assert torch.equal(ours, theirs)
    assert int(ours.min()) >= form.code_min and int(ours.max()) <= form.code_max
    ours, theirs = both(lambda: grid.decode(theirs, parameters=parameters, scheme=form), monkeypatch)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 40, 99])
def test_what_is_not_finite_is_refused(isa: str, bad: float, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 100)
    values[1, place] = bad
    with alone([LOOPS], monkeypatch), pytest.raises(BitwrightError) as caught:
        grid.fit(values, scheme=QuantScheme(bits=4, group=32))
    assert caught.value.code == "BW602"


@pytest.mark.parametrize("scheme", ["w4g32", "w2g5-asym", "w3g17", "w8-asym", "w4g16-asym-sbf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_and_their_steps(isa: str, scheme: str, dtype: torch.dtype) -> None:
    """Codes, numbers and steps as of one expression, bit for bit; gradients as of its derivatives in float64."""
    form = parse(scheme).weight
    for rows, columns in SHAPES:
        group = min(form.group or columns, columns)
        values, grad = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        grad.masked_fill_(torch.rand(rows, columns) < 0.1, 0.0).masked_fill_(torch.rand(rows, columns) < 0.1, -0.0)
        offset = torch.rand(rows, columns) - 0.5
        parameters = grid.fit(values * 0.6, scheme=form)  # many a code is clamped
        scale = parameters.scale.float()
        zero = torch.zeros_like(scale) if parameters.zero is None else parameters.zero.float()
        wide, points = (part.repeat_interleave(group, 1)[:, :columns] for part in (scale, zero))
        scaled = values.float() / torch.where(wide == 0, 1.0, wide)
        free = (scaled + offset).round() + points
        codes = free.clamp(form.code_min, form.code_max)
        found = native_grid.encode(values, scale, zero, group, form, offset)
        assert torch.equal(found.float(), codes)
        number = native_grid.rounded(values, scale, zero, group, form, offset, torch.full_like(values, torch.nan))
        assert torch.equal(bits(number), bits(((codes - points) * wide).to(dtype)))
        is_free, start = (free == codes).double(), offset.clone()
        found_parts = native_grid.step_offsets(values, scale, zero, group, form, offset, grad, 0.03)
        pull = grad.double()
        by_offset = grad.float() * wide * is_free.float()
        assert torch.equal(bits(offset), bits(start.sub(by_offset.sign(), alpha=0.03).clamp(-0.5, 0.5)))
        expected = [
            summed(pull * (codes.double() - points.double() - scaled.double() * is_free), group),
            summed(-pull * wide.double() * (1 - is_free), group),
        ]
        for ours, theirs in zip(found_parts, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)


def test_offsets_and_gradients_of_other_dtypes_are_refused() -> None:
    """They would be read beyond their end."""
    values, scale, form = torch.randn(4, 8), torch.ones(4, 1), QuantScheme(bits=4)
    half = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32 here, not"):
        native_grid.encode(values, scale, None, 8, form, half)
    for offset, grad in ((half, values), (values, half)):
        with pytest.raises(ValueError, match="float32 here, not"):
            native_grid.step_offsets(values, scale, None, 8, form, offset, grad, 0.1)
    with pytest.raises(ValueError, match="float32 here, not"):
        native_grid.rounded(values, scale, None, 8, form, values, half)


def test_a_step_knows_no_direction_of_nan_and_zero(isa: str) -> None:
    values, form, scale = torch.zeros(1, 7), QuantScheme(bits=4), torch.ones(1, 1)
    grad = torch.tensor([[math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-45]])
    offset = torch.zeros_like(values)
    native_grid.step_offsets(values, scale, None, 7, form, offset, grad, 0.25)
    assert offset.tolist() == [[0, 0, 0, 0, -0.25, 0.25, -0.25]]


def summed(values: Tensor, group: int) -> Tensor:
    return torch.stack([part.sum(1) for part in values.split(group, 1)], 1)


def test_the_number_of_threads_changes_nothing() -> None:
    weight, kept, made = torch.randn(300, 500), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(QuantizedTensor.quantize(weight, parse("w4g128-asym").weight))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(each.codes, made[0].codes) for each in made)
    assert all(torch.equal(each.dense_scale(), made[0].dense_scale()) for each in made)


def test_defaults_of_torch_change_nothing() -> None:
    """A user's default dtype or device is not that of what is computed here: other buffers would be read or overrun."""
    weight, form, kept = torch.randn(40, 96), parse("w4g32-asym").weight, torch.get_default_dtype()
    expected = QuantizedTensor.quantize(weight, form)
    try:
        torch.set_default_dtype(torch.float64)  # a narrower one would write beyond the end
        wide = QuantizedTensor.quantize(weight, form)
    finally:
        torch.set_default_dtype(kept)
    with torch.device("meta"):
        away = QuantizedTensor.quantize(weight, form)
        decoded = away.dequantize()
    for made in (wide, away):
        assert torch.equal(made.codes, expected.codes) and torch.equal(made.dense_scale(), expected.dense_scale())
    assert torch.equal(decoded, expected.dequantize())


def test_other_numbers_and_schemes_are_left_to_torch() -> None:
    weight, form = torch.randn(4, 8), QuantScheme(bits=4, group=4)
    assert LOOPS.accepts(weight, form, torch.float32)
    assert LOOPS.accepts(torch.nn.Parameter(weight, requires_grad=False), form, torch.float32)
    learning = weight.clone().requires_grad_()
    others = [weight.t(), weight.double(), torch.empty(0, 8), weight.to("meta"), learning]
    assert not any(LOOPS.accepts(each, form, each.dtype) for each in others)
    for scheme in (parse("nf4g4").weight, replace(form, bits=1), parse("fp8").weight):
        assert not LOOPS.accepts(weight, scheme, torch.float32)
    with torch.no_grad():
        assert LOOPS.accepts(learning, form, torch.float32)


def test_it_is_left_aside_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_MISSING", "not built")
    assert not native_grid.accepts(torch.randn(4, 8), QuantScheme(bits=4), torch.float32)
