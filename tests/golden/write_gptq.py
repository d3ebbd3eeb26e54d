"""How the golden GPTQ and AWQ checkpoints were made, by GPTQModel 7.7.0 on a CPU, from numbers that are counted.

OMP_NUM_THREADS=1 python -m tests.golden.write_gptq tests/golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["AWQ", "GPTQ", "GoldenLayer", "Numbers", "count_numbers"]


class GoldenLayer(NamedTuple):
    """What a golden layer is: ``[out, in]`` and its numbers; ``reordered``: column j is in group (7j mod K) // g."""

    bits: int
    group: int
    symmetric: bool
    shape: tuple[int, int] = (32, 64)
    reordered: bool = False
    bias: bool = False


class Numbers(NamedTuple):
    """``codes`` ``[out, in]`` and ``zero`` ``[out, groups]`` as uint8, ``scale`` float16, ``index`` int32 ``[in]``."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    index: Tensor


def _layers(symmetric: bool, group: int) -> dict[str, GoldenLayer]:
    return {
        "model.layers.0.q_proj": GoldenLayer(4, group, symmetric, bias=True),
        "model.layers.0.k_proj": GoldenLayer(2, group, symmetric),
        "model.layers.0.v_proj": GoldenLayer(3, group, symmetric),
        "model.layers.0.o_proj": GoldenLayer(8, group, symmetric),
        "model.layers.1.q_proj": GoldenLayer(4, group, symmetric, reordered=group != -1),
    }


# Directory: version, layers. Zero points of 0 are in version 2 alone, which is for them.
GPTQ: dict[str, tuple[int, dict[str, GoldenLayer]]] = {
    "gptq-v1-sym": (1, _layers(True, 32)),
    "gptq-v1-asym": (1, _layers(False, 32)),
    "gptq-v2-asym": (2, _layers(False, 32)),
    "gptq-v2-sym": (2, _layers(True, -1)),
}
AWQ: dict[str, dict[str, GoldenLayer]] = {
    "awq-gemm": {
        "model.layers.0.q_proj": GoldenLayer(4, 32, False),
        "model.layers.0.o_proj": GoldenLayer(4, 32, False, (8, 96)),
    },
    "awq-gemm-sym": {"model.layers.0.q_proj": GoldenLayer(4, 32, True, bias=True)},
    "awq-gemv": {"model.layers.0.q_proj": GoldenLayer(4, 64, False, (64, 128))},
    "awq-gemv_fast": {"model.layers.0.q_proj": GoldenLayer(4, 64, False, (16, 128))},
    "awq-llm-awq": {"model.layers.0.q_proj": GoldenLayer(4, 128, False, (16, 256))},
}  # fmt: skip


def count_numbers(layer: GoldenLayer, first_zero: int) -> Numbers:
    """The numbers of a layer: the same on any machine."""
    rows, columns = layer.shape
    size = columns if layer.group == -1 else layer.group
    groups = columns // size
    parameters = torch.arange(rows * groups).view(rows, groups)
    place = torch.arange(columns)
    codes = (place * 37 + torch.arange(rows).unsqueeze(1) * 11 + place // 7) % (1 << layer.bits)
    zero = parameters * 5 % ((1 << layer.bits) - first_zero) + first_zero
    if layer.symmetric:
        zero = torch.full_like(zero, 1 << (layer.bits - 1))
    index = (place * 7 % columns if layer.reordered else place) // size
    scale = ((parameters * 3 % 31 + 1) / 32).to(torch.float16)
    return Numbers(codes.to(torch.uint8), zero.to(torch.uint8), scale, index.to(torch.int32))


def _pack(kernel: Any, layer: GoldenLayer, numbers: Numbers, **options: Any) -> Any:
    """A layer of GPTQModel that holds the numbers, which it finds again in the weights that they stand for."""
    rows, columns = layer.shape
    index = numbers.index.long()
    scale = numbers.scale.float()
    linear = nn.Linear(columns, rows, bias=layer.bias)
    linear.weight.data = (numbers.codes.float() - numbers.zero.float()[:, index]) * scale[:, index]
    if layer.bias:
        linear.bias.data = torch.arange(rows) / 16
    module = kernel(
        bits=layer.bits, group_size=layer.group, sym=layer.symmetric, desc_act=layer.reordered, in_features=columns,
        out_features=rows, bias=layer.bias, register_buffers=False, **options,
    )  # fmt: skip
    module.pack(linear, scale, numbers.zero.float(), numbers.index)
    return module


def _write(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _state(name: str, module: Any) -> dict[str, Tensor]:
    """The tensors of a packed layer; scales are rounded as the package does when it saves."""
    fields = ("qweight", "qzeros", "scaled_zeros", "scales", "g_idx", "bias")
    found = {field: getattr(module, field, None) for field in fields}
    return {f"{name}.{field}": tensor for field, tensor in found.items() if isinstance(tensor, Tensor)}


def _write_gptq(root: Path) -> None:
    from gptqmodel import QuantizeConfig
    from gptqmodel import __version__ as version_of_package
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for folder, (version, layers) in GPTQ.items():
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            module = _pack(TorchLinear, layer, count_numbers(layer, 1 if version == 1 else 0), pack_dtype=torch.int32)
            if version == 1:
                convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=layer.bits, group_size=layer.group))
            tensors |= _state(name, module)
        common = next(iter(layers.values()))
        others = {name: layer for name, layer in layers.items() if layer.bits != common.bits}
        quantization = QuantizeConfig(
            bits=common.bits, group_size=common.group, sym=common.symmetric,
            desc_act=any(layer.reordered for layer in layers.values()), format="gptq" if version == 1 else "gptq_v2",
            dynamic={f"+:^{name.replace('.', chr(92) + '.')}$": {"bits": layer.bits} for name, layer in others.items()},
        ).to_dict()  # fmt: skip
        quantization["meta"] = {"quantizer": [f"gptqmodel:{version_of_package}"]}  # it names folders of the machine
        _write(root / folder, tensors, json.loads(json.dumps(quantization, default=str)))


def _write_awq(root: Path) -> None:
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear, LLMAwqLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    kernels = {"gemm": AwqTorchLinear, "gemv": AwqGEMVLinear, "gemv_fast": AwqGEMVFastLinear, "llm-awq": LLMAwqLinear}
    for folder, layers in AWQ.items():
        version = folder.removeprefix("awq-").removesuffix("-sym")
        dtype = torch.int16 if version in ("gemv_fast", "llm-awq") else torch.int32
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            module = _pack(kernels[version], layer, count_numbers(layer, 0), pack_dtype=dtype)
            tensors |= _state(name, module)
            # That package would round scales when it saves a model.
            tensors[f"{name}.scales"] = tensors[f"{name}.scales"].to(torch.float16)
            tensors.pop(f"{name}.g_idx", None)
        common = next(iter(layers.values()))
        quantization = {
            "quant_method": "awq", "bits": 4, "group_size": common.group, "zero_point": not common.symmetric,
            "version": "gemv" if version == "llm-awq" else version,
            "backend": "llm-awq" if version == "llm-awq" else "autoawq", "modules_to_not_convert": None,
        }  # fmt: skip
        _write(root / folder, tensors, quantization)


if __name__ == "__main__":
    _write_gptq(Path(sys.argv[1]))
    _write_awq(Path(sys.argv[1]))
