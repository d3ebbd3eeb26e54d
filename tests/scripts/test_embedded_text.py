"""The text generator: the same everywhere, with splits that share no story and right answers."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.embedded.probes import CALIBRATION_DOCUMENTS, HELDOUT_DOCUMENTS, Probe, corpus, probes
from scripts.embedded.tasks import reserved
from scripts.embedded.text import SPECIAL_TOKENS, document, documents

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src/bitwright/models/embedded"
TRAINING_DOCUMENTS = 20_000

DIGEST = """
import hashlib
from scripts.embedded.probes import probes
from scripts.embedded.text import documents
text = "".join(documents("train", 300)) + repr(probes(20))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def stories(texts: list[str]) -> set[str]:
    """Return every line that is long enough to be a story or most of one."""
    return {line for text in texts for line in text.split("\n") if len(line) > 150}


@pytest.fixture(scope="module")
def training() -> list[str]:
    """The first training documents."""
    return list(documents("train", TRAINING_DOCUMENTS))


@pytest.fixture(scope="module")
def all_probes() -> list[Probe]:
    """The probes as they are shipped."""
    return probes()


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_text_is_the_same_in_every_process(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    said = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    text = "".join(documents("train", 300)) + repr(probes(20))
    assert said.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_a_document_depends_on_its_index_alone() -> None:
    assert document("train", 41) == list(documents("train", 42))[41]
    assert document("train", 41) != document("heldout", 41)


def test_splits_share_no_story(training: list[str], all_probes: list[Probe]) -> None:
    groups = {
        "train": stories(training),
        "heldout": stories(list(documents("heldout", HELDOUT_DOCUMENTS))),
        "calibration": stories(list(documents("calibration", CALIBRATION_DOCUMENTS))),
        "probes": stories([probe.prompt for probe in all_probes]),
    }
    names = list(groups)
    for index, first in enumerate(names):
        assert len(groups[first]) > 100
        for second in names[index + 1 :]:
            assert not groups[first] & groups[second], f"{first} and {second} share a story"


def test_no_reserved_sum_is_in_the_training_text(training: list[str], all_probes: list[Probe]) -> None:
    pattern = re.compile(r"(\d+) plus (\d+)")
    trained = {match for text in training for match in pattern.findall(text)}
    asked = {match for probe in all_probes for match in pattern.findall(probe.prompt)}
    assert len(trained) > 1000
    assert not trained & asked
    assert all(reserved(int(first), int(second)) for first, second in asked)


def test_documents_use_the_chat_tokens_and_no_others(training: list[str]) -> None:
    for text in training[:2000]:
        assert set(re.findall(r"<\|.*?\|>", text)) <= set(SPECIAL_TOKENS[1:])
        assert text.count("<|assistant|>") == text.count("<|user|>")


def recomputed(probe: Probe) -> str | None:
    """Answer a probe from its prompt alone; None where only a reader could."""
    if probe.kind == "sum":
        return str(sum(int(term) for term in re.findall(r"\d+", probe.prompt)))
    if probe.kind == "copy":
        return probe.prompt.split(": ", 1)[1].split("\nAgain:")[0]
    if probe.kind == "recall":
        *lines, asked = probe.prompt.split("\n")
        return dict(line.split(": ") for line in lines if ": " in line)[asked[:-1]]
    return None


def test_answers_of_sum_copy_and_recall_are_right(all_probes: list[Probe]) -> None:
    counts: dict[str, int] = {}
    for probe in all_probes:
        counts[probe.kind] = counts.get(probe.kind, 0) + 1
        answer = recomputed(probe)
        assert probe.answer.startswith(" ")
        assert answer is None or probe.answer == f" {answer}", probe
    assert counts == {"qa": 200, "recall": 200, "copy": 200, "sum": 200}


READERS = (
    (r"Where did (\w+) live\?", r"{0} lived [^.]+"),
    (r"What did (\w+) love to do\?", r"{0} loved to [^.]+"),
    (r"What did (\w+) wear\?", r"{0} wore an? [^.]+"),
    (r"What did (\w+) have\?", r"{0} had an? [^.]+"),
    (r"What did (\w+) eat\?", r"{0} ate an? [^.]+"),
    (r"Where did (\w+) play\?", r"{0} played [^.]+"),
)


def test_answers_about_accounts_are_what_a_pattern_reads(all_probes: list[Probe]) -> None:
    read = [0] * len(READERS)
    for probe in (probe for probe in all_probes if probe.kind == "qa"):
        account, asked = probe.prompt.split("\nQuestion: ")
        for number, (question, statement) in enumerate(READERS):
            if match := re.match(question, asked):
                found = re.search(rf"\b{statement.format(*match.groups())}", account)
                assert found and f" {found.group()}" == probe.answer, probe
                read[number] += 1
    assert sum(read) == 200 and min(read) >= 10, read


@pytest.mark.parametrize(("name", "count"), [("heldout", 600), ("calibration", 500)])
def test_shipped_text_is_what_the_generator_writes(name: str, count: int) -> None:
    assert (SHIPPED / f"{name}.txt").read_text() == corpus(name, count)
