"""What towers are validated on: scenes of combinations that training never shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vilau.data.nano.dataset import ImageTextDataset, pick_scene
from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import render, single
from vilau.data.nano.texts import caption
from vilau.data.nano.world import HELDOUT, World
from vilau.evaluation.tower import ValidationSet, ZeroShot

_SCENES = {"single": 0.8, "small": 0.2}


def pairs_validation(name: str, pairs: Sequence[tuple[np.ndarray, str]]) -> ValidationSet:
    """Return a validation set of pictures ``(S, S, 3)`` uint8 with captions.

    Where captions repeat, as those made from the names of classes do, they are also classes for zero-shot
    classification: from 2 to half as many as there are pictures. Where one is empty, the set has no captions at all.
    """
    frames, captions = np.stack([pixels for pixels, _ in pairs]), tuple(words for _, words in pairs)
    if not all(captions):
        return ValidationSet(name, frames, ())
    classes = tuple(dict.fromkeys(captions))
    tasks: tuple[ZeroShot, ...] = ()
    if 2 <= len(classes) <= len(pairs) / 2:
        wanted = tuple(classes.index(caption) for caption in captions)
        tasks = (ZeroShot("captions", frames, wanted, tuple((caption,) for caption in classes)),)
    return ValidationSet(name, frames, captions, tasks)


def nano_validation(world: World, image_size: int, pictures: int = 512, seed: int = 0) -> ValidationSet:
    """Return held-out pictures of the nano world, as training would see them but for what they show.

    Reconstruction and retrieval use the whole held-out stream (scenes, frames of films, test pictures of easy-VQA),
    zero-shot classification one big or small object each: which of the world's objects, which of its background
    colours. The prompts of a class are its captions with everything else that may stand in one.

    Args:
        pictures: of the stream, and as many for the classifications.
        seed: another one, other pictures.

    Raises:
        ValueError: fewer than 2 pictures.
    """
    if pictures < 2:
        raise ValueError(f"validation needs at least 2 pictures, got {pictures}")
    stream = ImageTextDataset(world, HELDOUT, 800_000 + seed, image_size, pictures)
    items = [stream[number] for number in range(pictures)]
    scenes = [pick_scene(world, Draw(2203, seed, n), HELDOUT, _SCENES, jitter=2.0) for n in range(pictures)]
    frames = np.stack([render(scene, world, image_size) for scene in scenes])
    by_name = tuple(tuple(caption(single(name, colour), world) for colour in world.colours) for name in world.names)
    by_colour = tuple(tuple(prompts[number] for prompts in by_name) for number in range(len(world.colours)))
    objects = tuple(world.names.index(scene.object) for scene in scenes)
    colours = tuple(world.colours.index(scene.background) for scene in scenes)
    return ValidationSet(
        f"nano-heldout-{seed}",
        np.stack([pixels for pixels, _ in items]),
        tuple(words for _, words in items),
        (ZeroShot("objects", frames, objects, by_name), ZeroShot("backgrounds", frames, colours, by_colour)),
    )
