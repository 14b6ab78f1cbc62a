"""The nano world as a source: a function of its settings alone, drawn at the model's size, never what is held out."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from vilau.data.nano.dataset import ALL_FORM_OF, ImageTextDataset, NanoDataset
from vilau.data.nano.world import World, is_heldout, is_heldout_pair
from vilau.data.sample import Sample
from vilau.data.sources.nano import FORM_NAMES, NanoConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import ReadOptions, Source

OPTIONS = ReadOptions(num_frames=3, image_size=24)


def opened(options: ReadOptions = OPTIONS, **fields: Any) -> Source:
    """A source of 12 objects."""
    return NanoConfig(**({"objects": 12, "samples": 60} | fields)).open(options)


def content(sample: Sample) -> list[Any]:
    """All that a stage sees of a sample."""
    parts = [part for turn in sample.turns for part in turn.parts]
    return [sample.id, sample.form, [(part.text, [frame.tobytes() for frame in part.frames]) for part in parts]]


def shown(sample: Sample) -> list[tuple[str, str]]:
    """The objects with their backgrounds that a sample is known to show."""
    meta = sample.meta
    if "scenes" in meta:
        return [tuple(scene) for scene in meta["scenes"]]
    return [(name, meta["background"]) for name in meta.get("objects", [meta["object"]])]


def test_samples_are_those_of_the_nano_world() -> None:
    """Every form, its own shares, at the model's size: the samples of `NanoDataset` under the source's name."""
    forms = dict.fromkeys(ALL_FORM_OF, 1.0)
    source = opened(forms=forms, seed=5, jitter=2, name="w")
    plain = NanoDataset(World.load(objects=12), forms, "train", 5, 24, 3, 2, 60)
    assert len(source) == 60
    for index in range(60):
        sample, same = source.read(index), plain[index]
        assert sample.id == f"w/{index}" and sample.turns[0].role == same.turns[0].role
        assert content(sample)[1:] == content(same)[1:]
    copy = pickle.loads(pickle.dumps(source))
    assert [content(copy.read(index)) for index in (59, 3)] == [content(source.read(index)) for index in (59, 3)]


def test_pictures_are_those_of_the_towers_stages() -> None:
    """The form `pictures` gives what align and vision_tower see of the nano world, beside other forms in its share."""
    source = opened(forms={"pictures": 3, "text": 1}, samples=200)
    plain = ImageTextDataset(World.load(objects=12), "train", 0, 24, 200)
    samples = [source.read(index) for index in range(200)]
    pictures = [index for index, sample in enumerate(samples) if sample.form == "image_text"]
    assert 130 <= len(pictures) <= 170
    for index in pictures:
        pixels, caption = plain[index]
        assert np.array_equal(samples[index].frames[0], pixels)
        assert samples[index].turns[1].parts[0].text == caption


def test_what_is_held_out_stays_held_out() -> None:
    """No training sample of any form shows a held-out combination; validation shows nothing else."""
    forms = {name: 1.0 for name in FORM_NAMES if name not in ("easy_vqa", "text", "pictures")}
    source = opened(forms=forms, samples=2000, objects=48, image_size=8)
    pairs = [pair for index in range(2000) for pair in shown(source.read(index))]
    assert len(pairs) > 2000 and not any(is_heldout(*pair) for pair in pairs)
    held = opened(ReadOptions(image_size=8, held_out=True), samples=200, objects=48)
    scenes = [held.read(index).meta for index in range(200)]
    for scene in scenes:
        names = scene["objects"]
        if scene["scene"] == "relation":
            assert is_heldout_pair(*names)
        else:
            assert is_heldout(scene["object"], scene["background"])


def test_by_itself_it_is_pairs_half_each_way_round() -> None:
    """Without `forms` it can stand in any stage; a mixture does not turn its samples round."""
    source = opened(samples=400)
    counts = Counter(source.read(index).form for index in range(400))
    assert set(counts) == {"image_text", "text_image"} and abs(counts["image_text"] - 200) < 40
    assert NanoConfig().ways_round is None and NanoConfig().label == "nano" and NanoConfig(name="x").label == "x"


def test_content_is_what_decides_about_samples() -> None:
    """Weight, epochs and name may change over stored codes; forms and seed may not."""
    one = NanoConfig(weight=2, epochs=3, name="x")
    assert one.content() == NanoConfig().content() != NanoConfig(forms={"text": 1}).content()
    assert NanoConfig(seed=1).content() != NanoConfig().content()


@pytest.mark.parametrize("fields", [{"samples": 0}, {"objects": 3}, {"styles": []}, {"jitter": -1}, {"forms": {}}])
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    """A setting that makes no world is an error when the configuration is read."""
    with pytest.raises(ValidationError, match=next(iter(fields))):
        NanoConfig(**fields)


def test_wrong_styles_are_said_with_the_source() -> None:
    """What only the sprites can tell is said when the source is opened, with its name."""
    with pytest.raises(ValueError, match=r"source 'w': styles \['crayon'\] must be one or more of"):
        opened(styles=["crayon"], name="w")


def test_a_folder_of_the_nano_world_is_known_by_its_content(tmp_path: Path) -> None:
    """The folder that `vilau data nano` writes is this format."""
    for name in ("sprites.zip", "manifest.json"):
        (tmp_path / name).write_bytes(b"{}")
    assert isinstance(detect_format(tmp_path), NanoConfig)
