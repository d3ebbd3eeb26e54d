"""The shipped data sets: held-out text, calibration text and probes with known answers.

    python -m scripts.embedded.probes --output src/bitwright/models/embedded

A probe is right when greedy generation after its prompt begins with its answer. Each kind needs
something that rounding the weights too hard destroys: reading (qa), looking up (recall), exact
repetition (copy) and sums that are in no training document (sum).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .plain import ask, give_account
from .tasks import addition, copy, recall_list
from .text import END_OF_TEXT, documents, source

PROBES_PER_KIND = 200
HELDOUT_DOCUMENTS = 600
CALIBRATION_DOCUMENTS = 500


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with its one right answer, which begins with a space."""

    kind: str
    prompt: str
    answer: str


def _qa(rng: Random) -> Probe:
    """Ask for what is told of one being alone; in one draw of four, perhaps for what is told of others, too."""
    while True:
        account = give_account(rng, as_tale=False)
        asked = account.statements[rng.randrange(len(account.statements))]
        rivals = [statement for statement in account.statements if statement.verb == asked.verb]
        if len(rivals) == 1 or rng.random() < 0.25:
            prompt, answer = ask(asked)
            return Probe("qa", f"{account.text}\n{prompt}", answer)


def _recall(rng: Random) -> Probe:
    listing, tasks = recall_list(rng, rng.randint(8, 12))
    return Probe("recall", f"{listing}\n{tasks[0].prompt}", tasks[0].answer)


def _copy(rng: Random) -> Probe:
    task = copy(rng, rng.randint(8, 12))
    return Probe("copy", task.prompt, task.answer)


def _sum(rng: Random) -> Probe:
    task = addition(rng, held_out=True)
    return Probe("sum", task.prompt, task.answer)


KINDS: tuple[tuple[str, Callable[[Random], Probe]], ...] = (
    ("qa", _qa),
    ("recall", _recall),
    ("copy", _copy),
    ("sum", _sum),
)


def probes(count: int = PROBES_PER_KIND) -> list[Probe]:
    """Return `count` different probes of each kind."""
    found: dict[Probe, None] = {}
    for name, draw in KINDS:
        index, wanted = 0, len(found) + count
        while len(found) < wanted:
            found.setdefault(draw(source(f"probes-{name}", index)))
            index += 1
    return list(found)


def corpus(split: str, count: int) -> str:
    """Return documents of a split as one text, each closed by the end-of-text token."""
    return "".join(f"{text}{END_OF_TEXT}" for text in documents(split, count))


def write(directory: Path) -> None:
    """Write heldout.txt, calibration.txt and probes.jsonl into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "heldout.txt").write_text(corpus("heldout", HELDOUT_DOCUMENTS))
    (directory / "calibration.txt").write_text(corpus("calibration", CALIBRATION_DOCUMENTS))
    lines = [json.dumps({"kind": probe.kind, "prompt": probe.prompt, "answer": probe.answer}) for probe in probes()]
    (directory / "probes.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write the data sets into the directory that the command line names."""
    parser = argparse.ArgumentParser(description="Write the held-out text and the probes.")
    parser.add_argument("--output", type=Path, required=True)
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
