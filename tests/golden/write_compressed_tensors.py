"""How the golden compressed-tensors checkpoints were made: by the package itself, in two versions.

Run it with a version of the package first on the path; the layers, codes and scales are the same for each version:

    pip install --no-deps --target old "compressed-tensors==0.17.1"
    PYTHONPATH=old python tests/golden/write_compressed_tensors.py tests/golden/compressed-tensors-0.17
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

# bits, symmetric, columns per scale (None: the whole row), input features, 8-bit activations. 40 features of 3 bits
# fill as many words packed densely as padded.
LAYERS = [
    (3, False, 32, 64, False),
    (5, True, 32, 64, False),
    (6, False, None, 64, False),
    (7, True, None, 64, False),
    (4, False, 32, 64, False),
    (2, True, 32, 64, False),
    (8, True, None, 64, False),
    (3, True, None, 40, False),
    (8, True, None, 64, True),
]
ROWS = 16


def main(directory: Path) -> None:
    generator = torch.Generator().manual_seed(17)
    tensors, expected, groups = {}, {}, {}
    for number, (bits, symmetric, group, columns, has_activation) in enumerate(LAYERS):
        name = f"model.layers.{number}.linear"
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group else "channel",
            "group_size": group,
        }
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        scheme = QuantizationScheme(
            targets=[name], weights=weights, input_activations=activations if has_activation else None
        )
        layer_format = "int-quantized" if has_activation else "pack-quantized"
        groups[f"group_{number}"] = {**scheme.model_dump(exclude={"format"}), "format": layer_format}
        shape = (ROWS, columns // group if group else 1)
        half = 1 << (bits - 1)
        scale = torch.rand(shape, generator=generator).to(torch.bfloat16) + 0.5
        zero = torch.zeros(shape, dtype=torch.int8)
        if not symmetric:
            zero = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
        codes = torch.randint(-half, half, (ROWS, columns), generator=generator, dtype=torch.int8)
        spread = columns // shape[1]
        values = (codes.float() - zero.repeat_interleave(spread, 1)) * scale.float().repeat_interleave(spread, 1)
        compressor = BaseCompressor.get_value_from_registry(layer_format)
        state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in stored.items()}
        expected[f"{name}.codes"], expected[f"{name}.zero"] = codes, zero
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    save_file(expected, directory / "expected.safetensors")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "version": compressed_tensors.__version__,
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
