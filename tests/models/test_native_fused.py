"""InternLM2 and the first Qwen from their own checkpoints, against their forward passes restated in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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

HIDDEN, HEADS, GROUPS, INNER, LAYERS, VOCABULARY = 64, 4, 2, 96, 2, 80
WIDTH = HIDDEN // HEADS
Tensors = dict[str, Tensor]
INTERNLM2: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_size": HIDDEN, "bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}, "rms_norm_eps": 1e-5,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "silu",
    "num_key_value_heads": GROUPS, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "torch_dtype": "float32", "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": HIDDEN, "no_bias": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "layer_norm_epsilon": 1e-6,
    "intermediate_size": 2 * INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "kv_channels": WIDTH,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "seq_length": 128, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True, "fp16": True,
    "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


def internlm2_tensors(draw: Callable[..., Tensor], bias: bool) -> Tensors:
    rows = (HEADS + 2 * GROUPS) * WIDTH
    tensors = {"model.tok_embeddings.weight": draw(VOCABULARY, HIDDEN), "output.weight": draw(VOCABULARY, HIDDEN)}
    tensors["model.norm.weight"] = 1 + draw(HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.attention.wqkv.weight": draw(rows, HIDDEN), f"{name}.attention.wo.weight": draw(HIDDEN, HIDDEN),
            f"{name}.feed_forward.w1.weight": draw(INNER, HIDDEN),
            f"{name}.feed_forward.w3.weight": draw(INNER, HIDDEN),
            f"{name}.feed_forward.w2.weight": draw(HIDDEN, INNER),
            f"{name}.attention_norm.weight": 1 + draw(HIDDEN), f"{name}.ffn_norm.weight": 1 + draw(HIDDEN),
        }  # fmt: skip
        if bias:
            tensors |= {f"{name}.attention.wqkv.bias": draw(rows), f"{name}.attention.wo.bias": draw(HIDDEN)}
    return tensors


def qwen_tensors(draw: Callable[..., Tensor]) -> Tensors:
    tensors = {"transformer.wte.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    tensors["transformer.ln_f.weight"] = 1 + draw(HIDDEN)
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        tensors |= {
            f"{name}.attn.c_attn.weight": draw(3 * HIDDEN, HIDDEN), f"{name}.attn.c_attn.bias": draw(3 * HIDDEN),
            f"{name}.attn.c_proj.weight": draw(HIDDEN, HIDDEN), f"{name}.ln_1.weight": 1 + draw(HIDDEN),
            f"{name}.mlp.w1.weight": draw(INNER, HIDDEN), f"{name}.mlp.w2.weight": draw(INNER, HIDDEN),
            f"{name}.mlp.c_proj.weight": draw(HIDDEN, INNER), f"{name}.ln_2.weight": 1 + draw(HIDDEN),
        }  # fmt: skip
    return tensors


def saved(directory: Path, config: dict[str, Any], **changes: Any) -> tuple[Path, Tensors]:
    config = {**config, **changes}
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(0, 0.2, generator=generator)

    is_qwen = config["model_type"] == "qwen"
    tensors = qwen_tensors(draw) if is_qwen else internlm2_tensors(draw, bool(config["bias"]))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, tensors


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """Causal attention of ``[tokens, heads, width]`` with rotary positions; each head of keys has its queries."""
    tokens = q.shape[0]
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / base ** (torch.arange(0, WIDTH, 2) / WIDTH)
    cosine, sine = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    q, k = turn(q), turn(k).repeat_interleave(HEADS // k.shape[1], dim=1)
    v = v.repeat_interleave(HEADS // v.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(WIDTH)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(tokens, HIDDEN)


def internlm2_logits(tensors: Tensors, tokens: list[int], bias: bool) -> Tensor:
    """The published forward pass: ``wqkv`` gives ``[heads of keys, queries of each + key + value, width]``."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    silu = torch.nn.functional.silu
    x = t["model.tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        y = norm(x, t[f"{name}.attention_norm.weight"], 1e-5) @ t[f"{name}.attention.wqkv.weight"].T
        y = y + t[f"{name}.attention.wqkv.bias"] if bias else y
        parts = y.view(len(tokens), GROUPS, HEADS // GROUPS + 2, WIDTH)
        q = parts[:, :, :-2].reshape(len(tokens), HEADS, WIDTH)
        y = attend(q, parts[:, :, -2], parts[:, :, -1], 1e6) @ t[f"{name}.attention.wo.weight"].T
        x = x + (y + t[f"{name}.attention.wo.bias"] if bias else y)
        y = norm(x, t[f"{name}.ffn_norm.weight"], 1e-5)
        gate, up = (y @ t[f"{name}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (silu(gate) * up) @ t[f"{name}.feed_forward.w2.weight"].T
    return norm(x, t["model.norm.weight"], 1e-5) @ t["output.weight"].T


def qwen_logits(tensors: Tensors, tokens: list[int], _: bool) -> Tensor:
    """The published forward pass, of texts that are not longer than the training's: ``w1(x) * silu(w2(x))``."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["transformer.wte.weight"][tokens]
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        y = norm(x, t[f"{name}.ln_1.weight"], 1e-6) @ t[f"{name}.attn.c_attn.weight"].T
        q, k, v = (part.view(-1, HEADS, WIDTH) for part in (y + t[f"{name}.attn.c_attn.bias"]).split(HIDDEN, dim=-1))
        x = x + attend(q, k, v, 1e4) @ t[f"{name}.attn.c_proj.weight"].T
        y = norm(x, t[f"{name}.ln_2.weight"], 1e-6)
        a, b = (y @ t[f"{name}.mlp.{part}.weight"].T for part in ("w1", "w2"))
        x = x + (a * torch.nn.functional.silu(b)) @ t[f"{name}.mlp.c_proj.weight"].T
    return norm(x, t["transformer.ln_f.weight"], 1e-6) @ t["lm_head.weight"].T


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
    (QWEN, {"quantization_config": {"quant_method": "gptq"}}, "BW306.*codes of fused weights"),
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
