"""Matching the names of tensors in files to the names of a model's parameters and buffers."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from bitwright.core.errors import BitwrightError

__all__ = ["CACHE_SCALE", "IGNORABLE", "match_names", "shared_names", "state_names", "stored_names"]

# Other names that tensors have in files: ``(in the model, in the file)``, as beginnings of the name.
RENAMED = (("lm_head.", "embed_out."),)  # GPT-NeoX, whose head transformers has called so since version 5
# Constants that old checkpoints hold and that models compute anew.
IGNORABLE = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)")
# Calibrated parameters of a cache of keys and values, which lie beside the weights and are none.
CACHE_SCALE = re.compile(r".*\.self_attn\.[qkv]_(scale|zero_point)")


def state_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a checkpoint of ``model`` must hold, by name; one name for tied parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=True)
    shapes |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    return shapes


def shared_names(model: nn.Module) -> dict[str, str]:
    """Names that are second names of a parameter (a tied output head): ``{second name: first name}``."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return shared


def match_names(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """Which stored tensor fills each parameter and persistent buffer: ``{model name: stored name}``.

    Files may carry the name of the base model as a prefix or lack it, and may hold a tied weight under either name, or
    under both (where those differ, :func:`bitwright.models.tying.untie_stored` makes them two parameters beforehand).

    Raises:
        BitwrightError: BW303 if tensors are missing, or stored ones have no place (constants that models compute
            themselves excepted): the first five names and the count.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    wanted, available, second_names = state_names(model), set(stored), shared_names(model)
    alternatives: dict[str, list[str]] = {name: [name] for name in wanted}
    for second, first in second_names.items():
        alternatives[first].append(second)
    matched: dict[str, str] = {}
    for name, candidates in alternatives.items():
        spellings = [spelling for candidate in candidates for spelling in _spellings(candidate, prefix)]
        found = next((spelling for spelling in spellings if spelling in available), None)
        if found is not None:
            matched[name] = found
    used = set(matched.values()) | {s for n in second_names for s in _spellings(n, prefix)}
    _refuse("missing from the files", [name for name in wanted if name not in matched])
    spare = [n for n in stored if n not in used and not IGNORABLE.fullmatch(n) and not CACHE_SCALE.fullmatch(n)]
    _refuse("in the files without a place in the model", spare)
    return matched


def stored_names(model: nn.Module, name: str, stored: Collection[str]) -> list[str]:
    """Which of the ``stored`` names stand for the parameter ``name`` itself, the likeliest first."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return [spelling for spelling in _spellings(name, prefix) if spelling in stored]


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    other = () if prefix == "." else (name.removeprefix(prefix) if name.startswith(prefix) else prefix + name,)
    renamed = (stored + name.removeprefix(known) for known, stored in RENAMED if name.startswith(known))
    return (name, *other, *renamed)


def _refuse(what: str, names: list[str]) -> None:
    if names:
        listed = ", ".join(sorted(names)[:5])
        raise BitwrightError(
            "BW303",
            f"{len(names)} tensors are {what}: {listed}{', ...' if len(names) > 5 else ''}",
            suggestion="check that config.json belongs to these weights and that every shard is there",
        )
