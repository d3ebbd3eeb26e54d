"""From files to the native decoder without transformers: the same numbers, the same refusals, less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.kernels import arena, native_library
from bitwright.kernels.native_decoder import PackedFloats
from bitwright.models.decoder import read_shape, refuse_architecture
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.hf import empty_model
from bitwright.models.limits import end_tokens
from bitwright.models.loading import load
from bitwright.models.plain_config import read_plain
from bitwright.models.skeleton import Skeleton
from bitwright.quantization.api import quantize
from tests.models import decoder_laws
from tests.models.architectures import build

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tied": True}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "dtype": torch.bfloat16}),
    ("mistral", {}),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}),
    ("qwen3", {"tied": True, "dtype": torch.float16}),
]


def saved(directory: Path, name: str, fields: dict[str, Any]) -> Path:
    build(name, **fields).save_pretrained(directory)
    return directory


def logits(decoder: NativeDecoder) -> torch.Tensor:
    text = decoder_laws.random_text(40, decoder.shape.vocabulary, [2, 0])
    return decoder_laws.run(decoder, decoder.new_cache(3), [decoder_laws.Piece(text, 40)])[0]


@pytest.mark.parametrize(("name", "fields"), MODELS)
def test_it_is_the_decoder_of_the_loaded_model(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    directory = saved(tmp_path / "m", name, fields)
    for head in (None, parse("w8")):
        direct = open_direct(directory)
        assert direct is not None
        found, expected = NativeDecoder(direct.pack(head)), NativeDecoder(load(directory), head=head)
        assert torch.equal(logits(found), logits(expected))
        assert found.weight_bytes() == expected.weight_bytes()
    assert end_tokens(direct.model) == end_tokens(load(directory))


@pytest.mark.parametrize("scheme", ["w4g32", "w8a8", "nf4g32", "w4g32-asym-a8", "w4g32-a8g32"])
@pytest.mark.parametrize("format", ["native", None])
def test_quantized_checkpoints(tmp_path: Path, scheme: str, format: str | None) -> None:
    if format is None and scheme == "nf4g32":
        pytest.skip("no other format stores it")
    source = saved(tmp_path / "m", "qwen2", {})
    quantize(source, tmp_path / "q", scheme=scheme, algorithm="rtn", format=format or "compressed-tensors")
    direct = open_direct(tmp_path / "q")
    assert direct is not None
    assert torch.equal(logits(NativeDecoder(direct.pack(None))), logits(NativeDecoder(load(tmp_path / "q"))))


FIELDS: list[dict[str, Any]] = [
    {}, {"num_key_value_heads": None}, {"head_dim": 32}, {"rope_theta": 5e5},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3, "rope_theta": 9000.0}, {"rope_scaling": None},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"sliding_window": None},
    {"use_sliding_window": True, "max_window_layers": 1}, {"layer_types": ["full_attention"] * 2},
    {"partial_rotary_factor": 0.5}, {"torch_dtype": "bfloat16"}, {"dtype": "float16", "torch_dtype": "bfloat16"},
    {"eos_token_id": [3, 4]}, {"eos_token_id": None}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"},
    {"num_hidden_layers": 0}, {"num_attention_heads": 5}, {"hidden_size": "64"}, {"rms_norm_eps": 1},
]  # fmt: skip
REMOVED = ["", "num_key_value_heads", "head_dim", "sliding_window", "rms_norm_eps", "eos_token_id", "vocab_size"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_configuration_means_what_transformers_reads_in_it(family: str) -> None:
    """Or it is not read here at all. With every field changed, and with each removed."""
    base: dict[str, Any] = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 80, "sliding_window": 8,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "dtype": "float32", "eos_token_id": 7,
    }  # fmt: skip
    read = 0
    for change in FIELDS:
        for removed in REMOVED:
            fields = {name: value for name, value in {**base, **change}.items() if name != removed}
            plain = read_plain(fields)
            if plain is None:
                continue
            read += 1
            own = dict(fields)
            model = empty_model(AutoConfig.for_model(own.pop("model_type"), **own))
            skeleton = Skeleton(plain)
            assert refuse_architecture(model) == "the model has parameters without values (on the meta device)"
            found, expected = read_shape(skeleton), read_shape(model)
            for field in found.__slots__:
                one, other = getattr(found, field), getattr(expected, field)
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (fields, field)
            shapes = [{name: (p.shape, p.dtype) for name, p in each.named_parameters()} for each in (skeleton, model)]
            assert shapes[0] == shapes[1], fields
            assert end_tokens(skeleton) == end_tokens(model)
    assert read > 40 if family != "gpt2" else read == 0


def test_what_it_cannot_read_is_left_to_others(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", "llama", {})
    config = json.loads((directory / "config.json").read_text())
    changes = [{"model_type": kind} for kind in ("gpt2", ["llama"], {"a": 1}, None)]
    for change in (*changes, {"hidden_act": "gelu"}, {"num_hidden_layers": 3}):
        (directory / "config.json").write_text(json.dumps(config | change))
        assert open_direct(directory) is None
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 81}))
    direct = open_direct(directory)
    assert direct is not None
    for load_it in (lambda: load(directory), lambda: direct.pack(None)):
        with pytest.raises(BitwrightError, match=r"BW304.*lm_head|embed_tokens"):
            load_it()
    (directory / "config.json").write_text(json.dumps(config))
    assert open_direct(directory) is not None
    (directory / "generation_config.json").write_text("[")
    assert open_direct(directory) is None
    assert open_direct(tmp_path) is None


@pytest.mark.parametrize(("scheme", "least", "most"), [(None, 60e6, 80e6), ("w4g32", 20e6, 35e6)])
def test_packing_takes_little_more_memory_than_what_is_packed(
    tmp_path: Path, scheme: str | None, least: float, most: float
) -> None:
    """Beside the packed weights, at no time more than the largest tensor: here a tied embedding of 16 MB."""
    fields: dict[str, Any] = {
        "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "tied": True,
        "num_attention_heads": 8, "num_key_value_heads": 8, "dtype": torch.bfloat16,
    }  # fmt: skip
    directory = saved(tmp_path / "m", "llama", fields)
    if scheme is not None:
        quantize(directory, tmp_path / "q", scheme=scheme, algorithm="rtn")
        directory = tmp_path / "q"
    program = (
        "import sys; from pathlib import Path; from bitwright.core.scheme_names import parse;"
        "from bitwright.models.direct_loading import open_direct;"
        "read = lambda name: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name));"
        "open_direct(Path(sys.argv[2])).pack(None);"
        "before = read('VmRSS'); open('/proc/self/clear_refs', 'w').write('5');"
        "weights = open_direct(Path(sys.argv[1])).pack(parse('w8'));"
        "print((read('VmHWM') - before) * 1024, weights.bytes())"
    )
    small = saved(tmp_path / "s", "llama", {"dtype": torch.bfloat16})
    command = [sys.executable, "-c", program, str(directory), str(small)]
    largest, pages = 16384 * 512 * 2, 8 << 20
    peaks: list[int] = []
    for _ in range(3):  # which large pages the system gives differs from run to run; a copy too many is in each of them
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peak, packed = map(int, found.stdout.split())
        peaks.append(peak)
        assert least < packed < most
        if peak < packed + largest + pages:
            break
    assert packed / 2 < min(peaks) < packed + largest + pages, peaks


@pytest.mark.parametrize("scheme", [None, "w4g32", "w8a8"])
def test_codes_are_packed_where_they_stay(tmp_path: Path, scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside them only scales, norms and the like are copied; nothing takes room that nobody knows."""
    directory = saved(tmp_path / "m", "qwen2", {})
    if scheme is not None:
        quantize(directory, tmp_path / "q", scheme=scheme, algorithm="rtn")
        directory = tmp_path / "q"
    copied: list[int] = []
    keep = arena.Arena.keep

    def note(self: arena.Arena, tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.nbytes)
        return keep(self, tensor)

    monkeypatch.setattr(arena.Arena, "keep", note)
    monkeypatch.setattr(arena._shared, "room", None)
    monkeypatch.setattr(arena, "SMALLEST", 0)  # else small operands would come from elsewhere
    direct = open_direct(directory)
    assert direct is not None
    weights = direct.pack(parse("w8"))
    codes = [dense.weight for dense in weights.denses()]
    smallest = min(
        each.codes.nbytes if isinstance(each, PackedFloats) else each.tensors["codes"].nbytes for each in codes
    )
    assert copied and max(copied) < smallest, (max(copied), smallest)


def test_nothing_of_transformers_is_imported() -> None:
    """Nor of what it takes seconds to import; until there is text to encode."""
    program = (
        "import sys; from bitwright.engine import engine, resources;"
        "from bitwright.models.location import resolve_model;"
        "from bitwright.models.direct_loading import open_direct;"
        "open_direct(resolve_model('demo:')).pack(None);"
        "print(sorted({'transformers', 'sympy', 'torch._dynamo', 'triton', 'huggingface_hub'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
