"""Quantizing a module in memory: at once, or prepared, run by the user on data of their own, and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Override, Recipe, parse_override
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linear_weight, refuse_other_products, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.models.saving import attach_saving
from bitwright.quantization.algorithms import check_options, make_method
from bitwright.quantization.capture import Captured, capture, head_output, observe_head
from bitwright.quantization.decoded import DecodedLinear
from bitwright.quantization.logits import LogitsTask
from bitwright.quantization.plan import FINISH, GroupFallback, Plan, make_plan
from bitwright.quantization.sources import MemorySource, Source, refuse_nonfinite
from bitwright.quantization.statistics import SiteStatistics
from bitwright.quantization.stream import BlockWork, Flow, block_seed, quantize_block, quantized_linear, round_layers

__all__ = ["Prepared", "convert", "prepare", "quantize_module"]


Batch = tuple[tuple[Any, ...], dict[str, Any]]  # what a model was called with: arguments and keywords


class Prepared(nn.Module):
    """A model that notes every batch it is run on, as calibration data for :func:`convert`.

    It computes what the model computes. Batches are kept until the conversion, in memory. ``source`` says where weights
    are that are on the meta device as yet: each block's are then loaded for it, and float ones are let go again.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, group_fallback: GroupFallback) -> None:
        super().__init__()
        self.model = model
        self.recipe, self.group_fallback = recipe, group_fallback
        self.batches: list[Batch] = []
        self.source: Source | None = None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        caches = {name for name, value in keywords.items() if hasattr(value, "get_seq_length")}
        # A cache goes on being filled: kept, it would be another one when the batch is run again. And a step that has
        # something in its cache is the later token of a text that is being generated, no text of its own.
        if not any(int(keywords[name].get_seq_length()) for name in caches):
            self.batches.append((arguments, {name: value for name, value in keywords.items() if name not in caches}))
        return self.model(*arguments, **keywords)


def prepare(
    model: nn.Module,
    *,
    scheme: str | LayerScheme = "w4g128",
    algorithm: str = "rtn",
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str | Override] = (),
    seed: int = 0,
    group_fallback: GroupFallback = "error",
    inplace: bool = False,
) -> Prepared:
    """Wrap ``model`` (or a copy of it, unless ``inplace``) so that running it collects calibration data.

    Raises:
        BitwrightError: for schemes, options, overrides or group sizes that do not fit the model; nothing is changed.

    Example:
        >>> prepared = bitwright.prepare(model, scheme="w4g128")
        >>> for batch in batches:
        ...     prepared(**batch)
        >>> quantized = bitwright.convert(prepared)
    """
    rules = tuple(rule if isinstance(rule, Override) else parse_override(rule) for rule in overrides)
    stored = scheme if isinstance(scheme, LayerScheme) else parse(scheme)
    recipe = Recipe(scheme=stored, algorithm=algorithm, options=dict(options or {}), overrides=rules, seed=seed)
    check_options(recipe)
    make_plan(MemorySource(model), recipe, format="native", group_fallback=group_fallback)
    return Prepared(model if inplace else copy.deepcopy(model), recipe, group_fallback)


@torch.no_grad()
def convert(prepared: Prepared) -> nn.Module:
    """Quantize a prepared model, block by block, with the batches that it saw; return the model itself.

    Algorithms that rescale or rotate float weights do so in place: after a failure only a model that they leave alone
    is as it was.

    Raises:
        BitwrightError: BW401 if the algorithm needs calibration and the model was never run; BW309 or BW601 for weights
            or activations that are not finite.
    """
    model, recipe = prepared.model, prepared.recipe
    source = prepared.source or MemorySource(model)
    refuse_nonfinite(source)
    _rotate(model, recipe)
    plan = make_plan(source, recipe, format="native", group_fallback=prepared.group_fallback)
    if plan.is_calibrated and not prepared.batches:
        raise BitwrightError(
            "BW401",
            f"{recipe.algorithm} needs calibration data, and the prepared model was never run",
            suggestion="run the prepared model on some batches before converting it",
        )
    batches = [text for batch in prepared.batches for text in _texts(batch)]
    forwards: list[Callable[[], object]] = [partial(model, *arguments, **keywords) for arguments, keywords in batches]
    originals: dict[str, nn.Module] = {name: model.get_submodule(name) for name in plan.schemes}
    modes = {module: module.training for module in model.modules()}
    model.train(False)  # dropout would make other statistics at every pass
    try:
        refuse_other_products(originals)
        source.load(name for unit in plan.units if unit.blocks[:1] in ((), (0,)) for name in unit.tensors)
        captured = capture(model, plan.blocks, forwards) if forwards and plan.is_calibrated else None
        _convert_units(prepared, plan, captured, forwards, originals)
    except BaseException:
        for name, module in originals.items():
            set_module(model, name, module)
        raise
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])
    attach_saving(model)
    return model


def _texts(batch: Batch) -> list[Batch]:
    """The texts of a batch of token ids one by one, without what they are padded with; other batches as they are.

    What is drawn, judged or trained on then does not depend on how texts were put together.
    """
    arguments, keywords = batch
    ids = keywords.get("input_ids", arguments[0] if arguments else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return [batch]
    texts = []
    for row in range(ids.shape[0]):
        alone = partial(_row_of, row=row, count=ids.shape[0])
        texts.append(_unpadded((tuple(map(alone, arguments)), {name: alone(part) for name, part in keywords.items()})))
    return texts


def _row_of(value: Any, *, row: int, count: int) -> Any:
    is_batched = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count
    return value[row : row + 1] if is_batched else value


def _unpadded(text: Batch) -> Batch:
    """One text without the tokens that its mask hides, if those lie before or behind it."""
    arguments, keywords = text
    mask = keywords.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return text
    kept = mask[0].nonzero().flatten()
    first, end = int(kept[0]), int(kept[-1]) + 1
    if len(kept) != end - first or (first, end) == (0, mask.shape[1]):
        return text

    def cut(value: Any) -> Any:
        is_long = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == mask.shape[1]
        return value[:, first:end] if is_long else value

    rest = {name: cut(part) for name, part in keywords.items() if name != "attention_mask"}
    return tuple(map(cut, arguments)), rest


def _rotate(model: nn.Module, recipe: Recipe) -> None:
    method = make_method(recipe.algorithm, recipe.options)
    if (rotate := method.algorithm.rotate) is not None:
        rotate.run(model, method.options[rotate.name], recipe.seed)


def quantize_module(
    model: nn.Module,
    *,
    scheme: str | LayerScheme = "w4g128",
    algorithm: str = "rtn",
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str | Override] = (),
    seed: int = 0,
    group_fallback: GroupFallback = "error",
    inplace: bool = False,
) -> nn.Module:
    """Quantize a module without calibration data: :func:`prepare` and :func:`convert` in one call.

    The result is a copy unless ``inplace``. Its linear layers are ``QuantizedLinear`` and run from packed codes.
    """
    prepared = prepare(
        model,
        scheme=scheme,
        algorithm=algorithm,
        options=options,
        overrides=overrides,
        seed=seed,
        group_fallback=group_fallback,
        inplace=inplace,
    )
    return convert(prepared)


def _convert_units(
    prepared: Prepared,
    plan: Plan,
    captured: Captured | None,
    forwards: Sequence[Callable[[], object]],
    originals: Mapping[str, nn.Module],
) -> None:
    model, seed = prepared.model, prepared.recipe.seed
    inputs = captured.inputs if captured is not None else ()
    references = inputs if plan.with_float_flow else None
    head: dict[str, QuantizedLinear] = {}
    for unit in plan.units:
        layers = {name: model.get_submodule(name) for name in unit.layers}
        if prepared.source is not None and unit.is_block:
            prepared.source.load(unit.tensors)
        if unit.is_block:
            flow = None
            if captured is not None:
                calls = tuple(captured.calls[block] for block in unit.blocks)
                flow = Flow(inputs, calls, tuple(range(len(inputs))), references)
            work = BlockWork(
                name=unit.name,
                model=model,
                blocks=tuple(plan.blocks.modules[block] for block in unit.blocks),
                layers=layers,
                schemes=unit.layers,
                methods=plan.methods,
                flow=flow,
                seed=seed,
            )
            result = quantize_block(work)
            inputs, references = result.outputs, result.references
            if prepared.source is not None:
                for layer in layers.values():
                    layer.to("meta")  # kept for a failure, when the model is as empty as before
        elif layers:
            head = _round_head(model, plan, layers, captured, forwards, inputs)
    if plan.finish is not None and captured is not None and references is not None:
        _finish(prepared, plan, references, captured.as_tuple, originals, head)
    for name, layer in head.items():
        set_module(model, name, layer)


def _round_head(
    model: nn.Module,
    plan: Plan,
    layers: Mapping[str, nn.Module],
    captured: Captured | None,
    forwards: Sequence[Callable[[], object]],
    inputs: tuple[Tensor, ...],
) -> dict[str, QuantizedLinear]:
    statistics: Mapping[str, SiteStatistics] = {}
    if captured is not None:
        gram = any(plan.methods[name].algorithm.with_gram for name in layers)
        numbers, tuples = tuple(range(len(inputs))), captured.as_tuple
        statistics = observe_head(
            model, plan.blocks, layers, forwards, inputs, as_tuple=tuples, with_gram=gram, numbers=numbers
        )
    rounded = round_layers(layers, plan.schemes, plan.methods, statistics, is_calibrated=captured is not None)
    return {name: quantized_linear(layers[name], made.tensor, plan.schemes[name]) for name, made in rounded.items()}


def _finish(
    prepared: Prepared,
    plan: Plan,
    references: Sequence[Tensor],
    as_tuple: bool,
    originals: Mapping[str, nn.Module],
    head: Mapping[str, QuantizedLinear],
) -> None:
    """The pass over the whole model, whose head is still the float one, with every row of the batches a window."""
    assert plan.finish is not None
    model, (stage, options) = prepared.model, plan.finish
    windows = [row for batch in prepared.batches for text in _texts(batch) for row in _token_rows(text)]
    rows = [row.unsqueeze(0) for reference in references for row in reference]
    if len({len(window) for window in windows}) != 1:
        raise BitwrightError(
            "BW401",
            f"{prepared.recipe.algorithm} looks at the logits of whole windows, and the batches differ in length",
            suggestion="run the prepared model on batches of equally long, unpadded windows",
        )

    def reference(number: int) -> Tensor:
        ids = windows[number].unsqueeze(0)
        forward = partial(_logits, model, ids)
        return head_output(model, plan.blocks, rows[number], forward, as_tuple=as_tuple)[0]

    task = LogitsTask(
        model=model,
        blocks=plan.blocks.name,
        windows=windows,
        reference=reference,
        float_weight=None if plan.is_equalized else lambda name: linear_weight(originals[name]).detach().clone(),
        outer={name: DecodedLinear(layer, rows[0].dtype) for name, layer in head.items()},
    )
    updates = stage.run(task, options, seed=block_seed(prepared.recipe.seed, FINISH))
    if updates is None:
        return
    for name, vector in updates.vectors.items():
        parameter = model.get_parameter(name)
        parameter.copy_(vector)
    for name, tensor in updates.tensors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        set_module(model, name, QuantizedLinear.build(tensor, layer.bias, layer.scheme, layer.input_scale))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _token_rows(batch: Batch) -> Tensor:
    """The ids ``[windows, length]`` of a batch that is nothing but whole windows.

    Raises:
        BitwrightError: BW401 for batches without ids, and for padded ones.
    """
    arguments, keywords = batch
    ids, mask = keywords.get("input_ids", arguments[0] if arguments else None), keywords.get("attention_mask")
    is_padded = isinstance(mask, Tensor) and not bool(mask.all())
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or is_padded:
        raise BitwrightError(
            "BW401",
            "a pass over the logits needs batches of token ids" + (" without padding" if is_padded else ""),
            suggestion="run the prepared model on input_ids [windows, length], or leave that pass out",
        )
    return ids
