"""Conversations between a user and the assistant, as lists of messages."""

from __future__ import annotations

from random import Random

from . import words
from .cast import article, capital, pick
from .stories import Story, tell
from .tasks import NAMES, NOUNS, addition, copy, nonsense, subtraction

Message = tuple[str, str]
Exchange = tuple[str, str]

CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("animals", words.CREATURES),
    ("colours", words.COLOURS),
    ("foods", words.FOODS),
    ("plants", words.PLANTS),
    ("days of the week", words.DAYS),
    ("jobs", words.JOBS),
    ("pieces of clothing", words.CLOTHES),
)


def render(messages: list[Message]) -> str:
    """Return messages in the exact format of the model's chat template."""
    return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in messages)


def _story(rng: Random) -> Exchange:
    story: Story = tell(rng)
    subject = pick(rng, *story.subjects)
    if rng.random() < 0.3:
        return pick(rng, "Tell me a story.", "Write a short story.", "Please tell me a tale."), story.text
    what = subject if subject in words.FEARS else article(subject)
    order = pick(
        rng,
        f"Tell me a story about {what}.",
        f"Write a short story about {what}.",
        f"Can you tell a story with {what} in it?",
    )
    return order, story.text


def _reading(rng: Random) -> Exchange:
    story = tell(rng)
    fact = story.facts[rng.randrange(len(story.facts))]
    order = pick(rng, "Read the story and answer.", "Read this.", "Here is a story.")
    return f"{order}\n{story.text}\n{fact.question}", f"{capital(fact.answer)}."


def _sum(rng: Random) -> Exchange:
    task = addition(rng) if rng.random() < 0.6 else subtraction(rng)
    question = task.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    return question, f"The answer is{task.answer}."


def _copy(rng: Random) -> Exchange:
    task = copy(rng, rng.randint(2, 6))
    string = task.answer.strip()
    return pick(rng, f"Repeat after me: {string}", f"Say this again: {string}"), string


def _position(rng: Random) -> Exchange:
    items = [nonsense(rng) for _ in range(4)] if rng.random() < 0.3 else rng.sample(NOUNS, 4)
    index, name = pick_position(rng)
    return f"What is the {name} word? {', '.join(items)}", f"{capital(items[index])}."


def pick_position(rng: Random) -> tuple[int, str]:
    """Return a place in a list of four and its name."""
    return ((0, "first"), (1, "second"), (2, "third"), (3, "last"))[rng.randrange(4)]


def _category(rng: Random) -> Exchange:
    index = rng.randrange(len(CATEGORIES))
    name, members = CATEGORIES[index]
    if rng.random() < 0.5:
        first, second, third = rng.sample(members, 3)
        return f"Name three {name}.", f"{capital(first)}, {second} and {third}."
    stranger = pick(rng, *CATEGORIES[(index + rng.randint(1, len(CATEGORIES) - 1)) % 7][1])
    items = [*rng.sample(members, 3), stranger]
    rng.shuffle(items)
    return f"Which word does not belong? {', '.join(items)}", f"{capital(stranger)}."


def _knowledge(rng: Random) -> Exchange:
    if rng.random() < 0.5:
        question, answer = words.WORLD[rng.randrange(len(words.WORLD))]
        return question, f"{answer}."
    left, right = words.OPPOSITES[rng.randrange(len(words.OPPOSITES))]
    if rng.random() < 0.5:
        left, right = right, left
    return f"What is the opposite of {left}?", f"The opposite of {left} is {right}."


def _spelling(rng: Random) -> Exchange:
    word = pick(rng, *NOUNS) if rng.random() < 0.7 else pick(rng, *NAMES)
    return f"Spell the word {word}.", "-".join(word)


def _greeting(rng: Random) -> Exchange:
    name = pick(rng, *NAMES)
    greetings = (
        ("Hello!", "Hello! How can I help you?"),
        ("Hi there.", "Hello! How can I help you?"),
        (f"Hello, my name is {name}.", f"Hello, {name}! How can I help you?"),
        (f"I am {name}.", f"Nice to meet you, {name}!"),
        (f"Say hello to {name}.", f"Hello, {name}!"),
        (
            "Who are you?",
            "I am a small language model. I can tell stories, answer questions, copy words and add small numbers.",
        ),
        ("What can you do?", "I can tell stories, answer questions, copy words and add small numbers."),
        ("Thank you.", "You are welcome!"),
        ("How are you?", "I am fine, thank you!"),
        ("Goodbye.", "Goodbye! Have a nice day."),
    )
    return greetings[rng.randrange(len(greetings))]


def _sentence(rng: Random) -> Exchange:
    colour, noun, place = pick(rng, *words.COLOURS), pick(rng, *words.TOYS), pick(rng, *words.PLACES)
    name, hobby = pick(rng, *NAMES), pick(rng, *words.HOBBIES)
    kind = rng.randrange(3)
    if kind == 0:
        return f"Write a sentence with the word {noun}.", f"{name} found {article(noun)} {place}."
    if kind == 1:
        return f"Write a sentence about {name}.", f"{name} loves to {hobby} {place}."
    return f"Describe {article(noun)}.", f"It is {article(colour)} {noun}."


def _memory(rng: Random) -> list[Exchange]:
    """Return two exchanges: the user states something, then asks for it."""
    name, thing = pick(rng, *NAMES), f"{pick(rng, *words.COLOURS)} {pick(rng, *NOUNS)}"
    code = str(rng.randint(1000, 9999))
    options = (
        (f"My name is {name}.", f"Hello, {name}! How can I help you?", "What is my name?", f"Your name is {name}."),
        (f"Remember the {thing}.", "I will remember it.", "What did I ask you to remember?", f"The {thing}."),
        (f"The code is {code}.", "I will remember it.", "What is the code?", f"The code is {code}."),
    )
    first, reply, second, answer = options[rng.randrange(len(options))]
    return [(first, reply), (second, answer)]


SKILLS = (
    (_story, 30),
    (_reading, 25),
    (_sum, 8),
    (_copy, 8),
    (_position, 6),
    (_category, 6),
    (_knowledge, 6),
    (_spelling, 3),
    (_greeting, 4),
    (_sentence, 4),
)
SYSTEM = (
    "You are a helpful assistant.",
    "You tell stories to children.",
    "Answer in a few words.",
    "You are kind and polite.",
)


def converse(rng: Random) -> list[Message]:
    """Draw a conversation of one to four exchanges, one in five with a system message."""
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append(("system", pick(rng, *SYSTEM)))
    skills, weights = zip(*SKILLS, strict=True)
    exchanges = [skill(rng) for skill in rng.choices(skills, weights, k=rng.randint(1, 3))]
    if rng.random() < 0.15:
        exchanges += _memory(rng)
    while len(exchanges) > 1 and sum(len(reply) + len(order) for order, reply in exchanges) > 1500:
        exchanges.pop()
    for order, reply in exchanges:
        messages += [("user", order), ("assistant", reply)]
    return messages
