"""TEQ: untrained it is rounding to nearest, trained it never loses, and what is folded is what was trained."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.core import grid
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linear_weight
from bitwright.models.quantized import QuantizedLinear
from bitwright.models.sites import Site
from bitwright.quantization.smoothing import apply_scale, fake_quantize, task_sites
from bitwright.quantization.stages import BlockTask
from bitwright.quantization.teq import TeqOptions, scale_by_training, train_scales
from bitwright.quantization.teq_module import ScaledLinear, TrainableSites, _Rounded, group_ranges, insert_scales
from tests.models.architectures import build, sample_ids
from tests.quantization.tasks import make_task

SAMPLES = [sample_ids(1, 16, seed) for seed in range(3)]
ROUNDED = ["w2g32", "w3g32-asym", "w4", "w8-asym", "nf4g32"]


def inserted(task: BlockTask) -> TrainableSites:
    return insert_scales(task.block, task.name, task.layers, task.linears, task_sites(task), FitOptions())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_untrained_it_is_rounding_to_nearest_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    for kind in ("", "-asym"):
        model = build("llama", dtype=dtype)
        made: dict[str, list[QuantizedTensor]] = {}
        for algorithm, options in (("rtn", {}), ("teq", {"steps": 0})):
            prepared = bitwright.prepare(model, scheme=f"w{bits}g32{kind}", algorithm=algorithm, options=options)
            prepared(SAMPLES[0])
            quantized = bitwright.convert(prepared)
            layers = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
            made[algorithm] = [layer.unpack() for layer in layers]
        for ours, nearest in zip(made["teq"], made["rtn"], strict=True):
            assert torch.equal(ours.codes, nearest.codes)
            assert isinstance(ours.scale, Tensor) and isinstance(nearest.scale, Tensor)
            assert torch.equal(ours.scale, nearest.scale)
            assert (ours.zero is None and nearest.zero is None) or torch.equal(ours.zero, nearest.zero)
        task = make_task(model, SAMPLES, f"w{bits}g32{kind}")  # the trainable module itself, too
        module = inserted(task)
        for name, layer in module.scaled.items():
            expected = fake_quantize(linear_weight(task.layers[name]), task.linears[name].weight, FitOptions())
            assert torch.equal(layer.rounded()["weight"], expected.to(dtype))
        module.remove()
        assert all(task.block.get_submodule(n.removeprefix(task.name + ".")) is m for n, m in task.layers.items())


def naive_loss(alpha: Tensor, x: Tensor, weight: Tensor, target: Tensor, nearest: Tensor, bits: int) -> Tensor:
    """One layer restated in float64: only the rounding itself is passed straight through, for groups of all columns.

    The code of each weight stays; the grid's step follows the largest weight: ``Q(w) = step * (w / step + residue)``.
    """
    scaled = weight * alpha
    top = 2 ** (bits - 1) - 1
    step = scaled.abs().amax(1, keepdim=True) / top
    residue = ((nearest - scaled) / step).detach()
    return ((x / alpha) @ (step * (scaled / step + residue)).T - target).square().mean()


def test_the_gradient_is_that_of_the_equations() -> None:
    torch.manual_seed(0)
    bits, layer, x = 3, nn.Linear(12, 7, bias=False), torch.randn(9, 12)
    scheme = parse("w3-sf32")
    holder = nn.Module()
    holder.layer = layer
    site = Site(layers=("b.layer",), readers=("b.layer",), width=12, scope="b.layer")
    module = insert_scales(holder, "b", {"b.layer": layer}, {"b.layer": scheme}, [site], FitOptions())
    (alpha,) = module.parameters()
    with torch.no_grad():
        alpha.copy_(torch.rand(12) + 0.5)
    target = torch.randn(9, 7)
    loss = (holder.layer(x) - target).square().mean()
    (gradient,) = torch.autograd.grad(loss, alpha)
    plain = alpha.detach().double().requires_grad_(True)
    nearest = fake_quantize(layer.weight.detach() * alpha.detach(), scheme.weight, FitOptions()).double()
    expected = naive_loss(plain, x.double(), layer.weight.detach().double(), target.double(), nearest, bits)
    (naive,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-7)
    assert float(naive.abs().min()) > 1e-6


def test_what_hangs_on_a_layer_is_called() -> None:
    """Hooks of every kind, and a ``forward`` that another library has put in the place of its own."""
    seen: list[str] = []
    layers = {name: nn.Linear(8, 8) for name in ("before", "after", "back", "ahead", "own", "bare")}
    layers["before"].register_forward_pre_hook(lambda *_: seen.append("before"))
    layers["after"].register_forward_hook(lambda *_: seen.append("after"))
    layers["back"].register_full_backward_hook(lambda *_: seen.append("back"))
    layers["ahead"].register_full_backward_pre_hook(lambda *_: seen.append("ahead"))
    forward = layers["own"].forward
    layers["own"].forward = lambda x: (seen.append("own"), forward(x))[1]  # type: ignore[method-assign]
    for layer in layers.values():
        x = torch.randn(4, 8, requires_grad=True)
        ScaledLinear(layer, parse("w4").weight, FitOptions())(x).sum().backward()
        assert x.grad is not None
    assert seen == ["before", "after", "back", "ahead", "own"]


GRADED = ["w3-asym", "w2g5", "w3g5-asym", "w4g5-asym-fz", "w1g4", "nf4g5", "w3g3-axis0", "w3g4-asym-axis0", "w4g4-dq"]


@pytest.mark.parametrize("scheme", GRADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_same_by_rows_and_at_once(
    kernels: str, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what multiplies the columns and of what divides the rows, beside one expression over the whole weight."""
    monkeypatch.setattr(grid, "TILE", 24)  # two rows at a time
    torch.manual_seed(0)
    form, weight, grad = parse(scheme).weight, torch.randn(7, 12).to(dtype), torch.randn(7, 12)
    scale, divisor = (torch.rand(12) + 0.5).requires_grad_(), (torch.rand(7) + 0.5).requires_grad_()
    straight: Any = _Rounded.apply
    rounded = straight(weight, scale, divisor, form, FitOptions(), None)
    found = torch.autograd.grad((rounded.float() * grad.to(dtype).float()).sum(), (scale, divisor))
    columns, rows = (vector.detach().double().requires_grad_() for vector in (scale, divisor))
    scaled = weight.double() * columns / rows[:, None]
    along = scaled if form.axis == 1 else scaled.t()
    ranges = torch.cat([naive_range(part, form).expand_as(part) for part in along.split(form.group or 12, 1)], 1)
    ranges = ranges if form.axis == 1 else ranges.t()
    moving = scaled + (rounded.detach().double() - scaled.detach()) * ranges / ranges.detach()
    expected = torch.autograd.grad((moving * grad.to(dtype).double()).sum(), (columns, rows))
    for ours, naive in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), naive, rtol=1e-3, atol=1e-3)
        assert float(naive.abs().min()) > 1e-3


def naive_range(group: Tensor, form: QuantScheme) -> Tensor:
    if form.bits == 1:
        return group.abs().mean(1, keepdim=True)
    if form.symmetric or form.is_codebook:
        return group.abs().amax(1, keepdim=True)
    high, low = group.amax(1, keepdim=True), group.amin(1, keepdim=True)
    return high - low if form.zero == "float" else high.clamp(min=0) - low.clamp(max=0)


@pytest.mark.parametrize("scheme", ["w3g5", "w3g5-asym", "w1g4", "nf4g5", "w4g3-asym-fz"])
def test_the_ranges_of_groups_are_what_their_scales_are_proportional_to(scheme: str) -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(6, 12), parse(scheme + "-sf32").weight
    ranges = group_ranges(weight, form)
    ratio = ranges / QuantizedTensor.quantize(weight, form).dense_scale()
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_falls_in_most_steps_and_scales_stay_positive(name: str) -> None:  # W32
    task = make_task(build(name), SAMPLES, "w3g32")
    before = {key: value.clone() for key, value in task.block.state_dict().items()}
    trained = train_scales(task, TeqOptions(folding=False, steps=26))
    losses = [*trained.losses, trained.best]
    falls = [after < first for first, after in zip(trained.losses, trained.losses[1:], strict=False)]
    assert sum(falls) >= 0.8 * len(falls), losses
    assert trained.best == min(losses) and trained.best < 0.95 * losses[0]
    assert all((scale > 0).all() and not (scale == 1).all() for scale in trained.scales)
    assert all(torch.equal(value, before[key]) for key, value in task.block.state_dict().items())
    assert all(parameter.requires_grad for parameter in task.block.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixture"])
@torch.no_grad()
def test_the_folded_block_is_the_trained_one(name: str) -> None:  # W32
    task = make_task(build(name), SAMPLES, "w3g32")
    floats = [task.run(sample) for sample in range(3)]
    sites = task_sites(task)
    module = inserted(task)
    generator = torch.Generator().manual_seed(0)
    for alpha in module.parameters():
        alpha.copy_(torch.rand(alpha.shape, generator=generator) * 1.5 + 0.5)
    trained = [task.run(sample) for sample in range(3)]
    module.remove()
    with ExitStack() as hooks:
        for site, scale in zip(sites, module.values(), strict=True):
            assert apply_scale(task, site, scale, folding=False, hooks=hooks) is not None
        for sample in range(3):
            torch.testing.assert_close(task.run(sample), floats[sample], atol=1e-4, rtol=1e-4)
        for path, layer in task.layers.items():
            weight = linear_weight(layer)
            weight.copy_(fake_quantize(weight, task.linears[path].weight, FitOptions()))
        folded = [task.run(sample) for sample in range(3)]
    for ours, theirs, plain in zip(folded, trained, floats, strict=True):
        error, noise = (ours - theirs).abs().max(), (theirs - plain).abs().max()
        assert float(error) < 1e-4 * float(plain.abs().max()) < float(noise)


def test_the_learning_rate_rises_then_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def note(optimizer: torch.optim.Adam) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    train_scales(make_task(build("llama"), SAMPLES[:1], "w3g32"), TeqOptions(steps=10, warmup=0.4, lr=0.01))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, *(0.01 * left / 6 for left in (5, 4, 3, 2, 1))])


@pytest.mark.parametrize("batch", [1, 8])
def test_it_never_loses_and_the_seed_decides(batch: int) -> None:
    """Also with a learning rate that leads nowhere, when a step sees all samples and when it sees one."""
    results = []
    for seed in (0, 0, 1):
        task = make_task(build("llama"), SAMPLES, "w4g32", seed=seed)
        results.append(train_scales(task, TeqOptions(folding=False, steps=3, lr=0.9, batch=batch)))
    first, again, other = results
    assert all(torch.equal(a, b) for a, b in zip(first.scales, again.scales, strict=True))
    assert batch == 8 or first.losses != other.losses
    task = make_task(build("llama"), SAMPLES, "w4g32")
    nearest = train_scales(task, TeqOptions(folding=False, steps=1, lr=1e-12)).losses[0]
    if batch == 8:
        assert first.best <= nearest


@pytest.mark.parametrize("batch", [1, 8])
def test_training_in_batches_lowers_the_loss_of_all(batch: int) -> None:
    model = build("llama")
    with torch.no_grad():
        task = make_task(model, SAMPLES, "w3g32")
        floats = [task.run(sample) for sample in range(3)]

        def error() -> float:
            kept = {name: linear_weight(layer).clone() for name, layer in task.layers.items()}
            for name, layer in task.layers.items():
                linear_weight(layer).copy_(fake_quantize(kept[name], task.linears[name].weight, FitOptions()))
            found = sum(float((task.run(n) - output).square().mean()) for n, output in enumerate(floats))
            for name, layer in task.layers.items():
                linear_weight(layer).copy_(kept[name])
            return found

        before = error()
        assert scale_by_training(task, TeqOptions(folding=False, steps=20, batch=batch)) == {}
        assert error() < before
        torch.testing.assert_close(task.run(0), floats[0], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_folded_is_multiplied_or_left_out_openly() -> None:
    multipliers = scale_by_training(make_task(build("gpt2"), SAMPLES, "w3g32"), TeqOptions(folding=False, steps=4))
    assert [name.rpartition(".mlp.")[2] for name in multipliers] == ["c_proj"]
    assert all((multiplier > 0).all() for multiplier in multipliers.values())
    with pytest.warns(Notice, match=r"only folds are allowed.*mlp\.c_proj"):
        left = scale_by_training(make_task(build("gpt2"), SAMPLES, "w3g32"), TeqOptions(steps=4, folding=True))
    assert left == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", -1), ("steps", 2.0), ("lr", 0.0), ("lr", 2.0), ("warmup", 1.0), ("batch", 0), ("range", "half")],
)
def test_invalid_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(BitwrightError) as caught:
        TeqOptions(**{field: value})  # type: ignore[arg-type]
    assert caught.value.code == "BW201" and field in caught.value.what


def test_a_range_that_a_scheme_cannot_take_is_refused() -> None:
    task = make_task(build("llama"), SAMPLES, "w4g32-asym")
    with pytest.raises(BitwrightError) as caught:
        train_scales(task, TeqOptions(folding=False, range="centred"))
    assert caught.value.code == "BW201" and "w4g32-asym" in caught.value.what


def test_layers_of_other_schemes_train_together() -> None:
    task = make_task(build("llama"), SAMPLES, "w3g32")
    assert isinstance(next(iter(task.linears.values())), LayerScheme)
    mixed = {name: parse(ROUNDED[number % len(ROUNDED)]) for number, name in enumerate(task.linears)}
    object.__setattr__(task, "linears", mixed)
    trained = train_scales(task, TeqOptions(folding=False, steps=2))
    assert len(trained.losses) == 2 and trained.best <= trained.losses[0]
