"""What guessing from the text itself gains, on repetitive and on free text: the answers stay the same, bit for bit.

    python -m benchmarks.speculation --json benchmarks/results/speculation.json
    python -m benchmarks.speculation --checkpoint WORK/llama-3.2-1b-w4g32-a8

Repetitive prompts tell a passage twice and begin it a third time; free ones are beginnings of held-out documents. Each
is continued greedily, alone on an engine, without guesses and with several. A small model's steps cost about the same
whatever they compute, so its own speed says little about large ones: with ``--checkpoint`` the time of a step that
checks so many guesses is measured on that model, over the time of a step of one token, and the gain is told that the
steps and guesses of the small model would bring there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.command import told_command
from bitwright import Engine
from bitwright.core.scheme_names import parse
from bitwright.engine.handle import Completion
from bitwright.models.decoder import Step
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.embedded_model import read_text
from bitwright.models.paged_cache import PAGE

END = "<|endoftext|>"
GUESSES = (0, 2, 4, 8)
REPEATS = 5
CONTEXT = 256  # tokens before a step whose time is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All prompts of a kind; ``guesses`` at most in a step.

    Attributes:
        saved_steps: the share of steps that guessing made unnecessary.
        right_guesses: of all that were made.
        gain: in speed, as measured here.
        gain_there: with steps and guesses of the checkpoint's cost; 0 without a checkpoint.
        same: how many of the answers are those without guesses.
    """

    model: str
    text: str
    guesses: int
    tokens_per_second: float
    saved_steps: float
    right_guesses: float
    gain: float
    gain_there: float
    same: str


def prompts(kind: str, count: int) -> list[str]:
    """Texts of the embedded model's held-out documents."""
    documents = [text.strip() for text in read_text("heldout").split(END) if len(text.strip()) > 240][:count]
    if kind == "free":
        return [text[:120] for text in documents]
    return [f"{text[:160]}\n{text[:160]}\n{text[:40]}" for text in documents]


@dataclass(frozen=True, slots=True)
class Run:
    """The answers, one after the other, and what they took."""

    answers: list[Completion]
    seconds: float
    steps: int
    drafted: int
    right: int


def answer(model: str, texts: list[str], tokens: int) -> dict[int, Run]:
    """By how many guesses; engines take turns, and of each answer the fastest of ``REPEATS`` counts."""
    engines = {
        guesses: Engine(model, speculate=guesses, max_batch=1, reuse=0, cache_tokens=2048) for guesses in GUESSES
    }
    answers: dict[int, list[Completion]] = {guesses: [] for guesses in GUESSES}
    seconds = dict.fromkeys(GUESSES, 0.0)
    for text in texts:
        best = dict.fromkeys(GUESSES, math.inf)
        for repeat in range(REPEATS):
            for guesses, engine in engines.items():
                began = time.perf_counter()
                found = engine.generate([text], max_tokens=tokens, ignore_end=True)[0]
                best[guesses] = min(best[guesses], time.perf_counter() - began)
                if not repeat:
                    answers[guesses].append(found)
        seconds = {guesses: seconds[guesses] + best[guesses] for guesses in GUESSES}
    runs = {}
    for guesses, engine in engines.items():
        told = engine.statistics()
        engine.close()
        counts = (count // REPEATS for count in (told.steps, told.drafted_tokens, told.accepted_tokens))
        runs[guesses] = Run(answers[guesses], seconds[guesses], *counts)
    return runs


def step_costs(checkpoint: Path, rounds: int) -> dict[int, float]:
    """The time of a step of one token and so many guesses, over that of one token: of each the fastest tenth, because
    what disturbs a few steps says nothing about their cost."""
    direct = open_direct(checkpoint)
    assert direct is not None, "the native decoder does not run this checkpoint"
    decoder = NativeDecoder(direct.pack(parse("w8a8")))
    cache = decoder.new_cache(2 * CONTEXT // PAGE)
    seconds: dict[int, list[float]] = {guesses: [] for guesses in GUESSES}
    decoder.forward(_step(0, CONTEXT), cache)
    for _ in range(rounds):
        for guesses, times in seconds.items():
            begin = time.perf_counter()
            decoder.forward(_step(CONTEXT, 1 + guesses), cache)
            times.append(time.perf_counter() - begin)
    fast = {guesses: statistics.quantiles(times, n=10)[0] for guesses, times in seconds.items()}
    return {guesses: each / fast[0] for guesses, each in fast.items()}


def _step(first: int, count: int) -> Step:
    return Step(
        tokens=torch.randint(3, 1000, (count,)),
        positions=torch.arange(first, first + count, dtype=torch.int32),
        starts=torch.tensor([0, count], dtype=torch.int32),
        lengths=torch.tensor([first + count], dtype=torch.int32),
        pages=torch.arange(2 * CONTEXT // PAGE, dtype=torch.int32)[None],
        outputs=torch.arange(count, dtype=torch.int32),
    )


def measure(model: str, kind: str, args: argparse.Namespace, costs: dict[int, float]) -> list[Row]:
    texts = prompts(kind, args.prompts)
    runs = answer(model, texts, args.tokens)
    plain, rows = runs[0], []
    slope = statistics.median((cost - 1) / guesses for guesses, cost in costs.items() if guesses) if costs else 0.0
    for guesses, run in runs.items():
        same = sum(one.tokens == other.tokens for one, other in zip(run.answers, plain.answers, strict=True))
        rows.append(
            Row(
                model=Path(model).name, text=kind, guesses=guesses,
                tokens_per_second=len(texts) * args.tokens / run.seconds, saved_steps=1 - run.steps / plain.steps,
                right_guesses=run.right / run.drafted if run.drafted else 0.0, gain=plain.seconds / run.seconds,
                gain_there=plain.steps / (run.steps + slope * run.drafted) if costs else 0.0,
                same=f"{same} of {len(texts)}",
            )
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo:"])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    costs = step_costs(args.checkpoint, args.rounds) if args.checkpoint else {}
    if costs:
        print("a step over one of one token: " + ", ".join(f"{g} guesses {cost:.2f}" for g, cost in costs.items()))
    rows = [
        row for model in args.models for kind in ("repetitive", "free") for row in measure(model, kind, args, costs)
    ]
    heads = list(asdict(rows[0]))
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in asdict(row).values())
        print("| " + " | ".join(cells) + " |")
    if args.json:
        record = {
            "command": told_command("benchmarks.speculation"),
            "load_average": os.getloadavg()[0],
            "step_costs": costs,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
