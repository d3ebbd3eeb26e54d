"""Small tasks with one right answer: recall from a list, copying, sums.

Each task is drawn as a `Task`: a prompt that ends where the answer begins, and
the answer, which starts with a space so that a tokenizer splits exactly there.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import words
from .cast import pick

NAMES = words.GIRLS + words.BOYS + words.CREATURE_NAMES
NOUNS = words.TOYS + words.FOODS + words.CREATURES + words.CLOTHES
LARGEST_TERM = 49


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and the one answer that continues it."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """The whole exchange as one line of training text."""
        return f"{self.prompt}{self.answer}"


def nonsense(rng: Random) -> str:
    """Return an invented word of two or three syllables, such as "mirolu"."""
    count = 2 + int(rng.random() * 2)
    return "".join(pick(rng, *words.ONSETS) + pick(rng, *words.VOWELS) for _ in range(count))


def digits(rng: Random, length: int) -> str:
    """Return a string of random digits."""
    return "".join(pick(rng, *words.DIGITS) for _ in range(length))


def _value(rng: Random, kind: int) -> str:
    if kind == 0:
        return digits(rng, 4)
    if kind == 1:
        return f"{pick(rng, *words.COLOURS)} {pick(rng, *NOUNS)}"
    return nonsense(rng) if kind == 2 else pick(rng, *NOUNS)


def recall_list(rng: Random, pairs: int) -> tuple[str, list[Task]]:
    """Return a list of "key: value" lines and one question for each line.

    The prompt of each task is the line's key alone; the list stands before it.
    """
    keys = rng.sample(pick_keys(rng), pairs)
    kind = rng.randrange(4)
    values = [_value(rng, kind) for _ in keys]
    title = pick(rng, "List", "Table", "Notes", "Register")
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    listing = "\n".join([f"{title}:", *lines, "Ask:"])
    tasks = [Task(f"{key}:", f" {value}") for key, value in zip(keys, values, strict=True)]
    rng.shuffle(tasks)
    return listing, tasks


def pick_keys(rng: Random) -> tuple[str, ...]:
    """Return the names or the nouns, from which the keys of one list are drawn."""
    return NAMES if rng.random() < 0.6 else NOUNS


def copy(rng: Random, length: int) -> Task:
    """Return a string of `length` words, digits or invented words to be said again."""
    kind = rng.randrange(3)
    if kind == 0:
        what, string = "number", digits(rng, length)
    elif kind == 1:
        what, string = "words", " ".join(rng.sample(NOUNS, length))
    else:
        what, string = "words", " ".join(nonsense(rng) for _ in range(max(2, length // 2)))
    order = pick(rng, "Copy the", "Repeat the", "Say again the")
    return Task(f"{order} {what}: {string}\nAgain:", f" {string}")


def reserved(first: int, second: int) -> bool:
    """Return whether a sum is kept out of the training text: one pair in ten."""
    return (first * 31 + second * 17 + first * second) % 10 == 3


def terms(rng: Random, *, held_out: bool) -> tuple[int, int]:
    """Draw two terms from 0 to `LARGEST_TERM` that are, or are not, reserved for the probes."""
    while True:
        first, second = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
        if reserved(first, second) == held_out:
            return first, second


def addition(rng: Random, *, held_out: bool = False) -> Task:
    """Return the sum of two small numbers as a question."""
    first, second = terms(rng, held_out=held_out)
    return Task(f"Question: What is {first} plus {second}?\nAnswer:", f" {first + second}")


def subtraction(rng: Random) -> Task:
    """Return the difference of two small numbers as a question."""
    second, rest = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
    return Task(f"Question: What is {second + rest} minus {second}?\nAnswer:", f" {rest}")
