"""The sizes of the models that are measured, and random weights of them, packed without ever being dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from benchmarks.gpu_runs.timing import Bench
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_FP8, LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import fp8, integer, linear
from bitwright.kernels.records import Kernel, PackedWeight
from bitwright.models.quantized import QuantizedLinear

__all__ = ["MODELS", "TINY", "ModelShape", "decoded_double", "kernel_of", "make_model", "packed", "random_tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """``biased``: whether queries, keys and values have biases."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    biased: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """``[out, in]`` of the distinct products of a block, as they are joined."""
        head = self.hidden // self.heads
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * head, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama-3-8b": ModelShape(name="llama-3-8b", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8,
                             vocabulary=128256),
    "qwen2.5-7b": ModelShape(name="qwen2.5-7b", hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4,
                             vocabulary=152064, biased=True),
    "qwen-7b": ModelShape(name="qwen-7b", hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32,
                          vocabulary=151936, biased=True),
    "llama-7b": ModelShape(name="llama-7b", hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32,
                           vocabulary=32000),
}  # fmt: skip
TINY = ModelShape(name="tiny", hidden=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocabulary=48, biased=True)


def kernel_of(scheme: LayerScheme) -> Kernel:
    if scheme.activation is None:
        return linear.KERNEL
    return fp8.KERNEL if scheme.activation == DYNAMIC_FP8 else integer.KERNEL


def random_tensor(scheme: QuantScheme, shape: tuple[int, int], device: torch.device) -> QuantizedTensor:
    """A weight of random codes, whose numbers are about as large as those of a model."""
    groups = 1 if scheme.group is None else -(-shape[1] // scheme.group)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, shape, dtype=scheme.code_dtype, device=device)
    if scheme.code == "fp8_e4m3":
        codes &= 0xF7  # no code that is not a number
    scale = torch.rand(shape[0], groups, device=device) * 0.02 / (1 << (scheme.bits - 1)) + 1e-4
    zero: Tensor | None = None
    if not scheme.symmetric:
        middle = (scheme.code_min + scheme.code_max + 1) / 2
        zero = torch.full((shape[0], groups), middle, device=device)
        zero = zero.to(scheme.code_dtype) if scheme.zero == "integer" else (zero + 0.25).to(scheme.scale_dtype)
    return QuantizedTensor(scheme=scheme, codes=codes, scale=scale.to(scheme.scale_dtype), zero=zero)


def packed(name: str, shape: tuple[int, int], device: torch.device) -> PackedWeight:
    """A random weight of the scheme called ``name``, packed for the GPU."""
    scheme = parse(name)
    return kernel_of(scheme).pack(random_tensor(scheme.weight, shape, device), scheme)


def make_model(bench: Bench, name: str, scheme: str | None, *, layers: int | None = None) -> Any:
    """A causal language model of random weights on the device; its blocks' linear layers in ``scheme``, if given."""
    shape = TINY if bench.is_dry else MODELS[name]
    count = shape.layers if layers is None else layers
    fields = {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": count,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 1 << 17, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.device("meta"):
        model: Any = (
            Qwen2ForCausalLM(Qwen2Config(**fields)) if shape.biased else LlamaForCausalLM(LlamaConfig(**fields))
        )
    rotary = Qwen2RotaryEmbedding if shape.biased else LlamaRotaryEmbedding
    model = model.to(bench.dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for child, layer in list(parent.named_children()):
                if scheme is not None and isinstance(layer, nn.Linear):
                    setattr(parent, child, _quantized(layer, scheme, bench))
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            _fill(module, bench)
    model.model.rotary_emb = rotary(model.config).to(bench.device)
    return model.eval()


def decoded_double(model: Any) -> Any:
    """A copy of a model in float64, its packed layers decoded."""
    exact = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(exact.get_submodule(parent), leaf, dense)
    return exact.double()


def _fill(module: nn.Module, bench: Bench) -> None:
    """Give the module's own parameters random numbers on the device; norms have ones."""
    is_norm = "norm" in type(module).__name__.lower()
    for key, parameter in list(module.named_parameters(recurse=False)):
        data = torch.empty(parameter.shape, dtype=bench.dtype, device=bench.device)
        data = data.fill_(1.0) if is_norm else data.normal_(0, 0.02)
        setattr(module, key, nn.Parameter(data, requires_grad=False))


def _quantized(layer: nn.Linear, scheme: str, bench: Bench) -> QuantizedLinear:
    found = parse(scheme)
    weight = packed(scheme, (layer.out_features, layer.in_features), bench.device)
    bias = None if layer.bias is None else torch.zeros(layer.out_features, dtype=bench.dtype, device=bench.device)
    return QuantizedLinear(weight, bias, kernel_of(found))
