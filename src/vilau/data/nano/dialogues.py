"""Talk without pictures: names, groups, colours, small numbers, comparison, and what the model can do."""

from __future__ import annotations

from collections.abc import Callable

from vilau.data.nano.draw import Draw
from vilau.data.nano.questions import yes_no
from vilau.data.nano.texts import NUMBERS
from vilau.data.nano.world import BACKGROUNDS, HELDOUT, OTHER_GROUPS, World, article, group_words, stable_hash

Exchange = tuple[str, str]

_SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hello!", "hi", "hi there", "good morning"), "hello! what can i do for you?"),
    (("how are you?", "how are you today?"), "i am fine, thank you."),
    (("thank you", "thanks", "thank you!"), "you are welcome."),
    (("bye", "goodbye", "see you"), "goodbye!"),
    (("who are you?", "what are you?", "what is your name?"), "i am vilau, a small model that sees and draws."),
    (
        ("what can you do?", "how can you help me?", "help", "what do you know?"),
        "i can draw pictures and films, describe them, and answer questions about them.",
    ),
    (
        ("what can you draw?", "what can i ask for?"),
        'try "a red apple on a blue background" or "a dog moving left on a green background".',
    ),
    (("can you draw?", "can you make pictures?"), "yes, i can draw pictures and short films."),
    (("can you see?", "can you look at pictures?"), "yes, show me a picture or a film."),
    (("can you make films?", "can you make videos?"), "yes, films of one object that moves, grows or shrinks."),
    (
        ("what colours do you know?", "which colors do you know?"),
        f"i know {', '.join(tuple(BACKGROUNDS)[:-1])} and {tuple(BACKGROUNDS)[-1]}.",
    ),
    (
        ("how can things move?", "which motions do you know?"),
        "left, right, up and down. things can also grow and shrink.",
    ),
)
_COLOURED = {
    "banana": "yellow",
    "lemon": "yellow",
    "frog": "green",
    "cactus": "green",
    "carrot": "orange",
    "pig": "pink",
    "strawberry": "red",
    "red apple": "red",
    "snowman": "white",
    "ladybug": "red",
}
_BIGGER = ("ladybug", "strawberry", "lemon", "frog", "rabbit", "cat", "pig", "cow", "car", "bus", "house", "whale")


def _small_talk(world: World, draw: Draw) -> Exchange:
    asked, answer = draw.among(_SMALL_TALK)
    return draw.among(asked), answer


def _group_check(world: World, draw: Draw) -> Exchange:
    spec = draw.among(world.objects)
    truth = draw.chance(0.5)
    group = spec.group if truth else draw.among(OTHER_GROUPS[spec.group])
    return f"is {article(spec.name)} {group_words(group)}?", yes_no(truth)


def _group(world: World, draw: Draw) -> Exchange:
    spec = draw.among(world.objects)
    return f"what is {article(spec.name)}?", f"{article(spec.name)} is {group_words(spec.group)}."


def _arithmetic(world: World, draw: Draw) -> Exchange:
    first, second = draw.below(6), draw.below(6)
    if draw.chance(0.5):
        return f"what is {NUMBERS[first]} plus {NUMBERS[second]}?", NUMBERS[first + second]
    high, low = max(first, second), min(first, second)
    return f"what is {NUMBERS[high]} minus {NUMBERS[low]}?", NUMBERS[high - low]


def _after(world: World, draw: Draw) -> Exchange:
    number = draw.below(9)
    if draw.chance(0.5):
        return f"what comes after {NUMBERS[number]}?", NUMBERS[number + 1]
    return f"what comes before {NUMBERS[number + 1]}?", NUMBERS[number]


def _more(world: World, draw: Draw) -> Exchange:
    first, second = draw.some(NUMBERS, 2)
    bigger = NUMBERS[max(NUMBERS.index(first), NUMBERS.index(second))]
    return f"which is more, {first} or {second}?", bigger


def _counting(world: World, draw: Draw) -> Exchange:
    spec = draw.among(world.objects)
    first, second = 1 + draw.below(3), 1 + draw.below(3)
    one = f"{NUMBERS[first]} {spec.name if first == 1 else spec.plural}"
    return f"i have {one} and get {NUMBERS[second]} more. how many {spec.plural} do i have?", NUMBERS[first + second]


def _colour(world: World, draw: Draw) -> Exchange:
    known = [name for name in _COLOURED if name in world.names]
    if not known or draw.chance(0.4):
        if draw.chance(0.5):
            return f"is {draw.among(world.colours)} a colour?", "yes"
        return f"is {article(draw.among(world.names))} a colour?", "no"
    name = draw.among(known)
    return f"what colour is {article(name)}?", _COLOURED[name]


def _compare(world: World, draw: Draw) -> Exchange:
    known = [name for name in _BIGGER if name in world.names]
    if len(known) < 2:
        return _more(world, draw)
    first, second = draw.some(known, 2)
    bigger = known[max(known.index(first), known.index(second))]
    return f"which is bigger, {article(first)} or {article(second)}?", article(bigger)


def _odd_one(world: World, draw: Draw) -> Exchange:
    group = draw.among([name for name in world.groups if name != "thing"] or world.groups)
    odd = [spec.name for spec in world.objects if group in OTHER_GROUPS[spec.group]]
    if len(world.group(group)) < 2 or not odd:
        return _group(world, draw)
    wrong = draw.among(odd)
    shown = draw.some([*draw.some(world.group(group), 2), wrong], 3)
    return f"which one is not {group_words(group)}: {shown[0]}, {shown[1]} or {shown[2]}?", article(wrong)


_MAKERS: dict[str, Callable[[World, Draw], Exchange]] = {
    "small_talk": _small_talk,
    "group_check": _group_check,
    "group": _group,
    "arithmetic": _arithmetic,
    "after": _after,
    "more": _more,
    "counting": _counting,
    "colour": _colour,
    "compare": _compare,
    "odd_one": _odd_one,
}
_WEIGHTS = {
    "small_talk": 16.0,
    "group_check": 16.0,
    "group": 12.0,
    "arithmetic": 14.0,
    "after": 6.0,
    "more": 8.0,
    "counting": 8.0,
    "colour": 8.0,
    "compare": 6.0,
    "odd_one": 6.0,
}
# Kinds whose answers follow from other questions of the kind: one question in eight of these is held out.
_GENERAL = ("group_check", "arithmetic", "more", "counting", "compare", "odd_one")


def is_heldout_question(kind: str, question: str) -> bool:
    """Whether a text-only question is kept out of training."""
    return kind in _GENERAL and stable_hash("question", question) % 8 == 0


def talk(world: World, draw: Draw, split: str) -> tuple[str, str, str]:
    """One exchange of a split: its kind, the question, the answer. The two splits share no question."""
    wanted = split == HELDOUT
    weights = {kind: weight for kind, weight in _WEIGHTS.items() if not wanted or kind in _GENERAL}
    while True:
        kind = draw.weighted(weights)
        question, answer = _MAKERS[kind](world, draw)
        if is_heldout_question(kind, question) == wanted:
            return kind, question, answer
