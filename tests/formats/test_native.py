"""The native format: exact for every scheme, small where it should be, and strict about what it reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import NAMED_SCHEMES, parse
from bitwright.formats import native
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from tests.formats.layers import decode_all, make_layer, same_tensor, write_checkpoint
from tests.golden.write_native import build_layers

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "native-1"
INTEGERS = [f"w{bits}{group}{kind}" for bits in range(1, 9) for group in ("", "g32") for kind in ("", "-asym")]
OTHERS = [
    *NAMED_SCHEMES, "nf4", "nf4g64", "nf4g64-dq", "fp4g32", "fp4e2m1g16", "fp8", "fp8g64", "w4g32-axis0",
    "nf4g32-axis0", "w4g32-asym-axis0", "w4g32-asym-dq(ggml)", "w3g16-dq(w8g64)", "w4g48-asym-signed", "w4g32-asym-fz",
    "w4g32-sbf16", "w4g32-asym-sf32", "a16w4g32", "w4g32-asym-a8", "w2g128-dq", "w8-asym-fz-axis0", "w4-axis0",
    "w4g32-a8g64",
]  # fmt: skip
SHAPES = [(24, 160), (7, 70), (1, 1), (3, 33)]


@pytest.mark.parametrize("name", INTEGERS + OTHERS)
def test_layers_come_back_exactly(tmp_path: Path, name: str) -> None:
    layers = {f"model.layers.{rows}.mlp": make_layer(name, (rows, columns)) for rows, columns in SHAPES}
    checkpoint = write_checkpoint(tmp_path, native.FORMAT, layers)
    records = native.FORMAT.layers(checkpoint)
    assert list(records) == list(layers)
    for key, (layer, scheme) in layers.items():
        assert records[key] == LayerRecord(scheme, layer.shape)
        assert same_tensor(native.FORMAT.decode(checkpoint, key, records[key]), layer), layer.shape
        assert native.FORMAT.refuse(scheme, layer.shape) is None


def test_negative_scales_and_scales_fallen_back_to_float32_survive(tmp_path: Path) -> None:
    full = make_layer("w4g32", (8, 64), options=FitOptions(symmetric_range="full"))
    assert bool((full[0].dense_scale() < 0).any())
    scheme = parse("w4g32")
    tiny = QuantizedTensor.quantize(torch.randn(8, 64) * 1e-8, scheme.weight)
    assert tiny.dense_scale().dtype == torch.float32
    layers = {"full": full, "tiny": (tiny, scheme)}
    checkpoint = write_checkpoint(tmp_path, native.FORMAT, layers)
    for name, record in native.FORMAT.layers(checkpoint).items():
        assert same_tensor(native.FORMAT.decode(checkpoint, name, record), layers[name][0])


def test_a_group_index_survives(tmp_path: Path) -> None:
    layer, scheme = make_layer("w4g32-asym", (8, 64))
    indexed = replace(layer, group_index=(torch.randperm(64) % 2).to(torch.int32))
    checkpoint = write_checkpoint(tmp_path, native.FORMAT, {"a": (indexed, scheme)})
    read = native.FORMAT.decode(checkpoint, "a", native.FORMAT.layers(checkpoint)["a"])
    assert same_tensor(read, indexed) and torch.equal(read.dequantize(), indexed.dequantize())


def test_many_layers_of_many_schemes_share_one_checkpoint(tmp_path: Path) -> None:
    layers = {f"model.layers.{index}.x": make_layer(name, (16, 64)) for index, name in enumerate(INTEGERS + OTHERS)}
    checkpoint = write_checkpoint(tmp_path, native.FORMAT, layers)
    records = native.FORMAT.layers(checkpoint)
    assert list(records) == list(layers)
    for name, record in records.items():
        assert same_tensor(native.FORMAT.decode(checkpoint, name, record), layers[name][0])


@pytest.mark.parametrize("name", ["nf4g64-dq", "w4g32-dq", "w4g64-asym-dq", "w4g32-dq(ggml)", "w4g48-dq(w4g32)"])
def test_doubly_quantized_scales_take_the_room_of_their_bits(name: str) -> None:
    """Case W7: at most bits/16 of the float16 scales' bytes, beside the few bytes of the nested scales; tails too."""
    layer, scheme = make_layer(name, (128, 1000))
    nested = scheme.weight.scale_scheme
    assert nested is not None and nested.group is not None
    tensors = native.FORMAT.encode("a", layer, scheme)
    groups = 128 * layer.group_count
    size = {key: value.numel() * value.element_size() for key, value in tensors.items()}
    assert size["a.scale.codes"] <= groups * 2 * nested.bits / 16 + 4
    meta = sum(size[key] for key in size if key.startswith("a.scale.") and key != "a.scale.codes")
    per_group = nested.scale_dtype.itemsize + (0 if nested.symmetric else 1)
    assert meta <= -(-groups // nested.group) * per_group + 4


@pytest.mark.parametrize("name", INTEGERS)
def test_the_tensors_take_the_bits_that_the_scheme_says(name: str) -> None:
    layer, scheme = make_layer(name, (32, 64))
    size = sum(value.numel() * value.element_size() for value in native.FORMAT.encode("a", layer, scheme).values())
    assert size * 8 <= layer.stored_bits() + 32


def test_the_words_are_the_codes_counted_from_the_smallest() -> None:
    codes = torch.tensor([[7, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)
    scale = torch.ones(1, 1, dtype=torch.float16)
    scheme = LayerScheme(weight=QuantScheme(bits=4, group=None))
    tensors = native.FORMAT.encode("a", QuantizedTensor(scheme=scheme.weight, codes=codes, scale=scale), scheme)
    assert set(tensors) == {"a.codes", "a.scale"}
    assert tensors["a.codes"].tolist() == [[0xBA98765F - (1 << 32)]]


def test_a_layer_is_refused_when_its_record_would_lie() -> None:
    layer, _ = make_layer("w4g32", (8, 64))
    with pytest.raises(BitwrightError, match="BW205"):
        native.FORMAT.encode("a", layer, parse("w4g64"))


def _damage_config(directory: Path, change: dict[str, Any], layer: dict[str, Any] | None = None) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_bytes())
    config["quantization_config"] |= change
    if layer is not None:
        config["quantization_config"]["layers"]["a"] = layer
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "layer", "code", "words"),
    [
        ({"version": 2}, None, "BW311", "version 2"),
        ({"version": "1"}, None, "BW311", "version 1"),
        ({"version": True}, None, "BW311", "version"),
        ({"layers": []}, None, "BW311", "records"),
        ({"layers": {}}, None, "BW311", "records"),
        ({}, {"scheme": "w4g32"}, "BW311", "record of a"),
        ({}, {"scheme": "w99", "shape": [8, 64]}, "BW311", "w99"),
        ({}, {"scheme": "w" + "4" * 5000, "shape": [8, 64]}, "BW311", "record of a"),
        ({}, {"scheme": ["w4g32"], "shape": [8, 64]}, "BW311", "record of a"),
        ({}, {"scheme": "w4g32", "shape": [8, -64]}, "BW311", "record of a"),
        ({}, {"scheme": "w4g32", "shape": [8, 64, 1]}, "BW311", "record of a"),
        ({}, {"scheme": "w4g32", "shape": [True, 64]}, "BW311", "record of a"),
        ({}, {"scheme": "w4g32", "shape": [8, 1 << 40]}, "BW311", "record of a"),
        ({}, {"scheme": "w4g32", "shape": [16, 64]}, "BW304", "a.codes"),
        ({}, {"scheme": "w4g32", "shape": [8, 96]}, "BW304", "a.codes"),
        ({}, {"scheme": "w4g64", "shape": [8, 64]}, "BW304", "a.scale"),
        ({}, {"scheme": "w3g32", "shape": [8, 64]}, "BW304", "a.codes"),
        ({}, {"scheme": "w4g32-sbf16", "shape": [8, 64]}, "BW304", "a.scale"),
        ({}, {"scheme": "w4g32-asym", "shape": [8, 64]}, "BW303", "a.zero"),
        ({}, {"scheme": "w4g32-dq", "shape": [8, 64]}, "BW303", "a.scale.codes"),
    ],
)
def test_a_record_that_the_files_contradict_is_refused(
    tmp_path: Path, change: dict[str, Any], layer: dict[str, Any] | None, code: str, words: str
) -> None:
    write_checkpoint(tmp_path, native.FORMAT, {"a": make_layer("w4g32", (8, 64))})
    _damage_config(tmp_path, change, layer)
    with pytest.raises(BitwrightError) as caught:
        decode_all(open_checkpoint(tmp_path))
    assert caught.value.code == code and words in str(caught.value) and len(str(caught.value)) < 2000


def test_missing_and_stray_tensors_are_named(tmp_path: Path) -> None:
    layer, scheme = make_layer("w4g32", (8, 64))
    checkpoint = write_checkpoint(tmp_path, native.FORMAT, {"a": (layer, scheme), "b": (layer, scheme)})
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    write_file(tmp_path / "model.safetensors", serialize(tensors | {"a.bias": torch.zeros(8)}))
    assert set(native.FORMAT.layers(open_checkpoint(tmp_path))) == {"a", "b"}
    write_file(tmp_path / "model.safetensors", serialize(tensors | {"a.weight": torch.zeros(8, 64)}))
    with pytest.raises(BitwrightError, match=r"(?s)BW303.*1 unexpected tensors: a\.weight"):
        native.FORMAT.layers(open_checkpoint(tmp_path))
    write_file(
        tmp_path / "model.safetensors", serialize({"a.codes": tensors["a.codes"], "a.scale": tensors["a.scale"]})
    )
    with pytest.raises(
        BitwrightError, match=r"(?s)BW303.*2 tensors of quantized layers are missing: b\.codes, b\.scale"
    ):
        native.FORMAT.layers(open_checkpoint(tmp_path))


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    layer, scheme = make_layer("w4g32", (8, 64))
    indexed = replace(layer, group_index=torch.zeros(64, dtype=torch.int32))
    good = native.FORMAT.encode("a", indexed, scheme)
    write_checkpoint(tmp_path, native.FORMAT, {"a": (indexed, scheme)})
    infinite = good["a.scale"].clone()
    infinite[3, 1] = torch.inf
    outside = torch.full((64,), 2, dtype=torch.int32)
    for change, code in (({"a.scale": infinite}, "BW309"), ({"a.group_index": outside}, "BW311")):
        write_file(tmp_path / "model.safetensors", serialize(good | change))
        checkpoint = open_checkpoint(tmp_path)
        with pytest.raises(BitwrightError, match=code):
            native.FORMAT.decode(checkpoint, "a", native.FORMAT.layers(checkpoint)["a"])


def test_the_codes_of_a_large_layer_are_packed_by_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing goes through the one packer, once per tensor: nothing in the format loops over elements."""
    calls: list[int] = []
    pack = bitpack.pack
    monkeypatch.setattr(bitpack, "pack", lambda codes, bits: calls.append(codes.numel()) or pack(codes, bits))
    layer, scheme = make_layer("w3g32-asym", (64, 256))
    native.FORMAT.encode("a", layer, scheme)
    assert calls == [64 * 256, 64 * 8]


def test_the_bytes_of_version_one_never_change(tmp_path: Path) -> None:
    layers = build_layers()
    write_checkpoint(tmp_path, native.FORMAT, layers)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name
    for name, read in decode_all(open_checkpoint(GOLDEN)).items():
        assert same_tensor(read, layers[name][0]), name
