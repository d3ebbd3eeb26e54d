"""Small random models of several architectures, and checkpoints of them, float and quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.formats.records import LayerRecord
from bitwright.formats.table import get_format
from bitwright.models.blocks import is_linear, linear_shape, linear_weight

__all__ = ["ARCHITECTURES", "VOCABULARY", "byte_tokenizer", "dequantized", "save_float", "save_quantized"]

VOCABULARY = 300


def llama(tied: bool = True) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def qwen2() -> PreTrainedModel:
    """Attention biases, and an output head of its own."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=False,
        )
    )  # fmt: skip


def gpt2() -> PreTrainedModel:
    """Conv1D layers, whose weights are stored [in, out]."""
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128))


def opt() -> PreTrainedModel:
    """Blocks two levels below the base model, and biases everywhere."""
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
            max_position_embeddings=128, word_embed_proj_dim=48,
        )
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-untied": lambda: llama(tied=False),
    "qwen2": qwen2,
    "gpt2": gpt2,
    "opt": opt,
}


def byte_tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters are several tokens; then an end token and ``extra`` more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens([f"<extra {number}>" for number in range(extra)])
    return fast


def save_float(model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As transformers saves it."""
    model.to(dtype).save_pretrained(directory)
    return directory


def save_quantized(
    model: PreTrainedModel,
    directory: Path,
    schemes: Mapping[str, LayerScheme],
    *,
    format: str = "native",
    rename: Callable[[str], str] = lambda name: name,
) -> dict[str, QuantizedTensor]:
    """Write ``model`` with some layers quantized, and return their tensors; ``rename`` changes names in the file."""
    layout = get_format(format)
    modules = dict(model.named_modules())
    file_tensors = {rename(name): tensor.contiguous() for name, tensor in _state(model).items()}
    quantized: dict[str, QuantizedTensor] = {}
    records: dict[str, LayerRecord] = {}
    for name, scheme in schemes.items():
        tensor = QuantizedTensor.quantize(linear_weight(modules[name]).detach(), scheme.weight)
        file_tensors.pop(rename(name + ".weight"), None)
        file_tensors |= layout.encode(rename(name), tensor, scheme)
        quantized[name] = tensor
        records[rename(name)] = LayerRecord(scheme, linear_shape(modules[name]))
    ignored = [rename(name) for name, module in modules.items() if is_linear(module) and name not in schemes]
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"quantization_config": layout.config(records, ignored)}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in file_tensors.items()}, directory / "model.safetensors")
    return quantized


def dequantized(model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor]) -> PreTrainedModel:
    """``model`` itself, with the stored numbers of the quantized layers as dense weights."""
    for name, tensor in tensors.items():
        module = model.get_submodule(name)
        values = tensor.dequantize(model.dtype)
        with torch.no_grad():
            module.weight.copy_(values if isinstance(module, torch.nn.Linear) else values.t())
    return model.eval()


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter once: of tied ones, the first."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
