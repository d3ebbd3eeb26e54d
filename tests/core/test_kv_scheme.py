"""Names, validation and bytes of cache schemes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import FLOAT, NAMED_KV, KVCode, KVScheme, code_bytes, float_tokens, kv_bytes, parse_kv

MIB = 1 << 20
LLAMA_7B = {"layers": 32, "kv_heads": 32, "head_dim": 128}


def valid_codes() -> list[KVCode]:
    found = []
    for bits in (8, 4, 2):
        for grain in ("token_head", "static_layer", "static_head", "channel"):
            for flags in range(4):
                for group in (0, 32):
                    try:
                        code = KVCode(
                            bits=bits, grain=grain, symmetric=bool(flags & 1), rotated=bool(flags & 2), group=group
                        )
                    except ArgumentError:
                        continue
                    found.append(code)
    return [*found, FLOAT, KVCode(bits=8, kind="fp8", symmetric=True)]


codes = st.sampled_from(valid_codes())
counts = st.integers(0, 300)


@st.composite
def plain_schemes(draw: st.DrawFn) -> KVScheme:
    key, value = draw(codes), draw(codes)
    extent = {} if key.is_float and value.is_float else {"window": draw(counts), "sinks": draw(counts)}
    return KVScheme(key=key, value=value, **extent)


@given(plain_schemes(), st.dictionaries(st.integers(0, 80), plain_schemes(), max_size=3))
def test_a_name_is_read_back_to_an_equal_scheme(scheme: KVScheme, overrides: dict[int, KVScheme]) -> None:
    scheme = KVScheme(key=scheme.key, value=scheme.value, window=scheme.window, sinks=scheme.sinks, overrides=overrides)
    assert parse_kv(scheme.name) == scheme
    assert all(scheme.at(layer) == other for layer, other in overrides.items())
    assert scheme.at(81).key == scheme.key


@pytest.mark.parametrize("name", NAMED_KV)
def test_names_are_told_as_they_were_given(name: str) -> None:
    assert parse_kv(name).name == name
    assert parse_kv(name.upper()) == parse_kv(name)


@pytest.mark.parametrize(("policy", "name"), [(0, "none"), (4, "int4"), (8, "int8"), ("8", "int8")])
def test_numbers_of_bits_are_names(policy: int | str, name: str) -> None:
    assert parse_kv(policy).name == name


@pytest.mark.parametrize("text", ["int3", 5, "", "int8-", "int8-head", "k8", "int4-static", "int8/0", "int8/0:", True])
def test_what_is_no_scheme_is_refused_with_what_there_is(text: str | int) -> None:
    with pytest.raises(ArgumentError) as refused:
        parse_kv(text)
    assert refused.value.code == "BW202"
    assert "int8" in str(refused.value) or "8" in refused.value.suggestion


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3},
        {"bits": 8, "kind": "float"},
        {"bits": 4, "grain": "static_layer"},
        {"bits": 8, "grain": "static_layer", "rotated": True},
        {"bits": 8, "kind": "fp8"},
        {"bits": 8, "grain": "channel"},
        {"bits": 8, "symmetric": 1},
        {"bits": 8, "grain": "head"},
    ],
)
def test_impossible_codes_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=r"cache scheme field"):
        KVCode(**fields)  # type: ignore[arg-type]


def test_overrides_do_not_nest() -> None:
    inner = KVScheme(key=KVCode(bits=8), overrides={1: NAMED_KV["int8"]})
    with pytest.raises(ArgumentError, match="overrides"):
        KVScheme(overrides={0: inner})


@pytest.mark.parametrize(("code", "expected"), [("none", 262_144), ("int8", 139_264), ("int4", 73_728)])
def test_a_span_of_128_tokens(code: str, expected: int) -> None:
    assert code_bytes(parse_kv(code).key, tokens=128, heads=8, head_dim=128) == expected


@pytest.mark.parametrize(("name", "expected"), [("none", 1024), ("int8-static", 512), ("int8", 544), ("int4", 288)])
def test_llama_7b_takes_what_the_documents_say(name: str, expected: int) -> None:
    assert round(kv_bytes(parse_kv(name), tokens=2048, **LLAMA_7B) / MIB, 3) == expected


@pytest.mark.parametrize(("batch", "difference"), [(8, 4096), (16, 8224), (32, 16448), (48, 24672)])
def test_differences_by_batch_are_those_of_the_document(batch: int, difference: int) -> None:
    """E11."""
    float_bytes, coded = (
        kv_bytes(parse_kv(name), tokens=2048, batch=batch, **LLAMA_7B) for name in ("none", "int8-static")
    )
    assert (float_bytes - coded) / MIB == pytest.approx(difference, rel=0.01)


def test_a_sequence_takes_less_than_half_of_what_qwens_table_implies() -> None:
    """Its GB are 2^30 bytes: the weights alone, 15.44e9 bytes, are more than the 15 GB of its row for 512 tokens."""
    implied = (48.7 - 31.7) / 16 * 2**30
    assert kv_bytes(parse_kv("none"), tokens=1024, **LLAMA_7B) <= implied / 2
    assert kv_bytes(parse_kv("int8"), tokens=1024, **LLAMA_7B) <= implied / 3.9


def test_windows_and_groups_leave_tokens_float() -> None:
    scheme = parse_kv("int2")
    assert [float_tokens(scheme, tokens) for tokens in (0, 4, 132, 163, 164, 196)] == [0, 4, 132, 163, 132, 132]
    assert float_tokens(parse_kv("int8-w16-s2"), 100) == 18


def test_layers_that_differ_are_counted_as_they_are() -> None:
    one = {"layers": 1, "kv_heads": 2, "head_dim": 64, "tokens": 10}
    mixed = kv_bytes(parse_kv("int8/1:int4"), **{**one, "layers": 2})
    assert mixed == kv_bytes(parse_kv("int8"), **one) + kv_bytes(parse_kv("int4"), **one)
