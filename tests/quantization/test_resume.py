"""What may be resumed, what is refused, and that what was damaged is made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import WORK_DIRECTORY, WORK_JOURNAL, open_checkpoint
from bitwright.quantization.api import quantize
from bitwright.quantization.events import Event, Stopped
from tests.quantization.tiny import TEXT, Plain, digests, rewrite_tensors, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_model(folder, "llama", num_hidden_layers=3)
    (folder / "text.txt").write_text(TEXT)
    return folder


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {"calibration": model / "text.txt", "samples": 2, "seqlen": 8, "scheme": "w4g32"} | changes


def stop_after(units: int) -> Callable[[], bool]:
    """A question that is answered with yes after so many units."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= units

    return should_stop


def interrupt(source: Path | torch.nn.Module, output: Path, units: int, **arguments: Any) -> Stopped:
    with pytest.raises(Stopped) as caught:
        quantize(source, output, should_stop=stop_after(units), **arguments)
    return caught.value


CHANGES = {
    "scheme": ({"scheme": "w8"}, ("w4g32", "w8")),
    "seed": ({"seed": 7}, ("seed", "0", "7")),
    "samples": ({"samples": 3}, ("calibration",)),
    "threads": ({"threads": 2}, ("threads", "1", "2")),
    "options": ({"options": {"search": True}}, ("search", "true")),
    "overrides": ({"overrides": ["lm_head=w8"]}, ("lm_head", "w8")),
    "format": ({"format": "native"}, ("compressed-tensors", "native")),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_settings_are_refused_and_the_difference_is_shown(model: Path, tmp_path: Path, changed: str) -> None:
    output = tmp_path / "out"
    base = settings(model, threads=1)
    interrupt(model, output, 2, **base, command="bitwright quantize THIS")
    before = digests(output)
    change, shown = CHANGES[changed]
    with pytest.raises(BitwrightError) as caught:
        quantize(model, output, **(base | change))
    assert caught.value.code == "BW207"
    for word in shown:
        assert word in caught.value.what + caught.value.why, caught.value.render()
    assert "bitwright quantize THIS" in caught.value.suggestion and "--restart" in caught.value.suggestion
    assert digests(output) == before  # a refusal costs nothing
    if changed == "threads":
        return  # two pools of threads on a busy machine take minutes
    quantize(model, output, **(base | change), restart=True)
    quantize(model, tmp_path / "fresh", **(base | change))
    assert digests(output) == digests(tmp_path / "fresh")


def test_long_settings_are_shown_where_they_differ(model: Path, tmp_path: Path) -> None:
    rules = [f".*layers.{block}.{name}.*=w8g32" for block in (0, 1) for name in ("self_attn", "mlp")]
    interrupt(model, tmp_path / "out", 2, scheme="w4g32", overrides=rules)
    with pytest.raises(BitwrightError) as caught:
        quantize(model, tmp_path / "out", scheme="w4g32", overrides=[*rules[:-1], rules[-1].replace("w8", "w3")])
    there, now = (caught.value.why or "").split(" now;")[0].split(" there, ")
    assert there.startswith("recipe.overrides: ...") and there.count("w8g32") == 2
    assert 'mlp.*", "scheme": "w3g32' in now and now.endswith("]")  # both to the end, from one place
    assert len(now) == len(there.partition(": ")[2])


def test_the_same_tokens_cut_otherwise_are_other_calibration(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:32])
    quantities = {"calibration": tmp_path / "short.txt", "scheme": "w4g32"}
    interrupt(model, tmp_path / "out", 2, **quantities, samples=2, seqlen=16)
    with pytest.raises(BitwrightError, match="BW207"):
        quantize(model, tmp_path / "out", **quantities, samples=4, seqlen=8)


@pytest.mark.parametrize("touched", ["weights", "config"])
def test_a_model_that_changed_is_refused_by_the_name_of_what_changed(tmp_path: Path, touched: str) -> None:
    save_model(tmp_path / "model", "llama")
    interrupt(tmp_path / "model", tmp_path / "out", 2, scheme="w4g32")
    if touched == "weights":
        rewrite_tensors(tmp_path / "model", {"model.norm.weight": torch.ones(32)})
    else:
        path = tmp_path / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(BitwrightError) as caught:
        quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32")
    assert caught.value.code == "BW207"
    assert ("model.safetensors" if touched == "weights" else "rms_norm_eps") in caught.value.why


def test_with_nothing_finished_other_settings_are_no_obstacle(model: Path, tmp_path: Path) -> None:
    """A run that failed before its first unit left nothing that could be mixed up."""
    output = tmp_path / "out"
    interrupt(model, output, 1, scheme="w4g32")
    journal = output / WORK_DIRECTORY / WORK_JOURNAL
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")
    (output / ".model-00002-of-00009.safetensors.tmp").write_bytes(b"left by a kill")
    quantize(model, output, scheme="w8", overrides=["lm_head=w8"])
    quantize(model, tmp_path / "fresh", scheme="w8", overrides=["lm_head=w8"])
    assert digests(output) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_stopping_after_every_unit_in_turn_gives_the_same_bytes(model: Path, tmp_path: Path, calibrated: bool) -> None:
    arguments = settings(model) if calibrated else {"scheme": "w4g32"}
    arguments["overrides"] = ["lm_head=w8"]
    quantize(model, tmp_path / "whole", **arguments)
    output, events = tmp_path / "out", []
    stops: list[tuple[int, int]] = []
    while True:
        try:
            report = quantize(model, output, should_stop=lambda: True, on_event=events.append, **arguments)
        except Stopped as stopped:
            stops.append((stopped.done, stopped.total))
            assert "run the same command again" in str(stopped)
            with pytest.raises(BitwrightError, match="BW308"):
                open_checkpoint(output)
        else:
            break
    assert stops == [(1, 5), (2, 5), (3, 5), (4, 5)]  # embeddings and norm, three blocks, the head
    assert digests(output) == digests(tmp_path / "whole")
    assert [event.data["unit"] for event in events if event.kind == "unit"] == [
        "outer", "model.layers.0", "model.layers.1", "model.layers.2", "head",
    ]  # fmt: skip
    resumed = [event for event in events if event.kind == "resume"]
    assert [event.data["done"] for event in resumed] == [1, 2, 3, 4]
    assert "4/5" in resumed[-1].message and report.layers.keys() == set(report.layers)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "replaced by a directory"])
def test_a_damaged_shard_is_made_again(model: Path, tmp_path: Path, calibrated: bool, how: str) -> None:
    arguments = settings(model) if calibrated else {"scheme": "w4g32"}
    quantize(model, tmp_path / "whole", **arguments)
    output, events = tmp_path / "out", list[Event]()
    interrupt(model, output, 3, **arguments)
    shard = output / "model-00002-of-00004.safetensors"
    if how == "flipped":
        damage(shard)
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
        if how.startswith("replaced"):
            shard.mkdir()
            with pytest.raises(BitwrightError, match="BW501"):  # not ours to remove
                quantize(model, output, **arguments)
            shard.rmdir()
    quantize(model, output, on_event=events.append, **arguments)
    assert digests(output) == digests(tmp_path / "whole")
    redone = [event.data["unit"] for event in events if event.kind == "unit"]
    assert redone[0] == "model.layers.0" and len(redone) == 3


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_damaged_inputs_of_the_next_block_start_a_calibrated_run_over(model: Path, tmp_path: Path, how: str) -> None:
    quantize(model, tmp_path / "whole", **settings(model))
    output, events = tmp_path / "out", list[Event]()
    interrupt(model, output, 3, **settings(model))
    (inputs,) = (output / WORK_DIRECTORY).glob("inputs-*")
    damage(inputs) if how == "flipped" else inputs.unlink()
    quantize(model, output, on_event=events.append, **settings(model))
    assert digests(output) == digests(tmp_path / "whole")
    assert next(event.data["unit"] for event in events if event.kind == "unit") == "model.layers.0"


JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "no line end": lambda data: data[:-1],
    "a line cut short": lambda data: data[: len(data) - 40],
    "not json": lambda data: data + b"{nonsense\n",
    "not an object": lambda data: data + b"[1, 2]\n",
    "no record": lambda data: data + b'{"unit": "model.layers.9"}\n',
    "an unknown field": lambda data: data.replace(b'"unit"', b'"colour": 3, "unit"'),
    "zeros, as after a power cut": lambda data: data[:-50] + bytes(50),
    "not text": lambda data: data + b"\xff\xfe\n",
    "a damaged header": lambda data: b"{" + data,
    "a header that is a number": lambda data: b"7\n" + data.split(b"\n", 1)[1],
    "a unit twice": lambda data: data + data.rstrip(b"\n").rsplit(b"\n", 1)[1] + b"\n",
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_damaged_journal_loses_work_and_nothing_else(tmp_path: Path, what: str) -> None:
    model = Plain(width=16, blocks=3)
    quantize(model, tmp_path / "whole", scheme="w4g16")
    output = tmp_path / "out"
    interrupt(model, output, 3, scheme="w4g16")
    journal = output / WORK_DIRECTORY / WORK_JOURNAL
    journal.write_bytes(JOURNALS[what](journal.read_bytes()))
    quantize(model, output, scheme="w4g16")
    assert digests(output) == digests(tmp_path / "whole")


def test_equal_errors_keep_their_order_on_the_card_of_a_resumed_run(tmp_path: Path) -> None:
    """Rows come back from the journal sorted by name, and a table of the worst layers must not show that."""
    model = Plain(width=16, blocks=2)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
    quantize(model, tmp_path / "whole", scheme="w4g16")
    interrupt(model, tmp_path / "out", 2, scheme="w4g16")
    quantize(model, tmp_path / "out", scheme="w4g16")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_widened_scales_are_told_of_in_the_same_words_after_a_resumption(tmp_path: Path) -> None:
    model = Plain(width=16, blocks=2)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1e-9)  # scales of such weights do not fit float16
    report = quantize(model, tmp_path / "whole", scheme="w4g16")
    assert any("float32" in notice for notice in report.notices)
    interrupt(model, tmp_path / "out", 2, scheme="w4g16")
    quantize(model, tmp_path / "out", scheme="w4g16")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_restart_discards_and_overwrite_resumes_what_it_began(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model, tmp_path / "whole", scheme="w8")
    quantize(model, output, scheme="w4g32")
    events: list[Event] = []
    before = digests(output)
    interrupt(model, output, 2, scheme="w8", overwrite=True)
    found = digests(output)
    assert {name: found[name] for name in before} == before  # the old checkpoint is as it was
    quantize(model, output, scheme="w8", overwrite=True, on_event=events.append)
    assert [event.data["done"] for event in events if event.kind == "resume"] == [2]
    assert digests(output) == digests(tmp_path / "whole")
    interrupt(model, tmp_path / "other", 2, scheme="w8")
    events.clear()
    quantize(model, tmp_path / "other", scheme="w8", restart=True, on_event=events.append)
    assert not [event for event in events if event.kind == "resume"]
    assert digests(tmp_path / "other") == digests(tmp_path / "whole")
