"""Stories of words and pictures in turn, whose words refer to pictures seen before, and rows of examples."""

from __future__ import annotations

from collections.abc import Sequence

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import Scene, single
from vilau.data.nano.world import World, article

Piece = str | Scene


def _refer(scene: Scene, before: Sequence[Scene]) -> str:
    """What is said of a picture with a view to those before it."""
    if not before:
        return f"here is {article(scene.object)} on {article(scene.background)} background."
    last = before[-1]
    if scene.object == last.object:
        return f"the same {scene.object}, now on {article(scene.background)} background."
    again = any(scene.object == other.object for other in before)
    what = f"the {scene.object} again," if again else f"now {article(scene.object)}"
    if scene.background == last.background:
        return f"{what} on the same background."
    return f"{what} on {article(scene.background)} background."


def story(world: World, draw: Draw, split: str, style: str = "noto") -> list[Piece]:
    """Two to four scenes of one object each with words before or after each; later words refer to earlier pictures."""
    combinations = world.combinations(split)
    scenes: list[Scene] = []
    for _ in range(2 + draw.below(3)):
        choices: Sequence[tuple[str, str]] = combinations
        if scenes and draw.chance(0.7):
            last = draw.among(scenes) if draw.chance(0.3) else scenes[-1]
            same = draw.below(2)
            wanted = (last.object, last.background)[same]
            choices = [
                pair for pair in combinations if pair[same] == wanted and pair != (last.object, last.background)
            ] or combinations
        name, background = draw.among(choices)
        scenes.append(single(name, background, style))
    words_first = draw.chance(0.5)
    pieces: list[Piece] = []
    for i, scene in enumerate(scenes):
        said = _refer(scene, scenes[:i])
        pieces += [said, scene] if words_first else [scene, said]
    return pieces


def examples(world: World, draw: Draw, split: str, style: str = "noto") -> list[Piece]:
    """Pictures each followed by a word, by a rule that the first ones show: object, background, or group."""
    rule = draw.among(("object", "background", "group"))
    pieces: list[Piece] = []
    for name, background in draw.some(world.combinations(split), 3):
        word = {"object": name, "background": background, "group": world.spec(name).group}[rule]
        pieces += [single(name, background, style), f"{word}."]
    return pieces
