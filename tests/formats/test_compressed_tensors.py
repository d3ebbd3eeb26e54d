"""The compressed-tensors format against the package of that name, and against files that two versions of it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.compressed_tensors import FORMAT
from bitwright.formats.records import LayerRecord
from tests.formats.layers import Layer, make_layer, random_layer, write_checkpoint

NAME = "model.layers.0.mlp.up_proj"
PACKED = [f"w{bits}{group}{kind}" for bits in range(2, 9) for group in ("", "g32") for kind in ("", "-asym")]
BYTES = ["w8-a8", "w4-a8", "w8-asym-a8", "w8g32-a8", "w4g32-asym-a8", "w6-a8", "w4g32-a8g32", "w8-a8g16"]
SCALES = ["", "-sbf16", "-sf32", ""]
SHAPES = [(24, 96), (5, 32), (1, 64), (33, 160)]


def _compressor(record: LayerRecord) -> tuple[Any, Any]:
    """The package's own compressor and scheme for a layer."""
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    config = FORMAT.config({NAME: record}, [])
    quantization = package.quantization.QuantizationConfig.model_validate(config)
    scheme = quantization.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(config["format"]), scheme


def _with_scale(name: str, scale: str) -> str:
    weight, mark, group = name.partition("-a8")
    return weight + scale + mark + group


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _encoded(layer: Layer) -> dict[str, Tensor]:
    """Our tensors of a layer, without its name."""
    return {key.removeprefix(NAME + "."): value for key, value in FORMAT.encode(NAME, *layer).items()}


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_our_tensors_are_those_of_the_package_bit_for_bit(name: str) -> None:
    """Given the same codes and scales: the package is handed the numbers that they stand for, and finds them again."""
    for shape, scale in zip(SHAPES, SCALES, strict=True):
        _assert_same_bytes(_with_scale(name, scale), shape)


def _assert_same_bytes(name: str, shape: tuple[int, int]) -> None:
    layer, scheme = random_layer(name, shape)
    bits = scheme.weight.bits
    compressor, package_scheme = _compressor(LayerRecord(scheme, shape))
    zero = torch.zeros(layer.dense_scale().shape, dtype=torch.int8) if layer.zero is None else _signed(layer.zero, bits)
    state = {
        "weight": layer.dequantize(),
        "weight_scale": layer.dense_scale().to(torch.float32),
        "weight_zero_point": zero,
    }
    theirs = compressor.compress(state, package_scheme)
    ours = _encoded((layer, scheme))
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        wanted = theirs[key].to(scheme.weight.scale_dtype) if key == "weight_scale" else theirs[key]
        assert value.dtype == wanted.dtype and value.is_contiguous() and torch.equal(value, wanted), key


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_the_package_decodes_our_tensors_to_our_numbers(name: str) -> None:
    """It computes in the dtype of the scales, so that is where the two are compared: there they agree exactly."""
    for scale in SCALES[:3]:
        layer, scheme = make_layer(_with_scale(name, scale), (24, 96))
        compressor, package_scheme = _compressor(LayerRecord(scheme, (24, 96)))
        decoded = compressor.decompress(_encoded((layer, scheme)), package_scheme)["weight"]
        assert torch.equal(decoded, layer.dequantize(decoded.dtype)), scheme.name


def test_negative_scales_are_stored_and_mean_the_same_to_the_package() -> None:
    layer, scheme = make_layer("w4g32-sf32", (24, 96), options=FitOptions(symmetric_range="full"))
    assert bool((layer.dense_scale() < 0).any()) and int(layer.codes.min()) == -8
    compressor, package_scheme = _compressor(LayerRecord(scheme, (24, 96)))
    decoded = compressor.decompress(_encoded((layer, scheme)), package_scheme)["weight"]
    assert torch.equal(decoded, layer.dequantize())


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_a_layer_comes_back_with_the_same_numbers(tmp_path: Path, name: str) -> None:
    layer, scheme = make_layer(name, (24, 96))
    checkpoint = write_checkpoint(tmp_path, FORMAT, {NAME: (layer, scheme)})
    record = FORMAT.layers(checkpoint)[NAME]
    assert record == LayerRecord(scheme, (24, 96))
    read = FORMAT.decode(checkpoint, NAME, record)
    assert torch.equal(read.codes, layer.codes) and torch.equal(read.dequantize(), layer.dequantize())
    assert read.dense_scale().dtype == layer.dense_scale().dtype


def test_codes_centred_on_zero_come_back_counted_from_it(tmp_path: Path) -> None:
    """The format does not tell the two ways of writing asymmetric codes apart; the numbers are the same."""
    layer, scheme = make_layer("w4g32-asym-signed", (24, 96))
    checkpoint = write_checkpoint(tmp_path, FORMAT, {NAME: (layer, scheme)})
    record = FORMAT.layers(checkpoint)[NAME]
    assert record.scheme == parse("w4g32-asym")
    assert torch.equal(FORMAT.decode(checkpoint, NAME, record).dequantize(), layer.dequantize())


def test_scales_fallen_back_to_float32_survive(tmp_path: Path) -> None:
    scheme = parse("w4g32")
    tiny = QuantizedTensor.quantize(torch.randn(8, 64) * 1e-8, scheme.weight)
    checkpoint = write_checkpoint(tmp_path, FORMAT, {"a": (tiny, scheme), "b": make_layer("w4g32", (8, 64))})
    records = FORMAT.layers(checkpoint)
    read = FORMAT.decode(checkpoint, "a", records["a"])
    assert read.dense_scale().dtype == torch.float32 and torch.equal(read.dequantize(), tiny.dequantize())
    assert records["a"].scheme == parse("w4g32-sf32") and records["b"].scheme == scheme


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("nf4g32", 64, "nf4"), ("fp4g32", 64, "fp4"), ("fp8", 64, "fp8"), ("w4g32-dq", 64, "double"),
        ("A16W4", 64, "floats"), ("A8W8", 64, "floats"), ("w4g32-axis0", 64, "input features"), ("w1", 64, "2 bits"),
        ("w1-asym", 64, "2 bits"), ("w4g32", 72, "72"), ("w4g128", 64, "64, 32, 16"),
        ("w8-a8g48", 64, "groups of 48"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_with_the_reason(name: str, columns: int, words: str) -> None:
    layer, scheme = make_layer(name, (8, columns))
    reason = FORMAT.refuse(scheme, (8, columns))
    assert reason is not None and words in reason
    with pytest.raises(BitwrightError, match=r"(?s)BW205.*--format native"):
        FORMAT.encode(NAME, layer, scheme)


def test_a_group_index_and_a_foreign_scheme_are_refused() -> None:
    layer, scheme = make_layer("w4g32", (8, 64))
    indexed = replace(layer, group_index=torch.zeros(64, dtype=torch.int32))
    for tensor, told in ((indexed, scheme), (layer, parse("w4g64"))):
        with pytest.raises(BitwrightError, match="BW205"):
            FORMAT.encode(NAME, tensor, told)


@pytest.mark.parametrize("name", PACKED + BYTES)
def test_the_configuration_means_to_the_package_what_it_means_to_us(name: str) -> None:
    scheme = parse(name)
    _, package_scheme = _compressor(LayerRecord(scheme, (24, 96)))
    weights = package_scheme.weights
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (
        scheme.weight.bits,
        scheme.weight.symmetric,
        scheme.weight.group,
    )
    assert weights.strategy == ("channel" if scheme.weight.group is None else "group")
    activations = package_scheme.input_activations
    assert (activations is None) == (scheme.activation is None)
    if activations is not None:
        assert activations.dynamic is True and activations.group_size == scheme.activation_group
        assert activations.strategy == ("token" if scheme.activation_group is None else "group")
    assert package_scheme.targets == ["Linear"]


def test_layers_of_several_kinds_are_named_one_by_one() -> None:
    package = pytest.importorskip("compressed_tensors")
    records = {
        "a": LayerRecord(parse("w4g32"), (8, 64)),
        "b": LayerRecord(parse("w8a8"), (8, 64)),
        "c": LayerRecord(parse("w4g32-sf32"), (8, 64)),
    }
    config = FORMAT.config(records, ["lm_head"])
    assert config["format"] == "mixed-precision" and config["ignore"] == ["lm_head"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    read = package.quantization.QuantizationConfig.model_validate(config)
    assert read.config_groups["group_1"].input_activations.dynamic is True
    json.dumps(config)


def test_zero_points_lie_along_the_output_features() -> None:
    """Word 0 of a column holds the zero points of output features 0 to 7, the first in the lowest bits."""
    scheme = parse("w4g32-asym")
    zero = torch.arange(16, dtype=torch.uint8).reshape(8, 2)
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    tensor = QuantizedTensor(scheme=scheme.weight, codes=codes, scale=torch.ones(8, 2).half(), zero=zero)
    words = FORMAT.encode(NAME, tensor, scheme)[f"{NAME}.weight_zero_point"]
    assert [[word & 0xFFFFFFFF for word in row] for row in words.tolist()] == [[0xECA86420, 0xFDB97531]]
    assert torch.equal(bitpack.unpack(words.t().contiguous(), 4, 8).t(), zero)


def test_schemes_are_compared_by_what_is_stored() -> None:
    """Scales of two dtypes are one group of the configuration: it does not say their dtype."""
    bfloat = replace(parse("w4g32"), weight=QuantScheme(bits=4, group=32, scale_dtype=torch.bfloat16))
    records = {"a": LayerRecord(parse("w4g32"), (8, 64)), "b": LayerRecord(bfloat, (8, 64))}
    assert list(FORMAT.config(records, [])["config_groups"]) == ["group_0"]
