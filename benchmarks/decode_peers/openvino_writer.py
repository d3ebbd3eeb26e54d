"""Writes a checkpoint of benchmarks.shapes as OpenVINO's IR, whose weights NNCF rounds: CHECKPOINT OUT int4|int8.

int4: symmetric groups of 32, the head in int8. Only the last token's logits are computed, as OpenVINO GenAI does. Runs
in the environment of openvino.
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
from openvino import opset13

sys.modules["torchvision"] = None  # type: ignore[assignment]  # that which optimum brings is of another build of torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig  # noqa: E402

__all__ = ["write"]


def write(source: Path, target: Path, kind: str) -> None:
    if kind == "int4":
        settings = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0)
    else:
        settings = OVWeightQuantizationConfig(bits=8, sym=True)
    made = OVModelForCausalLM.from_pretrained(str(source), export=True, quantization_config=settings, compile=False)
    made.save_pretrained(target)
    core = openvino.Core()
    model = core.read_model(str(target / "openvino_model.xml"))
    _keep_last(model)
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, str(target / "last.xml"))
    for suffix in ("xml", "bin"):
        (target / f"openvino_model.{suffix}").unlink()
        (target / f"last.{suffix}").rename(target / f"openvino_model.{suffix}")


def _keep_last(model: openvino.Model) -> None:
    """Cut the input of the output layer down to the last token's row."""
    product = model.output(0).get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    hidden = product.input_value(0)
    last = opset13.slice(hidden, [-1], [2**31 - 1], [1], [1])
    product.input(0).replace_source_output(last.output(0))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
