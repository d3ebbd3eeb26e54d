"""What storing keys and values in few bits costs: each cache scheme beside the float cache, on trained models.

    python -m benchmarks.kv_quality [--peers-python VENV/bin/python] [--llama-python VENV/bin/python]

Teacher-forced: every position of a window is predicted from keys and values that were stored and read again. The
caches of transformers (HQQ, quanto) keep the newest tokens, and all of a first call, in float; they are given the
window token by token. Their environment is another Python, which is asked for their rows alone. ``llama.cpp`` itself
runs in a third one, from the same weights in float32, beside its own float cache; its four-bit formula (blocks of 32, a
float16 scale, rotated) is restated here, too, for the models whose heads it does not take. Beside that, probes of
recall are asked through our caches: the embedded model's own, whose answers stand in their prompts; of other models,
which were not taught those, the token that continues a passage that begins again. Writes a table and a record into
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache

import bitwright
from benchmarks.command import told_command
from bitwright.core.kv_codes import rotate_head
from bitwright.core.kv_scheme import kv_bytes, parse_kv
from bitwright.evaluation.divergence import agreement, divergence
from bitwright.evaluation.perplexity import log_probabilities
from bitwright.evaluation.probes import EncodedProbe, encode_probes, probe_counts, right_answers
from bitwright.models.embedded_model import embedded_directory, read_probes, read_text
from bitwright.models.hf import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
TEXTS = {  # of each model, what it was trained to read
    "embedded": None,
    "wikitext-qwen2-6m": "wikitext-2/test.txt",
    "BabyLlama-361-0.97M": "tinystories/train_head_2MiB.txt",
    "stories260K": "tinystories/train_head_2MiB.txt",
    "llama2xs-279K": "tinystories/train_head_2MiB.txt",
}
OURS = (
    "int8", "int8-rotated", "int8-static", "int8-static-head", "fp8", "k8v4", "k8v4-rotated", "int4", "int4-rotated",
    "int2",
)  # fmt: skip
PEERS = {
    "transformers hqq 4": ("hqq", 4),
    "transformers quanto 4": ("quanto", 4),
    "transformers quanto 2": ("quanto", 2),
}
LLAMA = {"llama.cpp q8_0": 8.5, "llama.cpp q4_0": 4.5}  # bits a number
LLAMA_BLOCK = 32
DRIVER = Path(__file__).resolve().parent / "decode_peers" / "llama_cpp_logits.py"
PEER_WINDOWS = 2  # token by token, they are slow
IN_CONTEXT = ("recall", "copy", "qa")  # kinds of probes whose answers stand in their prompts
PASSAGES, PASSAGE, AGAIN = 100, 239, 16  # tokens of a passage, and how many of them are read again
MakeCache = Callable[[], Any]


class RoundedCache(DynamicCache):
    """Keys and values in bfloat16, under a model that computes in float32: what any 16-bit cache costs."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        keys, values = (states.to(torch.bfloat16).to(states.dtype) for states in (key_states, value_states))
        return super().update(keys, values, *arguments, **keywords)


class RestatedQ4(DynamicCache):
    """llama.cpp's q4_0: rotated, blocks of 32, scale = the number of largest magnitude / -8 in float16."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return super().update(q4_0(key_states), q4_0(value_states), *arguments, **keywords)


def q4_0(x: Tensor) -> Tensor:
    """The numbers that come back from it."""
    turned = rotate_head(x.float())
    blocks = turned.reshape(*x.shape[:-1], -1, min(32, x.shape[-1]))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half().float()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (blocks * inverse + 8.5).floor().clamp(0, 15)
    return rotate_head(((codes - 8) * scale).reshape(x.shape)).to(x.dtype)


class ReadThrough(nn.Module):
    """A model that reads every batch through a new cache."""

    def __init__(self, model: Any, make: MakeCache) -> None:
        super().__init__()
        self.model, self.make = model, make

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        return self.model(input_ids=input_ids, past_key_values=self.make(), use_cache=True)


def probes_of(name: str, directory: Path, text: str) -> tuple[EncodedProbe, ...]:
    """The embedded model's own probes; of others, what comes next in a passage of ``text`` that begins again."""
    tokenizer = load_tokenizer(directory)

    def tokenize(part: str) -> Tensor:
        return torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])

    if name == "embedded":
        return encode_probes([probe for probe in read_probes() if probe.kind in IN_CONTEXT], tokenize)
    passages = tokenize(text)[: PASSAGES * PASSAGE].view(-1, PASSAGE)
    return tuple(EncodedProbe("repeat", torch.cat([each, each[: AGAIN + 1]]), 1) for each in passages)


def own_caches(model: Any) -> dict[str, MakeCache]:
    """What stands in for our rows, once the model's directory has calibrated ranges: each makes a new cache."""
    makes: dict[str, MakeCache] = {"bf16": lambda: RoundedCache(config=model.config)}
    for name in OURS:
        makes[name] = lambda name=name: bitwright.QuantizedCache(model, name, kv_safety="off")  # type: ignore[misc]
    makes["llama.cpp q4_0, restated"] = lambda: RestatedQ4(config=model.config)
    return makes


def read(model: Any, window: Tensor, cache: Any, step: int) -> Tensor:
    """Logits of every position, ``step`` tokens at a time."""
    pieces = []
    with torch.no_grad():
        for part in torch.split(window, step):
            output = model(input_ids=part.unsqueeze(0), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits[0].float())
    return torch.cat(pieces)


def measure(model: Any, windows: Tensor, wanted: list[Tensor], make: MakeCache, step: int) -> dict[str, float]:
    started = time.perf_counter()
    found = (log_probabilities(read(model, window, make(), step)) for window in windows)
    return compare(wanted, found, started)


def compare(wanted: Iterable[Tensor], found: Iterable[Tensor], started: float) -> dict[str, float]:
    """Log-probabilities of each window beside those of the float cache."""
    kl, same = [], []
    for reference, window in zip(wanted, found, strict=True):
        kl.append(divergence(reference, window))
        same.append(agreement(reference, window))
    values = torch.cat(kl)
    return {
        "kl_mean": float(values.mean()),
        "kl_p99": float(values.quantile(0.99)),
        "top1": float(torch.cat(same).double().mean()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def windows_of(directory: Path, text: str, samples: int) -> Tensor:
    config = json.loads((directory / "config.json").read_text())
    length = min(512, config["max_position_embeddings"])
    ids = load_tokenizer(directory)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: samples * length]).view(-1, length)


def measure_model(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    directory = embedded_directory() if name == "embedded" else options.shared / "models" / name
    file = TEXTS[name]
    path = options.shared / "data" / file if file else None
    if not directory.is_dir() or (path is not None and not path.is_file()):
        return None
    text = read_text("heldout") if path is None else path.read_text(encoding="utf-8")[:400_000]
    text = text.replace("<unk>", "unknown").replace("<|endoftext|>", "\n")
    windows = windows_of(directory, text, options.samples)
    model: Any = bitwright.load(directory, dtype=torch.float32)
    asked = windows[:0] if options.probes_only else windows
    wanted = [log_probabilities(read(model, window, None, len(window))) for window in asked]
    config = model.config
    shape = {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "tokens": windows.shape[1],
    }
    rows: dict[str, Any] = {}
    record = {"model": name, **shape, "windows": len(windows), "rows": rows}
    if options.peers_only:
        for row, (backend, bits) in PEERS.items():
            rows[row] = peer(model, windows, wanted, backend, bits)
        return record
    probes = probes_of(name, directory, text)
    record |= {"probes": probe_counts(probes), "probes_right": right_answers(model, probes)}
    rows |= own_rows(model, directory, asked, wanted, text, shape, probes)
    if not options.probes_only:
        rows |= llama_rows(directory, windows, shape, options.llama_python)
    return record


def own_rows(
    model: Any,
    directory: Path,
    windows: Tensor,
    wanted: list[Tensor],
    text: str,
    shape: dict[str, int],
    probes: Sequence[EncodedProbe],
) -> dict[str, Any]:
    """Our schemes, 16 bits, and the formula that is restated; without windows, what they answer to the probes alone."""
    rows: dict[str, Any] = {}
    bits = {"bf16": 16.0, "llama.cpp q4_0, restated": 4.5}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(directory, Path(folder) / "model"))
        (Path(folder) / "text.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
        bitwright.calibrate(copy, dataset=Path(folder) / "text.txt", samples=32, seqlen=min(256, shape["tokens"]))
        model.config.name_or_path = str(copy)
        for name, make in own_caches(model).items():
            row: dict[str, Any] = {}
            if len(windows):
                row = measure(model, windows, wanted, make, 1 << 20)
                size = 0.0 if name in bits else kv_bytes(parse_kv(name), **shape) / kv_bytes(parse_kv("none"), **shape)
                row["bits"] = bits.get(name, round(16 * size, 2))
            rows[name] = row | {"probes": right_answers(ReadThrough(model, make), probes)}
    return rows


def llama_rows(directory: Path, windows: Tensor, shape: dict[str, int], python: str | None) -> dict[str, Any]:
    """llama.cpp's own caches beside its own float cache."""
    if python is None:
        return {}
    if shape["head_dim"] % LLAMA_BLOCK:
        reason = f"blocks of {LLAMA_BLOCK} do not divide heads of {shape['head_dim']}"
        return {name: {"refused": reason} for name in LLAMA}
    started = time.perf_counter()
    kinds = [name.split()[1] for name in LLAMA]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/windows.npy", windows.numpy().astype(np.int32))
        command = [python, str(DRIVER), str(directory), f"{folder}/windows.npy", f"{folder}/logits", "f32", *kinds]
        subprocess.run(command, check=True, capture_output=True)
        logits = {kind: np.load(f"{folder}/logits-{kind}.npy") for kind in ("f32", *kinds)}
    wanted, *others = ([log_probabilities(torch.from_numpy(each)) for each in logits[kind]] for kind in logits)
    rows = zip(LLAMA.items(), others, strict=True)
    return {name: compare(wanted, found, started) | {"bits": bits} for (name, bits), found in rows}


def peer(model: Any, windows: Tensor, wanted: list[Tensor], backend: str, bits: int) -> dict[str, Any]:
    axis = 1 if backend == "hqq" else 0
    group = min(64, model.config.hidden_size // model.config.num_attention_heads)

    def make() -> Any:
        return QuantizedCache(
            backend, model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group, residual_length=128
        )

    try:
        return measure(model, windows, wanted, make, 1) | {"windows": len(windows)}
    except Exception as error:  # whatever another library does is a row
        return {"refused": f"{type(error).__name__}: {str(error)[:120]}"}


def render(records: list[dict[str, Any]]) -> str:
    lines = ["# Cache schemes on trained models", ""]
    lines += ["transformers' caches keep the newest 128 tokens, and all of the first call, in float.", ""]
    for record in records:
        lines.append(
            f"## {record['model']}: {record['layers']} layers, {record['kv_heads']} key-value heads of "
            f"{record['head_dim']}; {record['windows']} windows of {record['tokens']} tokens"
        )
        kinds = record.get("probes", {})
        if kinds:
            told = ", ".join(f"{record['probes_right'][kind]} of {count} {kind}" for kind, count in kinds.items())
            lines += ["", f"Probes that the float cache answers right: {told}."]
        header = "".join(f" {kind} |" for kind in kinds)
        lines += [
            "",
            f"| cache | bits | KL mean | KL p99 | top-1 |{header}",
            "|---|--:|--:|--:|--:|" + "--:|" * len(kinds),
        ]
        for name, row in record["rows"].items():
            answers = "".join(f" {row.get('probes', {}).get(kind, '')} |" for kind in kinds)
            if "refused" in row:
                lines.append(f"| {name} | | {row['refused']} | | |{answers}")
                continue
            figures = f"{row['kl_mean']:.2e} | {row['kl_p99']:.2e} | {row['top1']:.2%}"
            part = f" (the first {row['windows']} windows)" if "windows" in row else ""
            lines.append(f"| {name}{part} | {row.get('bits', '')} | {figures} |{answers}")
        four = record["rows"].get("int4"), record["rows"].get("int4-rotated")
        if all(four):
            lines += ["", f"int4-rotated costs {four[1]['kl_mean'] / four[0]['kl_mean']:.2f} of the KL of int4."]
            theirs = next((row for name, row in record["rows"].items() if "q4_0" in name and "kl_mean" in row), None)
            lines[-1] += f" llama.cpp's q4_0: {theirs['kl_mean'] / four[0]['kl_mean']:.2f}." if theirs else ""
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", default=list(TEXTS), choices=list(TEXTS), metavar="MODEL")
    parser.add_argument("--samples", type=int, default=8, help="windows of each model")
    parser.add_argument("--peers-python", help="a Python that has hqq and optimum-quanto")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--peers-only", action="store_true", help="print the rows of the peers as JSON")
    parser.add_argument("--probes-only", action="store_true", help="renew the probes of the record that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = [found for name in options.models if (found := measure_model(name, options)) is not None]
    if options.peers_only:
        print(json.dumps({record["model"]: record["rows"] for record in records}))
        return
    if options.peers_python:
        command = [
            options.peers_python,
            "-m",
            "benchmarks.kv_quality",
            "--peers-only",
            "--samples",
            str(PEER_WINDOWS),
        ]
        command += ["--shared", str(options.shared), "--models", *options.models]
        made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        for record in records:
            record["rows"] |= json.loads(made).get(record["model"], {})
    facts: dict[str, Any] = {"command": told_command("benchmarks.kv_quality")}
    facts |= {"machine": platform.machine(), "torch": torch.__version__, "models": records}
    if options.probes_only:
        known = json.loads((options.output / "kv_quality.json").read_text(encoding="utf-8"))
        facts = known | {
            "probes_command": facts["command"],
            "models": [with_probes(each, records) for each in known["models"]],
        }
    text = render(facts["models"])
    print(text)
    (options.output / "kv_quality.md").write_text(text + "\n", encoding="utf-8")
    (options.output / "kv_quality.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def with_probes(known: dict[str, Any], records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A model's record with the answers to the probes that were found anew, all else as it was."""
    found = next((each for each in records if each["model"] == known["model"]), None)
    if found is None:
        return known
    rows = {
        name: row | ({"probes": found["rows"][name]["probes"]} if name in found["rows"] else {})
        for name, row in known["rows"].items()
    }
    return known | {"probes": found["probes"], "probes_right": found["probes_right"], "rows": rows}


if __name__ == "__main__":
    main()
