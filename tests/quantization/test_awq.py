"""AWQ against the paper's equations in float64: the grid's true minimum, folded or multiplied, never worse than RTN."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.grid import FitOptions
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linear_weight
from bitwright.models.folding import share_scale
from bitwright.models.quantized import QuantizedLinear
from bitwright.models.sites import Site
from bitwright.quantization import awq
from bitwright.quantization.awq import (
    AwqOptions,
    AwqScaleOptions,
    candidate_scales,
    clip_and_scale,
    scale_by_activation,
)
from bitwright.quantization.awq_clip import CLIP_RATIOS, apply_ratios, search_ratios
from bitwright.quantization.smoothing import SiteBench, fake_quantize, judged_samples, open_bench, task_sites
from bitwright.quantization.stages import BlockTask
from tests.models.architectures import build, sample_ids
from tests.quantization.tasks import make_task
from tests.quantization.tiny import Plain

SAMPLES = [sample_ids(1, 20, seed) for seed in range(3)]
EITHER = FitOptions(symmetric_range="either")


def round_plainly(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric rounding to nearest in float64, but for the scale, which is stored in half precision."""
    top = 2 ** (bits - 1) - 1
    rounded = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        scale = (part.abs().amax(1, keepdim=True).float() / top).half().double()
        codes = torch.round(part / torch.where(scale == 0, 1.0, scale)).clamp(-top - 1, top)
        rounded[:, start : start + group] = codes * scale
    return rounded


def candidates_plainly(x: Tensor, w: Tensor, steps: int = 20) -> list[Tensor]:
    """Equation 4 of the paper and its variant with weights; the first one is no scale at all."""
    plain = [x ** (step / steps) for step in range(steps + 1)]
    weighted = [x ** (step / steps) / w ** (1 - step / steps) for step in range(steps)]
    return [(s / (s.max() * s.min()).sqrt()).clamp(1 / 1024, 1024) for s in (*plain, *weighted)]


def test_candidates_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, generator=generator, dtype=torch.float64) + 0.01
    w = torch.rand(12, generator=generator, dtype=torch.float64) + 0.01
    expected = candidates_plainly(x, w)
    found = list(candidate_scales(x, w, 20))
    assert len(found) == len(expected) == 41 and torch.equal(found[0], torch.ones(12))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)


def test_channels_without_numbers_keep_their_scale() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 2.0])
    w = torch.tensor([1.0, 1.0, 0.0, 3.0])
    for scale in candidate_scales(x, w, 4):
        assert scale[0] == scale[2] == 1 and torch.isfinite(scale).all() and (scale > 0).all()
    assert len(list(candidate_scales(torch.zeros(3), torch.ones(3), 4))) == 1


def inputs_of(task: BlockTask, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = task.layers[name].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for sample in range(len(task.inputs)):
        task.run(sample)
    hook.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen]).double()


@torch.no_grad()
def test_the_scale_of_one_layer_is_the_true_minimum_of_the_grid() -> None:
    task = make_task(build("gpt2"), SAMPLES, "w3g32")
    name = next(each for each in task.layers if each.endswith("mlp.c_proj"))
    x, weight = inputs_of(task, name), linear_weight(task.layers[name]).double().clone()
    losses = []
    for scale in candidates_plainly(x.abs().mean(0), weight.abs().mean(0)):
        error = round_plainly(weight * scale, 3, 32) / scale - weight
        losses.append(float((x @ error.T).square().sum()))
    best = min(range(len(losses)), key=losses.__getitem__)
    scale = candidates_plainly(x.abs().mean(0), weight.abs().mean(0))[best]
    assert best > 0 and losses[best] < 0.95 * losses[0]
    multipliers = scale_by_activation(task, AwqScaleOptions(folding=False))
    torch.testing.assert_close(1 / multipliers[name].double(), scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(linear_weight(task.layers[name]).double(), weight * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"range": "full"}, {"range": "either", "search": True}], ids=str)
@torch.no_grad()
def test_candidates_are_rounded_as_the_rounder_will(options: dict[str, Any]) -> None:
    task = make_task(build("gpt2"), SAMPLES, "w3g32")
    name = next(each for each in task.layers if each.endswith("mlp.c_proj"))
    x, weight = inputs_of(task, name).float(), linear_weight(task.layers[name]).clone()
    scales, losses = list(candidate_scales(x.abs().mean(0), weight.abs().mean(0), 20)), []
    form, fit = task.linears[name].weight, AwqScaleOptions(**options).fit
    for scale in scales:
        error = fake_quantize(weight * scale, form, fit) / scale - weight
        losses.append(float((x @ error.T).double().square().sum()))
    multipliers = scale_by_activation(task, AwqScaleOptions(folding=False, **options))
    chosen = min(range(len(losses)), key=lambda each: float((1 / multipliers[name] - scales[each]).abs().max()))
    torch.testing.assert_close(1 / multipliers[name], scales[chosen], rtol=1e-4, atol=0)
    assert losses[chosen] <= min(losses) * (1 + 1e-5)


@torch.no_grad()
def test_channels_that_one_row_makes_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query heads that share a value head: what candidates are made from is shared, so that each of them can fold."""
    task, given = make_task(build("llama"), SAMPLES, "w3g32"), []

    def note(activations: Tensor, weights: Tensor, grid: int) -> Iterator[Tensor]:
        given.append((activations, weights))
        return candidate_scales(activations, weights, grid)

    sites = task_sites(task)
    monkeypatch.setattr(awq, "candidate_scales", note)
    scale_by_activation(task, AwqScaleOptions())
    assert len(given) == len(sites) == 4 and sites[1].fold is not None and sites[1].fold.rows.unique().numel() == 32
    for site, vectors in zip(sites, given, strict=True):
        for vector in vectors:
            torch.testing.assert_close(share_scale(site.fold, vector), vector)


@torch.no_grad()
def test_the_scale_of_a_site_is_the_minimum_of_what_its_scope_makes() -> None:
    """Query, key and value are judged by the attention's output, in a float64 copy of the model."""
    model = build("llama")
    task = make_task(model, SAMPLES, "w3g32")
    site = task_sites(task)[0]
    wide = copy.deepcopy(model).double()
    reference = make_task(wide, SAMPLES, "w3g32")
    bench = open_bench(reference, site, range(3))
    assert bench is not None
    weights = {name: linear_weight(layer).clone() for name, layer in bench.layers.items()}
    outputs = [bench.scope(*a, **k)[0] for a, k in bench.calls]
    x = inputs_of(reference, site.layers[0]).abs().mean(0)
    w = torch.cat(list(weights.values())).abs().mean(0)
    norm = model.model.layers[0].input_layernorm
    before, losses = norm.weight.double().clone(), []
    for scale in candidates_plainly(x, w):
        for name, layer in bench.layers.items():
            linear_weight(layer).copy_(round_plainly(weights[name] * scale, 3, 32) / scale)
        made = [bench.scope(*a, **k)[0] for a, k in bench.calls]
        losses.append(sum(float((a - b).square().sum()) for a, b in zip(made, outputs, strict=True)))
    best = min(range(len(losses)), key=losses.__getitem__)
    scale_by_activation(task, AwqScaleOptions(folding=False))
    assert best > 0
    torch.testing.assert_close(before / norm.weight.double(), candidates_plainly(x, w)[best], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "w2g32"),
        ("llama", "w4g32-dq"),
        ("gpt2", "w3g32-asym"),
        ("gpt2", "nf4g32"),
        *(pytest.param(name, scheme, marks=pytest.mark.slow) for name in ("llama", "gpt2") for scheme in ("w4", "w8")),
    ],
)
@torch.no_grad()
def test_no_site_is_worse_than_rounded_to_nearest(name: str, scheme: str) -> None:
    """Each site alone, on what it reads in the float model, with the scheme's true numbers."""
    for number, site in enumerate(task_sites(make_task(build(name), SAMPLES, scheme))):
        losses = []
        for options in ({"scale": False, "clip": False}, {"clip": False}, {}):
            scaled, whole = (one_site(name, scheme, site) for _ in range(2))
            multipliers = clip_and_scale(scaled, AwqOptions(**{"folding": False, **options, "clip": False}))
            for layer, multiplier in multipliers.items():
                scaled.layers[layer].register_forward_pre_hook(lambda _, x, m=multiplier: (x[0] * m,))
            clip_and_scale(whole, AwqOptions(**{"folding": False, **options}))
            bench = open_bench(scaled, site, range(len(SAMPLES)))  # what it made before anything was clipped
            assert bench is not None
            fit = FitOptions() if "scale" in options else EITHER  # plain rounding, against the better of two ranges
            losses.append(bench.loss({each: rounded(whole, each, fit) for each in site.layers}))
        nearest, equalized, clipped = losses
        assert equalized <= nearest * (1 + 1e-4) and clipped <= equalized * (1 + 1e-4), (site.layers, losses)
        assert scheme != "w2g32" or clipped < 0.9 * nearest or number == 3


def one_site(name: str, scheme: str, site: Site) -> BlockTask:
    """A task that is responsible for one site's layers alone."""
    task = make_task(build(name), SAMPLES, scheme)
    layers = {each: task.layers[each] for each in site.layers}
    return replace(task, layers=layers, linears={each: task.linears[each] for each in layers})


def rounded(task: BlockTask, name: str, options: FitOptions) -> Tensor:
    return fake_quantize(linear_weight(task.layers[name]), task.linears[name].weight, options)


@pytest.mark.parametrize("scheme", ["w2g16", "w3g16", "w4", "w8g16", "w3g16-axis0"])
def test_the_better_of_two_ranges_is_taken_group_by_group(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, form = torch.randn(32, 40, generator=generator).clamp(-1, 1.2), parse(scheme + "-sf32").weight
    by_range = []
    for options in (FitOptions(), FitOptions(symmetric_range="full"), EITHER):
        error = (fake_quantize(weight, form, options) - weight).square()
        error = error if form.axis == 1 else error.t()
        size = form.group or error.shape[1]
        by_range.append(torch.stack([part.sum(1) for part in error.split(size, 1)]))
    restricted, full, either = by_range
    torch.testing.assert_close(either, torch.minimum(restricted, full))
    assert (full < restricted).any()


@pytest.mark.parametrize("scheme", ["w4g16-asym", "nf4g16", "w1g16", "fp8"])
def test_schemes_with_one_range_take_that(scheme: str) -> None:
    weight, form = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), parse(scheme).weight
    assert torch.equal(fake_quantize(weight, form, EITHER), fake_quantize(weight, form, FitOptions()))


@torch.no_grad()
def test_clipped_ranges_are_the_best_of_each_group() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=generator)
    tokens = torch.randn(50, 40, generator=generator) * torch.linspace(0.1, 3, 40)
    scheme = parse("w3g16").weight  # the last group has 8 columns
    ratios = search_ratios(weight, tokens, scheme, FitOptions())
    expected = torch.empty(6, 3)
    for group, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        losses = []
        for ratio in CLIP_RATIOS:
            part = weight[:, columns].double()
            low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
            clipped = part.clamp(low * ratio, high * ratio)
            error = round_plainly(clipped, 3, 16) - part
            losses.append((tokens[:, columns].double() @ error.T).square().sum(0))
        expected[:, group] = torch.tensor(CLIP_RATIOS)[torch.stack(losses).argmin(0)]
    torch.testing.assert_close(ratios, expected)
    assert (ratios < 1).any() and (ratios <= 1).all()
    clipped = apply_ratios(weight.clone(), ratios, scheme)
    assert torch.equal(clipped[:, :16][ratios[:, 0] == 1], weight[:, :16][ratios[:, 0] == 1])


@torch.no_grad()
def test_what_is_clipped_is_judged_by_what_the_whole_site_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose own search errs is left alone; one that gains counts when the next is judged."""
    task = make_task(build("llama"), SAMPLES, "w3g32")
    before = {name: linear_weight(layer).clone() for name, layer in task.layers.items()}
    good = {name: name.endswith(("q_proj", "up_proj")) for name in before}
    found: list[Tensor] = []

    def search(weight: Tensor, tokens: Tensor, scheme: QuantScheme, options: FitOptions) -> Tensor:
        name = next(name for name, own in before.items() if torch.equal(own, weight))
        found.append(search_ratios(weight, tokens, scheme, options))
        return found[-1] if good[name] else torch.full_like(found[-1], 0.1)

    monkeypatch.setattr(awq, "search_ratios", search)
    judged: list[tuple[Tensor, ...]] = []
    loss = SiteBench.loss
    monkeypatch.setattr(
        SiteBench, "loss", lambda bench, tried: judged.append(tuple(tried.values())) or loss(bench, tried)
    )
    clip_and_scale(task, AwqOptions(scale=False))
    changed = {name for name, layer in task.layers.items() if not torch.equal(linear_weight(layer), before[name])}
    assert changed and all(good[name] for name in changed) and len(found) == 7
    start, by_query, by_key = judged[:3]  # of the queries', keys' and values' site
    assert "self_attn.q_proj" in " ".join(changed) and not torch.equal(by_query[0], start[0])
    assert torch.equal(by_key[0], by_query[0]) and not torch.equal(by_key[1], start[1])


@torch.no_grad()
def test_folding_leaves_no_multipliers_and_says_what_it_leaves_out() -> None:  # W31
    for name, unfolded in (("llama", []), ("gpt2", ["c_proj"])):
        model = build(name)
        before = model(SAMPLES[0], use_cache=False).logits
        task = make_task(model, SAMPLES, "w3g32")
        if unfolded:
            with pytest.warns(Notice, match=r"only folds are allowed.*mlp\.c_proj"):
                multipliers = clip_and_scale(task, AwqOptions(folding=True, clip=False))
        else:
            multipliers = clip_and_scale(task, AwqOptions(folding=True, clip=False))
        assert multipliers == {}
        torch.testing.assert_close(model(SAMPLES[0], use_cache=False).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "phi"])
@torch.no_grad()
def test_multiplied_inputs_leave_the_output_alone(name: str) -> None:  # W31
    model = build(name)
    before = model(SAMPLES[0], use_cache=False).logits
    task = make_task(model, SAMPLES, "w3g32")
    multipliers = scale_by_activation(task, AwqScaleOptions(folding=False))
    assert [each.rpartition(".")[2] for each in multipliers] == [{"gpt2": "c_proj", "phi": "fc2"}[name]]
    assert not torch.allclose(model(SAMPLES[0], use_cache=False).logits, before, atol=1e-3)
    for layer, multiplier in multipliers.items():
        task.layers[layer].register_forward_pre_hook(lambda _, arguments, m=multiplier: (arguments[0] * m,))
    torch.testing.assert_close(model(SAMPLES[0], use_cache=False).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["w4g48", "w3g32-asym", "w4"])
def test_a_group_of_zeros_and_a_short_last_group(scheme: str) -> None:  # W30
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, :32] = 0
        model.model.layers[0].mlp.up_proj.weight[5] = 0
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    prepared = bitwright.prepare(model, scheme=scheme, algorithm="awq", group_fallback="pad")
    for sample in SAMPLES:
        prepared(input_ids=sample)
    quantized = bitwright.convert(prepared)
    with torch.no_grad():
        assert torch.isfinite(quantized(SAMPLES[0]).logits).all()


def test_the_whole_run_beats_rounding_to_nearest() -> None:
    model = build("llama")
    with torch.no_grad():
        expected = torch.cat([model(sample, use_cache=False).logits for sample in SAMPLES])
    errors = {}
    for algorithm in ("rtn", "awq"):
        prepared = bitwright.prepare(model, scheme="w3g32", algorithm=algorithm)
        for sample in SAMPLES:
            prepared(sample)
        quantized = bitwright.convert(prepared)
        with torch.no_grad():
            found = torch.cat([quantized(sample, use_cache=False).logits for sample in SAMPLES])
        errors[algorithm] = float((found - expected).square().mean())
    assert errors["awq"] < 0.9 * errors["rtn"]


def test_a_plain_module_is_equalized() -> None:
    model = Plain()
    torch.manual_seed(1)
    prepared = bitwright.prepare(model, scheme="w3g32", algorithm="awq")
    for _ in range(3):
        prepared(torch.randn(5, 8))
    quantized = bitwright.convert(prepared)
    layers = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 6 and all(layer.input_scale is None for layer in layers)  # norm and ReLU take everything


@torch.no_grad()
def test_a_float_layer_beside_quantized_ones_follows_the_norm() -> None:
    model = build("llama")
    before = model(SAMPLES[0], use_cache=False).logits
    key = model.model.layers[0].self_attn.k_proj.weight.clone()
    task = make_task(model, SAMPLES, "w2g32", excluded=["k_proj"])
    clip_and_scale(task, AwqOptions(folding=False, clip=False))
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, key)
    torch.testing.assert_close(model(SAMPLES[0], use_cache=False).logits, before, atol=1e-4, rtol=0)


def test_samples_are_bounded_by_tokens() -> None:
    task = make_task(build("llama"), [sample_ids(1, 10, seed) for seed in range(9)], "w4g32")
    assert judged_samples(task, 10_000) == tuple(range(9))
    assert judged_samples(task, 30) == (0, 3, 6)
    assert judged_samples(task, 1) == (0,)


@pytest.mark.parametrize("options", [{"grid": 0}, {"grid": 1.5}, {"tokens": 0}, {"range": "half"}, {"range": None}])
def test_invalid_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BitwrightError) as caught:
        AwqOptions(**options)  # type: ignore[arg-type]
    assert caught.value.code == "BW201"
    assert ("symmetric_range" if "range" in options else next(iter(options))) in caught.value.what


@pytest.mark.parametrize("scheme", ["w4g32-asym", "nf4g32"])
def test_a_range_that_a_scheme_cannot_take_is_refused(scheme: str) -> None:
    model = build("llama")
    task = make_task(model, SAMPLES, scheme)
    with pytest.raises(BitwrightError) as caught:
        clip_and_scale(task, AwqOptions(range="full"))
    assert caught.value.code == "BW201" and "q_proj" in caught.value.what
    assert isinstance(model, nn.Module)
