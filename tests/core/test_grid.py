"""Laws of the arithmetic: scales, codes and errors against the equations in float64; every kind of group."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_INT8, QuantScheme
from bitwright.core.scheme_names import NAMED_SCHEMES, parse
from tests.core.restatement import TINY, array, decoded, group_of, grouped, nearest_error, plain_scale
from tests.core.strategies import KINDS, asymmetric_schemes, integer_schemes, matrices, random_matrix, schemes

plain_schemes = schemes(double_quant=False)
ranges = st.sampled_from(["restricted", "full", "centred"])  # and "either", which is one of the first two
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}  # relative, half a step and more


def quantize(values: Tensor, name: str, **options: object) -> QuantizedTensor:
    return QuantizedTensor.quantize(values, parse(name).weight, FitOptions(**options))  # type: ignore[arg-type]


def slack(values: Tensor, tensor: QuantizedTensor) -> np.ndarray:
    """What the stored scale's and zero point's rounding, and float32 arithmetic, may add to an error."""
    codes, scale, zero = grouped(tensor)
    rounding = ROUNDING[tensor.dense_scale().dtype]
    span = np.abs(scale) * (np.abs(zero) + np.abs(codes)) * 2.0**-21
    zero_rounding = np.abs(scale * zero) * rounding if tensor.scheme.zero == "float" else 0.0
    # A scale rounded down shortens the whole range, and where zero was rounded too, one end bears all of it.
    range_rounding = 0.0 if tensor.scheme.symmetric else np.abs(scale) * 2**tensor.scheme.bits * rounding
    total = span + zero_rounding + range_rounding + TINY / 4
    return (total if tensor.scheme.axis == 1 else total.T) + np.abs(array(values)) * (rounding + 2.0**-21)


@given(matrices(), plain_schemes, ranges)
def test_stored_scales_are_those_of_the_definition(values: Tensor, scheme: QuantScheme, symmetric_range: str) -> None:
    tensor = QuantizedTensor.quantize(values, scheme, FitOptions(symmetric_range=symmetric_range))  # type: ignore[arg-type]
    rows = array(values if scheme.axis == 1 else values.t())
    group = group_of(scheme, rows.shape[1])
    wanted = np.array(
        [[plain_scale(row[group == g], scheme, symmetric_range) for g in range(group[-1] + 1)] for row in rows]
    )
    stored = tensor.dense_scale()
    found = array(stored if scheme.axis == 1 else stored.t())
    distance = float(np.abs(rows).max()) * 2.0**-22 if scheme.zero == "float" else 0.0  # ends of a range far from zero
    np.testing.assert_allclose(found, wanted, rtol=ROUNDING[stored.dtype] + 1e-6, atol=distance)
    limits, used = torch.finfo(scheme.scale_dtype), np.abs(wanted[wanted != 0])
    if stored.dtype != scheme.scale_dtype:  # only because some scale would have under- or overflowed
        assert used.min() < limits.tiny * 1.001 or used.max() > limits.max * 0.999
    else:
        assert used.size == 0 or (used.min() > limits.tiny * 0.999 and used.max() < limits.max * 1.001)


@given(matrices(), plain_schemes, ranges)
def test_every_code_is_a_nearest_one(values: Tensor, scheme: QuantScheme, symmetric_range: str) -> None:
    tensor = QuantizedTensor.quantize(values, scheme, FitOptions(symmetric_range=symmetric_range))  # type: ignore[arg-type]
    error = np.abs(decoded(tensor) - array(values))
    codes, scale, zero = grouped(tensor)
    arithmetic = np.abs(scale) * (np.abs(zero) + np.abs(codes) + 2) * 2.0**-21
    arithmetic = arithmetic if scheme.axis == 1 else arithmetic.T
    assert (error <= nearest_error(values, tensor) + arithmetic + np.abs(array(values)) * 2.0**-21).all()


@given(matrices(), plain_schemes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_decode_is_the_definition(values: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    values = values.clamp(-1e4, 1e4)
    tensor = QuantizedTensor.quantize(values, scheme)
    found = tensor.dequantize()
    codes, scale, zero = grouped(tensor)
    span = np.abs(scale) * (np.abs(zero) + np.abs(codes) + 1) * 2.0**-21
    assert (np.abs(array(found) - decoded(tensor)) <= (span if scheme.axis == 1 else span.T)).all()
    assert torch.equal(tensor.dequantize(dtype), found.to(dtype))


@given(matrices(), integer_schemes())
def test_error_is_at_most_half_a_step(values: Tensor, scheme: QuantScheme) -> None:
    """Elementwise, for every group but those of one symmetric bit, whose two levels are the mean magnitude."""
    tensor = QuantizedTensor.quantize(values, scheme)
    if scheme.symmetric and scheme.bits == 1:
        assert set(tensor.codes.unique().tolist()) <= {-1, 0}
        return
    _, scale, _ = grouped(tensor)
    step = np.abs(scale if scheme.axis == 1 else scale.T)
    assert (np.abs(array(tensor.dequantize()) - array(values)) <= step / 2 + slack(values, tensor)).all()


@given(matrices(kinds=("normal", "outlier", "integers")), st.integers(2, 8), st.sampled_from([None, 32, 128]))
def test_w1_symmetric_groups(values: Tensor, bits: int, group: int | None) -> None:
    scheme = QuantScheme(bits=bits, group=group)
    tensor = QuantizedTensor.quantize(values, scheme)
    _, scale, _ = grouped(tensor)
    index = group_of(scheme, values.shape[1])
    largest = np.stack([np.abs(array(values))[:, index == g].max(1) for g in index], axis=1)
    step = largest / (2 ** (bits - 1) - 1)
    constant = np.stack([np.ptp(array(values)[:, index == g], axis=1) == 0 for g in index], axis=1)  # exact otherwise
    assert (constant | (np.abs(scale - step) <= step * (2.0**-11 + 1e-6))).all()
    assert (np.abs(array(tensor.dequantize() - values)) <= step / 2 + largest * 2.0**-11 + 1e-6 * largest).all()
    assert int(tensor.codes.min()) >= -(2 ** (bits - 1)) and int(tensor.codes.max()) <= 2 ** (bits - 1) - 1


@given(matrices(kinds=("positive", "integers", "normal")), st.integers(1, 8), st.sampled_from(["int", "uint"]))
def test_w2_one_sided_rows_keep_an_exact_zero(values: Tensor, bits: int, code: str) -> None:
    for rows in (values.abs(), -values.abs()):
        tensor = QuantizedTensor.quantize(rows, QuantScheme(code=code, bits=bits, group=32, symmetric=False))  # type: ignore[arg-type]
        assert tensor.zero is not None
        assert int(tensor.zero.min()) >= tensor.scheme.code_min and int(tensor.zero.max()) <= tensor.scheme.code_max
        _, scale, _ = grouped(tensor)
        assert (np.abs(array(tensor.dequantize() - rows)) <= scale / 2 + slack(rows, tensor)).all()


@pytest.mark.parametrize("name", ["w4g8", "w8g8", "w2g8", "w4g8-asym", "w4g8-asym-fz"])
def test_positive_groups_do_not_clip(name: str) -> None:
    values = torch.arange(1, 9).float().repeat(2, 1)
    tensor = quantize(values, name)
    _, scale, _ = grouped(tensor)
    assert (np.abs(decoded(tensor) - array(values)) <= scale / 2 + 8 * 2.0**-10).all()


@given(matrices(kinds=("normal", "outlier", "positive", "negative")), st.integers(2, 8))
def test_w4_full_range_reproduces_the_extreme(values: Tensor, bits: int) -> None:
    values = values.to(torch.float16).to(torch.float32)
    scheme = QuantScheme(bits=bits, group=16)
    tensor = QuantizedTensor.quantize(values, scheme, FitOptions(symmetric_range="full"))
    found, wanted = array(tensor.dequantize()), array(values)
    index = group_of(scheme, values.shape[1])
    for row in range(values.shape[0]):
        for g in range(index[-1] + 1):
            part = wanted[row, index == g]
            low, high = part.min(), part.max()
            extreme = low if -low >= high else high
            if part.size > 1 and low != high:
                assert (found[row, index == g][part == extreme] == extreme).all()
    assert int(tensor.codes.max()) < 2 ** (bits - 1)  # no wrap


@settings(max_examples=60)
@given(matrices(), plain_schemes, ranges)
def test_w5_search_is_never_worse(values: Tensor, scheme: QuantScheme, symmetric_range: str) -> None:
    options = FitOptions(symmetric_range=symmetric_range)  # type: ignore[arg-type]
    wide = QuantizedTensor.quantize(values, scheme, options)
    searched = QuantizedTensor.quantize(values, scheme, replace(options, search=True))
    if wide.dense_scale().dtype != searched.dense_scale().dtype:
        return  # a shrunk scale may need float32 where the whole one does not
    before, after = (np.square(decoded(tensor) - array(values)) for tensor in (wide, searched))
    index = group_of(scheme, values.shape[scheme.axis])
    for g in range(index[-1] + 1):
        columns = index == g
        was, now = (part[:, columns].sum(1) if scheme.axis == 1 else part[columns].sum(0) for part in (before, after))
        part = np.square(array(values)[:, columns] if scheme.axis == 1 else array(values)[columns].T)
        assert (now <= was * (1 + 1e-5) + part.sum(1) * 1e-12 + TINY**2).all()


def test_w5_search_pays_where_there_is_an_outlier() -> None:
    values = random_matrix(["normal"] * 32, 128, 1)
    errors = [
        float((quantize(values, "w3g128", search=search).dequantize() - values).square().mean()) for search in (0, 1)
    ]
    assert errors[1] < 0.95 * errors[0]


@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_w46_tiny_weights_keep_their_scale(kind: str, seed: int, bits: int) -> None:
    """Weights of 1e-8 would have a float16 scale of zero."""
    values = random_matrix(["normal"], 64, seed) * 1e-8
    for symmetric in (True, False):
        scheme = QuantScheme(code="int" if symmetric else "uint", bits=bits, group=32, symmetric=symmetric)
        tensor = QuantizedTensor.quantize(values, scheme)
        assert tensor.dense_scale().dtype == torch.float32 and bool((tensor.dense_scale() > 0).all())
        assert int(tensor.codes.unique().numel()) > 1


def test_scales_leave_their_dtype_only_when_they_must() -> None:
    small = torch.full((1, 32), 2.0**-9)
    small[0, 0] = 2.0**-10
    assert quantize(small, "w4g32").dense_scale().dtype == torch.float16  # 2.8e-4 is a normal float16
    assert quantize(small * 2.0**-4, "w4g32").dense_scale().dtype == torch.float32
    assert quantize(small * 2.0**-4, "w4g32-sbf16").dense_scale().dtype == torch.bfloat16
    assert quantize(small * 2.0**30, "w4g32").dense_scale().dtype == torch.float32  # 3e5 is above the largest float16


@pytest.mark.parametrize("value", [2.0, -2.0, 0.0, -0.0, 1.5, 2.0**-20])
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (2, 70)])
def test_e2_constants_and_zeros_come_back_exactly(value: float, shape: tuple[int, int]) -> None:
    values = torch.full(shape, value)
    names = [f"w{bits}{group}{tail}" for bits in range(1, 9) for group in ("", "g32") for tail in ("", "-axis0")]
    names += [f"w{bits}g32-asym{tail}" for bits in range(1, 9) for tail in ("", "-signed", "-fz", "-signed-fz", "-dq")]
    names += ["nf4g32", "fp4g32", "fp4e2m1", "fp8", "fp8g32", *NAMED_SCHEMES]
    for name in names:
        for options in (FitOptions(), FitOptions(search=True), FitOptions(symmetric_range="full")):
            tensor = QuantizedTensor.quantize(values, parse(name).weight, options)
            assert torch.equal(tensor.dequantize(), values), name


@given(matrices(columns=20), schemes(), st.booleans())
def test_no_group_makes_nan_or_infinity(values: Tensor, scheme: QuantScheme, search: bool) -> None:
    """Any finite numbers up to 1e38 give finite numbers; warnings are errors in these tests."""
    tensor = QuantizedTensor.quantize(values, scheme, FitOptions(search=search))
    found = tensor.dequantize()
    assert bool(torch.isfinite(found).all()) and bool(torch.isfinite(tensor.dense_scale()).all())
    assert float(found.abs().max()) <= 2 * float(values.abs().max()) + TINY


@given(plain_schemes, st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.integers(0, 11), st.booleans())
def test_non_finite_values_are_refused(scheme: QuantScheme, value: float, place: int, search: bool) -> None:
    values = random_matrix(["normal"] * 2, 6, place)
    values.view(-1)[place] = value
    with pytest.raises(BitwrightError, match="BW602"):
        QuantizedTensor.quantize(values, scheme, FitOptions(search=search))


def test_e3_symmetric_int8() -> None:
    tensor = quantize(torch.tensor([[-2.54, 0.0, 2.54]]), "w8-sf32")
    assert float(tensor.dense_scale()) == pytest.approx(0.02, rel=1e-6)
    assert tensor.codes.tolist() == [[-127, 0, 127]]


def test_e24_instant_int8_and_uint4() -> None:
    column = torch.tensor([[-1.0, 0.0, 1.0]])
    int8 = quantize(column, "A16W8")
    assert int8.zero is not None and int8.codes.dtype == torch.int8
    assert torch.equal(int8.dense_scale(), torch.tensor([[2 / 255]])) and int8.zero.tolist() == [[-0.5]]
    assert int8.codes.tolist() == [[-128, 0, 127]]
    assert int8.dequantize().tolist()[0] == pytest.approx([-1.0, 1 / 255, 1.0], abs=1e-6)
    uint4 = quantize(column, "A16W4")
    assert uint4.zero is not None and uint4.codes.dtype == torch.uint8
    assert torch.equal(uint4.dense_scale(), torch.tensor([[2 / 15]])) and uint4.zero.tolist() == [[7.5]]
    assert uint4.codes.tolist() == [[0, 8, 15]]
    assert uint4.dequantize().tolist()[0] == pytest.approx([-1.0, 1 / 15, 1.0], abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["w4g128", "A16W4g128", "A16W8g128", "w3g128-asym"]))
def test_e25_the_tail_group_is_fitted_from_its_own_columns(seed: int, name: str) -> None:
    values = random_matrix(["normal", "distant"], 300, seed)
    tensor = quantize(values, name)
    alone = quantize(values[:, 256:], name)
    assert tensor.dense_scale().shape == (2, 3) and tensor.dequantize().shape == (2, 300)
    assert torch.equal(tensor.dense_scale()[:, 2:].float(), alone.dense_scale().float())
    assert torch.equal(tensor.codes[:, 256:], alone.codes)


@given(st.integers(0, 2**32 - 1))
def test_e29_dynamic_int8_rows(seed: int) -> None:
    row = QuantizedTensor.quantize(torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]]), DYNAMIC_INT8)
    assert torch.equal(row.dense_scale(), torch.tensor([[2 / 127], [0.0]]))
    assert row.codes.tolist() == [[32, -127, 64], [0, 0, 0]]
    x, w = random_matrix(["normal", "outlier", "zero"], 48, seed), random_matrix(["normal", "positive"], 48, seed + 1)
    many = QuantizedTensor.quantize(x, DYNAMIC_INT8)
    for index in range(3):
        assert torch.equal(QuantizedTensor.quantize(x[index : index + 1], DYNAMIC_INT8).codes[0], many.codes[index])
    weight = QuantizedTensor.quantize(w, parse("A8W8").weight)
    assert weight.zero is not None
    sums = many.codes.int() @ weight.codes.int().t()
    offsets = many.codes.int().sum(1, keepdim=True) * weight.zero.double().t()
    integer = (sums - offsets) * many.dense_scale().double() * weight.dense_scale().double().t()
    expression = torch.from_numpy(decoded(many) @ decoded(weight).T)
    torch.testing.assert_close(integer, expression, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@given(matrices(kinds=tuple(kind for kind in KINDS if kind not in ("huge", "subnormal"))), schemes())
def test_w37_half_precision_weights_give_the_codes_of_their_float32_values(values: Tensor, scheme: QuantScheme) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = values.clamp(-1000, 1000).to(dtype)
        assert same(QuantizedTensor.quantize(half, scheme), QuantizedTensor.quantize(half.float(), scheme))


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    zeros = one.zero is other.zero is None or (
        one.zero is not None and other.zero is not None and torch.equal(one.zero, other.zero)
    )
    return torch.equal(one.codes, other.codes) and torch.equal(one.dense_scale(), other.dense_scale()) and zeros


@given(matrices(), schemes(), st.booleans())
def test_arguments_are_left_alone_and_layout_does_not_matter(values: Tensor, scheme: QuantScheme, search: bool) -> None:
    before = values.clone()
    tensor = QuantizedTensor.quantize(values, scheme, FitOptions(search=search))
    assert torch.equal(values, before)
    strided = torch.stack([values, values], dim=2)[:, :, 0]
    assert not strided.is_contiguous() or strided.numel() == 1 or strided.shape[0] * strided.shape[1] == 1
    assert same(tensor, QuantizedTensor.quantize(strided, scheme, FitOptions(search=search)))


@given(matrices(), schemes(), st.booleans(), st.integers(1, 50))
def test_the_size_of_the_working_tile_does_not_matter(
    values: Tensor, scheme: QuantScheme, search: bool, tile: int
) -> None:
    whole = QuantizedTensor.quantize(values, scheme, FitOptions(search=search))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "TILE", tile)
        tiled = QuantizedTensor.quantize(values, scheme, FitOptions(search=search))
        assert same(whole, tiled) and torch.equal(tiled.dequantize(), whole.dequantize())


@pytest.mark.parametrize(
    ("name", "rows", "columns", "search"),
    [
        ("w1", 1, 40_000, True),
        ("w4g128", 24, 1100, True),
        ("w8", 1, 40_000, False),
        ("A16W4", 2, 40_000, False),
        ("nf4g64-dq", 60, 1100, False),
        ("fp8", 60, 1100, False),
        ("w3g100-asym-axis0", 60, 1100, False),
    ],
)
def test_the_number_of_threads_does_not_matter(name: str, rows: int, columns: int, search: bool) -> None:
    """One long row is the case where a sum is split among threads."""
    values = random_matrix(["normal", "outlier", "mixed"][: min(rows, 3)] * -(-rows // 3), columns, 5)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(QuantizedTensor.quantize(values, parse(name).weight, FitOptions(search=search)))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1])


def digest() -> str:
    """A hash of everything that quantizing a fixed matrix by many schemes gives."""
    sha = hashlib.sha256()
    values = random_matrix(list(KINDS), 200, 7)
    names = [
        "w1",
        "w2g32",
        "w3g64-asym",
        "w4g128",
        "w5g48-asym-fz",
        "w8-axis0",
        "nf4g64-dq",
        "fp4",
        "fp8",
        *NAMED_SCHEMES,
    ]
    for name in names:
        tensor = QuantizedTensor.quantize(values, parse(name).weight, FitOptions(search="g" in name))
        for part in (tensor.codes, tensor.dense_scale(), tensor.zero):
            sha.update(b"-" if part is None else part.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_two_processes_give_identical_bytes() -> None:
    root = Path(__file__).resolve().parents[2]
    program = "from tests.core.test_grid import digest; print(digest())"
    environment = {"PYTHONPATH": f"{root / 'src'}:{root}", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "random"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()


@given(matrices(), asymmetric_schemes("integer"), st.integers(0, 2**32 - 1))
def test_rescaled_ranges_stay_where_they_were(values: Tensor, scheme: QuantScheme, seed: int) -> None:
    """After rounding its scale otherwise, a grid still begins within half a step of where it began."""
    parameters = grid.fit(values, scheme=scheme)
    factor = 1 + 0.2 * torch.rand(parameters.scale.shape, generator=torch.Generator().manual_seed(seed))
    moved = grid.rescale(parameters, parameters.scale.float() * factor, scheme)
    assert parameters.zero is not None and moved.zero is not None and moved.zero.dtype == scheme.code_dtype
    old = (scheme.code_min - array(parameters.zero)) * array(parameters.scale)
    new = (scheme.code_min - array(moved.zero)) * array(moved.scale)
    assert (np.abs(new - old) <= array(moved.scale) * (0.5 + 1e-4)).all()


def test_unknown_ranges_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="symmetric_range is 'wide'") as caught:
        FitOptions(symmetric_range="wide")  # type: ignore[arg-type]
    assert caught.value.exit_status == 2 and "restricted, full, centred" in str(caught.value)
