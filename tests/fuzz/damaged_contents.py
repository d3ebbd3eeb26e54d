"""Damage to what the files of a model say: its configuration, index, weights, tokenizer; done to a copy."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

__all__ = [
    "CONFIG",
    "INDEX",
    "config_calls_remote_code",
    "config_has_a_huge_number",
    "config_has_a_name_twice",
    "config_has_another_type",
    "config_has_more_layers",
    "config_is_huge",
    "config_size_is_wrong",
    "index_escapes",
    "index_has_no_map",
    "index_names_are_wrong",
    "list_shards",
    "numbers_are_infinite",
    "only_pickles_are_left",
    "quantization_is_no_object",
    "quantization_is_unknown",
    "quantization_lost_a_field",
    "record_is_too_many",
    "record_is_wrong",
    "shard_is_a_pickle",
    "shard_is_longer",
    "shard_lies_about_its_header",
    "shards_are_swapped",
    "template_is_hostile",
    "tensor_has_another_dtype",
    "tensor_has_another_name",
    "tensor_has_another_shape",
    "tensor_is_gone",
    "tensor_is_too_many",
    "tensor_offsets_are_wrong",
    "tokenizer_calls_remote_code",
    "tokenizer_is_of_another_kind",
    "work_is_unfinished",
]

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def list_shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = _read(path)
    change(header)
    _write(path, header, data)


def _tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _weights(header: dict[str, Any]) -> list[str]:
    """Matrices that are not square: their shape can be wrong."""
    names = [name for name in _tensors(header) if len(header[name]["shape"]) == 2]
    return [name for name in names if header[name]["shape"][0] != header[name]["shape"][1]]


# The configuration.


def config_has_a_name_twice(model: Path, random: Random) -> None:
    path = model / CONFIG
    path.write_text('{"model_type": "gpt2",' + path.read_text(encoding="utf-8").lstrip()[1:], encoding="utf-8")


def config_has_a_huge_number(model: Path, random: Random) -> None:
    path = model / CONFIG
    path.write_text('{"x": ' + "9" * 5000 + "," + path.read_text(encoding="utf-8").lstrip()[1:], encoding="utf-8")


def config_is_huge(model: Path, random: Random) -> None:
    path = model / CONFIG
    path.write_bytes(path.read_bytes() + b" " * (9 << 20))


def config_size_is_wrong(model: Path, random: Random) -> None:
    keys = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]

    def change(record: dict[str, Any]) -> None:
        key = random.choice([key for key in keys if isinstance(record.get(key), int)])
        other = random.choice([0, -1, record[key] * 2 + 1, record[key] + 1, 1 << 40, "64", 1.5, [], float("nan")])
        record[key] = other

    _edit_json(model / CONFIG, change)


def config_has_more_layers(model: Path, random: Random) -> None:
    def change(record: dict[str, Any]) -> None:
        record["num_hidden_layers"] += random.choice([1, 3])

    _edit_json(model / CONFIG, change)


def config_has_another_type(model: Path, random: Random) -> None:
    names = ["lama", "no-such-model", "", 5, None, [], "../llama", "bert\0"]
    _edit_json(model / CONFIG, lambda record: record.update(model_type=random.choice(names)))


def config_calls_remote_code(model: Path, random: Random) -> None:
    """Such code is never run: with a known model type the model loads as if it were not there."""
    (model / "modeling_evil.py").write_text("raise SystemExit('remote code ran')\n")
    _edit_json(model / CONFIG, lambda record: record.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}))


def quantization_is_no_object(model: Path, random: Random) -> None:
    _edit_json(model / CONFIG, lambda record: record.update(quantization_config=random.choice([[], "w4", 4, True, {}])))


def quantization_is_unknown(model: Path, random: Random) -> None:
    methods = ["aqlm", "exl3", "bitwrigth", "\x1b[2J", None, 5, ["bitwright"]]
    _edit_json(model / CONFIG, lambda record: record["quantization_config"].update(quant_method=random.choice(methods)))


def quantization_lost_a_field(model: Path, random: Random) -> None:
    def change(record: dict[str, Any]) -> None:
        quantization = record["quantization_config"]
        needed = {
            "bitwright": ["layers", "version"], "compressed-tensors": ["config_groups", "format"],
            "gptq": ["quant_method", "bits"], "awq": ["quant_method"],
        }  # fmt: skip
        del quantization[random.choice(needed[quantization["quant_method"]])]

    _edit_json(model / CONFIG, change)


def record_is_wrong(model: Path, random: Random) -> None:
    schemes = ["w4g16", "w3g32", "w4g32-axis0", "nf4g64-dq", "w99", "", 4, None, "w4g" + "9" * 300]
    shapes: list[Any] = [[1, 1], [64], [0, 64], [-64, 64], [1 << 31, 1 << 31], "x", [64.0, 64.0], None]

    def change(record: dict[str, Any]) -> None:
        layers = record["quantization_config"]["layers"]
        layer = layers[random.choice(list(layers))]
        if random.random() < 0.5:
            layer["scheme"] = random.choice([scheme for scheme in schemes if scheme != layer["scheme"]])
        else:
            layer["shape"] = random.choice(shapes)

    _edit_json(model / CONFIG, change)


def record_is_too_many(model: Path, random: Random) -> None:
    def change(record: dict[str, Any]) -> None:
        layers = record["quantization_config"]["layers"]
        name = random.choice(list(layers))
        layers["model.layers.999.x"] = layers[name]

    _edit_json(model / CONFIG, change)


# The index.


def index_escapes(model: Path, random: Random) -> None:
    names = ["../outside/{}", "/etc/passwd", "..", ".", "", "sub/{}", "a\\b", "\0", "{}\n", "./{}", "../model/{}"]

    def change(record: dict[str, Any]) -> None:
        weight_map = record["weight_map"]
        name = random.choice(list(weight_map))
        weight_map[name] = random.choice(names).format(weight_map[name])

    _edit_json(model / INDEX, change)


def index_names_are_wrong(model: Path, random: Random) -> None:
    def change(record: dict[str, Any]) -> None:
        weight_map = record["weight_map"]
        names, files = list(weight_map), sorted(set(weight_map.values()))
        kind, name = random.randrange(6), random.choice(names)
        others = [file for file in files if file != weight_map[name]]
        if kind == 0:
            weight_map["lm_head.extra"] = files[0]
        elif kind == 1:
            del weight_map[name]
        elif kind == 2:
            weight_map[name] = random.choice(others)
        elif kind == 3:
            weight_map[name] = "model-00009-of-00009.safetensors"
        elif kind == 4:
            weight_map[name] = random.choice([None, 5, [], {}])
        else:
            weight_map[name] = "pytorch_model.bin"

    _edit_json(model / INDEX, change)


def index_has_no_map(model: Path, random: Random) -> None:
    _edit_json(model / INDEX, lambda record: record.update(weight_map=random.choice([None, [], {}, "x", 5])))


# The shards.


def shards_are_swapped(model: Path, random: Random) -> None:
    first, second = random.sample(list_shards(model), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def shard_is_longer(model: Path, random: Random) -> None:
    with random.choice(list_shards(model)).open("ab") as file:
        file.write(random.randbytes(random.randrange(1, 100)))


def shard_lies_about_its_header(model: Path, random: Random) -> None:
    path = random.choice(list_shards(model))
    content = path.read_bytes()
    lie = random.choice([0, 1, len(content), 1 << 40, (1 << 64) - 1, int.from_bytes(content[:8], "little") - 1])
    path.write_bytes(struct.pack("<Q", lie) + content[8:])


def shard_is_a_pickle(model: Path, random: Random) -> None:
    content = random.choice([b"\x80\x04\x95" + b"cos\nsystem\n" * 20, b"PK\x03\x04" + bytes(200), b"GGUF" + bytes(99)])
    random.choice(list_shards(model)).write_bytes(content)


def only_pickles_are_left(model: Path, random: Random) -> None:
    for path in list_shards(model):
        path.rename(path.with_suffix(random.choice([".bin", ".pt", ".pth"])))
    (model / INDEX).unlink(missing_ok=True)


def work_is_unfinished(model: Path, random: Random) -> None:
    (model / ".bitwright").mkdir(exist_ok=True)
    (model / ".bitwright/journal.jsonl").touch()
    (model / INDEX).unlink(missing_ok=True)
    (model / "model.safetensors").unlink(missing_ok=True)


def tensor_offsets_are_wrong(model: Path, random: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = header[random.choice(_tensors(header))]
        entry["data_offsets"] = [offset + random.choice([-1, 1, 8, 1 << 50]) for offset in entry["data_offsets"]]

    _edit_header(random.choice(list_shards(model)), change)


def tensor_is_gone(model: Path, random: Random) -> None:
    """The last tensor of a shard and its bytes are cut off cleanly; the index does not know."""
    path = random.choice(list_shards(model))
    header, data = _read(path)
    last = max(_tensors(header), key=lambda name: header[name]["data_offsets"])
    start = header.pop(last)["data_offsets"][0]
    _write(path, header, data[:start])


def tensor_has_another_name(model: Path, random: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        name = random.choice(_tensors(header))
        header[name + "x"] = header.pop(name)

    _edit_header(random.choice(list_shards(model)), change)


def tensor_has_another_dtype(model: Path, random: Random) -> None:
    same = {"F32": ["I32", "U32"], "BF16": ["I16", "U16"], "F16": ["I16"], "I32": ["F32"], "I64": ["F64"], "I8": ["U8"]}

    def change(header: dict[str, Any]) -> None:
        name = random.choice([name for name in _tensors(header) if header[name]["dtype"] in same])
        header[name]["dtype"] = random.choice(same[header[name]["dtype"]])

    _edit_header(random.choice(list_shards(model)), change)


def tensor_has_another_shape(model: Path, random: Random) -> None:
    def change(header: dict[str, Any]) -> None:
        # One scale per row may be stored as a column or without its second dimension: both are read.
        names = [name for name in _weights(header) or _tensors(header) if not name.endswith("_scale")]
        name = random.choice(names)
        shape = header[name]["shape"]
        flat = 1
        for size in shape:
            flat *= size
        others = [shape[::-1], [flat], [1, *shape], [*shape, 1]] if len(shape) > 1 else [[1, flat]]
        header[name]["shape"] = random.choice([other for other in others if other != shape])

    _edit_header(random.choice(list_shards(model)), change)


def tensor_is_too_many(model: Path, random: Random) -> None:
    path = model / "model.safetensors"
    header, data = _read(path)
    header["model.layers.0.stray.weight"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    _write(path, header, data + bytes(4))


def numbers_are_infinite(model: Path, random: Random) -> None:
    """Of a float model the weights; of a quantized one its scales."""
    path = random.choice(list_shards(model))
    header, data = _read(path)
    wide = {"F32": b"\0\0\x80\x7f", "BF16": b"\x80\x7f", "F16": b"\0\x7c"}
    names = [name for name in _tensors(header) if header[name]["dtype"] in wide]
    names = [name for name in names if name.endswith("scale")] or names
    entry = header[random.choice(names)]
    start, infinity = entry["data_offsets"][0], wide[entry["dtype"]]
    _write(path, header, data[:start] + infinity + data[start + len(infinity) :])


# The tokenizer and its template.


def tokenizer_is_of_another_kind(model: Path, random: Random) -> None:
    records = [
        {},
        {"model": 5},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["b", "c"]]}},
    ]
    (model / "tokenizer.json").write_text(json.dumps(random.choice(records)))


def tokenizer_calls_remote_code(model: Path, random: Random) -> None:
    (model / "tokenization_evil.py").write_text("raise SystemExit('remote code ran')\n")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})
    )


def template_is_hostile(model: Path, random: Random) -> None:
    templates = [
        "{% for", "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{% for a in range(10**12) %}x{% endfor %}",
        "{{ 'x' * 10**11 }}", "{{ ''.__class__ }}", "{% include '/etc/passwd' %}", "\ud800",
    ]  # fmt: skip
    path = model / "tokenizer_config.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(record | {"chat_template": random.choice(templates)}))
