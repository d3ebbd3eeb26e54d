"""Short English stories with the facts that a reader can be asked about.

`tell` draws one story; what it states about the hero, the friend and the
events comes back as questions and answers, so nothing has to be read out of
the text afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import words
from .adventures import brave, build, plant, trip
from .cast import Being, Fact, Passage, article, capital, draw_being, pick
from .exchanges import gift, lost, share, trade

PLOTS: tuple[Callable[[Random, Being, Being], Passage], ...] = (lost, share, build, brave, gift, plant, trip, trade)


@dataclass(frozen=True, slots=True)
class Story:
    """A story, the facts it states and the things it is about."""

    text: str
    facts: tuple[Fact, ...]
    subjects: tuple[str, ...]


def _opening(rng: Random, hero: Being) -> Passage:
    who, home = f"{article(pick(rng, *words.TRAITS))} {hero.noun}", pick(rng, *words.HOMES)
    identity = Fact(f"Who was {hero.name}?", who)
    if rng.random() < 0.3:
        first = pick(
            rng,
            f"Once upon a time there was {who} named {hero.name}.",
            f"Once upon a time, there was {who} called {hero.name}.",
            f"There once was {who} whose name was {hero.name}.",
            f"{hero.name} was {who}.",
        )
        return Passage((first,), (identity,), (hero.noun,))
    first = pick(
        rng,
        f"Once upon a time there was {who} named {hero.name} who lived {home}.",
        f"Once upon a time, {home}, there lived {who} named {hero.name}.",
        f"Once upon a time, {who} called {hero.name} lived {home}.",
        f"Once upon a time {who} lived {home}. The {hero.noun} was called {hero.name}.",
        f"{hero.name} was {who} who lived {home}.",
        f"{capital(home)} lived {who} named {hero.name}.",
    )
    return Passage((first,), (identity, Fact(f"Where did {hero.name} live?", home)), (hero.noun,))


def _hobbies(rng: Random, hero: Being, friend: Being) -> Passage:
    mine, yours = rng.sample(words.HOBBIES, 2)
    first = pick(
        rng,
        f"{hero.name} loved to {mine}.",
        f"Every day {hero.they} liked to {mine}.",
        f"More than anything, {hero.name} loved to {mine}.",
    )
    facts = (Fact(f"What did {hero.name} love to do?", mine),)
    if rng.random() < 0.5:
        return Passage((first,), facts)
    second = pick(
        rng, f"{capital(hero.their)} friend {friend.full} loved to {yours}.", f"{friend.full} liked to {yours} instead."
    )
    return Passage((first, second), (*facts, Fact(f"What did {friend.name} love to do?", yours)))


def _clothes(rng: Random, hero: Being, friend: Being) -> Passage:
    mine, yours = rng.sample(words.CLOTHES, 2)
    colour, other = rng.sample(words.COLOURS, 2)
    lines = [
        pick(rng, f"{hero.name} wore {article(colour)} {mine}.", f"{hero.start} always wore {article(colour)} {mine}.")
    ]
    facts = [
        Fact(f"What did {hero.name} wear?", f"{article(colour)} {mine}"),
        Fact(f"What colour was {hero.name}'s {mine}?", colour),
    ]
    if rng.random() < 0.6:
        lines.append(f"{friend.full} wore {article(other)} {yours}.")
        facts += [
            Fact(f"What did {friend.name} wear?", f"{article(other)} {yours}"),
            Fact(f"What colour was {friend.name}'s {yours}?", other),
        ]
    return Passage(tuple(lines), tuple(facts))


def _friend_home(rng: Random, hero: Being, friend: Being) -> Passage:
    home = pick(rng, *words.HOMES)
    line = pick(
        rng,
        f"{capital(hero.their)} best friend {friend.full} lived {home}.",
        f"{friend.full}, {hero.their} friend, lived {home}.",
    )
    facts = (Fact(f"Where did {friend.name} live?", home), Fact(f"Who was {hero.name}'s friend?", friend.name))
    return Passage((line,), facts)


def _closing(rng: Random, hero: Being, friend: Being) -> Passage:
    food, gave = pick(rng, *words.FOODS), pick(rng, *words.KIN)
    if rng.random() < 0.3:
        line = pick(
            rng,
            f"That night {hero.name} ate {article(food)} that {hero.their} {gave} had made.",
            f"At home {hero.their} {gave} had {article(food)} ready for {hero.name}.",
        )
        return Passage((line,), (Fact(f"What was ready for {hero.name} at home?", article(food)),))
    line = pick(
        rng,
        f"From that day on {hero.name} and {friend.name} were best friends.",
        f"{hero.name} never forgot that day.",
        "And they all lived happily ever after.",
        f"That night {hero.name} slept very well.",
        f"{hero.name} told {hero.their} {gave} all about it.",
        "The end.",
        f"{friend.name} and {hero.name} laughed and went home together.",
    )
    return Passage((line,))


def _plots(rng: Random, hero: Being, friend: Being) -> list[Passage]:
    """One plot, or two; a second plot states no facts, for they might blur the first one's."""
    first, second = rng.sample(PLOTS, 2)
    passage = first(rng, hero, friend)
    if rng.random() < 0.8:
        return [passage]
    sequel = second(rng, hero, draw_being(rng, unlike=(hero, friend)))
    if set(sequel.subjects) & set(passage.subjects):
        return [passage]
    link = pick(
        rng, "The next day something else happened.", "But that was not all.", "A week later there was more to tell."
    )
    return [passage, Passage((link, *sequel.sentences), (), sequel.subjects)]


def tell(rng: Random) -> Story:
    """Draw one story of about 70 to 200 words with its facts."""
    hero = draw_being(rng)
    friend = draw_being(rng, unlike=(hero,))
    details = [part(rng, hero, friend) for part in (_hobbies, _clothes, _friend_home) if rng.random() < 0.5]
    rng.shuffle(details)
    passages = [_opening(rng, hero), *details, *_plots(rng, hero, friend)]
    passages.append(_closing(rng, hero, friend))
    sentences = [sentence for passage in passages for sentence in passage.sentences]
    lead = 1 + len(details)
    joint = "\n" if rng.random() < 0.3 else " "
    text = joint.join((" ".join(sentences[:lead]), " ".join(sentences[lead:])))
    facts = tuple(fact for passage in passages for fact in passage.facts)
    subjects = tuple(name for passage in passages for name in passage.subjects)
    return Story(text, facts, subjects)
