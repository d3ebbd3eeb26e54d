"""Where ranges end: groups far from zero, and which shrunk ranges a search tries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse


@pytest.mark.parametrize("offset", [30.0, 1e3, -1e3, 1e5, -1e5])
def test_float_zero_points_far_from_zero_lose_less_than_a_code(offset: float) -> None:
    """A zero point of -15,000 would be off by four codes in float16, and one of 10^6 would overflow."""
    spread = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)).double()
    values = (offset + spread).to(torch.float32)
    tensor = QuantizedTensor.quantize(values, parse("w4g32-asym-fz").weight)
    assert isinstance(tensor.scale, torch.Tensor) and tensor.zero is not None
    assert tensor.zero.isfinite().all()
    error = (tensor.dequantize().double() - values.double()).abs()
    scale = tensor.scale.double().repeat_interleave(32, dim=1)
    assert (error <= 0.8 * scale + abs(offset) * 2.0**-11).all()
    assert (scale < 0.1 + abs(offset) * 2.0**-8).all()  # and the range is not wider than it must be


def test_a_search_finds_the_best_of_36_ranges_from_the_whole_to_three_tenths() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40, 16, generator=generator)
    values[:, 0] *= torch.linspace(1, 12, 40)  # outliers that pay to be cut off, by more and more
    tensor = QuantizedTensor.quantize(values, parse("w3g16-sf32").weight, FitOptions(search=True))
    assert isinstance(tensor.scale, torch.Tensor)
    rows, chosen = values.double().numpy(), set()
    for row, scale in zip(rows, tensor.scale[:, 0].double().tolist(), strict=True):
        whole = np.abs(row).max() / 3
        errors = []
        for step in range(36):
            tried = whole * (1 - 0.02 * step)
            errors.append(np.square(np.clip(np.round(row / tried), -4, 3) * tried - row).sum())
        step = round((1 - scale / whole) / 0.02)
        assert errors[step] == pytest.approx(min(errors), rel=1e-4)
        assert scale == pytest.approx(whole * (1 - 0.02 * step), rel=1e-5)
        chosen.add(step)
    assert max(chosen) > 15 and min(chosen) < 5


@pytest.mark.parametrize("power", [-70, 70])
def test_a_search_is_blind_to_the_unit(power: int) -> None:
    """Squares of such numbers over- or underflow in float32."""
    values = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    scheme, search = parse("w3g16-sf32").weight, FitOptions(search=True)
    plain, scaled = (QuantizedTensor.quantize(x, scheme, search) for x in (values, values * 2.0**power))
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.dense_scale() * 2.0**power, scaled.dense_scale())


@pytest.mark.parametrize("scheme", ["w4g32", "w8g32", "w4g32-asym", "w3g32-asym-fz"])
def test_a_search_stores_no_scale_that_overflows(scheme: str) -> None:
    """The narrowest of its ranges would have a scale in float16; the widest, with which it begins, has not."""
    form = parse(scheme).weight
    for constant in (False, True):  # a constant group keeps its own range
        values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        values *= 150_000 * form.code_max / float(values.abs().max()) if not constant else 0
        values = values + 70_000.0 if constant else values
        found = QuantizedTensor.quantize(values, form, FitOptions(search=True)).dequantize()
        assert found.isfinite().all()
        assert (found - values).norm() <= 0.2 * values.norm()
