"""GPTQ checkpoints: byte for byte what GPTQModel writes, and what a naive reading of the specification packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats import awq, compressed_tensors, gptq
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.records import LayerRecord
from bitwright.formats.table import find_format
from tests.formats.layers import decode_all, make_layer, random_layer, same_tensor, write_checkpoint
from tests.golden.write_gptq import GPTQ, count_numbers

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "model.layers.0.mlp.up_proj"
SCHEMES = [f"w{bits}{group}{kind}" for bits in (2, 3, 4, 8) for group in ("", "g32") for kind in ("", "-asym")]


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes as one number, least bit first, cut into 32-bit words with a sign."""
    number = sum(code << (bits * position) for position, code in enumerate(codes))
    words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def naive(layer: QuantizedTensor, version: int) -> dict[str, list[Any]]:
    """The tensors of a layer by the specification, one code at a time."""
    bits, middle = layer.scheme.bits, 1 << (layer.scheme.bits - 1)
    (rows, columns), groups = layer.shape, layer.group_count
    size = layer.scheme.group or columns
    shift = middle if layer.scheme.code == "int" else 0
    codes = [[int(code) + shift for code in row] for row in layer.codes]
    zeros = [
        [middle if layer.zero is None else int(layer.zero[n][g]) + shift for n in range(rows)] for g in range(groups)
    ]
    stored = [[(zero - (2 - version)) % (1 << bits) for zero in row] for row in zeros]
    down = [stream(codes[n], bits) for n in range(rows)]
    index = layer.group_index.tolist() if layer.group_index is not None else [k // size for k in range(columns)]
    return {
        "qweight": [[down[n][word] for n in range(rows)] for word in range(len(down[0]))],
        "qzeros": [stream(row, bits) for row in stored],
        "scales": layer.dense_scale().t().tolist(),
        "g_idx": index,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEMES, "w4g32-asym-signed"])
@pytest.mark.parametrize("version", [1, 2])
def test_our_tensors_are_those_of_the_specification(name: str, version: int) -> None:
    layer, scheme = random_layer(name, (32, 64))
    ours = gptq.encode(NAME, layer, scheme, version)
    expected = naive(layer, version)
    assert {key.removeprefix(NAME + "."): value.tolist() for key, value in ours.items()} == expected
    assert {value.dtype for key, value in ours.items() if "scales" not in key} == {torch.int32}
    assert ours[f"{NAME}.scales"].dtype == torch.float16 and all(value.is_contiguous() for value in ours.values())


def test_the_order_of_bits_is_that_of_autogptq() -> None:
    """W11."""
    codes = torch.tensor([7, -3, -2, -1, 0, 1, 2, 3], dtype=torch.int8).repeat(32, 4)
    tensor = QuantizedTensor(scheme=parse("w4").weight, codes=codes, scale=torch.ones(32, 1, dtype=torch.float16))
    encoded = gptq.FORMAT.encode(NAME, tensor, parse("w4"))
    assert set(encoded[f"{NAME}.qweight"].flatten().tolist()) == {0xBA98765F - (1 << 32)}
    assert set(encoded[f"{NAME}.qzeros"].flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize("folder", GPTQ)
def test_golden_checkpoints_are_read_exactly(folder: str) -> None:
    version, layers = GPTQ[folder]
    read = decode_all(open_checkpoint(GOLDEN / folder))
    assert set(read) == set(layers)
    for name, layer in layers.items():
        numbers, tensor = count_numbers(layer, 1 if version == 1 else 0), read[name]
        middle = 1 << (layer.bits - 1)
        codes = tensor.codes.to(torch.int16) + (middle if layer.symmetric else 0)
        assert torch.equal(codes.to(torch.uint8), numbers.codes) and torch.equal(tensor.dense_scale(), numbers.scale)
        assert tensor.zero is None if layer.symmetric else torch.equal(tensor.zero, numbers.zero)  # type: ignore[arg-type]
        assert (tensor.group_index is not None) == layer.reordered
        index = numbers.index.long()
        expected = (numbers.codes.float() - numbers.zero.float()[:, index]) * numbers.scale.float()[:, index]
        assert torch.equal(tensor.dequantize(), expected)


@pytest.mark.parametrize("folder", GPTQ)
def test_a_checkpoint_that_is_read_and_written_again_has_the_same_bytes(folder: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / folder)
    found = find_format(checkpoint.quantization or {})
    written: dict[str, Tensor] = {}
    records = found.layers(checkpoint)
    for name, record in records.items():
        written |= found.encode(name, found.decode(checkpoint, name, record), record.scheme)
    stored = {
        name: tensor for name, tensor in load_file(GOLDEN / folder / "model.safetensors").items() if "bias" not in name
    }
    assert set(written) == set(stored)
    assert all(written[name].dtype == stored[name].dtype for name in stored)
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    again = found.config(records, [])
    assert again["checkpoint_format"] == (checkpoint.quantization or {})["checkpoint_format"]
    assert all(again[key] == (checkpoint.quantization or {})[key] for key in ("bits", "group_size", "desc_act", "sym"))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("written", [gptq.FORMAT, gptq.FORMAT_V1, gptq.FORMAT_V2], ids=lambda entry: entry.name)
def test_any_zero_point_comes_back(tmp_path: Path, name: str, written: Any) -> None:
    """Those of 0 too, which version 1 stores as all ones: nothing carries into the code beside it."""
    layer, scheme = random_layer(name, (32, 64))
    read = decode_all(write_checkpoint(tmp_path, written, {NAME: (layer, scheme)}))[NAME]
    assert same_tensor(read, layer)
    if layer.zero is not None and scheme.weight.bits < 8:
        assert bool((layer.zero == 0).any())


def test_columns_may_be_in_any_group(tmp_path: Path) -> None:
    layer, scheme = random_layer("w4g32-asym", (32, 96))
    index = torch.randperm(96, generator=torch.Generator().manual_seed(1)).to(torch.int32) % 3
    layer = QuantizedTensor(
        scheme=layer.scheme, codes=layer.codes, scale=layer.scale, zero=layer.zero, group_index=index
    )
    assert gptq.encode(NAME, layer, scheme)[f"{NAME}.g_idx"].tolist() == index.tolist()
    checkpoint = write_checkpoint(tmp_path, gptq.FORMAT, {NAME: (layer, scheme)})
    assert same_tensor(decode_all(checkpoint)[NAME], layer)


def test_desc_act_is_announced() -> None:
    scheme = parse("w4g32")
    plain = gptq.FORMAT.config({NAME: LayerRecord(scheme, (32, 64))}, [])
    moved = gptq.FORMAT.config({"a.0.b": LayerRecord(scheme, (32, 64)), NAME: LayerRecord(scheme, (32, 64), True)}, [])
    assert plain["desc_act"] is False and moved["desc_act"] is True and "dynamic" not in moved


@pytest.mark.parametrize("name", [name for name in SCHEMES if "asym" not in name])
def test_the_weight_is_that_of_compressed_tensors_turned(name: str) -> None:
    layer, scheme = make_layer(name, (32, 64))
    ours, other = gptq.encode(NAME, layer, scheme), compressed_tensors.encode(NAME, layer, scheme)
    assert torch.equal(ours[f"{NAME}.qweight"].t(), other[f"{NAME}.weight_packed"])
    assert torch.equal(ours[f"{NAME}.scales"].t(), other[f"{NAME}.weight_scale"])


def test_zero_points_of_version_2_are_those_of_compressed_tensors_turned() -> None:
    layer, scheme = random_layer("w3g32-asym", (32, 64))
    ours, other = gptq.encode(NAME, layer, scheme, 2), compressed_tensors.encode(NAME, layer, scheme)
    assert torch.equal(ours[f"{NAME}.qzeros"].t(), other[f"{NAME}.weight_zero_point"])


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("nf4g32", (32, 64), "nf4"), ("w4g32-dq", (32, 64), "double"), ("A16W4", (32, 64), "floats"),
        ("w4g32-axis0", (32, 64), "input features"), ("w5", (32, 64), "2, 3, 4, 8 bits, not 5"),
        ("w8a8", (32, 64), "activations"), ("w4g32-sbf16", (32, 64), "float16"), ("w4g32", (40, 64), "40 x 64"),
        ("w4g8", (32, 40), "32 x 40"), ("w4g8", (32, 64), "not 8"), ("w4g128", (32, 64), "do not divide 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_with_the_reason(name: str, shape: tuple[int, int], words: str) -> None:
    reason = gptq.refuse(parse(name), shape)
    assert reason is not None and words in reason


def test_encoding_refuses_what_it_would_change() -> None:
    layer, _ = make_layer("w4g32", (32, 64))
    for scheme in (parse("w4g32-asym"), parse("w4g32-a8"), parse("w4g32-a8g32")):
        with pytest.raises(BitwrightError, match=r"(?s)BW205.*--format native"):
            gptq.encode(NAME, layer, scheme)


def test_scales_too_large_for_float16_are_refused() -> None:
    scheme = parse("w4g32")
    tensor = QuantizedTensor.quantize(torch.full((32, 64), 1e9), scheme.weight)
    with pytest.raises(BitwrightError, match=r"BW205.*float16"):
        gptq.encode(NAME, tensor, scheme)


@pytest.mark.parametrize("written", [gptq.FORMAT, awq.FORMAT], ids=lambda entry: entry.name)
def test_scales_too_small_for_float16_stay_as_they_are(tmp_path: Path, written: Any) -> None:
    """In the layer that has them; others keep float16, and readers cast."""
    scheme = parse("w4g32")
    layers = {
        NAME: QuantizedTensor.quantize(torch.randn(32, 64) * 1e-7, scheme.weight),
        "model.layers.0.a": make_layer("w4g32", (32, 64))[0],
    }
    checkpoint = write_checkpoint(tmp_path, written, {name: (tensor, scheme) for name, tensor in layers.items()})
    assert [layer.dense_scale().dtype for layer in layers.values()] == [torch.float32, torch.float16]
    read = decode_all(checkpoint)
    assert all(same_tensor(read[name], tensor) for name, tensor in layers.items())
