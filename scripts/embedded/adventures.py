"""Plots in which something is made, met or overcome: one function each."""

from __future__ import annotations

from random import Random

from . import words
from .cast import Being, Fact, Passage, article, capital, draw, pick


def build(rng: Random, hero: Being, friend: Being) -> Passage:
    """What is built falls down, then stands."""
    project, helper = draw(rng, words.PROJECTS, words.KIN)
    (weak, strong), place = rng.sample(words.MATERIALS, 2), pick(rng, *words.PLACES)
    sentences = (
        pick(
            rng,
            f"{hero.name} wanted to build {article(project)} {place}.",
            f'"I will build {article(project)} {place}," said {hero.name} one day.',
            f"One {pick(rng, *words.WEATHER)} day {hero.name} began to build {article(project)} {place}.",
        ),
        pick(
            rng,
            f"First {hero.they} made it from {weak}, but it fell down.",
            f"{hero.start} used {weak}, but the {project} broke at once.",
            f"The first {project} was made of {weak}. It did not last long.",
        ),
        pick(
            rng,
            f"{friend.full} laughed at the mess.",
            f'"What happened?" asked {friend.full}.',
            f"{friend.full} saw it and felt sorry.",
        ),
        pick(
            rng,
            f'"You should use {strong}," said {hero.their} {helper}.',
            f"Then {hero.their} {helper} came and brought {strong}.",
            f"{capital(hero.their)} {helper} told {hero.them} to try {strong}.",
        ),
        pick(
            rng,
            f"{hero.name} tried again, and this time the {project} was strong.",
            f"They worked all day, and soon the new {project} was ready.",
            f"With {strong} the {project} stood firm, even in the wind.",
        ),
        pick(
            rng,
            f"{hero.name} learned never to give up.",
            f"{friend.name} clapped, and {hero.name} was proud.",
            "Everyone came to see it.",
        ),
    )
    facts = (
        Fact(f"What did {hero.name} build?", article(project)),
        Fact(f"Where did {hero.name} build the {project}?", place),
        Fact(f"What was the first {project} made of?", weak),
        Fact(f"What was the second {project} made of?", strong),
        Fact(f"Who told {hero.name} to use {strong}?", f"{hero.their} {helper}"),
    )
    return Passage(sentences, facts, (project,))


def brave(rng: Random, hero: Being, friend: Being) -> Passage:
    """A fear is overcome to save a friend."""
    fear, place, tool = draw(rng, words.FEARS, words.PLACES, words.TOOLS)
    sentences = (
        pick(
            rng,
            f"{hero.name} was afraid of {fear}.",
            f"There was one thing that {hero.name} feared: {fear}.",
            f"{hero.start} liked everything but {fear}.",
        ),
        pick(
            rng,
            f"One {pick(rng, *words.DAYPARTS)} {hero.they} heard a cry {place}.",
            f"One day, {place}, somebody called for help.",
            f'"Help! Help!" cried a voice {place}.',
        ),
        pick(
            rng,
            f"It was {friend.full}, who was stuck.",
            f"{friend.full} could not get out.",
            f"{article(friend.noun).capitalize()} named {friend.name} was in trouble.",
        ),
        pick(
            rng,
            f"{hero.name} was scared of {fear}, but {hero.they} ran to get {article(tool)}.",
            f"{hero.name} took a deep breath and fetched {article(tool)}.",
            f'"I must be brave," said {hero.name}, and {hero.they} found {article(tool)}.',
        ),
        pick(
            rng,
            f"With the {tool} {hero.they} saved {friend.name}.",
            f"Slowly, with the {tool}, {hero.name} pulled {friend.name} out.",
            f"{hero.name} used the {tool}, and soon {friend.name} was safe.",
        ),
        pick(
            rng,
            f'"You are so brave!" said {friend.name}.',
            f"From then on {hero.name} was not afraid of {fear} any more.",
            f"{friend.name} was thankful, and {hero.name} felt strong.",
        ),
    )
    facts = (
        Fact(f"What was {hero.name} afraid of?", fear),
        Fact("Who needed help?", friend.name),
        Fact(f"What did {hero.name} use to save {friend.name}?", article(tool)),
        Fact("Where did the cry come from?", place),
    )
    return Passage(sentences, facts, (fear,))


def plant(rng: Random, hero: Being, friend: Being) -> Passage:
    """A seed is planted and grows."""
    plant, place, giver, number = draw(rng, words.PLANTS, words.PLACES, words.JOBS, words.NUMBERS)
    sentences = (
        pick(
            rng,
            f"One day a {giver} gave {hero.name} a seed.",
            f"{hero.name} got a tiny seed from a {giver}.",
            f'"Plant this seed," a {giver} told {hero.name}.',
        ),
        pick(
            rng,
            f"{hero.start} planted it {place}.",
            f"{hero.name} dug a hole {place} and put the seed in.",
            f"{capital(place)}, {hero.they} put the seed in the ground.",
        ),
        pick(
            rng,
            f"For {number} weeks {hero.they} gave it water.",
            f"{hero.name} watered it for {number} weeks.",
            f"Nothing happened for {number} weeks, but {hero.name} waited.",
        ),
        pick(
            rng,
            f'"It will never grow," said {friend.full}.',
            f"{friend.full} came to look every day.",
            f"{friend.full} helped to pull the weeds.",
        ),
        pick(
            rng,
            f"Then {article(plant)} grew, taller than {friend.name}.",
            f"One morning there was a beautiful {plant}.",
            f"At last the seed became a big {plant}.",
        ),
        pick(
            rng,
            f"{hero.name} and {friend.name} were very glad.",
            f'"Look at my {plant}!" shouted {hero.name}.',
            f"Everyone in town came to see the {plant}.",
        ),
    )
    facts = (
        Fact(f"Who gave {hero.name} the seed?", f"a {giver}"),
        Fact(f"Where did {hero.name} plant the seed?", place),
        Fact("How many weeks did it take?", number),
        Fact("What did the seed become?", article(plant)),
    )
    return Passage(sentences, facts, (plant,))


def trip(rng: Random, hero: Being, friend: Being) -> Passage:
    """A walk with somebody of the family, and an animal."""
    kin, place, creature = draw(rng, words.KIN, words.PLACES, words.CREATURES)
    weather, food, spot = draw(rng, words.WEATHER, words.FOODS, words.SPOTS)
    sentences = (
        pick(
            rng,
            f"On a {weather} {pick(rng, *words.DAYPARTS)} {hero.name} went out with {hero.their} {kin}.",
            f"It was a {weather} day. {hero.name} and {hero.their} {kin} went for a walk.",
            f'"Let us go out," said {hero.their} {kin} one {weather} day.',
        ),
        pick(
            rng,
            f"They spent the day {place}.",
            f"They walked until they were {place}.",
            f"{capital(place)} they stopped to rest.",
        ),
        pick(
            rng,
            f"There they saw {article(creature)} {spot}.",
            f"{hero.name} saw {article(creature)} sitting {spot}.",
            f'"Look, {article(creature)}!" said {hero.name}. It was hiding {spot}.',
        ),
        pick(
            rng,
            f"It ran to {friend.full}, who was its friend.",
            f"{friend.full} waved at them.",
            f"Later they met {friend.full}.",
        ),
        pick(
            rng,
            f"They all shared {article(food)}.",
            f"{friend.name} gave them {article(food)} to eat.",
            f"{friend.name} had brought {article(food)}.",
        ),
        pick(
            rng,
            f"In the evening {hero.name} was tired and happy.",
            "When the sun went down they walked home.",
            f'"Can we come again?" asked {hero.name}.',
        ),
    )
    facts = (
        Fact(f"Who went out with {hero.name}?", f"{hero.their} {kin}"),
        Fact("Which animal did they see?", article(creature)),
        Fact("Where was the animal?", spot),
        Fact("What did they eat?", article(food)),
        Fact("What was the weather like?", weather),
    )
    return Passage(sentences, facts, (creature,))
