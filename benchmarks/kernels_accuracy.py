"""What the native decoder's arithmetic costs on trained models: divergence from the same weights computed in float32.

    python -m benchmarks.kernels_accuracy --json benchmarks/results/kernels_accuracy.json

Each model is rounded to nearest. `rounding` is the mean KL divergence, over the tokens of a text, of the rounded model
from the original, both dense and in float32; `arithmetic` that of the native decoder from the rounded model in float32,
with keys and values in float32; `with_cache` the same with those in the model's dtype, as they are by default. Models
are used in float32 and in bfloat16, where 16-bit activations are rounded. Trained models of others are looked for in a
folder `shared` beside the repository.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.command import told_command
from bitwright.kernels import native, native_library
from bitwright.models.blocks import set_module
from bitwright.models.decoder import Step
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.hf import PreTrainedModel
from bitwright.models.loading import load_with_tokenizer
from bitwright.models.paged_cache import PAGE, PagedCache
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.session import quantize_module

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
SCHEMES = ("w8", "w4g32", "nf4g32", "w8a8", "w8-a8g32", "w4g32-a8", "w4g32-a8g32")
TOKENS = 256
TEXT = Path(__file__).resolve().parents[1] / "src" / "bitwright" / "models" / "embedded" / "heldout.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    model: str
    scheme: str
    dtype: str
    rounding: float
    arithmetic: float
    with_cache: float


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL divergence of rows of logits, in float64."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def dense_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the model in float32, its quantized layers dense."""
    model = copy.deepcopy(model).float()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight.data = layer.dequantize()
            if layer.bias is not None:
                dense.bias.data = layer.bias.data.float()
            set_module(model, name, dense)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits[0]
    return logits


def native_logits(model: PreTrainedModel, ids: Tensor, *, cache_dtype: torch.dtype) -> Tensor:
    decoder, count = NativeDecoder(model), -(-len(ids) // PAGE)
    shape = replace(decoder.new_cache(1).shape, dtype=cache_dtype)
    step = Step(
        tokens=ids,
        positions=torch.arange(len(ids), dtype=torch.int32),
        starts=torch.tensor([0, len(ids)], dtype=torch.int32),
        lengths=torch.tensor([len(ids)], dtype=torch.int32),
        pages=torch.arange(count, dtype=torch.int32)[None],
        outputs=torch.arange(len(ids), dtype=torch.int32),
    )
    return decoder.forward(step, PagedCache(shape, count))


def measure(path: str) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        original, tokenizer = load_with_tokenizer(path, dtype=dtype)
        ids = tokenizer(TEXT.read_text(encoding="utf-8")[: 8 * TOKENS], return_tensors="pt").input_ids[0][:TOKENS]
        reference = dense_logits(original, ids)
        for scheme in SCHEMES:
            model = quantize_module(copy.deepcopy(original), scheme=scheme, group_fallback="pad")
            assert isinstance(model, PreTrainedModel)
            rounded = dense_logits(model, ids)
            rows.append(
                Row(
                    model=Path(path).name,
                    scheme=scheme,
                    dtype=str(dtype).removeprefix("torch."),
                    rounding=divergence(reference, rounded),
                    arithmetic=divergence(rounded, native_logits(model, ids, cache_dtype=torch.float32)),
                    with_cache=divergence(rounded, native_logits(model, ids, cache_dtype=dtype)),
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    native.MOST_PADDING = math.inf  # however small a layer is
    names = ["demo:", *(str(path.parent) for path in sorted(SHARED.glob("*/config.json")))]
    rows = [row for name in names for row in measure(name)]
    heads = ("model", "scheme", "dtype", "rounding to nearest", "arithmetic", "with its cache")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        costs = " | ".join(f"{cost:.1e}" for cost in (row.rounding, row.arithmetic, row.with_cache))
        print(f"| {row.model} | {row.scheme} | {row.dtype} | {costs} |")
    if arguments.json:
        command = told_command("benchmarks.kernels_accuracy")
        isa = native_library.instruction_set()
        record = {"command": command, "instruction_set": isa, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
