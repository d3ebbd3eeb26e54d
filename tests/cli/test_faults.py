"""What can go wrong with what a command is given: each fault, by its number in the catalogue of faults.

A fault is made in a copy of a tiny model (or in its quantized checkpoint), a command meets it, and the code, the exit
status, the object that the message names and the next step that it proposes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from bitwright.cli import main
from bitwright.core.errors import CATALOGUE
from tests.cli.damaged_models import (
    CALIBRATE,
    EVAL,
    EVAL_MODEL,
    GENERATE,
    INSPECT,
    LAYER,
    QUANTIZE,
    WEIGHTS,
    Folder,
    add_tensor,
    drop_tensors,
    edit_config,
    explode,
    finish_half,
    flip_last_byte,
    grow_tokenizer,
    lie_in_header,
    make_integer,
    nothing,
    pickle_instead,
    put_nan,
    reshape,
    shard,
    swap_tokenizer,
    tree,
    truncate,
)


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
    Fault(0, nothing, ("generate", "made", "once", "--kv-cache", "int8-static"), "BW404", ["made", "calibrate"]),
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


def test_every_tested_code_is_in_the_catalogue() -> None:
    assert {fault.code for fault in FAULTS} <= set(CATALOGUE)
