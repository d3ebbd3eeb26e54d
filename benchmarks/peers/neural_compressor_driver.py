"""Intel Neural Compressor (PyTorch): RTN, GPTQ, AWQ, TEQ and HQQ through ``prepare`` and ``convert``."""

from __future__ import annotations

import importlib.metadata

import torch
from neural_compressor.torch.quantization import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
    convert,
    prepare,
)
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.driving import Cell, Refusal, block_linears

__all__ = ["METHODS", "quantize", "versions"]

CONFIGS = {
    "rtn": (RTNConfig, {"use_layer_wise": False}),
    "rtn-mse": (RTNConfig, {"use_layer_wise": False, "use_mse_search": True}),
    "gptq": (GPTQConfig, {}),
    "gptq-actorder": (GPTQConfig, {"act_order": True}),
    "awq": (AWQConfig, {}),
    "teq": (TEQConfig, {"folding": True}),
    "hqq": (HQQConfig, {}),
}
METHODS = tuple(CONFIGS)
DTYPES = {"int": "int", "nf4": "nf4", "fp4": "fp4_e2m1_bnb"}
# Its tracing of which layer follows which fails with present models, so that the map is given.
FOLDS = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
}
TEQ_RATE = 1e-3
TEQ_STEPS = 128  # one pass over the samples, one at a time


def quantize(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    """One configuration on the given windows; the packed layers are unpacked by the library itself."""
    names, known = list(block_linears(model)), set(model.state_dict())
    config = _config(model, cell)
    example = cell.tokens[:1]
    prepared = prepare(model, config, example_inputs=example)
    if cell.method == "teq":
        _train(prepared, cell.tokens)
    elif cell.method in ("gptq", "gptq-actorder", "awq"):
        with torch.no_grad():
            for window in cell.tokens:
                prepared(window.unsqueeze(0))
    quantized = convert(prepared)
    state = {name: value for name, value in quantized.state_dict().items() if _is_whole(name, names)}
    # Layers whose neighbours were scaled get a bias that they did not have, of zeros.
    state = {name: value for name, value in state.items() if name in known or value.any()}
    for name in names:
        state[f"{name}.weight"] = _weight(quantized.get_submodule(name))
    return state


def _config(model: nn.Module, cell: Cell) -> object:
    kind, options = CONFIGS[cell.method]
    fields: dict[str, object] = {"bits": cell.bits, "group_size": cell.group or -1}
    if cell.method == "hqq":
        if cell.code != "int" or cell.symmetric:
            raise Refusal("HQQ has a float zero point")
        return kind(**fields, quant_zero=False)
    if cell.method == "teq" and cell.code != "int":
        raise Refusal("its TEQ rounds to whole numbers whatever is asked for")
    fields |= {"dtype": DTYPES[cell.code], "use_sym": cell.symmetric or cell.code != "int"}
    if cell.method == "awq":
        fields["absorb_layer_dict"] = FOLDS
    if cell.method == "teq":
        blocks = sorted({".".join(name.split(".")[:3]) for name in block_linears(model)})
        fields["absorb_to_layer"] = {
            f"{block}.{producer}": [f"{block}.{reader}" for reader in readers]
            for block in blocks
            for producer, readers in FOLDS.items()
            if producer != readers[0]
        }
    return kind(**fields, **options)


def _train(model: nn.Module, tokens: Tensor) -> None:
    """The library leaves training to its user; its example trains the scales alone, with Adam, on the language loss."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=TEQ_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEQ_STEPS)
    for window in tokens[:TEQ_STEPS]:
        logits = model(input_ids=window.unsqueeze(0)).logits
        loss = functional.cross_entropy(logits[0, :-1], window[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _is_whole(name: str, names: list[str]) -> bool:
    """Norms, embeddings and biases; not what belongs to a packed layer."""
    layer = next((layer for layer in names if name.startswith(f"{layer}.")), None)
    return layer is None or name == f"{layer}.bias"


def _weight(layer: nn.Module) -> Tensor:
    """The float weight that a layer now stands for, an inserted multiplication of its input included."""
    scale = getattr(layer, "input_scale", None)
    inner = getattr(layer, "linear", layer)
    if hasattr(inner, "dequantize_weight"):
        weight = inner.dequantize_weight()
    elif hasattr(inner, "W_q"):
        weight = inner.dequantize()
    elif hasattr(inner, "recover"):
        weight = inner.recover()
    else:
        weight = inner.weight.data
    return weight if scale is None else weight * scale


def versions() -> str:
    return f"neural-compressor-pt {importlib.metadata.version('neural-compressor-pt')}"
