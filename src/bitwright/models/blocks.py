"""Finding the repeated blocks and the linear layers of any causal language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bitwright.core.errors import BitwrightError

__all__ = [
    "Blocks",
    "find_blocks",
    "is_linear",
    "linear_shape",
    "linear_weight",
    "linears",
    "output_head",
    "refuse_other_products",
    "set_module",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The transformer blocks of a model: ``name`` is where their list hangs (``model.layers``)."""

    name: str
    modules: tuple[nn.Module, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{index}" for index in range(len(self.modules)))


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one matrix: a Linear, or GPT-2's Conv1D, which keeps it transposed.

    The output projection of torch's own attention is none: the attention takes its weight and never runs it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D as ``[out, in]``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, nn.Linear) else weight.t()


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a Linear or Conv1D."""
    weight = linear_weight(module)
    return (weight.shape[0], weight.shape[1])


def linears(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The Linear and Conv1D layers below ``module`` by full name, in order of definition."""
    return {f"{prefix}.{name}": child for name, child in module.named_modules() if name and is_linear(child)}


def output_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and module of the layer that makes logits, where the model says which it is."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if not isinstance(head, nn.Module) or not is_linear(head):
        return None
    return next((name, module) for name, module in model.named_modules() if module is head)


def find_blocks(model: nn.Module) -> Blocks:
    """The outermost ModuleList whose members all contain linear layers (and are none themselves); the one with most
    weights if several.

    Raises:
        BitwrightError: BW313 if there is none, if layers share weights, if blocks hold weight matrices in no Linear or
            Conv1D (fused mixtures of experts), which would silently stay unquantized, or state spaces of the first
            Mamba, whose layers are not run as such.
    """
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(other + ".") for other in candidates)
        if not isinstance(module, nn.ModuleList) or not len(module) or inside_another:
            continue
        if all(linears(block, "") for block in module):
            candidates[name] = module
    if not candidates:
        raise BitwrightError(
            "BW313",
            f"{type(model).__name__} has no ModuleList of blocks with Linear or Conv1D layers",
            suggestion="quantize decoder-only models such as Llama, Mistral, Qwen2, GPT-2 or OPT",
        )
    name = max(candidates, key=lambda candidate: _weight_count(candidates[candidate]))
    blocks = Blocks(name=name, modules=tuple(candidates[name]))
    _refuse_shared_layers(blocks)
    for block_name, block in zip(blocks.names(), blocks.modules, strict=True):
        _refuse_fused_matrices(block_name, block)
        _refuse_state_spaces(block_name, block)
    return blocks


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    if isinstance(holder, nn.ModuleList | nn.Sequential) and leaf.isdigit():
        holder[int(leaf)] = module
    else:
        setattr(holder, leaf, module)
    if isinstance(holder, nn.TransformerEncoderLayer) and not is_linear(module) and not module._forward_pre_hooks:
        module.register_forward_pre_hook(_run_it)


def _run_it(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Does nothing; where torch's own layer sees a hook, it runs its parts, instead of taking their weights."""


def refuse_other_products(layers: Mapping[str, nn.Module]) -> None:
    """Try layers of classes with a forward of their own, which may do more than to multiply by their weight.

    Raises:
        BitwrightError: BW313 naming the first layer that does; quantized, it would silently lose that.
    """
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        forward = type(layer).forward
        if forward is nn.Linear.forward or not isinstance(layer, nn.Linear) or layer.weight.device.type != "cpu":
            continue
        x = torch.randn(4, layer.in_features, generator=generator).to(layer.weight.dtype)
        with torch.no_grad():
            found, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        if not isinstance(found, Tensor) or float((found - expected).norm()) > 0.02 * float(expected.norm()):
            kind = type(layer).__name__
            raise BitwrightError(
                "BW313",
                f"{name} ({kind}) does more than to multiply by its weight and to add its bias",
                why="in the quantized model a plain product takes its place",
                suggestion=f"merge what {kind} adds into its weight, or leave it as it is: --override {name}=float",
            )


def _weight_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _refuse_shared_layers(blocks: Blocks) -> None:
    first: dict[int, str] = {}
    for block_name, block in zip(blocks.names(), blocks.modules, strict=True):
        for name, layer in block.named_modules(prefix=block_name, remove_duplicate=False):
            weight = layer._parameters.get("weight") if is_linear(layer) else None
            if weight is not None and first.setdefault(id(weight), name) != name:
                raise BitwrightError(
                    "BW313",
                    f"{name} has the weight of {first[id(weight)]}; layers that share one cannot be quantized yet",
                    why="each block is quantized by itself, and what fits one need not fit the other",
                    suggestion="quantize a model whose blocks have weights of their own",
                )


def _refuse_state_spaces(block_name: str, block: nn.Module) -> None:
    """Mamba's mixers take the weight of their last small layer and never run it: nothing could stand in its place."""
    for name, module in block.named_modules(prefix=block_name):
        layer = getattr(module, "dt_proj", None)
        if isinstance(layer, nn.Module) and is_linear(layer) and isinstance(getattr(module, "A_log", None), Tensor):
            raise BitwrightError(
                "BW313",
                f"{name} is a state space whose weights are read and not run; such models cannot be quantized yet",
                suggestion="quantize a transformer, or a Mamba of the second kind",
            )


def _refuse_fused_matrices(block_name: str, block: nn.Module) -> None:
    """Three-dimensional weights of more than a convolution's size are experts fused into one parameter.

    Some architectures lay their experts below each other instead: matrices that hold most of the block, in no Linear.
    """
    loose = dict(_loose_matrices(block))
    fused = next((name for name, parameter in loose.items() if parameter.dim() == 3), None)
    if fused is None and sum(parameter.numel() for parameter in loose.values()) * 2 > _weight_count(block):
        fused = max(loose, key=lambda name: loose[name].numel())
    if fused is None:
        return
    shape = " x ".join(map(str, loose[fused].shape))
    raise BitwrightError(
        "BW313",
        f"{block_name}.{fused} ({shape}) holds fused expert matrices, which cannot be quantized yet",
        why="leaving them out would leave most of the model in floating point",
        suggestion="quantize a dense model",
    )


def _loose_matrices(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a block that no Linear, Conv1D or Embedding multiplies by or looks up."""
    for prefix, module in block.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 8 and parameter.dtype in FLOAT_DTYPES:
                yield name, parameter


FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
