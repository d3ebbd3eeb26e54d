"""GPTQModel: GPTQ and AWQ through ``quantize``; the dequantized weights are taken where its solver returns them."""

from __future__ import annotations

import importlib.metadata
import os

os.cpu_count = lambda: 8  # its default of half the processors is refused on two: set before it is imported

from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from gptqmodel.looper.named_module import NamedModule  # noqa: E402
from gptqmodel.quantization.gptq import GPTQ  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.peers.driving import Cell, Refusal, block_linears  # noqa: E402

__all__ = ["METHODS", "quantize", "versions"]

METHODS = {
    "gptq": {"desc_act": False, "act_group_aware": False},
    "gptq-actorder": {"desc_act": True},
    "gptq-groupaware": {"desc_act": False, "act_group_aware": True},
}


def quantize(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    """The library's defaults on the given windows. It loads the model itself."""
    if cell.code != "int":
        raise Refusal(f"no {cell.code} weights by GPTQ")
    names, state = list(block_linears(model)), dict(model.state_dict())
    found: dict[str, Tensor] = {}
    begin, solve = GPTQ.__init__, GPTQ.quantize

    def naming(self: GPTQ, module: NamedModule, *args: object, **options: object) -> None:
        begin(self, module, *args, **options)
        self.place = module.full_name  # its own name is the same in every block

    def recording(self: GPTQ, *args: object, **options: object) -> tuple[Tensor, ...]:
        result = solve(self, *args, **options)
        found[self.place] = result[0].detach().clone()
        return result

    GPTQ.__init__, GPTQ.quantize = naming, recording
    config = QuantizeConfig(
        bits=cell.bits,
        group_size=cell.group or -1,
        sym=cell.symmetric,
        offload_to_disk=False,
        **METHODS[cell.method],
    )
    loaded = GPTQModel.load(cell.model, config, device="cpu", dtype=cell.dtype)
    loaded.quantize([{"input_ids": window.tolist()} for window in cell.tokens], batch_size=1, calibration_sort=None)
    return state | {f"{name}.weight": found[name].reshape(state[f"{name}.weight"].shape) for name in names}


def versions() -> str:
    return f"gptqmodel {importlib.metadata.version('gptqmodel')}"
