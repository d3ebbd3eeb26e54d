"""InternLM2 and the first Qwen from their own checkpoints, against their forward passes restated in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright import Engine
from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.kernels import native_library
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from tests.models import decoder_laws
from tests.models.fused_models import (
    GROUPS,
    HEADS,
    HIDDEN,
    INTERNLM2,
    QWEN,
    VOCABULARY,
    WIDTH,
    internlm2_logits,
    qwen_logits,
    saved,
)

Tensors = dict[str, Tensor]
CASES: list[tuple[dict[str, Any], dict[str, Any], Callable[[Tensors, list[int], bool], Tensor]]] = [
    (INTERNLM2, {}, internlm2_logits),
    (INTERNLM2, {"bias": True, "rope_scaling": None}, internlm2_logits),
    (QWEN, {}, qwen_logits),
]


@pytest.mark.parametrize(("config", "changes", "restated"), CASES)
def test_they_compute_what_was_published(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], restated: Callable[..., Tensor]
) -> None:
    directory, tensors = saved(tmp_path / "m", config, **changes)
    tokens = torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = restated(tensors, tokens, bool(changes.get("bias")))
    with torch.no_grad():
        model: Any = load(directory)
        found = model(input_ids=torch.tensor([tokens])).logits[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if native_library.missing() is None:
        direct = open_direct(directory)
        assert direct is not None
        decoder = NativeDecoder(direct.pack(None))
        piece = decoder_laws.Piece(decoder_laws.Text(tokens, [2, 0]), 50)
        logits = decoder_laws.run(decoder, decoder.new_cache(3), [piece])[0].double()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [INTERNLM2, QWEN], ids=["internlm2", "qwen"])
def test_they_are_quantized_loaded_and_decoded(tmp_path: Path, config: dict[str, Any]) -> None:
    """Through the stream; what is written is a checkpoint of the model that it is."""
    directory, tensors = saved(tmp_path / "m", config)
    quantize(directory, tmp_path / "q", scheme="w8g32", algorithm="rtn")
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["model_type"] == ("qwen2" if config is QWEN else "llama") and "auto_map" not in written
    assert written["max_position_embeddings"] == 128
    restated = qwen_logits if config is QWEN else internlm2_logits
    tokens = list(range(1, 40))
    with torch.no_grad():
        model: Any = load(tmp_path / "q")
        found = model(input_ids=torch.tensor([tokens])).logits[0].double()
    expected = restated(tensors, tokens, False)
    assert (found - expected).norm() < 0.1 * expected.norm()
    with Engine(load(tmp_path / "q")) as engine:
        answer = engine.generate([tokens], max_tokens=10, ignore_end=True)[0].tokens
    assert answer[0] == int(found[-1].argmax()) and len(answer) == 10


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    directory, tensors = saved(tmp_path / "m", INTERNLM2)
    checkpoint = open_checkpoint(directory)
    whole = tensors["model.layers.1.attention.wqkv.weight"].view(GROUPS, HEADS // GROUPS + 2, WIDTH, HIDDEN)
    for name, rows in (("q_proj", whole[:, :-2]), ("k_proj", whole[:, -2]), ("v_proj", whole[:, -1])):
        stored = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(checkpoint.read(stored), rows.reshape(-1, HIDDEN))
        streamed = b"".join(checkpoint.source(stored).chunks())
        assert streamed == rows.reshape(-1, HIDDEN).contiguous().numpy().tobytes()
        entry = checkpoint.stored(stored).entry
        assert entry.nbytes == rows.numel() * 4
        part = entry.rows([(3, 5), (WIDTH - 1, WIDTH + 1)])
        assert part.shape == (4, HIDDEN) and part.nbytes == 4 * HIDDEN * 4
    total = sum(stored.entry.nbytes for stored in checkpoint.tensors.values())
    assert total == sum(tensor.nbytes for tensor in tensors.values())


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN, {"no_bias": False}, "BW306.*no_bias"),
    (QWEN, {"rotary_pct": 0.25}, "BW306.*rotary_pct"),
    (QWEN, {"kv_channels": 32}, "BW307.*kv_channels"),
    (QWEN, {"intermediate_size": 193}, "BW307.*odd"),
    (QWEN, {"seq_length": None}, "BW307.*seq_length"),
    (QWEN, {"hidden_size": 128, "kv_channels": 32}, "BW304.*c_attn"),
    (INTERNLM2, {"rope_scaling": {"type": "yarn"}}, "BW306.*yarn"),
    (INTERNLM2, {"hidden_act": "gelu"}, "BW306.*gelu"),
    (INTERNLM2, {"num_key_value_heads": 3}, "BW307.*multiple"),
    (INTERNLM2, {"num_key_value_heads": 4}, "BW304.*wqkv"),
    (INTERNLM2, {"num_attention_heads": "4"}, "BW307.*num_attention_heads"),
    (INTERNLM2, {"hidden_size": 66}, "BW307.*multiple"),
]


@pytest.mark.parametrize(("config", "changes", "says"), REFUSED)
def test_what_is_not_known_is_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    directory, _ = saved(tmp_path / "m", config)
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(BitwrightError, match=says):
        open_checkpoint(directory)
