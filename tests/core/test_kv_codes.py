"""Codes of keys and values against their formulas in float64, and on the inputs that break such formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_codes import Coded, StaticParameters, decode_kv, encode_kv, join, rotate_head, unpacked
from bitwright.core.kv_scheme import KVCode, code_bytes, parse_kv

HEAD = 16
ONLINE = ("int8", "int4", "int8-rotated", "int4-rotated", "fp8", "int8-sym", "int4-sym", "int4-g8", "int2-channel4")


def code_of(name: str) -> KVCode:
    return parse_kv(name).key


def numbers(tokens: int = 8, *, seed: int = 0, head: int = HEAD) -> Tensor:
    return torch.randn(2, 3, tokens, head, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_online_codes_are_those_of_the_formula(bits: int) -> None:
    x = numbers(seed=bits)
    code = KVCode(bits=bits)
    coded = encode_kv(x, code)
    assert coded.scale is not None
    assert coded.low is not None
    low, high = x.amin(-1).double(), x.amax(-1).double()
    torch.testing.assert_close(coded.scale[..., 0].double(), (high - low) / (2**bits - 1), rtol=1e-6, atol=0)
    assert torch.equal(coded.low[..., 0], x.amin(-1))
    exact = (x.double() - low[..., None]) / ((high - low) / (2**bits - 1))[..., None]
    codes = unpacked(coded.codes, code, HEAD).double()
    assert float((codes - exact).abs().max()) <= 0.5 + 1e-5
    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    expected = codes * coded.scale.double() + coded.low.double()
    torch.testing.assert_close(decode_kv(coded, code, HEAD).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("value", [0.0, 2.0, -3.5, 1e-30, -1e-42, 3e38, 65504.0])
def test_constant_inputs_come_back_exactly(name: str, value: float) -> None:
    """E2."""
    code = code_of(name)
    x = torch.full((1, 2, 4, HEAD), value if abs(value) < 1e38 or not code.rotated else 1e37)
    back = decode_kv(encode_kv(x, code), code, HEAD)
    if code.rotated:  # the rotation itself rounds
        torch.testing.assert_close(back, x, rtol=1e-2, atol=1e-37)
    elif abs(value) >= torch.finfo(torch.float32).tiny or not code.symmetric:
        assert torch.equal(back, x)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=HEAD, max_size=HEAD),
    st.sampled_from(["int8", "int4", "int2-channel1", "int8-sym", "int4-g4"]),
)
@settings(max_examples=80, deadline=None)
def test_no_number_is_off_by_more_than_half_a_step(row: list[float], name: str) -> None:
    code = code_of(name)
    x = torch.tensor(row).view(1, 1, 1, HEAD)
    coded = encode_kv(x, code)
    back = decode_kv(coded, code, HEAD)
    assert bool(torch.isfinite(back).all())
    assert coded.scale is not None
    wide = coded.scale.double().repeat_interleave(HEAD // coded.scale.shape[-1], -1)
    limit = wide / 2 * (1 + 1e-5) + x.abs().amax().double() * 1e-6
    assert bool(((back.double() - x.double()).abs() <= limit).all())


def test_four_bit_codes_lie_low_nibble_first() -> None:
    x = torch.arange(16.0).view(1, 1, 1, 16)
    assert encode_kv(x, KVCode(bits=4)).codes.flatten().tolist() == [
        0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE,
    ]  # fmt: skip
    two = encode_kv(torch.tensor([0.0, 1, 2, 3] * 3).view(1, 1, 1, 12), KVCode(bits=2))
    assert two.codes.flatten().tolist() == [0b11100100] * 3


def test_the_static_formula_clamps_its_extremes() -> None:
    x = torch.tensor([-63.75, 0.0, 63.75, 99.0]).view(1, 1, 1, 4)
    code = code_of("int8-static")
    parameters = StaticParameters(torch.tensor([0.5]), torch.tensor([0.0]))
    coded = encode_kv(x, code, parameters)
    assert coded.codes.view(torch.int8).flatten().tolist() == [-128, 0, 127, 127]
    back = decode_kv(coded, code, 4, parameters).flatten()
    torch.testing.assert_close(back, torch.tensor([-64.0, 0, 63.5, 63.5]))


def test_the_symmetric_static_formula() -> None:
    """E3."""
    x = torch.tensor([-2.54, 0.0, 2.54, 0.01]).view(1, 1, 1, 4)
    parameters = StaticParameters(torch.tensor([2.54 / 127]), torch.tensor([0.0]))
    coded = encode_kv(x, code_of("int8-static-sym"), parameters)
    assert coded.codes.view(torch.int8).flatten().tolist() == [-127, 0, 127, 0]


def test_static_parameters_of_each_head() -> None:
    x = torch.tensor([[1.0, -1], [10, -10]]).view(1, 2, 1, 2)
    parameters = StaticParameters(torch.tensor([2 / 255, 20 / 255]), torch.tensor([0.0, 0.0]))
    code = code_of("int8-static-head")
    back = decode_kv(encode_kv(x, code, parameters), code, 2, parameters)
    torch.testing.assert_close(back, x, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_coded_alone(name: str, dtype: torch.dtype) -> None:
    """However tokens, and sequences, come together, each has the codes that it has alone."""
    code = code_of(name)
    x = numbers(8).to(dtype)
    whole = encode_kv(x, code)
    parts = [encode_kv(x[:, :, start : start + 4], code) for start in (0, 4)]
    assert_equal(join(parts), whole)
    assert_equal(whole.each(lambda part: part[1:]), encode_kv(x[1:], code))
    assert_equal(whole.span(0, 4, code.group if code.grain == "channel" else 1), parts[0])


@pytest.mark.parametrize("name", [*ONLINE, "int2-g8"])
@pytest.mark.parametrize("head", [8, 24])
def test_bytes_are_those_of_the_planner(name: str, head: int) -> None:
    code = code_of(name)
    coded = encode_kv(numbers(head=head), code)
    assert coded.nbytes == 2 * code_bytes(code, tokens=8, heads=3, head_dim=head)


@pytest.mark.parametrize("head", [2, 8, 24, 80, 128])
def test_the_rotation_is_orthonormal_and_undoes_itself(head: int) -> None:
    x = numbers(head=head)
    turned = rotate_head(x)
    torch.testing.assert_close(turned.square().sum(-1), x.square().sum(-1))
    torch.testing.assert_close(rotate_head(turned), x, atol=1e-5, rtol=1e-5)


def test_rotated_keys_and_queries_have_the_scores_of_plain_ones() -> None:
    code = KVCode(bits=8, rotated=True)
    keys, queries = numbers(seed=1), numbers(seed=2)
    coded = encode_kv(keys, code)
    scores = rotate_head(queries) @ decode_kv(coded, code, HEAD, keep_rotated=True).transpose(2, 3)
    torch.testing.assert_close(scores, queries @ decode_kv(coded, code, HEAD).transpose(2, 3), atol=1e-4, rtol=1e-4)


def test_a_rotation_spreads_an_outlier() -> None:
    x = numbers()
    x[..., 3] += 40
    errors = []
    for name in ("int4", "int4-rotated"):
        back = decode_kv(encode_kv(x, code_of(name)), code_of(name), HEAD)
        errors.append(float((back - x).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", ["int8", "int4-rotated", "fp8", "int2-channel4", "int8-static"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    x = numbers()
    x[0, 0, 0, 0] = bad
    parameters = StaticParameters(torch.ones(1), torch.zeros(1))
    with pytest.raises(BitwrightError) as refused:
        encode_kv(x, code_of(name), parameters)
    assert refused.value.code == "BW602"


def test_static_codes_need_parameters() -> None:
    with pytest.raises(BitwrightError, match="calibrated"):
        encode_kv(numbers(), code_of("int8-static"))


def assert_equal(left: Coded, right: Coded) -> None:
    assert torch.equal(left.codes, right.codes)
    for one, other in ((left.scale, right.scale), (left.low, right.low)):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_the_rotation_is_hadamards() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = numbers()
    torch.testing.assert_close(rotate_head(x).double(), x.double() @ matrix / 4, atol=1e-6, rtol=1e-6)
