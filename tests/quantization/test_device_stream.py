"""Quantizing on a device, block by block: on one that only pretends, and by a lane that notes what it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.kernels.gpu import library
from bitwright.quantization import api, device_stream, job
from bitwright.quantization.device_memory import check_device, device_bytes
from bitwright.quantization.device_stream import Copies, CudaLane, DeviceSource, find_device, on_device
from bitwright.quantization.events import Event, Stopped
from bitwright.quantization.plan import make_plan
from bitwright.quantization.sources import DiskSource, MemorySource
from tests.kernels.gpu.pretending import PLACE, PretendGpu, there
from tests.quantization.tiny import TEXT, build_model, file_tensors, save_model

BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    save_model(folder, "llama", num_hidden_layers=BLOCKS)
    (folder / "text.txt").write_text(TEXT)
    return folder


class NotingLane:
    """Copies at once, and notes what is begun and what is taken; blocks are named by their number."""

    def __init__(self, device: torch.device = PLACE) -> None:
        self.device, self.log, self.begun = device, [], set()  # type: ignore[var-annotated]
        self.changed = threading.Condition()

    def begin(self, tensors: Mapping[str, Tensor]) -> Copies:
        self.note("begin", tensors)
        move: Callable[[Tensor], Tensor] = there if self.device == PLACE else torch.clone
        return Copies({name: move(tensor) for name, tensor in tensors.items()})

    def finish(self, copies: Copies) -> Mapping[str, Tensor]:
        self.note("take", copies.tensors)
        return copies.tensors

    def note(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        numbers = sorted({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
        with self.changed:
            self.log.append((what, "+".join(numbers) if len(tensors) > 1 else "outer"))
            self.begun |= set(numbers)
            self.changed.notify_all()

    def wait_for(self, block: int) -> bool:
        """Whether the copy of a block is begun while the caller waits."""
        with self.changed:
            return self.changed.wait_for(lambda: str(block) in self.begun, timeout=20)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotingLane]:
    """``device="cuda"`` means the pretended one."""
    made = NotingLane()
    monkeypatch.setattr(api, "find_device", lambda name: PLACE if name == "cuda" else torch.device("cpu"))
    monkeypatch.setattr(api, "CudaLane", lambda _device: made)
    monkeypatch.setattr(library, "gpu_memory", lambda _device: (1 << 34, 1 << 34))
    with PretendGpu():
        yield made


def settings(model: Path, algorithm: str, **changes: Any) -> dict[str, Any]:
    fields = {"scheme": "w4g32", "algorithm": algorithm, "calibration": model / "text.txt", "samples": 2, "seqlen": 8}
    return fields | changes


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [("rtn", {"calibration": None}), ("gptq", {"overrides": ["lm_head=w8"]}), ("hqq", {}),
     ("awq", {"options": {"grid": 2, "clip": False}}), ("autoround", {"options": {"iters": 2}}), ("rotation+gptq", {})],
)  # fmt: skip
def test_a_checkpoint_made_on_the_device_is_the_one_made_on_the_cpu(
    model: Path, tmp_path: Path, lane: NotingLane, algorithm: str, changes: dict[str, Any]
) -> None:
    for device in ("cpu", "cuda"):
        api.quantize(model, tmp_path / device, device=device, **settings(model, algorithm, **changes))
    assert lane.log, "nothing went by way of the lane"
    here, away = file_tensors(tmp_path / "cpu"), file_tensors(tmp_path / "cuda")
    assert here.keys() == away.keys()
    for name, tensor in here.items():  # where memory lies otherwise, sums of vectors may differ in their last bit
        torch.testing.assert_close(away[name], tensor, rtol=1e-5 if tensor.is_floating_point() else 0, atol=0, msg=name)


def test_a_block_is_copied_while_the_one_before_it_is_rounded_and_never_earlier(
    model: Path, tmp_path: Path, lane: NotingLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_block, seen = job.quantize_block, []

    def watched(work: Any) -> Any:
        number = int(work.name.rpartition(".")[2])
        is_last = number == BLOCKS - 1
        seen.append(is_last or lane.wait_for(number + 1))  # the block is not rounded before: so they overlap
        assert str(number + 2) not in lane.begun, "three blocks would be on the device"
        return quantize_block(work)

    monkeypatch.setattr(job, "quantize_block", watched)
    events: list[Event] = []
    fields = settings(model, "rtn", calibration=None)
    api.quantize(model, tmp_path / "out", device="cuda", on_event=events.append, **fields)
    assert events[0].data["device"] == "meta" and events[0].data["device_bytes"] > 0 and "seconds" not in events[0].data
    assert seen == [True] * BLOCKS
    assert [each for each in lane.log if each[1] in "012"] == [
        ("begin", "0"), ("take", "0"), ("begin", "1"), ("take", "1"), ("begin", "2"), ("take", "2")
    ]  # fmt: skip


def test_the_module_and_its_buffers_are_as_they_were_afterwards(tmp_path: Path, lane: NotingLane) -> None:
    module = build_model("llama")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frequencies = module.get_submodule("model.rotary_emb").get_buffer("inv_freq")
    api.quantize(module, tmp_path / "out", device="cuda", scheme="w4g32")
    assert lane.log
    with on_device(MemorySource(module), lane, []):
        assert module.get_submodule("model.rotary_emb").get_buffer("inv_freq").device == PLACE != frequencies.device
    assert module.get_submodule("model.rotary_emb").get_buffer("inv_freq") is frequencies
    for name, tensor in module.state_dict().items():
        assert type(tensor) is Tensor and torch.equal(tensor, before[name])


def test_a_run_that_was_stopped_goes_on_there_and_nowhere_else(model: Path, tmp_path: Path, lane: NotingLane) -> None:
    fields = settings(model, "gptq")
    with pytest.raises(Stopped):
        api.quantize(model, tmp_path / "out", device="cuda", should_stop=lambda: True, **fields)
    with pytest.raises(BitwrightError, match="another device") as caught:
        api.quantize(model, tmp_path / "out", **fields)
    assert caught.value.code == "BW207" and "device='cuda'" in (caught.value.suggestion or "")
    api.quantize(model, tmp_path / "out", device="cuda", **fields)
    api.quantize(model, tmp_path / "whole", device="cuda", **fields)
    found, whole = file_tensors(tmp_path / "out"), file_tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_the_device_does_not_hold_is_refused_before_any_work(
    model: Path, tmp_path: Path, lane: NotingLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "gpu_memory", lambda _device: (1000, 1 << 34))
    with pytest.raises(BitwrightError, match=r"the run needs about .* GB on meta") as caught:
        api.quantize(model, tmp_path / "out", device="cuda", **settings(model, "gptq"))
    assert caught.value.code == "BW503" and not lane.log and not (tmp_path / "out").exists()
    with pytest.raises(BitwrightError, match="on the CPU alone"):
        api.quantize(model, tmp_path / "out", device="cuda", **settings(model, "gptq+logits"))


def test_memory_that_runs_out_after_all_is_told_with_what_to_do(
    model: Path, tmp_path: Path, lane: NotingLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_work: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(job, "quantize_block", fail)
    with pytest.raises(BitwrightError, match="memory of the GPU ran out: CUDA out of memory") as caught:
        api.quantize(model, tmp_path / "out", device="cuda", **settings(model, "rtn", calibration=None))
    assert caught.value.code == "BW503" and "--seqlen" in (caught.value.suggestion or "")


def test_the_headroom_counts_against_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total, needed = 100 << 30, 20 << 30
    monkeypatch.setattr(library, "gpu_memory", lambda _device: (needed + int(library.HEADROOM * total), total))
    check_device(torch.device("cuda"), needed)
    with pytest.raises(BitwrightError, match=r"21\.5 GB on cuda, and 21\.5 GB"):
        check_device(torch.device("cuda"), needed + 1)


def test_the_estimate_covers_two_blocks_and_grows_with_what_is_kept(model: Path) -> None:
    source = DiskSource(model)
    tokens = api._calibration(source, model / "text.txt", 4, 8, 0)
    more = api._calibration(source, model / "text.txt", 8, 8, 0)

    def needed(algorithm: str, calibration: Any) -> int:
        recipe = api._recipe("w4g32", algorithm, None, (), 0)
        return device_bytes(source, make_plan(source, recipe, format=None, group_fallback="error"), calibration)

    block = sum(torch.Size(shape).numel() for name, shape in source.shapes().items() if ".layers.0." in name)
    assert needed("rtn", None) > 2 * 4 * block
    assert needed("rtn", None) < needed("rtn", tokens) < needed("gptq", tokens) < needed("gptq", more)
    assert needed("gptq", tokens) < needed("autoround", tokens)


def test_a_failed_copy_is_told_when_its_block_is_asked_for_and_tried_again(model: Path) -> None:
    source, lane = MemorySource(build_model("llama")), NotingLane(torch.device("cpu"))
    order = [(f"model.layers.{number}.mlp.up_proj.weight", f"model.layers.{number}.mlp.down_proj.weight")
             for number in range(2)]  # fmt: skip
    begin, failures = lane.begin, [OSError("gone"), OSError("gone again")]

    def fail(tensors: Mapping[str, Tensor]) -> Copies:
        if "model.layers.1.mlp.up_proj.weight" in tensors and failures:
            raise failures.pop(0)
        return begin(tensors)

    lane.begin = fail  # type: ignore[method-assign]
    with on_device(source, lane, order) as moved:
        moved.load(order[0])
        for message in ("gone", "gone again"):
            with pytest.raises(OSError, match=message):
                moved.load(order[1])
        moved.load(order[1])
    assert [each[0] for each in lane.log] == ["begin", "take", "begin", "take"]


def test_a_block_that_is_loaded_again_has_its_own_weights_and_the_next_one_is_not_lost() -> None:
    source, lane = MemorySource(build_model("llama")), NotingLane(torch.device("cpu"))
    names = [(f"model.layers.{number}.mlp.up_proj.weight", f"model.layers.{number}.mlp.down_proj.weight")
             for number in range(2)]  # fmt: skip
    moved = DeviceSource(source, lane, names)
    own = source.model.get_parameter(names[0][0]).clone()
    moved.load(names[0])
    source.model.get_parameter(names[0][0]).mul_(3)
    moved.load(names[0])
    assert torch.equal(source.model.get_parameter(names[0][0]), own)
    moved.release(names[0])
    moved.load(names[1])
    moved.close()
    assert sorted(lane.log) == sorted([("begin", "0"), ("take", "0")] * 2 + [("begin", "1"), ("take", "1")])


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    for name in ("tpu!", "meta", 7.5):
        with pytest.raises(ArgumentError, match="device is"):
            find_device(name)  # type: ignore[arg-type]
    monkeypatch.setattr(device_stream.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError) as caught:
        find_device("cuda")
    assert caught.value.why == "no usable GPU is present" and caught.value.suggestion == "device='cpu'"
    monkeypatch.setattr(device_stream.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_stream.torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1").index == 1 and find_device("cuda").type == "cuda"
    with pytest.raises(ArgumentError, match="cuda:2"):
        find_device("cuda:2")


def test_the_lane_of_a_gpu_copies_from_pinned_memory_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own functions only note here that they are called, and on which stream."""
    log: list[Any] = []
    current = ["compute"]

    class FakeStream:
        def __init__(self, _device: Any = None, name: str = "copies") -> None:
            self.name = name

        def record_event(self) -> str:
            log.append(f"event on {self.name}, made within {current[-1]}")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    @contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    def move(self: Tensor, device: torch.device, *, non_blocking: bool = False, copy: bool = False) -> Tensor:
        log.append(f"copy on {current[-1]}" + ("" if non_blocking and copy else ", waiting, or not a copy"))
        return self

    cuda = device_stream.torch.cuda
    monkeypatch.setattr(cuda, "Stream", FakeStream)
    monkeypatch.setattr(cuda, "stream", within)
    monkeypatch.setattr(cuda, "current_stream", lambda _device: FakeStream(name="compute"))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (log.append("pin"), self)[1])
    monkeypatch.setattr(Tensor, "to", move)
    monkeypatch.setattr(Tensor, "record_stream", lambda _self, stream: log.append(f"kept for {stream.name}"))
    lane = CudaLane(torch.device("cuda"))
    copies = lane.begin({"a": torch.ones(2), "b": torch.ones(3).t()})
    assert log == ["pin", "pin", "copy on copies", "copy on copies", "event on copies, made within copies"]
    log.clear()
    lane.begin({"there": torch.empty(2, device="meta")})
    assert log == ["copy on copies", "event on copies, made within copies"], "only a processor's memory is pinned"
    log.clear()
    assert list(lane.finish(copies)) == ["a", "b"]
    assert log == ["compute waits for event", "kept for compute", "kept for compute"]


def test_what_torch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (50, 100)), ("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(library.torch.cuda, name, lambda _device, value=value: value)
    assert library.gpu_memory(torch.device("cuda")) == (70, 100)
    assert library.usable_memory(torch.device("cuda")) == 62
