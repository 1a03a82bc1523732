"""Arithmetic word problems with worked answers, from a seeded generator of our own."""

import random
from collections.abc import Iterator

NAMES = ("Ada", "Bilal", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mira", "Noor")
THINGS = ("apples", "marbles", "stamps", "books", "coins", "pencils", "shells", "tickets", "eggs", "bricks", "cards")
PLACES = ("market", "school", "harbour", "library", "workshop", "garden", "station", "fair")


def _gain_loss(rng: random.Random) -> str:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    start, gain = rng.randint(5, 90), rng.randint(3, 60)
    loss = rng.randint(1, start + gain - 1)
    return (
        f"Question: {name} has {start} {thing}. At the {place} {name} gets {gain} more and then gives away {loss}. "
        f"How many {thing} does {name} have now?\n"
        f"Answer: {start} + {gain} = {start + gain}. {start + gain} - {loss} = {start + gain - loss}. "
        f"The answer is {start + gain - loss}.\n"
    )


def _boxes(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, extra = rng.randint(2, 12), rng.randint(3, 24), rng.randint(1, 20)
    return (
        f"Question: {name} packs {boxes} boxes with {each} {thing} in each box, and {extra} {thing} are left over. "
        f"How many {thing} are there in all?\n"
        f"Answer: {boxes} * {each} = {boxes * each}. {boxes * each} + {extra} = {boxes * each + extra}. "
        f"The answer is {boxes * each + extra}.\n"
    )


def _share(rng: random.Random) -> str:
    one, two = rng.sample(NAMES, 2)
    thing, people, each = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 30)
    left = rng.randint(0, people - 1)
    total = people * each + left
    return (
        f"Question: {one} and {two} share {total} {thing} equally among {people} people. "
        f"How many does each person get, and how many are left?\n"
        f"Answer: {people} * {each} = {people * each}. {total} - {people * each} = {left}. "
        f"Each person gets {each} and {left} are left.\n"
    )


def _price(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 15), rng.randint(2, 40)
    paid = ((count * price) // 50 + 1) * 50
    return (
        f"Question: {thing.capitalize()} cost {price} cents each. {name} buys {count} and pays with {paid} cents. "
        f"What is the change?\n"
        f"Answer: {count} * {price} = {count * price}. {paid} - {count * price} = {paid - count * price}. "
        f"The change is {paid - count * price} cents.\n"
    )


TEMPLATES = (_gain_loss, _boxes, _share, _price)


def word_problems(documents: int, seed: int = 0, problems: int = 8) -> Iterator[str]:
    """Yield `documents` texts of `problems` word problems each; the same seed gives the same texts."""
    rng = random.Random(seed)
    for _ in range(documents):
        yield "\n".join(rng.choice(TEMPLATES)(rng) for _ in range(problems))
