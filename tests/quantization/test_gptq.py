"""GPTQ against a naive restatement, and what it promises of its result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.quantization import fp8, gptq
from bitwright.quantization import hessian as hessian_module
from bitwright.quantization.gptq import GptqOptions, round_by_error_feedback
from bitwright.quantization.gptq_grids import join
from bitwright.quantization.statistics import SiteStatistics
from tests.quantization.gptq_restatement import correlated_site, hessian, restate, squared_error

ORDERS: list[dict[str, bool]] = [
    {},
    {"act_order": False},
    {"act_order": False, "static_groups": True},
    {"act_order": True, "static_groups": False},
    {"group_aware": True},
    {"group_aware": True, "static_groups": True},
]
SCHEMES = [
    QuantScheme(group=32),
    QuantScheme(group=32, symmetric=False, code="uint"),
    QuantScheme(group=32, symmetric=False),
    QuantScheme(bits=2, group=25, symmetric=False, code="uint"),  # a shorter last group, and blocks that it straddles
    QuantScheme(bits=3, group=70),
    QuantScheme(bits=8, group=None),
    QuantScheme(bits=1, group=16),
    QuantScheme(group=32, symmetric=False, code="uint", zero="float"),
    QuantScheme(bits=3, group=8, axis=0),
    QuantScheme(group=7, axis=0, symmetric=False, code="uint"),
    QuantScheme(code="nf4", group=32),
    QuantScheme(code="fp4_e2m1", group=32),
    QuantScheme(code="fp4_bnb", group=32),
    QuantScheme(code="fp8_e4m3", bits=8, group=None),
]
DOUBLE = QuantScheme(group=16, scale_scheme=QuantScheme(code="uint", bits=8, group=64, symmetric=False))


def weights(rows: int = 20, columns: int = 100, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def check_same(
    scheme: QuantScheme, options: GptqOptions, *, seed: int = 0, dead: tuple[int, ...] = ()
) -> QuantizedTensor:
    weight, site = weights(), correlated_site(100, seed=seed, dead=dead)
    rounded = round_by_error_feedback(weight, site, scheme, options)
    codes, values = restate(weight, site, scheme, options)
    assert "rounded_by" not in rounded.notes
    np.testing.assert_array_equal(rounded.tensor.codes.numpy(), codes)
    # Updated weights in float32 and float64 may give scales that are neighbours in float16.
    np.testing.assert_allclose(rounded.tensor.dequantize().double().numpy(), values, rtol=2**-10, atol=1e-9)
    return rounded.tensor


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_codes_are_those_of_the_paper_column_by_column(scheme: QuantScheme, order: dict[str, bool]) -> None:
    tensor = check_same(scheme, GptqOptions(**order))
    groups = tensor.scale.shape[1] if isinstance(tensor.scale, Tensor) else 0
    needs_index = order == {"act_order": True, "static_groups": False} and scheme.axis == 1 and groups > 1
    assert (tensor.group_index is not None) == needs_index


@pytest.mark.parametrize("block_size", [1, 24, 96, 1000])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_change_nothing(order: dict[str, bool], block_size: int) -> None:
    check_same(QuantScheme(bits=3, group=48), GptqOptions(block_size=block_size, **order))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_dead_inputs_leave_those_beside_them_alone(order: dict[str, bool]) -> None:
    """They are no part of the mean that damping is a fraction of, and spread no errors."""
    check_same(QuantScheme(bits=3, group=32), GptqOptions(damp=0.1, **order), dead=tuple(range(0, 90, 2)))


def test_scales_of_one_group_below_half_precision_keep_their_digits() -> None:
    """Where one group needs float32, all get it, whichever was fitted first."""
    coarse, fine = torch.full((3, 1), 0.5, dtype=torch.float16), torch.full((3, 1), 1e-9)
    for parts in ([coarse, fine], [fine, coarse], [coarse, fine, coarse]):
        joined = join([Parameters(part, part) for part in parts], dim=1)
        assert joined.zero is not None and joined.scale.dtype == joined.zero.dtype == torch.float32
        assert torch.equal(joined.scale, torch.cat([part.float() for part in parts], dim=1))
    assert join([Parameters(coarse, None)] * 2, dim=0).scale.dtype == torch.float16


@pytest.mark.parametrize("search", ["plain", "importance"])
@pytest.mark.parametrize(
    "order", [{}, {"act_order": False}, {"act_order": False, "static_groups": True}, {"static_groups": False}], ids=str
)
def test_searches_look_at_the_updated_weights(search: str, order: dict[str, bool]) -> None:
    check_same(QuantScheme(bits=3, group=32), GptqOptions(search=search, **order))  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric_range", ["full", "centred"])
def test_ranges_of_symmetric_grids(symmetric_range: str) -> None:
    check_same(QuantScheme(bits=3, group=32), GptqOptions(range=symmetric_range))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "order", [{}, {"act_order": False}, {"act_order": True, "static_groups": False}, {"group_aware": True}], ids=str
)
@pytest.mark.parametrize(
    "scheme", [DOUBLE, replace(DOUBLE, code="uint", symmetric=False), replace(DOUBLE, code="nf4")], ids=lambda s: s.name
)
def test_doubly_quantized_scales_are_rounded_before_codes_are_found(
    scheme: QuantScheme, order: dict[str, bool]
) -> None:
    tensor = check_same(scheme, GptqOptions(**order))
    nearest = QuantizedTensor.quantize(weights(), scheme)
    assert tensor.group_index is None and isinstance(tensor.scale, QuantizedTensor)
    assert torch.equal(tensor.dense_scale(), nearest.dense_scale())


def test_static_groups_have_the_scales_of_rounding_to_nearest() -> None:
    for order in ({}, {"act_order": False}, {"group_aware": True}):
        options = GptqOptions(static_groups=True, **order)
        tensor = round_by_error_feedback(weights(), correlated_site(100), parse("w4g32-asym").weight, options).tensor
        nearest = QuantizedTensor.quantize(weights(), parse("w4g32-asym").weight)
        assert isinstance(tensor.scale, Tensor) and torch.equal(tensor.scale, nearest.dense_scale())
        assert tensor.zero is not None and nearest.zero is not None and torch.equal(tensor.zero, nearest.zero)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_outputs_are_better_than_those_of_rounding_to_nearest(bits: int) -> None:
    scheme = QuantScheme(bits=bits, group=32, symmetric=False, code="uint")
    for seed in range(10):
        weight, site = weights(seed=seed), correlated_site(100, seed=seed)
        nearest = squared_error(weight, QuantizedTensor.quantize(weight, scheme).dequantize(), hessian(site))
        for order in ORDERS:
            tensor = round_by_error_feedback(weight, site, scheme, GptqOptions(**order)).tensor
            assert squared_error(weight, tensor.dequantize(), hessian(site)) < 0.8 * nearest


def test_group_aware_order_is_as_good_as_none() -> None:
    scheme, total = parse("w4g32").weight, {"natural": 0.0, "group_aware": 0.0}
    for seed in range(5):
        weight, site = weights(seed=seed), correlated_site(100, seed=seed)
        for name in total:
            options = GptqOptions(group_aware=name == "group_aware")
            tensor = round_by_error_feedback(weight, site, scheme, options).tensor
            total[name] += squared_error(weight, tensor.dequantize(), hessian(site))
    assert total["group_aware"] <= 1.05 * total["natural"]


def test_auto_keeps_the_search_of_least_output_error() -> None:
    scheme = QuantScheme(bits=2, group=32)
    chosen = set()
    for seed in range(6):
        weight, site = weights(seed=seed), correlated_site(100, seed=seed)

        def error(search: str, weight: Tensor = weight, site: SiteStatistics = site) -> float:
            options = GptqOptions(search=search)  # type: ignore[arg-type]
            tensor = round_by_error_feedback(weight, site, scheme, options).tensor
            return squared_error(weight, tensor.dequantize(), hessian(site))

        rounded = round_by_error_feedback(weight, site, scheme, GptqOptions(search="auto"))
        errors = {search: error(search) for search in ("none", "plain", "importance")}
        assert squared_error(weight, rounded.tensor.dequantize(), hessian(site)) == min(errors.values())
        assert errors[rounded.notes["search"]] == min(errors.values())
        chosen.add(rounded.notes["search"])
    assert "none" not in chosen  # two-bit ranges always gain


def test_never_worse_than_rounding_to_nearest_and_says_so() -> None:
    """Few tokens, few columns, coarse grids: error feedback loses now and then."""
    kept, options = 0, GptqOptions(act_order=False)
    for seed in range(40):
        weight, site = weights(2, 8, seed=seed), correlated_site(8, tokens=64, seed=seed)
        scheme = QuantScheme(bits=2, group=4)
        rounded = round_by_error_feedback(weight, site, scheme, options)
        nearest = QuantizedTensor.quantize(weight, scheme)
        error = squared_error(weight, rounded.tensor.dequantize(), hessian(site))
        limit = squared_error(weight, nearest.dequantize(), hessian(site))
        assert error <= limit * (1 + 1e-5)
        if rounded.notes.get("rounded_by") == "rtn":
            kept += 1
            assert torch.equal(rounded.tensor.codes, nearest.codes)
            fed_back = torch.from_numpy(restate(weight, site, scheme, options)[1])
            assert squared_error(weight, fed_back, hessian(site)) > error
    assert 0 < kept < 40


def test_a_dead_input_keeps_its_nearest_weight() -> None:
    inputs = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, [0, 17, 40, 63]] = 0
    site = SiteStatistics(64, with_gram=True)
    site.add(inputs)
    weight = weights(8, 64)
    for order in ORDERS:
        tensor = round_by_error_feedback(weight, site, parse("w4g32").weight, GptqOptions(**order)).tensor
        assert isinstance(tensor.scale, Tensor)
        index = torch.arange(64) // 32 if tensor.group_index is None else tensor.group_index.long()
        error = (tensor.dequantize() - weight).abs() / tensor.scale.float()[:, index].abs()
        assert float(error[:, [0, 17, 40, 63]].max()) <= 0.501


def test_one_token_is_enough_not_to_fail() -> None:
    weight, site = weights(), correlated_site(100, tokens=1)
    for damp in (0.01, 1e-6, 0.0):
        rounded = round_by_error_feedback(weight, site, parse("w4g32").weight, GptqOptions(damp=damp))
        nearest = QuantizedTensor.quantize(weight, parse("w4g32").weight).dequantize()
        error = squared_error(weight, rounded.tensor.dequantize(), hessian(site))
        assert error <= squared_error(weight, nearest, hessian(site))
    assert rounded.notes["damp"] > 0


def test_damping_rises_until_the_hessian_can_be_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    site = correlated_site(100)
    mean = float(hessian(site).diagonal().mean())

    def factor(matrix: Tensor) -> bool:
        tried.append(float(matrix.diagonal().mean()) / mean - 1)
        return len(tried) == 3 and genuine(matrix)

    genuine = hessian_module.factor_upper
    monkeypatch.setattr(hessian_module, "factor_upper", factor)
    rounded = round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions())
    assert tried == pytest.approx([0.01, 0.1, 1.0], rel=1e-3) and rounded.notes == {"damp": 1.0}


def test_a_hessian_that_cannot_be_factored_is_reported_or_fatal() -> None:
    site = SiteStatistics(100, with_gram=True)
    site.add(torch.zeros(5, 100))
    rounded = round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions())
    assert rounded.notes["rounded_by"] == "rtn" and "positive definite" in rounded.notes["reason"]
    assert torch.equal(rounded.tensor.codes, QuantizedTensor.quantize(weights(), parse("w4g32").weight).codes)
    with pytest.raises(BitwrightError, match="positive definite") as failure:
        round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions(strict=True))
    assert failure.value.code == "BW604"


def test_the_layers_of_a_site_share_one_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    genuine = hessian_module.factor_upper
    monkeypatch.setattr(hessian_module, "factor_upper", lambda matrix: calls.append(1) is None and genuine(matrix))
    site = correlated_site(100)
    for seed in range(3):
        round_by_error_feedback(weights(seed=seed), site, parse("w4g32").weight, GptqOptions())
    assert len(calls) == 1
    round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions(act_order=False))
    assert len(calls) == 2
    site.add(torch.randn(3, 100))
    round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions(act_order=False))
    assert len(calls) == 3


@pytest.mark.parametrize("order", [*ORDERS, {"fp8_aware": True}], ids=str)
@pytest.mark.parametrize("scheme", ["w4g32", "w3g24-asym", "nf4g32", "w4g8-axis0", "w4g16-dq(w8g64-asym)"])
def test_outputs_rounded_on_several_threads_are_the_same(
    scheme: str, order: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, options = parse(scheme).weight, GptqOptions(**order)
    if options.fp8_aware and fp8.refuse_scheme(stored):
        return
    whole = round_by_error_feedback(weights(), correlated_site(100), stored, options).tensor
    monkeypatch.setattr(gptq, "SMALL", 0)
    monkeypatch.setattr(gptq, "PART", 3)
    monkeypatch.setattr(gptq, "OUTPUTS", 4)
    torch.set_num_threads(2)
    split = round_by_error_feedback(weights(), correlated_site(100), stored, options).tensor
    assert torch.equal(split.codes, whole.codes) and torch.equal(split.dequantize(), whole.dequantize())


def test_no_calibration_is_an_error() -> None:
    for site in (None, SiteStatistics(100, with_gram=True), correlated_site(100, gram=False)):
        with pytest.raises(BitwrightError, match="no calibration tokens") as failure:
            round_by_error_feedback(weights(), site, parse("w4g32").weight, GptqOptions())
        assert failure.value.code == "BW401"


def test_weights_that_are_not_finite_are_an_error() -> None:
    weight = weights()
    weight[3, 7] = float("inf")
    with pytest.raises(BitwrightError, match="NaN or infinity") as failure:
        round_by_error_feedback(weight, correlated_site(100), parse("w4g32").weight, GptqOptions())
    assert failure.value.code == "BW602"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    weight, site = weights().to(dtype), correlated_site(100)
    narrow = round_by_error_feedback(weight, site, parse("w3g32").weight, GptqOptions()).tensor
    assert torch.equal(
        narrow.codes, round_by_error_feedback(weight.float(), site, parse("w3g32").weight, GptqOptions()).tensor.codes
    )


def test_nothing_that_is_given_is_changed() -> None:
    weight, site = weights(), correlated_site(100)
    assert site.gram is not None
    gram = site.gram.clone()
    for order in ORDERS:
        round_by_error_feedback(weight, site, parse("w3g32").weight, GptqOptions(**order))
    assert torch.equal(weight, weights()) and torch.equal(site.gram, gram)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0), ("block_size", True), ("damp", -0.1), ("damp", float("nan")), ("damp", "1"),
        ("search", "mse"), ("range", "wide"), ("act_order", 1), ("strict", None),
    ],
)  # fmt: skip
def test_options_are_checked_where_they_are_made(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match="accepted") as failure:
        GptqOptions(**{field: value})  # type: ignore[arg-type]
    assert failure.value.code == "BW201"
    with pytest.raises(ArgumentError, match="group_aware"):
        GptqOptions(act_order=True, group_aware=True)
