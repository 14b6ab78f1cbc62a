"""Samples of the nano world: pure functions of seed, split and index, with nothing of the held-out part in training."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from vilau.data.nano.dataset import ALL_FORM_OF, FORM_OF, ImageTextDataset, NanoDataset
from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World, is_heldout, is_heldout_pair
from vilau.data.sample import FORMS, Sample

WORLD = World.load()
EVERYTHING = dict.fromkeys(FORM_OF, 1.0)


@lru_cache
def samples(split: str, number: int = 1200) -> tuple[Sample, ...]:
    """The first samples of a mixture of everything."""
    dataset = NanoDataset(WORLD, EVERYTHING, split, seed=5, size=number)
    return tuple(dataset[index] for index in range(number))


def digest(sample: Sample) -> str:
    """A digest of all words, pictures and facts of a sample."""
    said = [(turn.role, [(part.kind, part.text) for part in turn.parts]) for turn in sample.turns]
    pixels = b"".join(frame.tobytes() for frame in sample.frames)
    return hashlib.sha256(
        repr((sample.id, sample.form, said, sorted(sample.meta.items()))).encode() + pixels
    ).hexdigest()


def test_samples_are_pure_functions_of_their_index() -> None:
    """Protects exact resume and any number of workers: order of access, other instances and pickling change nothing."""
    first = NanoDataset(WORLD, EVERYTHING, seed=3, size=100)
    second = pickle.loads(pickle.dumps(NanoDataset(World.load(), EVERYTHING, seed=3, size=100_000)))
    forwards = [digest(first[index]) for index in range(60)]
    backwards = [digest(second[index]) for index in reversed(range(60))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 60
    other = NanoDataset(WORLD, EVERYTHING, seed=4, size=100)
    assert sum(digest(other[index]) == forwards[index] for index in range(60)) == 0


def test_samples_are_the_same_in_another_process() -> None:
    """Protects several machines: hash seeds and import order of a fresh interpreter change nothing."""
    code = (
        "from vilau.data.nano import NanoDataset, World\n"
        "from vilau.data.nano.dataset import FORM_OF\n"
        "d = NanoDataset(World.load(), dict.fromkeys(FORM_OF, 1.0), seed=5, size=1200)\n"
        "import hashlib\n"
        "h = hashlib.sha256()\n"
        "for i in range(40):\n"
        "    s = d[i]\n"
        "    h.update(repr([[p.text for p in t.parts] for t in s.turns]).encode())\n"
        "    [h.update(f.tobytes()) for f in s.frames]\n"
        "print(h.hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    here = hashlib.sha256()
    for sample in samples("train")[:40]:
        here.update(repr([[part.text for part in turn.parts] for turn in sample.turns]).encode())
        for frame in sample.frames:
            here.update(frame.tobytes())
    assert done.stdout.strip() == here.hexdigest()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "1234"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_are_of_their_split(split: str) -> None:
    """Protects figures on held-out combinations: no form shows one in training, held-out forms show nothing else."""
    shown: Counter[str] = Counter()
    for sample in samples(split):
        meta = sample.meta
        for name, background in meta.get("scenes", []):
            assert is_heldout(name, background) == (split == "heldout"), sample.id
        if meta.get("scene") == "relation":
            assert is_heldout_pair(*meta["objects"]) == (split == "heldout"), sample.id
            if split == "train":
                assert not any(is_heldout(name, meta["background"]) for name in meta["objects"])
        elif "background" in meta:
            assert is_heldout(meta["object"], meta["background"]) == (split == "heldout"), sample.id
            shown[meta["object"]] += 1
    assert set(shown) == set(WORLD.names)


def test_every_form_is_as_it_says() -> None:
    """Protects supervision: roles, kinds of parts and frames of each form."""
    seen: Counter[str] = Counter()
    for sample in samples("train"):
        roles = [turn.role for turn in sample.turns]
        kinds = [[part.kind for part in turn.parts] for turn in sample.turns]
        seen[sample.meta["key"]] += 1
        assert sample.form == FORM_OF[sample.meta["key"]]
        if sample.form == "interleaved":
            assert roles == ["document"] and kinds[0].count("image") in (2, 3, 4) and kinds[0].count("text") >= 2
            continue
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if sample.form == "image_text":
            assert kinds == [["image"], ["text"]]
        elif sample.form in ("text_image", "text_video"):
            assert kinds == [["text"], [sample.form.removeprefix("text_")]]
        elif sample.form == "question":
            assert kinds[0] in (["image", "text"], ["image", "image", "text"])
            assert all(kind == ["text"] for kind in kinds[1:])
        elif sample.form == "video_text":
            assert kinds == [["video", "text"], ["text"]] and len(sample.frames) == 4
        else:
            assert all(kind == ["text"] for kind in kinds)
        assert sample.turns[-1].parts[-1].text == sample.meta.get("answer", sample.turns[-1].parts[-1].text)
    assert set(seen) == set(FORM_OF) and set(ALL_FORM_OF.values()) == set(FORMS)


def test_pictures_are_those_of_the_captions() -> None:
    """Protects drawing: the picture of a single-object sample is that very object on that very colour."""
    checked = 0
    for sample in samples("train"):
        if sample.meta.get("scene") == "single" and sample.form in ("image_text", "text_image"):
            wanted = render(single(sample.meta["object"], sample.meta["background"]), WORLD, 32)
            assert (sample.frames[0] == wanted).all()
            checked += 1
    assert checked > 100


def test_stories_refer_rightly() -> None:
    """Protects back-references: "the same", "again" and "the same background" agree with the pictures before."""
    for sample in samples("train"):
        if sample.meta["key"] != "interleaved":
            continue
        said = [part.text for part in sample.turns[0].parts if part.kind == "text"]
        scenes = sample.meta["scenes"]
        assert len(said) == len(scenes)
        for i, (words, (name, background)) in enumerate(zip(said, scenes, strict=True)):
            assert name in words
            if i and "the same background" in words:
                assert scenes[i - 1][1] == background
            else:
                assert re.search(rf"\b{background} background", words)
            assert words.startswith(f"the same {name}") == (i > 0 and scenes[i - 1][0] == name)
            if "again" in words:
                assert name in [other for other, _ in scenes[: i - 1]]


def test_shares_are_kept() -> None:
    """Protects mixtures: keys come as often as their shares say, scenes mostly with one big object."""
    dataset = NanoDataset(WORLD, {"text_image": 3, "text": 1, "question": 0}, size=2000, image_size=8)
    drawn = [dataset[index] for index in range(1500)]
    share = sum(sample.form == "text_image" for sample in drawn) / 1500
    assert 0.71 < share < 0.79 and {sample.form for sample in drawn} == {"text_image", "text"}
    kinds = Counter(sample.meta["scene"] for sample in drawn if sample.form == "text_image")
    assert 0.71 < kinds["single"] / kinds.total() < 0.81 and len(kinds) == 4


def test_jitter_moves_pictures() -> None:
    """Protects the option: with jitter the same prompt has several pictures, without it one."""
    for jitter, most in ((0.0, 1), (1.0, 9)):
        dataset = NanoDataset(
            WORLD, {"text_image": 1}, image_size=16, jitter=jitter, drawn_scenes={"single": 1.0}, size=3000
        )
        found: dict[str, set[bytes]] = {}
        for index in range(1500):
            sample = dataset[index]
            found.setdefault(sample.meta["caption"], set()).add(sample.frames[0].tobytes())
        assert max(len(pictures) for pictures in found.values()) <= most
        assert (max(len(pictures) for pictures in found.values()) > 1) == (jitter > 0)


def test_other_sizes_and_small_worlds() -> None:
    """Protects debug runs and 64 px runs: any world of four objects or more, any size, any number of frames."""
    for objects, size, frames in ((4, 16, 2), (6, 32, 4), (48, 64, 8)):
        for split in ("train", "heldout"):
            dataset = NanoDataset(
                World.load(objects=objects), EVERYTHING, split, image_size=size, num_frames=frames, size=150
            )
            for index in range(150):
                sample = dataset[index]
                assert all(frame.shape == (size, size, 3) for frame in sample.frames)
                if sample.form in ("text_video", "video_text"):
                    assert len(sample.frames) == frames


def test_tower_pictures() -> None:
    """Protects the tower's stages: pictures and captions of the right split, varied, repeatable, some of easy-VQA."""
    train, heldout = ImageTextDataset(WORLD, size=600), ImageTextDataset(WORLD, "heldout", size=600)
    pairs = [train[index] for index in range(400)]
    assert all(pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 for pixels, _ in pairs)
    pale = sum("pale background" in caption for _, caption in pairs) / 400
    assert 0.05 < pale < 0.16
    assert (train[7][0] == pairs[7][0]).all() and train[7][1] == pairs[7][1]
    assert len({pixels.tobytes() for pixels, _ in pairs}) > 340
    assert len(ImageTextDataset(WORLD, easy_vqa=0.0, size=5)) == 5
    for dataset in (train, heldout):
        for index in range(200):
            found = re.fullmatch(r"an? (?:small )?(\w+(?: \w+)?) on an? (\w+) background", dataset[index][1])
            if found and found[1] in WORLD.names:
                assert is_heldout(found[1], found[2]) == (dataset is heldout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mixture": {"pictures": 1.0}}, "'pictures'.*text_image"),
        ({"mixture": {}}, "above 0"),
        ({"mixture": {"text": -1.0}}, "above 0"),
        ({"split": "validation"}, "'validation'"),
        ({"image_size": 0}, "image_size=0"),
        ({"size": 0}, "size=0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], said: str) -> None:
    """Protects configurations: the message names the value and what may be used."""
    with pytest.raises(ValueError, match=said):
        NanoDataset(WORLD, **{"mixture": {"text": 1.0}, **change})  # type: ignore[arg-type]


def test_indices_out_of_range_are_refused() -> None:
    """Protects loops over the dataset: it ends where it says."""
    dataset = NanoDataset(WORLD, {"text": 1.0}, size=3)
    assert len([dataset[index] for index in range(len(dataset))]) == 3
    with pytest.raises(IndexError, match="has 3"):
        dataset[3]


def test_the_stream_stays_what_it_is() -> None:
    """Protects running and published trainings: the words of seed 0 are those that the shipped model was trained on."""
    dataset = NanoDataset(WORLD, EVERYTHING, image_size=4, num_frames=1)
    said = [[part.text for turn in dataset[index].turns for part in turn.parts] for index in range(300)]
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == "b232399ae672058e"
