"""AutoRound: the paper's algorithm restated, what every option does, and that it is never worse than its start."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels import native_library
from bitwright.models.blocks import find_blocks
from bitwright.quantization import autoround
from bitwright.quantization.autoround import AutoRoundOptions, learn_rounding
from bitwright.quantization.block_loss import BlockLoss
from bitwright.quantization.capture import capture
from bitwright.quantization.fake_quant import OffsetWeight
from bitwright.quantization.stages import BlockTask
from bitwright.quantization.stream import Flow, _are_alike
from tests.conftest import LEFT_ASIDE, MISSING
from tests.quantization.few_steps import few_steps
from tests.quantization.tiny import Plain, PlainBlock, build_model

WIDTH, TOKENS, SAMPLES = 16, 12, 10


def make_task(scheme: str = "w2g16-asym", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> BlockTask:
    """A block with two layers, whose inputs in the quantized model differ from those in the float one."""
    torch.manual_seed(seed)
    block = PlainBlock(WIDTH).to(dtype)
    layers: dict[str, nn.Module] = {"blocks.0.up": block.up, "blocks.0.down": block.down}
    reference = tuple(torch.randn(1, TOKENS, WIDTH, dtype=dtype) for _ in range(SAMPLES))
    inputs = tuple(hidden + 0.1 * torch.randn_like(hidden) for hidden in reference)

    def run_on(hidden: Tensor, sample: int) -> Tensor:
        result: Tensor = block(hidden)
        return result

    return BlockTask(
        name="blocks.0",
        block=block,
        layers=layers,
        linears=dict.fromkeys(layers, parse(scheme)),
        sites=(("blocks.0.up",), ("blocks.0.down",)),
        statistics={},
        inputs=inputs,
        reference_inputs=reference,
        run=lambda sample: run_on(inputs[sample], sample),
        run_on=run_on,
        seed=7,
    )


def round_to_nearest(task: BlockTask) -> dict[str, QuantizedTensor]:
    return {
        name: QuantizedTensor.quantize(layer.weight.detach(), task.linears[name].weight)
        for name, layer in task.layers.items()
    }


def error_of(task: BlockTask, tensors: dict[str, QuantizedTensor]) -> float:
    """The mean squared error over all samples, worked out by hand."""
    float_up, float_down = task.block.up.weight, task.block.down.weight
    with torch.no_grad():
        wanted = [task.run_on(hidden, 0) for hidden in task.reference_inputs]
        task.block.up.weight = nn.Parameter(tensors["blocks.0.up"].dequantize())
        task.block.down.weight = nn.Parameter(tensors["blocks.0.down"].dequantize())
        found = [task.run(sample) for sample in range(len(task.inputs))]
        task.block.up.weight, task.block.down.weight = float_up, float_down
    errors = [(a.double() - b.double()).square().mean() for a, b in zip(found, wanted, strict=True)]
    return float(torch.stack(errors).mean())


def naive_rounding(weight: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 3 and 4 at two bits, asymmetric, groups of 16, in float64 but for the float16 scale that is stored."""
    view = weight.view(weight.shape[0], -1, 16)
    lows, highs = view.amin(-1).clamp(max=0) * low, view.amax(-1).clamp(min=0) * high
    scale = (highs - lows) / 3
    scale = (scale + (scale.half().double() - scale).detach()).unsqueeze(-1)
    zero = -lows.unsqueeze(-1) / scale
    zero = zero + (zero.round() - zero).detach()
    scaled = view / scale + offset.view_as(view)
    codes = (scaled + (scaled.round() - scaled).detach() + zero).clamp(0, 3)
    return ((codes - zero) * scale).view_as(weight), codes.view_as(weight).detach()


def naive_codes(task: BlockTask, steps: int) -> dict[str, Tensor]:
    """Algorithm 1 of the paper on all samples at once: sign steps, the best iterate of those seen."""
    block = task.block.double()
    weights = [block.up.weight.detach(), block.down.weight.detach()]
    counts = [(weight.shape[0], weight.shape[1] // 16) for weight in weights]
    values = [
        [torch.zeros_like(weight), torch.ones(count).double(), torch.ones(count).double()]
        for weight, count in zip(weights, counts, strict=True)
    ]
    inputs, reference = torch.cat(task.inputs).double(), torch.cat(task.reference_inputs).double()

    def forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x + torch.relu(block.norm(x) @ up.T + block.up.bias) @ down.T

    wanted, least, best = forward(reference, *weights).detach(), float("inf"), []
    for step in range(steps):
        leaves = [[value.clone().requires_grad_() for value in layer] for layer in values]
        rounded = [naive_rounding(weight, *layer) for weight, layer in zip(weights, leaves, strict=True)]
        loss = (forward(inputs, rounded[0][0], rounded[1][0]) - wanted).square().mean()
        if loss.item() < least:
            least, best = loss.item(), [codes for _, codes in rounded]
        loss.backward()
        for layer, moved in zip(leaves, values, strict=True):
            for leaf, value, bounds in zip(layer, moved, ((-0.5, 0.5), (0, 1), (0, 1)), strict=True):
                value.sub_((1 - step / steps) / steps * leaf.grad.sign()).clamp_(*bounds)
    block.float()
    return {"blocks.0.up": best[0], "blocks.0.down": best[1]}


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_first_steps_are_those_of_the_paper(steps: int) -> None:
    task = make_task()
    options = AutoRoundOptions(iters=steps, batch_size=SAMPLES)
    found = learn_rounding(task, round_to_nearest(task), options)
    expected = naive_codes(task, steps)
    for name, codes in expected.items():
        assert (found[name].codes == codes).float().mean() > 0.999, name  # a tie of float32 sums may fall otherwise


def test_it_improves_on_rounding_to_nearest_and_leaves_the_block_as_it_was() -> None:
    task = make_task()
    before = {name: value.clone() for name, value in task.block.state_dict().items()}
    start = round_to_nearest(task)
    found = dict(learn_rounding(task, start, AutoRoundOptions(iters=60, batch_size=4)))
    assert error_of(task, found) < 0.9 * error_of(task, start)
    assert all(torch.equal(before[name], value) for name, value in task.block.state_dict().items())
    assert not any(parameter.grad is not None for parameter in task.block.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.0, "minmax_lr": 1.0},
        {"lr": 1.0, "not_use_best_mse": True},
        {"lr": 0.5, "lr_scheduler": "constant", "dynamic_max_gap": 2},
    ],
)
def test_it_is_never_worse_than_its_start(options: dict[str, Any]) -> None:
    """Steps that are far too long lead nowhere; the start is kept then."""
    task = make_task("w8g16-asym")
    start = round_to_nearest(task)
    found = dict(learn_rounding(task, start, AutoRoundOptions(iters=6, batch_size=2, **options)))
    assert error_of(task, found) <= error_of(task, start)


def test_the_seed_settles_everything() -> None:
    runs = [learn_rounding(make_task(), round_to_nearest(make_task()), AutoRoundOptions(iters=8)) for _ in range(2)]
    assert all(torch.equal(runs[0][name].codes, runs[1][name].codes) for name in runs[0])


def differs(*changed: dict[str, Any], scheme: str = "w2g16-asym") -> bool:
    """Whether two sets of options give different codes."""
    task = make_task(scheme)
    found = [
        learn_rounding(task, round_to_nearest(task), AutoRoundOptions(**{"iters": 10, "batch_size": 2} | options))
        for options in changed
    ]
    return any(not torch.equal(found[0][name].dequantize(), found[1][name].dequantize()) for name in found[0])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02},
        {"minmax_lr": 0.02},
        {"minmax_tuning": False},
        {"lr_scheduler": "constant"},
        {"batch_size": 4},
        {"gradient_accumulate_steps": 3},
        {"sampler": "sequential"},
        {"quantized_input": False},
        {"dynamic_max_gap": 1},
    ],
)
def test_every_option_does_something(options: dict[str, Any]) -> None:
    assert differs({}, options)


def test_the_last_iterate_is_kept_only_if_that_is_asked_for() -> None:
    task, start = make_task(), round_to_nearest(make_task())
    options: dict[str, Any] = {"iters": 20, "batch_size": SAMPLES, "lr": 0.02, "lr_scheduler": "constant"}
    best, last = (
        dict(learn_rounding(task, start, AutoRoundOptions(**options, not_use_best_mse=flag))) for flag in (False, True)
    )
    assert error_of(task, best) < error_of(task, last) < error_of(task, start)


@pytest.mark.parametrize("gap", [1, 3])
def test_it_stops_after_so_many_steps_without_a_better_iterate(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    genuine = BlockLoss.backward

    def backward(loss: BlockLoss, batch: Any) -> float:
        calls.append(1)
        genuine(loss, batch)
        return 1.0

    monkeypatch.setattr(BlockLoss, "backward", backward)
    learn_rounding(make_task(), round_to_nearest(make_task()), AutoRoundOptions(iters=20, dynamic_max_gap=gap))
    assert len(calls) == 1 + gap


def test_samples_may_be_taken_one_after_the_other() -> None:
    batches = autoround._batches(5, AutoRoundOptions(batch_size=2, sampler="sequential"), torch.Generator())
    assert [next(batches) for _ in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_offsets_and_ranges_stay_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[OffsetWeight] = []

    def note(*arguments: Any) -> OffsetWeight:
        made.append(OffsetWeight(*arguments))
        return made[-1]

    monkeypatch.setattr(autoround, "OffsetWeight", note)
    options = AutoRoundOptions(iters=12, lr=0.3, lr_scheduler="constant")
    learn_rounding(make_task(), round_to_nearest(make_task()), options)
    assert len(made) == 2
    for weight in made:
        assert float(weight.offset.min()) == -0.5 and float(weight.offset.max()) == 0.5
        for bound in (weight.low, weight.high):
            assert float(bound.min()) >= 0 and float(bound.max()) == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_step_leads_beyond_the_bounds(sign: float) -> None:
    task = make_task()
    weight = OffsetWeight(task.block.up.weight, parse("w2g16-asym").weight)
    for _ in range(3):
        autoround._move(weight, sign * torch.ones(weight.rows.shape), 1.0, AutoRoundOptions(iters=2))
        for bound in (weight.low, weight.high):
            assert float(bound.min()) >= 0 and float(bound.max()) <= 1
        assert float(weight.offset.abs().max()) == 0.5


def test_a_block_whose_error_is_never_finite_keeps_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockLoss, "backward", lambda *_: float("nan"))
    given = round_to_nearest(make_task())
    assert learn_rounding(make_task(), given, AutoRoundOptions(iters=2)) is given


@pytest.mark.parametrize("scheme", ["w2g16-asym", "w3g16", "w4g16-asym-axis0"])
@pytest.mark.parametrize("last", [False, True])
def test_native_loops_learn_the_same_codes(scheme: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many steps, whose buffers are written over again and again."""
    if MISSING is not None:
        pytest.skip(MISSING)
    options, found = AutoRoundOptions(iters=30, lr=0.1, not_use_best_mse=last), []
    for missing in (LEFT_ASIDE, None):
        monkeypatch.setattr(native_library, "_MISSING", missing)
        found.append(learn_rounding(make_task(scheme=scheme), round_to_nearest(make_task(scheme=scheme)), options))
    for name, tensor in found[0].items():
        assert torch.equal(tensor.codes, found[1][name].codes)
        assert torch.equal(tensor.dense_scale(), found[1][name].dense_scale())


def test_the_full_range_is_for_symmetric_schemes() -> None:
    assert differs({}, {"full_range": True}, scheme="w2g16")
    with pytest.raises(BitwrightError, match=r"w2g16-asym, the scheme of blocks\.0\.up: range is 'full'"):
        differs({"full_range": True}, scheme="w2g16-asym")


def test_without_tuned_ranges_the_grid_is_that_of_rounding_to_nearest() -> None:
    task = make_task()
    start = round_to_nearest(task)
    found = learn_rounding(task, start, AutoRoundOptions(iters=20, minmax_tuning=False))
    for name, tensor in found.items():
        assert torch.equal(tensor.dense_scale(), start[name].dense_scale())
        assert (tensor.codes.int() - start[name].codes.int()).abs().max() <= 1


def test_accumulated_gradients_are_those_of_one_larger_batch() -> None:
    assert not differs(
        {
            "sampler": "sequential",
            "batch_size": 5,
            "gradient_accumulate_steps": 2,
            "iters": 3,
            "not_use_best_mse": True,
        },
        {"sampler": "sequential", "batch_size": 10, "iters": 3, "not_use_best_mse": True},
    )


def test_samples_that_are_alike_are_run_together_with_the_same_loss() -> None:
    task = make_task()
    assert not task.alike
    together = BlockLoss(replace(task, alike=True))
    assert BlockLoss(task).mean(range(5)) == pytest.approx(together.mean(range(5)), rel=1e-6)
    lengths: list[int] = []

    def counted(hidden: Tensor, sample: int) -> Tensor:
        lengths.append(len(hidden))
        return task.run_on(hidden, sample)

    BlockLoss(replace(task, alike=True, run_on=counted)).mean(range(5))
    assert lengths == [1] * SAMPLES + [2, 5]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, None])
def test_samples_whose_masks_are_for_one_are_run_alone(kind: type[Exception] | None) -> None:
    """As those of Bloom, which have a row for each head of each sample, and of XGLM, which are checked."""
    task = make_task()

    def for_one(hidden: Tensor, sample: int) -> Tensor:
        if len(hidden) > 1 and kind is not None:
            raise kind("the mask is of one sample")
        return task.run_on(hidden, sample) * len(hidden)

    loss = BlockLoss(replace(task, alike=True, run_on=for_one))
    assert loss.mean(range(5)) == BlockLoss(task).mean(range(5))
    assert not loss.joins


@pytest.mark.parametrize("algorithm", ["autoround", "gptq+learned"])
def test_a_family_whose_masks_are_for_one_sample_learns(algorithm: str) -> None:
    options = few_steps(algorithm)
    prepared = bitwright.prepare(build_model("bloom"), scheme="w4g16", algorithm=algorithm, options=options)
    for seed in range(3):
        prepared(input_ids=torch.arange(12).remainder(7 + seed).view(1, 12))
    assert torch.isfinite(bitwright.convert(prepared)(input_ids=torch.arange(6)[None]).logits).all()


def test_the_stream_knows_which_samples_are_alike() -> None:
    """Windows of one length are; batches of several rows, other lengths or other masks are not."""
    model = build_model("qwen2")
    ids = torch.arange(12).remainder(7).view(1, 12)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    calls: dict[str, list[dict[str, Tensor]]] = {
        "alike": [{"input_ids": ids}, {"input_ids": ids + 1}],
        "rows": [{"input_ids": ids.repeat(2, 1)}, {"input_ids": ids.repeat(2, 1)}],
        "lengths": [{"input_ids": ids}, {"input_ids": ids[:, :8]}],
        "masks": [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}],
    }
    found = {}
    for name, batches in calls.items():
        blocks = find_blocks(model)
        captured = capture(model, blocks, [partial(model, **batch, use_cache=False) for batch in batches])
        found[name] = _are_alike(Flow(captured.inputs, captured.calls[:1], (0, 1)))
    assert found == {"alike": True, "rows": False, "lengths": False, "masks": False}


def test_half_precision_blocks_learn_too() -> None:
    task = make_task(dtype=torch.bfloat16)
    found = learn_rounding(task, round_to_nearest(task), AutoRoundOptions(iters=10))
    assert {tensor.scheme.name for tensor in found.values()} == {"w2g16-asym"}


def test_what_it_cannot_do_is_refused() -> None:
    task = make_task("nf4g16")
    with pytest.raises(BitwrightError, match=r"autoround cannot use nf4g16, the scheme of blocks\.0\.up"):
        learn_rounding(task, round_to_nearest(task), AutoRoundOptions())
    with pytest.raises(BitwrightError, match="autoround option sampler is 'first'"):
        AutoRoundOptions(sampler="first")  # type: ignore[arg-type]
    with pytest.raises(BitwrightError, match="autoround option lr is 2"):
        AutoRoundOptions(lr=2)


def test_through_the_whole_library() -> None:
    model = Plain(width=16, blocks=2)
    batches = [torch.randn(2, 6, 8) for _ in range(4)]
    divergence = {}
    for algorithm, options in (("rtn", {}), ("autoround", {"iters": 30, "batch_size": 4})):
        prepared = bitwright.prepare(model, scheme="w2g16-asym", algorithm=algorithm, options=options)
        for batch in batches:
            prepared(batch)
        quantized = bitwright.convert(prepared)
        with torch.no_grad():
            divergence[algorithm] = sum(float((quantized(x) - model(x)).square().mean()) for x in batches)
    assert divergence["autoround"] < 0.9 * divergence["rtn"]
