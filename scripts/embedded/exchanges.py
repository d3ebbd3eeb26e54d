"""Plots in which something changes hands: one function each."""

from __future__ import annotations

from random import Random

from . import words
from .cast import Being, Fact, Passage, article, capital, draw, pick

PRESENT = (words.KIN, words.JOBS, words.NUMBERS, words.COLOURS, words.TOYS, words.DAYS)


def lost(rng: Random, hero: Being, friend: Being) -> Passage:
    """A loved thing is lost and a friend finds it."""
    colour, toy, place, spot = draw(rng, words.COLOURS, words.TOYS, words.PLACES, words.SPOTS)
    thing = f"{colour} {toy}"
    sentences = (
        pick(
            rng,
            f"{hero.name} had {article(thing)}.",
            f"The thing {hero.they} loved most was {hero.their} {thing}.",
            f"{hero.name} always carried {article(thing)}.",
        ),
        pick(
            rng,
            f"One day {hero.they} lost the {toy} {place}.",
            f"But one {pick(rng, *words.WEATHER)} day, {place}, the {toy} was gone.",
            f"One {pick(rng, *words.DAYPARTS)}, while playing {place}, {hero.name} lost it.",
        ),
        pick(
            rng,
            f"{hero.start} looked everywhere and began to cry.",
            f'"Where is my {toy}?" cried {hero.name}.',
            f"{hero.name} was very sad and did not know what to do.",
        ),
        pick(
            rng,
            f'"Do not worry," said {friend.name}. "I will help you find it."',
            f"{friend.full} came to help.",
            f"{hero.name} asked {friend.full} for help.",
        ),
        pick(
            rng,
            f"They looked and looked, and at last {friend.name} found the {toy} {spot}.",
            f"{capital(spot)}, {friend.name} saw something {colour}. It was the {toy}!",
            f"After a long time {friend.name} found it {spot}.",
        ),
        pick(
            rng,
            f'"Thank you!" said {hero.name}, and {hero.they} hugged {friend.name}.',
            f"{hero.name} thanked {friend.name} and held the {toy} tight.",
            f"{hero.name} was so happy that {hero.they} danced.",
        ),
    )
    facts = (
        Fact(f"What did {hero.name} lose?", f"the {thing}"),
        Fact(f"Where did {hero.name} lose the {toy}?", place),
        Fact(f"Who found the {toy}?", friend.name),
        Fact(f"Where was the {toy} found?", spot),
        Fact(f"What colour was the {toy}?", colour),
    )
    return Passage(sentences, facts, (thing,))


def share(rng: Random, hero: Being, friend: Being) -> Passage:
    """Food is shared with a hungry friend."""
    food, place, giver = draw(rng, words.FOODS, words.PLACES, words.KIN)
    sentences = (
        pick(
            rng,
            f"One {pick(rng, *words.DAYPARTS)} {hero.their} {giver} gave {hero.them} {article(food)}.",
            f"{hero.name} got {article(food)} from {hero.their} {giver}.",
            f'"Here is {article(food)} for you," said {hero.their} {giver}.',
        ),
        pick(
            rng,
            f"{hero.start} wanted to eat it {place}.",
            f"{hero.name} took the {food} and sat down {place}.",
            f"{hero.start} carried it carefully and sat {place}.",
        ),
        pick(
            rng,
            f"There {hero.they} met {article(friend.noun)} named {friend.name}.",
            f"Then {article(friend.noun)} came by. It was {friend.name}.",
            f"{friend.full} was there too.",
        ),
        pick(
            rng,
            f'"I am so hungry," said {friend.name}.',
            f"{friend.name} had nothing to eat and looked sad.",
            f'"That smells good," said {friend.name} in a small voice.',
        ),
        pick(
            rng,
            f"{hero.name} thought for a moment and broke the {food} in two.",
            f'"You can have half of my {food}," said {hero.name}.',
            f"So {hero.name} gave {friend.name} half of the {food}.",
        ),
        pick(
            rng,
            "They ate together and became good friends.",
            f"{friend.name} smiled, and they talked until it was dark.",
            f"It was the best {food} that they had ever eaten.",
        ),
    )
    facts = (
        Fact(f"Who gave {hero.name} the {food}?", f"{hero.their} {giver}"),
        Fact(f"What did {hero.name} share?", f"the {food}"),
        Fact(f"Where did {hero.name} sit?", place),
        Fact("Who was hungry?", friend.name),
    )
    return Passage(sentences, facts, (food,))


def gift(rng: Random, hero: Being, friend: Being) -> Passage:
    """A present is bought for somebody in the family."""
    kin, job, number, colour, toy, day = draw(rng, *PRESENT)
    thing = f"{colour} {toy}"
    sentences = (
        pick(
            rng,
            f"{hero.name} wanted to give {hero.their} {kin} a present on {day}.",
            f"On {day} it was the birthday of {hero.name}'s {kin}.",
            f'"On {day} I need a gift for my {kin}," said {hero.name}.',
        ),
        pick(
            rng,
            f"{hero.start} had only {number} coins.",
            f"{hero.name} counted the money. There were {number} coins.",
            f"In {hero.their} pocket were {number} coins.",
        ),
        pick(
            rng,
            f"{hero.name} and {friend.full} went to see the {job}.",
            f"{hero.start} asked {friend.full} to come along to the {job}.",
            f"Together with {friend.full}, {hero.they} walked to the {job}.",
        ),
        pick(
            rng,
            f"The {job} had {article(thing)}.",
            f'"I can sell you {article(thing)}," said the {job}.',
            f"There they saw {article(thing)} in the window.",
        ),
        pick(
            rng,
            f'"It costs {number} coins," said the {job}, and {hero.name} paid.',
            f"{hero.name} gave the {job} all the coins and took the {toy}.",
            f"{hero.start} bought the {toy} for {number} coins.",
        ),
        pick(
            rng,
            f"{capital(hero.their)} {kin} loved the {toy}.",
            f'"What a lovely {toy}!" said {hero.their} {kin}.',
            f"{capital(hero.their)} {kin} gave {hero.them} a big hug.",
        ),
    )
    facts = (
        Fact(f"How many coins did {hero.name} have?", number),
        Fact("Who got the present?", f"{hero.their} {kin}"),
        Fact(f"What did {hero.name} buy?", article(thing)),
        Fact(f"Who sold the {toy}?", f"the {job}"),
        Fact("On which day was the present given?", day),
    )
    return Passage(sentences, facts, (thing,))


def trade(rng: Random, hero: Being, friend: Being) -> Passage:
    """Two friends trade what they have."""
    (mine, yours), (colour, other) = rng.sample(words.TOYS, 2), rng.sample(words.COLOURS, 2)
    place = pick(rng, *words.PLACES)
    sentences = (
        pick(
            rng,
            f"{hero.name} had {article(colour)} {mine}, and {friend.full} had {article(other)} {yours}.",
            f"{friend.full} had {article(other)} {yours}. {hero.name} had {article(colour)} {mine}.",
        ),
        pick(
            rng,
            f"One day they met {place}.",
            f"They saw each other {place}.",
            f"{capital(place)}, the two of them met.",
        ),
        pick(
            rng,
            f'"I like your {yours}," said {hero.name}.',
            f'"What a fine {yours} you have!" said {hero.name}.',
            f"{hero.name} could not stop looking at the {yours}.",
        ),
        pick(
            rng,
            f'"And I like your {mine}," said {friend.name}.',
            f'"Would you give me your {mine} for it?" asked {friend.name}.',
            f'"We could trade," said {friend.name}.',
        ),
        pick(
            rng,
            f"So {hero.name} gave away the {mine} and took the {yours}.",
            f"{hero.name} handed over the {mine}, and {friend.name} handed over the {yours}.",
            f"They traded the {mine} for the {yours}.",
        ),
        pick(
            rng,
            "Both went home happy.",
            f"{hero.name} played with the {yours} all day.",
            f'"A good trade!" said {friend.name}.',
        ),
    )
    facts = (
        Fact(f"What did {hero.name} have at first?", f"{article(colour)} {mine}"),
        Fact(f"What did {friend.name} have at first?", f"{article(other)} {yours}"),
        Fact("Where did they meet?", place),
        Fact(f"What colour was the {yours}?", other),
        Fact(f"What colour was the {mine}?", colour),
        Fact(f"What did {hero.name} get?", f"the {yours}"),
    )
    return Passage(sentences, facts, (mine, yours))
