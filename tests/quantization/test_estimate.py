"""What a run is said to take before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme_names import parse
from bitwright.quantization import estimate as estimates
from bitwright.quantization.calibration import CalibrationTokens
from bitwright.quantization.device_memory import device_bytes
from bitwright.quantization.estimate import (
    HESSIANS,
    TUNED_BYTES,
    activation_bytes,
    check_resources,
    estimate,
    seconds_a_flop,
)
from bitwright.quantization.plan import Plan, make_plan
from bitwright.quantization.sources import MemorySource
from bitwright.quantization.stream import COMPARED_SAMPLES
from tests.quantization.tiny import build_model

HIDDEN, WIDE, SEQLEN = 32, 64, 16
ITEM = 4  # bytes of a float32


@pytest.fixture
def source() -> MemorySource:
    return MemorySource(build_model("llama"))


@pytest.fixture(autouse=True)
def steady_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "seconds_a_flop", lambda dtype: 1e-9)


def plan_of(source: MemorySource, algorithm: str, **options: object) -> Plan:
    recipe = Recipe(scheme=parse("w4g32"), algorithm=algorithm, options=options)
    return make_plan(source, recipe, format=None, group_fallback="error")


def windows(samples: int) -> CalibrationTokens:
    return CalibrationTokens(windows=torch.zeros(samples, SEQLEN, dtype=torch.int64), available=samples, source="text")


def peak(source: MemorySource, algorithm: str, samples: int, **options: object) -> int:
    return estimate(source, plan_of(source, algorithm, **options), windows(samples)).peak_bytes


def seconds(source: MemorySource, algorithm: str, samples: int, **options: object) -> float:
    return estimate(source, plan_of(source, algorithm, **options), windows(samples)).seconds * torch.get_num_threads()


def test_every_sample_is_kept_before_and_behind_a_block(source: MemorySource) -> None:
    hidden = SEQLEN * HIDDEN * ITEM
    assert peak(source, "gptq", 9) - peak(source, "gptq", 4) == 5 * 2 * hidden
    assert peak(source, "autoround", 9) - peak(source, "autoround", 4) == 5 * 4 * hidden  # the float model's, too


def test_every_part_of_the_activations_counts(source: MemorySource) -> None:
    """No other part of the estimate differs here: no sums of products, nothing tuned, embeddings below a block."""
    plan = plan_of(source, "rtn")
    sizes = {unit.name: sum(torch.Size(source.shapes()[name]).numel() for name in unit.tensors) for unit in plan.units}
    assert sizes["outer"] <= max(sizes.values())
    without = estimate(source, plan, None).peak_bytes
    states, inside = (2 * 3 + COMPARED_SAMPLES) * SEQLEN * HIDDEN * ITEM, SEQLEN * WIDE * 16
    assert estimate(source, plan, windows(3)).peak_bytes - without == states + inside
    assert activation_bytes(plan, windows(3), ITEM) == states + inside
    assert activation_bytes(plan, windows(3), 2) == states // 2 + inside
    on_device = device_bytes(source, plan, windows(3)) - device_bytes(source, plan, windows(1))
    assert on_device == 2 * 2 * SEQLEN * HIDDEN * ITEM
    assert device_bytes(source, plan, windows(1)) - device_bytes(source, plan, None) >= states - on_device + inside


def test_sums_of_products_and_what_is_tuned_count(source: MemorySource) -> None:
    plain = peak(source, "awq", 4)
    assert peak(source, "gptq", 4) - plain == ITEM * (HIDDEN**2 + HESSIANS * WIDE**2)
    shapes = source.shapes()
    block = sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".layers.0." in name)
    hidden = SEQLEN * HIDDEN * ITEM
    assert peak(source, "autoround", 4) - plain == TUNED_BYTES * block + 2 * 4 * hidden


def test_the_time_grows_with_what_training_repeats(source: MemorySource) -> None:
    weights = sum(out * columns for out, columns in plan_of(source, "autoround").shapes.values())
    a_pass = 2 * weights * SEQLEN * 1e-9
    short, long = (seconds(source, "autoround", 16, iters=iters) for iters in (10, 30))
    assert long - short == pytest.approx(20 * 8 * 3 * a_pass)  # batches of eight, forward and backward
    short, long = (seconds(source, "autoround", 2, iters=iters) for iters in (10, 30))
    assert long - short == pytest.approx(20 * 2 * 3 * a_pass)  # two samples are no batch of eight
    short, long = (seconds(source, "awq", 16, grid=grid, clip=False) for grid in (5, 20))
    assert long - short == pytest.approx(15 * 8 * a_pass)
    order = [seconds(source, name, 16) for name in ("rtn", "gptq", "teq", "autoround", "best")]
    assert order == sorted(order) and order[-1] > 5 * order[1]


def test_the_machines_own_rate_is_measured() -> None:
    rate = 1 / seconds_a_flop(torch.float32)
    assert 1e7 < rate < 1e13


def test_the_disk_holds_the_checkpoint_and_the_inputs_of_two_blocks(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = SEQLEN * HIDDEN * ITEM
    for algorithm, flows in (("gptq", 2), ("autoround", 4)):
        assert estimate(source, plan_of(source, algorithm), windows(9)).work_bytes == flows * 9 * hidden
    assert estimate(source, plan_of(source, "rtn"), None).work_bytes == 0
    plan = plan_of(source, "gptq")
    needed = estimate(source, plan, windows(9))
    room = int(plan.output_bytes * 1.01) + needed.work_bytes + (1 << 20)

    def check(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            check_resources(tmp_path, plan, needed)

    check(room)
    with pytest.raises(BitwrightError, match=r"BW501.*are free") as caught:
        check(room - 1)
    assert caught.value.where == str(tmp_path) and "inputs of blocks" in caught.value.why
    (tmp_path / ".bitwright").mkdir()
    (tmp_path / ".bitwright" / "inputs-00001.safetensors").write_bytes(b"x" * 1000)
    check(room - 1000)  # what an earlier run has left is there already
    with pytest.raises(BitwrightError, match="BW501"):
        check(room - 1001)
