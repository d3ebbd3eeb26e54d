"""Which cells there are: models times schemes times the methods of bitwright and of its peers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_runs.material import Material

__all__ = [
    "FAMILIES",
    "OURS",
    "PEERS",
    "SCHEMES",
    "VARIANTS",
    "Cell",
    "Scheme",
    "cells_of",
    "peer_methods",
    "stored_schemes",
]

LEAST_GROUP = 16
OURS = "bitwright"


@dataclass(frozen=True)
class Scheme:
    """What is stored: as in ``bitwright.QuantScheme``; ``group`` may have to be replaced for a model."""

    code: str
    bits: int
    group: int | None
    symmetric: bool

    def for_sizes(self, sizes: tuple[int, ...]) -> Scheme:
        """With the largest group, at most this one, that divides every size; per channel where that is under 16."""
        if self.group is None:
            return self
        largest = math.gcd(*sizes)
        groups = [group for group in range(LEAST_GROUP, self.group + 1) if largest % group == 0]
        return Scheme(self.code, self.bits, max(groups, default=None), self.symmetric)

    @property
    def name(self) -> str:
        base = f"w{self.bits}" if self.code == "int" else self.code
        group = f"g{self.group}" if self.group else ""
        return f"{base}{group}{'-asym' if not self.symmetric else ''}"


def _integers(*shapes: tuple[int, int | None]) -> list[Scheme]:
    return [Scheme("int", bits, group, symmetric=False) for bits, group in shapes]


_TABLES = [Scheme("nf4", 4, 32, symmetric=True), Scheme("fp4", 4, 32, symmetric=True)]
_ALL = _integers((8, None), (4, None), (4, 128), (4, 32), (3, 128), (3, 32), (2, 64), (2, 32)) + _TABLES
# By name. All integer schemes have a zero point: that is where the best peers are, and what "equal bits" means here.
SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in _ALL}

# Peer, method: the algorithm that it is an implementation of.
FAMILIES: Mapping[tuple[str, str], str] = {
    ("llmcompressor", "rtn"): "rtn",
    ("neural_compressor", "rtn"): "rtn",
    ("neural_compressor", "rtn-mse"): "rtn",
    ("hqq", "hqq"): "hqq",
    ("neural_compressor", "hqq"): "hqq",
    ("llmcompressor", "gptq-actorder"): "gptq",
    ("gptqmodel", "gptq-actorder"): "gptq",
    ("gptqmodel", "gptq"): "gptq",
    ("neural_compressor", "gptq"): "gptq",
    ("neural_compressor", "gptq-actorder"): "gptq",
    ("llmcompressor", "awq"): "awq",
    ("neural_compressor", "awq"): "awq",
    ("neural_compressor", "teq"): "teq",
    ("llmcompressor", "awq+gptq"): "awq+gptq",
    ("auto_round", "autoround"): "autoround",
}
# Ours with options other than the defaults, as peers have them: the algorithm and the options.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "hqq-axis0": ("hqq", {}),  # groups along the output, as neural-compressor has them; the scheme says so
    "rtn-search": ("rtn", {"search": True}),
    "awq-all": ("awq", {"tokens": 1 << 20}),  # scales judged on all tokens, as llm-compressor does
    "gptq-columns": ("gptq", {"act_order": False}),
    "gptq-actorder": ("gptq", {"static_groups": False}),
    "gptq-search": ("gptq", {"static_groups": False, "search": "auto"}),
    "awq+gptq-search": ("awq+gptq", {"awq.search": True, "gptq.static_groups": False, "gptq.search": "auto"}),
    "best-100": ("best", {"logits.steps": 100}),
}
# Peer: the name of its environment.
PEERS: Mapping[str, str] = {
    "hqq": "hqq",
    "llmcompressor": "llmcompressor",
    "gptqmodel": "gptqmodel",
    "neural_compressor": "neural-compressor-pt",
    "auto_round": "auto-round",
}


def stored_schemes(material: Material) -> dict[str, str]:
    """By name of a scheme, that of what is stored for it in this model; several may be stored alike."""
    return {name: scheme.for_sizes(material.input_sizes).name for name, scheme in SCHEMES.items()}


def peer_methods(peer: str) -> list[str]:
    return [method for name, method in FAMILIES if name == peer]


@dataclass(frozen=True)
class Cell:
    """One model, scheme and method, and the folder that keeps what came of it."""

    material: Material
    scheme_name: str
    peer: str
    method: str
    folder: Path

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.scheme_name].for_sizes(self.material.input_sizes)

    @property
    def family(self) -> str:
        """The algorithm; ours are called by it."""
        if self.peer == OURS:
            return VARIANTS[self.method][0] if self.method in VARIANTS else self.method
        return FAMILIES[self.peer, self.method]

    def job(self) -> dict[str, object]:
        """As ``benchmarks.peers.driving`` reads it."""
        scheme = self.scheme
        fields = {"code": scheme.code, "bits": scheme.bits, "group": scheme.group, "symmetric": scheme.symmetric}
        return {"method": self.method, "output": str(self.folder), **fields}


def cells_of(material: Material, schemes: list[str], methods: list[tuple[str, str]], work: Path) -> Iterator[Cell]:
    """In the order of methods, then schemes; of schemes that are stored alike the first one."""
    stored = stored_schemes(material)
    distinct = {stored[scheme]: scheme for scheme in reversed(schemes)}
    for peer, method in methods:
        for scheme in (scheme for scheme in schemes if distinct[stored[scheme]] == scheme):
            folder = work / "cells" / material.name / stored[scheme] / f"{peer}.{method}"
            yield Cell(material, scheme, peer, method, folder)
