"""The records that stories are made of, and the draws that fill them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import words


@dataclass(frozen=True, slots=True)
class Fact:
    """One question about a story, with its short answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Being:
    """A person or an animal, with the pronouns that stand for it."""

    name: str
    noun: str
    they: str
    them: str
    their: str

    @property
    def full(self) -> str:
        """The name, with the kind of animal if it is one."""
        return self.name if self.noun in ("girl", "boy") else f"{self.name} the {self.noun}"

    @property
    def start(self) -> str:
        """The pronoun as the first word of a sentence."""
        return self.they.capitalize()


@dataclass(frozen=True, slots=True)
class Passage:
    """Some sentences, the facts they state and the things they are about."""

    sentences: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    subjects: tuple[str, ...] = ()


def pick(rng: Random, *options: str) -> str:
    """Return one option, each equally likely."""
    return options[int(rng.random() * len(options))]


def draw(rng: Random, *lists: tuple[str, ...]) -> tuple[str, ...]:
    """Return one phrase of each list."""
    return tuple(pick(rng, *phrases) for phrases in lists)


def article(phrase: str) -> str:
    """Return the phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capital(phrase: str) -> str:
    """Return the phrase with its first letter as a capital."""
    return phrase[0].upper() + phrase[1:]


def draw_being(rng: Random, unlike: tuple[Being, ...] = ()) -> Being:
    """Draw a girl, a boy or an animal; name and kind differ from all of `unlike`."""
    while True:
        female = rng.random() < 0.5
        if rng.random() < 0.6:
            name = pick(rng, *(words.GIRLS if female else words.BOYS))
            noun = "girl" if female else "boy"
        else:
            name, noun = pick(rng, *words.CREATURE_NAMES), pick(rng, *words.CREATURES)
        if all(name != other.name and noun != other.noun for other in unlike):
            they, them, their = ("she", "her", "her") if female else ("he", "him", "his")
            return Being(name, noun, they, them, their)
