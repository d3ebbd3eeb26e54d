"""Input sites of a block: the linears that read one activation, and where a scale of that activation can be folded.

Sites are found by running the block once and looking at which memory each layer reads, never by names; every fold is
tried on the block itself before it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitwright.models.blocks import linear_shape, linears
from bitwright.models.folding import Fold, holds, is_norm, norm_offset

__all__ = ["Site", "enclosing", "find_sites"]

TRIES = 8  # folds tried for one site before it is given up
Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One activation and what reads it. Names are full (``model.layers.0.self_attn.q_proj``).

    Attributes:
        layers: the readers that are to be quantized, in the order in which they run.
        readers: every linear layer that must change with a scale of the input, ``layers`` among them.
        width: features of the activation.
        scope: the smallest module that contains all readers; the layer itself if there is one. Its output is what
            the site makes: an attention block for q, k and v, an MLP for gate and up.
        fold: where a scale of the input can be put; ``None`` if nowhere.
        refusal: why nowhere, naming the layer.
    """

    layers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int
    scope: str
    fold: Fold | None = None
    refusal: str = ""


@dataclass(slots=True)
class _Trace:
    """What one forward pass showed: what each layer read, and what each norm wrote, in order of time."""

    reads: dict[str, Key] = field(default_factory=dict)
    writes: dict[Key, str] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)  # what each norm read
    order: list[str] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)  # memory must not be used twice while addresses are compared


@torch.no_grad()
def find_sites(
    block: nn.Module, name: str, layers: Iterable[str], run: Callable[[], Tensor], *, folds: bool = True
) -> tuple[Site, ...]:
    """The sites of ``block`` (called ``name`` in the model) that ``layers`` read, in the order in which they run.

    ``run`` computes the block on one calibration sample. Layers that no token of it reaches form no site of their own;
    they are readers of a site where their neighbours in a list of experts are. With ``folds`` every fold is verified:
    the producer divided and the readers multiplied by random powers of two must leave the block's output alone.

    Example:
        >>> [site.layers for site in find_sites(block, "model.layers.0", names, run)]
        [('...q_proj', '...k_proj', '...v_proj'), ('...o_proj',), ('...gate_proj', '...up_proj'), ('...down_proj',)]
    """
    wanted = set(layers)
    modules = linears(block, name)
    trace = _watch(block, name, modules, run)
    trace.alive.clear()
    groups: dict[Key, list[str]] = {}
    for reader in trace.order:
        if reader in trace.reads:
            groups.setdefault(trace.reads[reader], []).append(reader)
    sites = [_site(members, wanted, modules) for members in groups.values()]
    if folds:
        sites = _folded(sites, block, name, modules, trace, run, wanted)
    return tuple(site for site in sites if site.layers)


def enclosing(names: Sequence[str]) -> str:
    """The name of the smallest module that contains all of ``names``; the layer itself if there is one."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def _site(members: Sequence[str], wanted: set[str], modules: Mapping[str, nn.Module]) -> Site:
    return Site(
        layers=tuple(member for member in members if member in wanted),
        readers=tuple(members),
        width=linear_shape(modules[members[0]])[1],
        scope=enclosing(members),
    )


def _watch(block: nn.Module, name: str, modules: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> _Trace:
    trace = _Trace()

    def read(reader: str, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].numel() and reader not in trace.reads:
            trace.reads[reader] = (arguments[0].data_ptr(), arguments[0].numel())
            trace.order.append(reader)
            trace.alive.append(arguments[0])

    def written(norm: str, arguments: tuple[Tensor, ...], keywords: Mapping[str, object], output: object) -> None:
        is_plain = len(arguments) == 1 and not keywords  # a gated norm reads more than what it normalizes
        if is_plain and isinstance(output, Tensor) and norm not in trace.samples:
            trace.writes[(output.data_ptr(), output.numel())] = norm
            trace.samples[norm] = arguments[0].detach()[..., :8, :].clone()
            trace.order.append(norm)
            trace.alive += [output, arguments[0]]

    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, reader=reader: read(reader, arguments))
        for reader, module in modules.items()
    ]
    for path, module in block.named_modules(prefix=name):
        if is_norm(module):
            note = lambda _, a, k, output, norm=path: written(norm, a, k, output)  # noqa: E731
            hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        trace.alive.append(run())
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _folded(
    sites: list[Site],
    block: nn.Module,
    name: str,
    modules: Mapping[str, nn.Module],
    trace: _Trace,
    run: Callable[[], Tensor],
    wanted: set[str],
) -> list[Site]:
    """The sites with their folds: all first guesses tried together, and each alone where that fails."""
    expected = run()
    guesses = [_guesses(site, block, name, modules, trace) for site in sites]
    first = [(fold[0], site.readers) for site, fold in zip(sites, guesses, strict=True) if fold]
    if first and holds(block, name, first, run, expected):
        firsts = [fold[0] if fold else None for fold in guesses]
        return [replace(s, fold=f, refusal=_refusal(s, f)) for s, f in zip(sites, firsts, strict=True)]
    found: list[Site] = []
    for site, choices in zip(sites, guesses, strict=True):
        if site.readers[0] in {reader for other in found for reader in other.readers}:
            continue  # taken into an earlier site
        fold = next((each for each in choices if holds(block, name, [(each, site.readers)], run, expected)), None)
        if fold is None and choices and choices[0].kind == "norm":
            wider = _with_routed(site, sites, modules, trace, wanted)
            if wider.readers != site.readers and holds(block, name, [(choices[0], wider.readers)], run, expected):
                site, fold = wider, choices[0]
        found.append(replace(site, fold=fold, refusal=_refusal(site, fold, choices)))
    return found


def _refusal(site: Site, fold: Fold | None, tried: Sequence[Fold] = ()) -> str:
    if fold is not None:
        return ""
    if not tried:
        return f"nothing before {site.readers[0]} can take a scale of its input"
    names = ", ".join(dict.fromkeys(each.producer for each in tried))
    return f"a scale of the input of {site.readers[0]} does not pass through to it from {names}"


def _guesses(
    site: Site, block: nn.Module, name: str, modules: Mapping[str, nn.Module], trace: _Trace
) -> tuple[Fold, ...]:
    """What may produce the site's input, the likeliest first: the norm that wrote it, or a linear that ran before."""
    norm = trace.writes.get(trace.reads[site.readers[0]])
    if norm is not None:
        module = block.get_submodule(norm.removeprefix(name + "."))
        offset = norm_offset(module, trace.samples[norm])
        width = getattr(module, "weight").numel()  # noqa: B009 - the type checker knows no such attribute
        if offset is None or width != site.width:
            return ()
        return (Fold(producer=norm, kind="norm", rows=torch.arange(site.width), offset=offset),)
    if len(site.readers) > 1:
        return ()
    before = [each for each in trace.order[: trace.order.index(site.readers[0])] if each in modules]
    heads = _head_widths(block, name, site.readers[0])
    folds = [
        Fold(producer=producer, kind="linear", rows=rows)
        for producer in reversed(before)
        for rows in _row_maps(linear_shape(modules[producer])[0], site.width, heads)
    ]
    return tuple(folds[:TRIES])


def _head_widths(block: nn.Module, name: str, reader: str) -> tuple[int, ...]:
    """Widths of attention heads to try: what the modules around ``reader`` say, then the usual ones."""
    said: list[int] = []
    path = reader.removeprefix(name + ".")
    while "." in path:
        path = path.rpartition(".")[0]
        module = block.get_submodule(path)
        values = (getattr(module, attribute, None) for attribute in ("head_dim", "head_size"))
        said += [value for value in values if type(value) is int and value > 0]
    return tuple(dict.fromkeys([*said, 64, 128, 32, 256, 16, 8]))


def _row_maps(out: int, width: int, heads: Sequence[int]) -> Iterable[Tensor]:
    """Which output row of a linear may make each of ``width`` channels, for a producer of ``out`` rows.

    Its own row; one of a part (fused gate and up, packed q, k and v); that of the key-value head which the query head
    shares; and both of the last together, heads stacked (``q q k v``) or grouped (``qkv qkv``).
    """
    channels = torch.arange(width)
    if out == width:
        yield channels
    elif out < width and width % out == 0:
        for head in (each for each in heads if out % each == 0):
            yield channels // head // (width // out) * head + channels % head
    if out == 2 * width:
        yield channels + width
        yield channels
    shared = (out - width) // 2
    if shared > 0 and (out - width) % 2 == 0 and width % shared == 0:
        repeats = width // shared
        for head in (each for each in heads if shared % each == 0):
            key_head = channels // head // repeats
            yield width + shared + key_head * head + channels % head
            yield (key_head * (repeats + 2) + repeats + 1) * head + channels % head


def _with_routed(
    site: Site, sites: Sequence[Site], modules: Mapping[str, nn.Module], trace: _Trace, wanted: set[str]
) -> Site:
    """The site together with the layers behind a router, which read chosen rows of the same activation.

    Those are the later sites of one width whose input no norm wrote, and the experts beside them that no token reached.
    """
    position = {reader: number for number, reader in enumerate(trace.order)}
    later = [
        other
        for other in sites
        if other.width == site.width
        and trace.writes.get(trace.reads[other.readers[0]]) is None
        and position[other.readers[0]] > position[site.readers[0]]
        and _in_list_of_experts(other.readers[0], site.readers)
    ]
    readers = [*site.readers, *(reader for other in later for reader in other.readers)]
    kinds = {_numberless(reader) for other in later for reader in other.readers}
    readers += [each for each in modules if each not in trace.reads and _numberless(each) in kinds]
    return replace(
        site,
        readers=tuple(readers),
        layers=tuple(reader for reader in readers if reader in wanted),
        scope=enclosing(readers),
    )


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _in_list_of_experts(name: str, routers: Sequence[str]) -> bool:
    """Whether ``name`` lies in a numbered member of the module that holds the router."""
    holder = enclosing(routers).rpartition(".")[0] if len(routers) == 1 else enclosing(routers)
    return name.startswith(holder + ".") and re.search(r"\.\d+\.", name[len(holder) :]) is not None
