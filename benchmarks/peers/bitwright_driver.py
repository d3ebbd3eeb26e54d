"""bitwright through the same door as its peers: ``bitwright.quantize``, by default options or those of a variant."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

import bitwright
from benchmarks.peers.driving import Cell, Refusal
from benchmarks.quality_runs.cells import VARIANTS
from bitwright.core.errors import BitwrightError
from bitwright.quantization.algorithms import ALGORITHMS

__all__ = ["METHODS", "quantize", "scheme_name", "versions"]

METHODS = (*ALGORITHMS, *VARIANTS)
# What changes when the code that decides on weights changes.
SOURCES = ("core", "models", "quantization")


def quantize(model: nn.Module, cell: Cell) -> None:
    """Write a checkpoint from the same windows, which the text gives when it is cut in the same way."""
    del model  # the directory is streamed
    try:
        _write_checkpoint(cell)
    except BitwrightError as error:
        if error.exit_status == 2:  # the algorithm has no such scheme
            raise Refusal(error.what) from error
        raise


def _write_checkpoint(cell: Cell) -> None:
    samples, seqlen = cell.tokens.shape
    algorithm, options = VARIANTS.get(cell.method, (cell.method, {}))
    bitwright.quantize(
        cell.model,
        cell.output / "checkpoint",
        scheme=scheme_name(cell),
        algorithm=algorithm,
        options=options,
        format="native",
        calibration=cell.text if ALGORITHMS[algorithm].calibrated else None,
        samples=samples,
        seqlen=seqlen,
        seed=0,
        threads=cell.threads,
        overwrite=True,
        restart=True,
    )


def scheme_name(cell: Cell) -> str:
    """The short name of the cell's scheme; HQQ has its authors' zero points and, for whole rows, their float32."""
    base = f"w{cell.bits}" if cell.code == "int" else cell.code
    group = f"g{cell.group}" if cell.group else ""
    zero = "" if cell.symmetric or cell.code != "int" else "-asym"
    if zero and cell.method.startswith("hqq"):
        zero += "-fz" if group else "-fz-sf32"
        zero += "-axis0" if cell.method == "hqq-axis0" else ""
    return f"{base}{group}{zero}"


def versions() -> str:
    """The version, and a hash of the sources."""
    digest = hashlib.sha256()
    root = Path(bitwright.__file__).parent
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"bitwright {bitwright.__version__} {digest.hexdigest()[:12]}"
