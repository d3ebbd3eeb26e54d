"""What can go wrong on the command line: each fault, by its number in the catalogue, with what a user sees."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitwright
from bitwright.cli import main
from bitwright.core.errors import CATALOGUE
from bitwright.formats import storage
from bitwright.formats.storage import lock_directory
from bitwright.kernels import table
from tests.quantization.tiny import TEXT, save_model

LAYER = "model.layers.0.mlp.down_proj.weight"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Folder:
    """Where a case lives: ``model`` (float), ``made`` (its checkpoint, if the case asks for it), ``out``, ``text``."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def made(self) -> Path:
        return self.path / "made"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A sound tiny model, a quantized one, and a text; copied by every case."""
    folder = Folder(tmp_path_factory.mktemp("faults"))
    save_model(folder.model)
    (folder.path / "text.txt").write_text(TEXT)
    assert main(["quantize", str(folder.model), "-o", str(folder.made), "--scheme", "w4g32", "--no-check"]) == 0
    return folder


@pytest.fixture
def folder(prepared: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    shutil.copytree(prepared.path, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    return Folder(tmp_path / "case")


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Folder) -> Path:
    return sorted(folder.made.glob("model-*.safetensors"))[1]


def truncate(folder: Folder) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])


def flip_last_byte(folder: Folder) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)


def lie_in_header(folder: Folder) -> None:
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}'
    (folder.model / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def finish_half(folder: Folder) -> None:
    (folder.made / "model.safetensors.index.json").unlink()
    (folder.made / ".bitwright").mkdir()


def pickle_instead(folder: Folder) -> None:
    (folder.model / WEIGHTS).rename(folder.model / "pytorch_model.bin")


def put_nan(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors[LAYER][0, :3].fill_(float("nan")))


def explode(folder: Folder) -> None:
    """Weights that are finite, and whose products are not."""
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors[LAYER].fill_(3e38))


def reshape(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: t.update({LAYER: t[LAYER][:, :7].contiguous()}))


def make_integer(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors.update({LAYER: tensors[LAYER].view(torch.int32)}))


def drop_tensors(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: [t.pop(name) for name in list(t) if "mlp" in name][:0])


def add_tensor(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(3)}))


def grow_tokenizer(folder: Folder, directory: str = "model", start: int = 50) -> None:
    path = folder.path / directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"<{number}>": number for number in range(start, start + 20)}
    path.write_text(json.dumps(tokenizer))


def swap_tokenizer(folder: Folder) -> None:
    path = folder.made / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


def nothing(folder: Folder) -> None:
    return


QUANTIZE = ("quantize", "model", "-o", "out", "--scheme", "w4g32", "--no-check")
GENERATE, EVAL = ("generate", "made", "once"), ("eval", "made", "--reference", "model", "--text", "text.txt")
EVAL_MODEL, INSPECT = ("eval", "model", "--text", "text.txt"), ("inspect", "made")
CALIBRATE = (*QUANTIZE, "--calibration", "text.txt", "--seqlen", "16")


@dataclass(frozen=True)
class Fault:
    """``number`` in the catalogue of faults, how to make it, who meets it, the code, and words of the message."""

    number: int
    make: Callable[[Folder], object]
    command: Sequence[str]
    code: str
    words: Sequence[str]


FAULTS = [
    Fault(5, finish_half, GENERATE, "BW308", ["made", "run the same", "resumes"]),
    Fault(5, finish_half, EVAL, "BW308", ["made", "resumes"]),
    Fault(7, nothing, ("quantize", "model", "-o", "made", "--scheme", "w8"), "BW203", ["made", "--overwrite"]),
    Fault(
        7,
        nothing,
        ("quantize", "model", "-o", "model", "--scheme", "w8", "--overwrite"),
        "BW203",
        ["source", "another"],
    ),
    Fault(7, nothing, ("quantize", "model", "-o", "text.txt", "--scheme", "w8"), "BW203", ["text.txt", "directory"]),
    Fault(8, truncate, GENERATE, "BW302", ["model-00002-of-", "byte", "again"]),
    Fault(8, flip_last_byte, ("inspect", "made", "--verify"), "BW314", ["model-00002-of-", "sha256", "again"]),
    Fault(9, lambda f: shard(f).unlink(), GENERATE, "BW303", ["model-00002-of-", "fetch"]),
    Fault(9, lambda f: shard(f).unlink(), INSPECT, "BW303", ["1 of", "fetch"]),
    Fault(9, drop_tensors, QUANTIZE, "BW303", ["mlp.down_proj.weight", "6", "missing"]),
    Fault(9, add_tensor, EVAL_MODEL, "BW303", ["model.layers.0.extra.weight", "1"]),
    Fault(10, lie_in_header, QUANTIZE, "BW302", [WEIGHTS, "byte", "again"]),
    Fault(10, lie_in_header, EVAL, "BW302", [WEIGHTS, "byte"]),
    Fault(11, reshape, QUANTIZE, "BW304", [LAYER, "[32, 7]", "[32, 64]"]),
    Fault(11, reshape, EVAL_MODEL, "BW304", [LAYER, "[32, 7]", "[32, 64]"]),
    Fault(11, make_integer, QUANTIZE, "BW304", [LAYER, "int32", "float"]),
    Fault(11, make_integer, EVAL_MODEL, "BW304", [LAYER]),
    Fault(12, pickle_instead, QUANTIZE, "BW305", ["pytorch_model.bin", "safe_serialization=True"]),
    Fault(12, pickle_instead, EVAL_MODEL, "BW305", ["pytorch_model.bin", "safe_serialization=True"]),
    Fault(13, lambda f: edit_config(f.model, model_type="qwen2x"), QUANTIZE, "BW306", ["qwen2x", "qwen2"]),
    Fault(14, lambda f: edit_config(f.model, num_attention_heads=5), QUANTIZE, "BW307", ["5"]),
    Fault(14, lambda f: (f.model / "config.json").write_text("{"), EVAL_MODEL, "BW307", ["config.json"]),
    Fault(15, grow_tokenizer, EVAL_MODEL, "BW312", ["70", "32"]),
    Fault(15, lambda f: grow_tokenizer(f, "made"), GENERATE, "BW312", ["70", "32"]),
    Fault(16, swap_tokenizer, EVAL, "BW312", ["made", "model"]),
    Fault(17, nothing, (*QUANTIZE, "--scheme", "w4g48"), "BW204", ["q_proj", "32", "--group-fallback"]),
    Fault(19, lambda f: (f.path / "text.txt").write_text(" \n"), CALIBRATE, "BW401", ["text.txt"]),
    Fault(19, lambda f: (f.path / "text.txt").write_text("once"), CALIBRATE, "BW401", ["4", "16", "--seqlen"]),
    Fault(19, lambda f: (f.path / "text.txt").write_text(""), EVAL, "BW401", ["text.txt"]),
    Fault(19, nothing, (*QUANTIZE, "--calibration", "wikitext"), "BW402", ["wikitext", "heldout"]),
    Fault(21, explode, CALIBRATE, "BW601", ["sample 0", "model.layers.0"]),
    Fault(21, put_nan, ("generate", "model", "once"), "BW601", ["not numbers", "evaluate"]),
    Fault(21, put_nan, EVAL_MODEL, "BW601", ["model"]),
    Fault(23, put_nan, QUANTIZE, "BW309", [LAYER, "3"]),
    Fault(28, nothing, ("generate", "made", "a" * 200), "BW403", ["200", "128", "shorten"]),
    Fault(29, nothing, ("generate", "made", "once", "--max-tokens", "125"), "BW403", ["125", "128", "at most 124"]),
    Fault(0, nothing, ("quantize", "nowhere", "-o", "out", "--scheme", "w4"), "BW504", ["nowhere", "local directory"]),
    Fault(0, nothing, ("eval", "./modle"), "BW301", ["modle", "nearest names: model"]),
    Fault(0, nothing, (*QUANTIZE, "--scheme", "w9"), "BW202", ["bits", "9", "1 to 8"]),
    Fault(0, nothing, (*QUANTIZE, "--scheme", "w1", "--format", "compressed-tensors"), "BW205", ["native"]),
    Fault(0, nothing, (*QUANTIZE, "--override", "nosuch=w8"), "BW208", ["nosuch", "nearest"]),
    Fault(0, nothing, (*QUANTIZE, "--override", "nosuch"), "BW201", ["nosuch", "NAME=SCHEME"]),
    Fault(0, nothing, (*QUANTIZE, "--option", "serch=true"), "BW201", ["serch", "search"]),
    Fault(0, nothing, (*QUANTIZE, "--option", "search=1"), "BW201", ["search", "1", "bool"]),
    Fault(0, nothing, (*QUANTIZE, "--algorithm", "magic"), "BW201", ["magic", "rtn"]),
    Fault(0, nothing, (*QUANTIZE, "--format", "zip"), "BW201", ["zip", "native"]),
    Fault(0, nothing, (*QUANTIZE, "--threads", "0"), "BW201", ["threads", "at least 1"]),
    Fault(0, nothing, ("generate", "made", "once", "--top-p", "1.5"), "BW201", ["top_p", "1.5", "at most 1"]),
    Fault(0, nothing, ("generate", "made", "once", "--temperature", "-1"), "BW201", ["temperature", "-1"]),
    Fault(0, nothing, ("generate", "made", ""), "BW201", ["prompt", "empty"]),
]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.number}-{f.code}-{f.command[0]}-{i}" for i, f in enumerate(FAULTS)])
def test_fault(fault: Fault, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    fault.make(folder)
    before = tree(folder.path)
    assert main(fault.command) == int(fault.code[2])
    err = capsys.readouterr().err
    assert err.startswith(f"error[{fault.code}]: ")
    assert "Traceback" not in err
    assert [word for word in fault.words if word not in err] == [], err
    assert "\n  try: " in err, "no next step"
    after = {name: data for name, data in tree(folder.path).items() if not name.startswith("out/")}
    assert after == before, "something outside the output was touched"


def test_disk_full_before_the_start(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4: what is needed, what is free, where."""
    usage = shutil.disk_usage(folder.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW501]: ")
    assert str(folder.path / "out") in err
    assert "try: free " in err


def test_disk_full_in_the_middle(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4: the temporary file is gone, finished blocks stay, and the same command ends well."""
    write, calls = os.write, [0]

    def full(descriptor: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", full)
        assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW501]: ")
    assert "run the same command again" in err
    assert list((folder.path / "out").glob("*.tmp")) + list((folder.path / "out").glob(".*.tmp")) == []
    assert main(QUANTIZE) == 0
    sound = {name: data for name, data in tree(folder.made).items() if name != "report.json"}
    made = {name: data for name, data in tree(folder.path / "out").items() if name != "report.json"}
    assert made == sound


def test_a_second_run_is_told_who_holds_the_output(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 6."""
    work = folder.path / "out" / ".bitwright"
    work.mkdir(parents=True)
    with lock_directory(work):
        assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW502]: ")
    assert f"pid {os.getpid()} on host " in err
    assert main(QUANTIZE) == 0, "a lock that nobody holds does not matter"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_run_resumes(
    folder: Folder, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    """Faults 1 to 3, in a process of its own that gets a real signal."""
    at = 2 if number == signal.SIGKILL else 1  # shards are written one behind, and the last is not stopped after
    script = (
        "import os, sys\n"
        "from bitwright.quantization import job\n"
        "compute = job.Job._compute\n"
        "def compute_or_die(self, index, unit):\n"
        f"    if index == {at}: os.kill(os.getpid(), {int(number)})\n"
        "    return compute(self, index, unit)\n"
        "job.Job._compute = compute_or_die\n"
        "from bitwright.cli import main\n"
        f"sys.exit(main({list(QUANTIZE)}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bitwright.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == status
    capsys.readouterr()
    assert main(("generate", "out", "once")) == 3
    assert "BW308" in capsys.readouterr().err
    assert main(QUANTIZE) == 0
    out = capsys.readouterr().out
    assert "resuming at" in out
    sound = {name: data for name, data in tree(folder.made).items() if name != "report.json"}
    assert {name: data for name, data in tree(folder.path / "out").items() if name != "report.json"} == sound


def test_other_settings_do_not_resume(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 1: a mixture of two runs is refused, with the difference shown."""
    finish_half(folder)
    shutil.rmtree(folder.made / ".bitwright")
    shutil.rmtree(folder.made)
    script_out = ("quantize", "model", "-o", "made", "--scheme", "w4g32", "--no-check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "replace", _fail_at(3, os.replace))
        assert main(script_out) == 5
    capsys.readouterr()
    assert main(("quantize", "model", "-o", "made", "--scheme", "w8g32", "--no-check")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[BW207]: ")
    assert "--restart" in err
    assert main(("quantize", "model", "-o", "made", "--scheme", "w8g32", "--no-check", "--restart")) == 0


def _fail_at(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    return call


def test_few_samples_are_noticed_and_recorded(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 20."""
    assert main((*CALIBRATE, "--samples", "4")) == 0
    assert "notice: only 4 calibration samples" in capsys.readouterr().out
    assert "only 4 calibration samples" in (folder.path / "out" / "README.md").read_text()


def test_out_of_memory_names_the_levers(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 25."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("bitwright.quantization.job.quantize_block", refuse)
    assert main(CALIBRATE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW503]: ")
    assert "--samples" in err and "--seqlen" in err


def test_no_kernel_for_a_scheme(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18."""
    picky = tuple(replace(kernel, refuse=lambda spec: "not today") for kernel in table.KERNELS)
    monkeypatch.setattr(table, "KERNELS", picky)
    assert main(GENERATE) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[BW206]: ")
    assert "w4g32" in err and "not today" in err


def test_a_collapse_in_eval_is_a_notice(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 27: exit 0, the worst modules named."""
    assert main(("quantize", "demo:", "-o", "out", "--scheme", "w1", "--no-check")) == 0
    capsys.readouterr()
    status = main(("eval", "out", "--reference", "demo:", "--max-tokens", "512", "--seqlen", "256", "--no-probes"))
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    assert captured.out.partition("quality collapsed")[2].count("model.layers.") == 5


def test_every_tested_code_is_in_the_catalogue() -> None:
    assert {fault.code for fault in FAULTS} <= set(CATALOGUE)
