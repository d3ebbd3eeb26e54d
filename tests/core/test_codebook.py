"""The tables against their definitions, and nearest levels against a search through all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.codebook import FP8_MAX, decode_levels, encode_levels, levels
from bitwright.core.errors import ArgumentError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import CODEBOOK_BITS, QuantScheme
from bitwright.core.scheme_names import parse
from tests.core.restatement import code_values
from tests.core.strategies import random_matrix

TABLES = ("nf4", "fp4_e2m1", "fp4_bnb")


def worth(code: str) -> tuple[np.ndarray, np.ndarray]:
    return code_values(QuantScheme(code=code, bits=CODEBOOK_BITS[code]))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", TABLES)
def test_w6_tables_are_those_of_their_sources(code: str) -> None:
    np.testing.assert_allclose(levels(code).double().numpy(), worth(code)[1], rtol=0, atol=1e-7)  # seven digits


def test_w6_e2m1_is_the_ocp_set() -> None:
    found = sorted({abs(level) for level in (levels("fp4_e2m1").double() * 6).tolist()})
    assert found == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_fp8_codes_are_those_of_the_bits() -> None:
    codes, values = worth("fp8_e4m3")
    found = decode_levels(torch.from_numpy(codes.astype(np.uint8)), "fp8_e4m3")
    np.testing.assert_array_equal(found.double().numpy(), values)
    assert found.max() == FP8_MAX == 448


@pytest.mark.parametrize("code", [*TABLES, "fp8_e4m3"])
def test_levels_are_their_own_codes(code: str) -> None:
    codes, values = worth(code)
    found = encode_levels(torch.from_numpy(values.astype(np.float32)), code)
    again = decode_levels(found, code).double().numpy()
    np.testing.assert_allclose(again, values, rtol=0, atol=1e-7)
    zeros = values == 0
    assert (found.numpy()[~zeros] == codes[~zeros]).all()


@pytest.mark.parametrize("code", TABLES)
def test_w6_midpoints_go_down(code: str) -> None:
    distinct = np.unique(levels(code).double().numpy() if code == "nf4" else worth(code)[1])
    middle = ((distinct[1:] + distinct[:-1]) / 2).astype(np.float32)
    for values, wanted in ((middle, distinct[:-1]), (np.nextafter(middle, np.float32(2)), distinct[1:])):
        found = decode_levels(encode_levels(torch.from_numpy(values), code), code).double().numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)


@given(st.sampled_from([*TABLES, "fp8_e4m3"]), st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50))
def test_w6_the_nearest_level_is_found(code: str, numbers: list[float]) -> None:
    largest = FP8_MAX if code == "fp8_e4m3" else 1.0
    values = torch.tensor(numbers) * largest
    found = decode_levels(encode_levels(values, code), code).double().numpy()
    wanted = values.double().numpy()
    least = np.abs(worth(code)[1][None, :] - wanted[:, None]).min(1)
    assert (np.abs(found - wanted) <= least + 1e-7).all()


@given(st.sampled_from(["nf4g32", "fp4g32", "fp4e2m1g32", "nf4", "fp4e2m1-sf32"]), st.integers(0, 2**32 - 1))
def test_w6_values_lie_on_scale_times_levels(name: str, seed: int) -> None:
    tensor = QuantizedTensor.quantize(random_matrix(["normal", "outlier"], 70, seed), parse(name).weight)
    scale = tensor.dense_scale().float()
    width = tensor.scheme.group or 70
    table = levels(tensor.scheme.code)
    for column in range(70):
        possible = scale[:, column // width, None] * table
        assert bool((tensor.dequantize()[:, column, None] == possible).any(1).all())


@pytest.mark.parametrize("code", TABLES)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_w6_four_bit_tables_have_four_bits(code: str, bits: int) -> None:
    with pytest.raises(ValueError, match="bits") as caught:
        QuantScheme(code=code, bits=bits)  # type: ignore[arg-type]
    assert isinstance(caught.value, ArgumentError) and f"4 for {code}" in str(caught.value)
