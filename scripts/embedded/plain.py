"""Accounts of two or three beings in plain sentences, and questions that are answered in whole sentences.

Every fact is stated in words that its answer repeats, with the name beside the verb, so that a model
of a few million parameters can learn to read: it finds who and what was asked for, and says it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import words
from .cast import Being, article, draw_being, pick
from .stories import PLOTS


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence without its full stop, and the question that it answers."""

    question: str
    sentence: str

    @property
    def verb(self) -> str:
        """The word after the name."""
        return self.sentence.split()[1]


@dataclass(frozen=True, slots=True)
class Account:
    """A text and everything in it that can be asked for."""

    text: str
    statements: tuple[Statement, ...]


def _home(rng: Random, name: str) -> Statement:
    return Statement(f"Where did {name} live?", f"{name} lived {pick(rng, *words.HOMES)}")


def _hobby(rng: Random, name: str) -> Statement:
    return Statement(f"What did {name} love to do?", f"{name} loved to {pick(rng, *words.HOBBIES)}")


def _clothes(rng: Random, name: str) -> Statement:
    thing = f"{pick(rng, *words.COLOURS)} {pick(rng, *words.CLOTHES)}"
    return Statement(f"What did {name} wear?", f"{name} wore {article(thing)}")


def _toy(rng: Random, name: str) -> Statement:
    thing = f"{pick(rng, *words.COLOURS)} {pick(rng, *words.TOYS)}"
    return Statement(f"What did {name} have?", f"{name} had {article(thing)}")


def _food(rng: Random, name: str) -> Statement:
    return Statement(f"What did {name} eat?", f"{name} ate {article(pick(rng, *words.FOODS))}")


def _place(rng: Random, name: str) -> Statement:
    return Statement(f"Where did {name} play?", f"{name} played {pick(rng, *words.PLACES)}")


STATEMENTS: tuple[Callable[[Random, str], Statement], ...] = (_home, _hobby, _clothes, _toy, _food, _place)


def _opening(rng: Random, beings: list[Being], as_tale: bool) -> str:
    names = " and ".join((", ".join(being.full for being in beings[:-1]), beings[-1].full))
    plain = (f"This is the story of {names}.", f"Here is what we know of {names}.")
    if not as_tale:
        return pick(rng, *plain)
    friends = f"There once were {len(beings)} friends, {names}."
    return pick(rng, f"Once upon a time there lived {names}.", *plain, friends)


def give_account(rng: Random, *, as_tale: bool = True) -> Account:
    """Draw an account: an opening, two to four facts of each being in any order, now and then a plot."""
    beings: list[Being] = []
    for _ in range(rng.randint(2, 3)):
        beings.append(draw_being(rng, unlike=tuple(beings)))
    statements = [state(rng, being.name) for being in beings for state in rng.sample(STATEMENTS, rng.randint(2, 4))]
    rng.shuffle(statements)
    sentences = [_opening(rng, beings, as_tale), *(f"{statement.sentence}." for statement in statements)]
    if rng.random() < 0.3:
        sentences += rng.choice(PLOTS)(rng, beings[0], beings[1]).sentences
    return Account(" ".join(sentences), tuple(statements))


def ask(statement: Statement) -> tuple[str, str]:
    """Return the prompt and the answer under which a statement is asked for after an account."""
    return f"Question: {statement.question}\nFull answer:", f" {statement.sentence}"
