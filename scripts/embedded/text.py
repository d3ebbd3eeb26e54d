"""The seeded generator of the embedded model's training and evaluation text.

A split is a name ("train", "heldout", "calibration", "probes") and document
`i` of a split depends on nothing but (seed, split, i): the same text comes out
in every process, on every machine and in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from .cast import Fact
from .instructions import converse, render
from .plain import Account, ask, give_account
from .stories import tell
from .tasks import addition, copy, recall_list, subtraction

SEED = 20260
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def question(fact: Fact) -> tuple[str, str]:
    """Return the prompt and the answer under which a fact is asked for after a story."""
    return f"Question: {fact.question}\nAnswer:", f" {fact.answer}"


def _story(rng: Random) -> str:
    return tell(rng).text


def _reading(rng: Random) -> str:
    story = tell(rng)
    facts = rng.sample(story.facts, min(len(story.facts), rng.randint(3, 6)))
    asked = ["".join(question(fact)) + "." for fact in facts]
    return "\n".join([story.text, *asked])


def _plain_reading(rng: Random) -> str:
    return _asked(rng, give_account(rng))


def _plainest_reading(rng: Random) -> str:
    return _asked(rng, give_account(rng, as_tale=False))


def _asked(rng: Random, account: Account) -> str:
    asked = rng.sample(account.statements, rng.randint(2, len(account.statements)))
    return "\n".join([account.text, *("".join(ask(statement)) + "." for statement in asked)])


def _recall(rng: Random) -> str:
    listing, tasks = recall_list(rng, rng.randint(3, 12))
    return "\n".join([listing, *(task.text for task in tasks)])


def _copy(rng: Random) -> str:
    return "\n".join(copy(rng, rng.randint(3, 12)).text for _ in range(rng.randint(2, 5)))


def _sums(rng: Random) -> str:
    tasks = [addition(rng) if rng.random() < 0.6 else subtraction(rng) for _ in range(8)]
    return "\n".join(f"{task.text}." for task in tasks)


def _conversation(rng: Random) -> str:
    return render(converse(rng))


Mixture = tuple[tuple[Callable[[Random], str], int], ...]

MIXTURE: Mixture = ((_story, 22), (_reading, 28), (_recall, 14), (_copy, 10), (_sums, 8), (_conversation, 18))
# Training opens with drills: a model that has learned to look up and copy learns to read sooner.
DRILLS: Mixture = ((_story, 6), (_reading, 10), (_recall, 40), (_copy, 30), (_sums, 4), (_conversation, 10))
DRILL_DOCUMENTS = 8_000
# It ends with lessons in reading; what is held out is drawn as these are.
LESSONS: Mixture = (
    (_story, 14),
    (_reading, 8),
    (_plain_reading, 36),
    (_recall, 14),
    (_copy, 8),
    (_sums, 8),
    (_conversation, 12),
)
LESSONS_FROM = 76_000
# And last with mostly stories, which reading in plain accounts alone would blur.
EVENINGS: Mixture = (
    (_story, 46),
    (_reading, 4),
    (_plainest_reading, 18),
    (_recall, 8),
    (_copy, 6),
    (_sums, 6),
    (_conversation, 12),
)
EVENINGS_FROM = 142_100


def source(split: str, index: int, seed: int = SEED) -> Random:
    """Return the random generator of one document, the same in every process."""
    return Random(f"{seed}/{split}/{index}")


def mixture(split: str, index: int) -> Mixture:
    """Return what a document is drawn from: training goes from drills over the mixture and lessons to stories."""
    if split in ("heldout", "calibration") or index >= EVENINGS_FROM:
        return EVENINGS
    if index >= LESSONS_FROM:
        return LESSONS
    return DRILLS if split == "train" and index < DRILL_DOCUMENTS else MIXTURE


def document(split: str, index: int, seed: int = SEED) -> str:
    """Return document `index` of a split."""
    rng = source(split, index, seed)
    kinds, weights = zip(*mixture(split, index), strict=True)
    write: Callable[[Random], str] = rng.choices(kinds, weights)[0]
    return write(rng)


def documents(split: str, count: int, seed: int = SEED) -> Iterator[str]:
    """Yield the first `count` documents of a split."""
    return (document(split, index, seed) for index in range(count))
