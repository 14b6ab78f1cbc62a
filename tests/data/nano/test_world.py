"""The nano world: 48 objects that can be told apart, and combinations kept out of training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import ASSETS, BACKGROUNDS, OBJECTS, OTHER_GROUPS, STYLES, World, article, is_heldout
from vilau.files import file_digest

WORLD = World.load(styles=STYLES)


def test_there_are_48_objects_of_clear_names() -> None:
    """Protects judging by words: no object's name holds another's as a word, and none is a colour."""
    names = [spec.name for spec in OBJECTS]
    assert len(names) == len(set(names)) == len({spec.code for spec in OBJECTS}) == 48
    assert "red apple" in names
    for one, other in itertools.permutations(names, 2):
        assert f" {one} " not in f" {other} "
    assert not set(names) & set(BACKGROUNDS)
    assert all(1 <= len(name.split()) <= 2 for name in names)
    assert {spec.group for spec in OBJECTS} == set(OTHER_GROUPS)


@pytest.mark.parametrize("style", STYLES)
def test_objects_look_different_at_32_pixels(style: str) -> None:
    """Protects the judge: no two objects give nearly the same picture on any background."""
    for colour in WORLD.colours:
        pictures = np.stack(
            [render(single(name, colour, style), WORLD, 32).astype(float).ravel() for name in WORLD.names]
        )
        squares = (pictures**2).mean(axis=1)
        apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * pictures @ pictures.T / pictures.shape[1], 0))
        np.fill_diagonal(apart, np.inf)
        one, other = np.unravel_index(apart.argmin(), apart.shape)
        assert apart.min() > 17, (WORLD.names[one], WORLD.names[other], colour, float(apart.min()))


@pytest.mark.parametrize("colour", WORLD.colours)
def test_objects_stand_out_from_backgrounds(colour: str) -> None:
    """Protects drawing and naming: on every colour a part of every object is seen."""
    for name in WORLD.names:
        picture = render(single(name, colour), WORLD, 32).astype(float)
        far = np.abs(picture - np.array(WORLD.backgrounds[colour])).max(axis=-1) > 30
        assert far.mean() > 0.07, (name, float(far.mean()))


def test_colours_are_far_apart() -> None:
    """Protects the judge of backgrounds: a mean colour tells which of the eight it is."""
    for one, other in itertools.combinations(BACKGROUNDS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) > 75


def test_held_out_combinations_are_one_in_eight_and_never_trained() -> None:
    """Protects every figure on held-out combinations: the splits are disjoint, and all words occur in training."""
    train, heldout = WORLD.combinations("train"), WORLD.combinations("heldout")
    assert not set(train) & set(heldout) and len(train) + len(heldout) == 48 * 8
    assert len(heldout) == 48 and {name for name, _ in heldout} == set(WORLD.names)
    assert {colour for _, colour in heldout} == set(WORLD.colours) == {colour for _, colour in train}
    pairs = WORLD.pairs("train"), WORLD.pairs("heldout")
    assert not set(pairs[0]) & set(pairs[1]) and 0.08 < len(pairs[1]) / (48 * 47 / 2) < 0.17


def test_held_out_combinations_stay_what_they_are() -> None:
    """Protects published figures: another hash would move training combinations into the test."""
    assert [colour for colour in BACKGROUNDS if is_heldout("red apple", colour)] == ["purple"]
    assert [colour for colour in BACKGROUNDS if is_heldout("cat", colour)] == ["red"]
    assert [colour for colour in BACKGROUNDS if is_heldout("ladybug", colour)] == ["white"]


def test_smaller_worlds_are_the_first_objects() -> None:
    """Protects debug runs: fewer objects, same names, colours and splits."""
    small = World.load(objects=6)
    assert small.names == WORLD.names[:6] and len(small.groups) >= 3
    assert set(small.combinations("heldout")) <= set(WORLD.combinations("heldout"))


def test_sprites_are_rgba_and_scale_smoothly() -> None:
    """Protects rendering: 64 px RGBA of both styles, and premultiplied scaling that leaves no dark rim."""
    for style in STYLES:
        for name in WORLD.names:
            sprite = WORLD.sprite(name, style)
            assert sprite.shape == (64, 64, 4) and sprite.dtype == np.uint8
            assert 0.15 < (sprite[..., 3] > 127).mean() < 0.95
    colour, through = WORLD.scaled("snowman", "noto", 20)
    assert colour.shape == (20, 20, 3) and through.shape == (20, 20, 1)
    assert colour.min() >= 0 and through.min() >= 0 and through.max() <= 1
    assert through[0, 0, 0] == 1 and colour[0, 0].sum() == 0


def test_shipped_files_are_those_of_the_manifest() -> None:
    """Protects licence notices: what ships is what the manifest lists, each source with its licence text."""
    manifest = json.loads((ASSETS / "manifest.json").read_text(encoding="utf-8"))
    for part in ("sprites", "tokenizer"):
        assert file_digest(ASSETS / manifest[part]["file"]) == manifest[part]["sha256"]
    for source in manifest["sources"]:
        assert (ASSETS / "LICENSES" / source["licence_file"]).stat().st_size > 500
        assert source["licence"] in ("Apache-2.0", "CC-BY-4.0", "MIT")
    assert "Twemoji" in (ASSETS / "NOTICE.txt").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 2_000_000


def test_articles() -> None:
    """Protects the language: an before a vowel, a elsewhere."""
    assert (article("owl"), article("red apple"), article("umbrella")) == ("an owl", "a red apple", "an umbrella")


def test_wrong_worlds_are_refused(tmp_path: Path) -> None:
    """Protects configurations: a message names the value and the limits."""
    with pytest.raises(ValueError, match="objects=49.*4 to 48"):
        World.load(objects=49)
    with pytest.raises(ValueError, match="apple.*noto, twemoji"):
        World.load(styles=("apple",))
    with pytest.raises(ValueError, match="no sprite archive"):
        World.load(tmp_path)
    with pytest.raises(ValueError, match="'dragon'"):
        WORLD.spec("dragon")
    with pytest.raises(ValueError, match="'test'.*train, heldout"):
        WORLD.combinations("test")
    with pytest.raises(ValueError, match="'twemoji' is not loaded"):
        World.load().sprite("dog", "twemoji")
