"""The embedded model as shipped: files, size, quality, and a trainer that survives a kill."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.embedded.report import correct, round_linears

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src/bitwright/models/embedded"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "calibration.txt",
    "heldout.txt",
    "probes.jsonl",
    "model_card.md",
)
PROBES_READ = 60
TINY = (
    "--steps=40 --batch-tokens=1024 --layers=1 --hidden=128 --intermediate=128 --warmup=2 --device=cpu --threads=1"
).split()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> Any:
    """The shipped model in bf16."""
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16).eval()


def read_probes() -> list[dict[str, str]]:
    """Return the shipped probes."""
    return [json.loads(line) for line in (SHIPPED / "probes.jsonl").read_text().splitlines()]


def test_every_file_is_there_and_all_are_small() -> None:
    assert {name for name in FILES if not (SHIPPED / name).is_file()} == set()
    assert sum(path.stat().st_size for path in SHIPPED.iterdir() if path.is_file()) <= 12_000_000
    assert (SHIPPED / "calibration.txt").stat().st_size <= 400_000


def test_weights_are_bf16_and_few() -> None:
    parameters = 0
    with safe_open(SHIPPED / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert bool(torch.isfinite(tensor).all()), name
            parameters += tensor.numel()
    assert 2_000_000 <= parameters <= 6_000_000


def test_architecture_has_what_quantization_meets_in_large_models(model: Any) -> None:
    config = model.config
    assert config.model_type == "qwen2"
    assert config.num_key_value_heads < config.num_attention_heads
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias is not None and attention.o_proj.bias is None
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(linear.in_features % 128 == 0 for linear in linears)


def test_tokenizer_gives_text_back(tokenizer: Any) -> None:
    for text in ('Once upon a time, Tom said: "Hi!"\n', "naïve 漢字 🙂\t 42", "  two  spaces"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    heldout = (SHIPPED / "heldout.txt").read_text()[:20_000]
    assert tokenizer.decode(tokenizer(heldout, add_special_tokens=False).input_ids) == heldout


def test_chat_template_renders(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "You are kind and polite."}, {"role": "user", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|system|>\nYou are kind and polite.<|end|>\n<|user|>\nHello!<|end|>\n<|assistant|>\n")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2


def test_probes_split_where_their_answer_begins(tokenizer: Any) -> None:
    for probe in read_probes():
        before = tokenizer(probe["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(probe["answer"], add_special_tokens=False).input_ids
        whole = tokenizer(probe["prompt"] + probe["answer"], add_special_tokens=False).input_ids
        assert whole == before + answer, probe
        assert len(whole) <= 512


def test_perplexity_is_twenty_times_better_than_unigrams(model: Any, tokenizer: Any) -> None:
    text = (SHIPPED / "heldout.txt").read_text()[:40_000]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = ids[: len(ids) // 512 * 512]
    windows = torch.tensor(ids).view(-1, 512)  # [windows, tokens]
    with torch.inference_mode():
        logits = model(input_ids=windows).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    frequencies = torch.tensor(list(Counter(ids).values())) / len(ids)
    unigram = math.exp(-float((frequencies * frequencies.log()).sum()))
    assert unigram / math.exp(float(loss)) >= 20


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[int]:
    """Return the ids of a greedy continuation."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    continuation: list[int] = said[0, ids.shape[1] :].tolist()
    return continuation


@pytest.mark.parametrize(
    "prompt",
    [
        "Once upon a time",
        "Once upon a time there was a little fox",
        "<|user|>\nTell me a story about a dragon.<|end|>\n<|assistant|>\n",
    ],
)
def test_greedy_story_ends_and_does_not_loop(model: Any, tokenizer: Any, prompt: str) -> None:
    ids = complete(model, tokenizer, prompt, 400)
    assert ids[-1] in model.generation_config.eos_token_id, "the story has no end"
    text = tokenizer.decode(ids, skip_special_tokens=True).split("\nQuestion:")[0].strip()
    assert text[-1] in '.!?"'
    spoken = text.split()
    assert len(spoken) >= 30
    grams = Counter(zip(*(spoken[start:] for start in range(4)), strict=False))
    assert max(grams.values()) <= 2, grams.most_common(3)


def test_probes_are_answered_at_bf16(model: Any, tokenizer: Any) -> None:
    right: dict[str, list[bool]] = {}
    for probe in read_probes():
        hits = right.setdefault(probe["kind"], [])
        if len(hits) == PROBES_READ:
            continue
        before = tokenizer(probe["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(probe["answer"], add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([before + answer[:-1]])).logits
        hits.append(logits[0, len(before) - 1 :].argmax(-1).tolist() == answer)
    scores = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    assert min(scores[kind] for kind in ("qa", "recall", "copy")) >= 0.8, scores


def trainer(work_dir: Path, output: Path, chunk: int) -> list[str]:
    """Return the command that trains a very small model for forty steps."""
    module = [sys.executable, "-m", "scripts.embedded.train"]
    where = ["--work-dir", str(work_dir), "--output", str(output), "--chunk-steps", str(chunk)]
    return [*module, *where, *TINY]


def digest(directory: Path) -> str:
    """Return the sha256 of the exported weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    work, straight, resumed = tmp_path / "work", tmp_path / "straight", tmp_path / "resumed"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(trainer(work, straight, 40), cwd=ROOT, env=environment, check=True)
    (work / "checkpoint.pt").unlink()
    log = work / "log.jsonl"
    log.unlink()

    process = subprocess.Popen(trainer(work, resumed, 1), cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(log.read_text().splitlines()) < 40
    assert not resumed.exists()

    subprocess.run(trainer(work, resumed, 3), cwd=ROOT, env=environment, check=True)
    assert digest(resumed) == digest(straight)


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    subprocess.run(trainer(tmp_path, tmp_path / "out", 40), cwd=ROOT, check=True)
    other = [*trainer(tmp_path, tmp_path / "out", 40), "--learning-rate=0.1"]
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "learning_rate" in refused.stderr


@pytest.mark.slow
def test_probes_fall_at_3_bits_and_are_lost_at_2(tokenizer: Any) -> None:
    """Pair by pair: of 800 answers clearly more are lost at 3 bits than won."""
    right: dict[str, list[bool]] = {}
    for scheme in ("bf16", "w3g128", "w2g128"):
        model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16).eval()
        if scheme != "bf16":
            round_linears(model, scheme)
        right[scheme] = [correct(model, tokenizer, probe["prompt"], probe["answer"]) for probe in read_probes()]
    pairs = list(zip(right["bf16"], right["w3g128"], strict=True))
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    assert len(pairs) == 800
    assert lost - won > 2 * math.sqrt(lost + won), (lost, won)
    assert sum(right["w2g128"]) < 0.1 * sum(right["bf16"])
