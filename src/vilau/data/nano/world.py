"""What there is in the nano world: objects, drawing styles, background colours, and which combinations are held out."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

MIN_OBJECTS = 4  # two pictures can show two objects, and questions ask for one that is not there
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "nano"
STYLES = ("noto", "twemoji")
TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)


@dataclass(frozen=True)
class ObjectSpec:
    """One kind of thing.

    Args:
        name: as people type it, one or two words.
        plural: the same for several.
        group: ``animal``, ``fruit``, ``plant``, ``food``, ``vehicle`` or ``thing``.
        unicode_name: its name in Unicode's emoji list.
        code: its code points in hexadecimal, as emoji image files are named.
    """

    name: str
    plural: str
    group: str
    unicode_name: str
    code: str


# The order matters: a world of the first N objects is varied for every N.
OBJECTS: tuple[ObjectSpec, ...] = (
    ObjectSpec("dog", "dogs", "animal", "dog face", "1f436"),
    ObjectSpec("red apple", "red apples", "fruit", "red apple", "1f34e"),
    ObjectSpec("car", "cars", "vehicle", "automobile", "1f697"),
    ObjectSpec("cat", "cats", "animal", "cat face", "1f431"),
    ObjectSpec("banana", "bananas", "fruit", "banana", "1f34c"),
    ObjectSpec("rocket", "rockets", "vehicle", "rocket", "1f680"),
    ObjectSpec("sunflower", "sunflowers", "plant", "sunflower", "1f33b"),
    ObjectSpec("house", "houses", "thing", "house", "1f3e0"),
    ObjectSpec("pig", "pigs", "animal", "pig face", "1f437"),
    ObjectSpec("pizza", "pizzas", "food", "pizza", "1f355"),
    ObjectSpec("frog", "frogs", "animal", "frog", "1f438"),
    ObjectSpec("soccer ball", "soccer balls", "thing", "soccer ball", "26bd"),
    ObjectSpec("strawberry", "strawberries", "fruit", "strawberry", "1f353"),
    ObjectSpec("airplane", "airplanes", "vehicle", "airplane", "2708-fe0f"),
    ObjectSpec("panda", "pandas", "animal", "panda", "1f43c"),
    ObjectSpec("guitar", "guitars", "thing", "guitar", "1f3b8"),
    ObjectSpec("mushroom", "mushrooms", "food", "mushroom", "1f344"),
    ObjectSpec("penguin", "penguins", "animal", "penguin", "1f427"),
    ObjectSpec("umbrella", "umbrellas", "thing", "umbrella", "2602-fe0f"),
    ObjectSpec("boat", "boats", "vehicle", "sailboat", "26f5"),
    ObjectSpec("lion", "lions", "animal", "lion", "1f981"),
    ObjectSpec("cactus", "cactuses", "plant", "cactus", "1f335"),
    ObjectSpec("fish", "fish", "animal", "tropical fish", "1f420"),
    ObjectSpec("crown", "crowns", "thing", "crown", "1f451"),
    ObjectSpec("robot", "robots", "thing", "robot", "1f916"),
    ObjectSpec("watermelon", "watermelons", "fruit", "watermelon", "1f349"),
    ObjectSpec("bus", "buses", "vehicle", "oncoming bus", "1f68d"),
    ObjectSpec("owl", "owls", "animal", "owl", "1f989"),
    ObjectSpec("hamburger", "hamburgers", "food", "hamburger", "1f354"),
    ObjectSpec("clock", "clocks", "thing", "alarm clock", "23f0"),
    ObjectSpec("fox", "foxes", "animal", "fox", "1f98a"),
    ObjectSpec("carrot", "carrots", "food", "carrot", "1f955"),
    ObjectSpec("butterfly", "butterflies", "animal", "butterfly", "1f98b"),
    ObjectSpec("snowman", "snowmen", "thing", "snowman without snow", "26c4"),
    ObjectSpec("pineapple", "pineapples", "fruit", "pineapple", "1f34d"),
    ObjectSpec("train", "trains", "vehicle", "locomotive", "1f682"),
    ObjectSpec("whale", "whales", "animal", "spouting whale", "1f433"),
    ObjectSpec("doughnut", "doughnuts", "food", "doughnut", "1f369"),
    ObjectSpec("turtle", "turtles", "animal", "turtle", "1f422"),
    ObjectSpec("drum", "drums", "thing", "drum", "1f941"),
    ObjectSpec("cow", "cows", "animal", "cow face", "1f42e"),
    ObjectSpec("lemon", "lemons", "fruit", "lemon", "1f34b"),
    ObjectSpec("octopus", "octopuses", "animal", "octopus", "1f419"),
    ObjectSpec("palm tree", "palm trees", "plant", "palm tree", "1f334"),
    ObjectSpec("rabbit", "rabbits", "animal", "rabbit face", "1f430"),
    ObjectSpec("gift", "gifts", "thing", "wrapped gift", "1f381"),
    ObjectSpec("bear", "bears", "animal", "bear", "1f43b"),
    ObjectSpec("ladybug", "ladybugs", "animal", "lady beetle", "1f41e"),
)

# RGB, far enough apart that a mean colour tells which one it is, and off the pure colours that emoji are drawn in.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (226, 78, 82),
    "orange": (246, 156, 62),
    "yellow": (252, 228, 104),
    "green": (88, 188, 100),
    "blue": (68, 130, 232),
    "purple": (152, 92, 206),
    "gray": (142, 142, 146),
    "white": (250, 250, 250),
}

_SALT = "73"  # of the salts tried, one that spreads the held-out combinations evenly: each colour has five to seven
_VOWELS = "aeiou"


def article(words: str) -> str:
    """``"a dog"``, ``"an owl"``: the words with their article."""
    return ("an " if words[:1].lower() in _VOWELS else "a ") + words


# Groups that an object clearly does not belong to: a fruit is food, a carrot may pass for a plant, all are things.
OTHER_GROUPS: dict[str, tuple[str, ...]] = {
    "animal": ("fruit", "plant", "vehicle"),
    "fruit": ("animal", "vehicle"),
    "plant": ("animal", "vehicle", "food"),
    "food": ("animal", "vehicle"),
    "vehicle": ("animal", "fruit", "plant", "food"),
    "thing": ("animal", "fruit", "plant", "food", "vehicle"),
}


def group_words(group: str) -> str:
    """A group as a predicate: ``"an animal"``, ``"food"``."""
    return group if group == "food" else article(group)


def stable_hash(*words: str) -> int:
    """A number that depends on the words alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:8], "big")


@lru_cache(maxsize=4096)
def is_heldout(name: str, background: str) -> bool:
    """Whether an object never stands on this background in training (one of eight colours for each object)."""
    colours = tuple(BACKGROUNDS)
    return colours[stable_hash("background", _SALT, name) % len(colours)] == background


def is_heldout_pair(one: str, other: str) -> bool:
    """Whether two objects never share a relation scene in training (about one unordered pair in eight)."""
    return stable_hash("pair", *sorted((one, other))) % 8 == 0


def check_split(split: str) -> str:
    """The split itself, or ValueError when it is none."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return split


@lru_cache(maxsize=4)
def _archive(path: Path) -> dict[str, bytes]:
    """All members of a sprite archive, by name."""
    if not path.is_file():
        raise ValueError(
            f"no sprite archive at {path}: install the package with its assets, or run `vilau data nano --out DIR` "
            "and name DIR"
        )
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sprite_name(style: str, name: str) -> str:
    """Name of a sprite within the archive."""
    return f"{style}/{name.replace(' ', '_')}.png"


@dataclass(frozen=True)
class World:
    """The objects, styles and colours that scenes are made of.

    Build it with :meth:`load`. Sprites are decoded at first use and kept.
    """

    objects: tuple[ObjectSpec, ...]
    styles: tuple[str, ...]
    backgrounds: dict[str, tuple[int, int, int]]
    archive: Path
    _sprites: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _scaled: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def load(
        cls, path: Path | str | None = None, *, objects: int = len(OBJECTS), styles: Sequence[str] = ("noto",)
    ) -> World:
        """The world with its first ``objects`` objects.

        Args:
            path: folder that holds ``sprites.zip``; None is the one shipped with the package.
            objects: how many objects, 4 to 48.
            styles: drawing styles, of ``noto`` and ``twemoji``.

        Raises:
            ValueError: a number or style out of range, or no archive there, or a sprite missing in it.
        """
        if not MIN_OBJECTS <= objects <= len(OBJECTS):
            limits = f"{MIN_OBJECTS} to {len(OBJECTS)}"
            raise ValueError(f"objects={objects} is out of range: the world has {limits} objects")
        unknown = [style for style in styles if style not in STYLES]
        if unknown or not styles:
            raise ValueError(f"styles {list(styles)} must be one or more of {', '.join(STYLES)}")
        archive = Path(path) / "sprites.zip" if path is not None else ASSETS / "sprites.zip"
        members = _archive(archive)
        chosen = OBJECTS[:objects]
        for style in styles:
            for spec in chosen:
                if sprite_name(style, spec.name) not in members:
                    raise ValueError(
                        f"{archive} holds no {style} sprite of {spec.name!r}: "
                        f"build it again with {' '.join(f'--style {name}' for name in styles)}"
                    )
        return cls(chosen, tuple(styles), dict(BACKGROUNDS), archive)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all objects."""
        return tuple(spec.name for spec in self.objects)

    @cached_property
    def colours(self) -> tuple[str, ...]:
        """Names of all background colours."""
        return tuple(self.backgrounds)

    @cached_property
    def _by_name(self) -> dict[str, ObjectSpec]:
        return {spec.name: spec for spec in self.objects}

    def spec(self, name: str) -> ObjectSpec:
        """The object of this name; ValueError when there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise ValueError(f"no object {name!r} in this world of {len(self.objects)}: it has {', '.join(self.names)}")
        return found

    def group(self, group: str) -> tuple[str, ...]:
        """Names of the objects of a group."""
        return self._groups.get(group, ())

    @cached_property
    def _groups(self) -> dict[str, tuple[str, ...]]:
        groups: dict[str, list[str]] = {}
        for spec in self.objects:
            groups.setdefault(spec.group, []).append(spec.name)
        return {name: tuple(members) for name, members in groups.items()}

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that have members."""
        return tuple(self._groups)

    @cached_property
    def _combinations(self) -> dict[str, tuple[tuple[str, str], ...]]:
        every = [(name, colour) for name in self.names for colour in self.colours]
        return {
            TRAIN: tuple(pair for pair in every if not is_heldout(*pair)),
            HELDOUT: tuple(pair for pair in every if is_heldout(*pair)),
        }

    def combinations(self, split: str) -> tuple[tuple[str, str], ...]:
        """All (object, background) of a split; the two splits share none."""
        return self._combinations[check_split(split)]

    @cached_property
    def _pairs(self) -> dict[str, tuple[tuple[str, str], ...]]:
        every = [(one, other) for i, one in enumerate(self.names) for other in self.names[i + 1 :]]
        return {
            TRAIN: tuple(pair for pair in every if not is_heldout_pair(*pair)),
            HELDOUT: tuple(pair for pair in every if is_heldout_pair(*pair)),
        }

    def pairs(self, split: str) -> tuple[tuple[str, str], ...]:
        """All unordered pairs of different objects of a split, for relation scenes; the two splits share none."""
        return self._pairs[check_split(split)]

    def sprite(self, name: str, style: str = "noto") -> np.ndarray:
        """Pixels ``(64, 64, 4)`` uint8 RGBA of an object; read-only."""
        found = self._sprites.get((style, name))
        if found is None:
            self.spec(name)
            if style not in self.styles:
                raise ValueError(f"style {style!r} is not loaded: this world has {', '.join(self.styles)}")
            with Image.open(io.BytesIO(_archive(self.archive)[sprite_name(style, name)])) as picture:
                found = np.array(picture.convert("RGBA"))
            found.setflags(write=False)
            self._sprites[style, name] = found
        return found

    def scaled(self, name: str, style: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """An object at ``size`` pixels, ready to lay over a picture.

        Returns:
            premultiplied RGB ``(size, size, 3)`` float32 in [0, 255], and what shines through ``(size, size, 1)``
            float32 in [0, 1].
        """
        key = (style, name, size)
        found = self._scaled.get(key)
        if found is None:
            rgba = self.sprite(name, style).astype(np.float32)
            alpha = rgba[..., 3:] / 255.0
            planes = np.concatenate([rgba[..., :3] * alpha, alpha * 255.0], axis=-1)
            resized = [Image.fromarray(planes[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(4)]
            out = np.clip(np.stack([np.asarray(plane) for plane in resized], axis=-1), 0.0, 255.0)
            found = (np.ascontiguousarray(out[..., :3]), np.ascontiguousarray(1.0 - out[..., 3:] / 255.0))
            self._scaled[key] = found
        return found
