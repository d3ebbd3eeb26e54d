"""The table of formats: found by name and by what a checkpoint says; and, for every format, any layer at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.records import Format, LayerRecord
from bitwright.formats.table import FORMATS, find_format, get_format
from tests.formats.layers import decode_all, random_layer, same_tensor, scratch_directory, write_checkpoint


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_a_format_is_found_by_its_name_and_its_configuration(entry: Format) -> None:
    assert get_format(entry.name) is entry
    # Of the versions of GPTQ, each is found where the others would write something else.
    scheme = "w4g32-asym" if entry.name == "gptq_v1" else "w4g32"
    records = {"model.layers.0.a": LayerRecord(parse(scheme), (32, 64))}
    assert find_format(entry.config(records, [])) is entry


def test_where_none_is_named_the_most_widely_read_one_comes_first() -> None:
    assert FORMATS[-1].name == "compressed-tensors" and FORMATS[0].name == "native"


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(BitwrightError, match=r"(?s)BW201.*'gguf'.*native, gptq_v1, gptq_v2, gptq, awq, compressed-ten"):
        get_format("gguf")


@pytest.mark.parametrize("method", ["gguf", None, 5, ["bitwright"], "x" * 1000])
def test_an_unknown_method_is_named(method: object) -> None:
    with pytest.raises(BitwrightError, match=r"(?s)BW311.*it reads native, .*compressed-tensors") as caught:
        find_format({"quant_method": method})
    assert len(str(caught.value)) < 400


@st.composite
def schemes(draw: st.DrawFn) -> str:
    name = f"w{draw(st.integers(1, 8))}"
    name += draw(st.sampled_from(["", *(f"g{size}" for size in (1, 3, 8, 16, 32))]))
    name += draw(st.sampled_from(["", "-asym", "-asym-fz", "-asym-signed"])) + draw(st.sampled_from(["", "-axis0"]))
    return name + draw(st.sampled_from(["", "-sbf16", "-sf32"]))


@settings(max_examples=60)
@given(schemes(), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_any_layer_that_is_not_refused_comes_back(name: str, rows: int, columns: int, seed: int) -> None:
    """Any codes, zero points and scales: exactly, where the format keeps the scheme; else with the same numbers."""
    layer, scheme = random_layer(name, (rows, columns), seed=seed)
    assert scheme == parse(name)
    for entry in FORMATS:
        if entry.refuse(scheme, (rows, columns)) is not None:
            continue
        with scratch_directory() as folder:
            read = decode_all(write_checkpoint(folder, entry, {"model.a": (layer, scheme)}))["model.a"]
        assert same_tensor(read, layer) or ("signed" in name and entry.name != "native")
        assert bool((read.dequantize() == layer.dequantize()).all())
