"""A source read through its codes gives what the source itself would, whichever way round its pairs are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilau.data.coded_source import CodedSource, SquareReader
from vilau.data.codes import StoreInfo, create_store, write_shard
from vilau.data.feed import SampleFeed
from vilau.data.mixture import Entry, Mixture
from vilau.data.sources.folder import FolderConfig
from vilau.data.sources.source import ReadOptions, Source

SIZE, P, D, K = 16, 4, 3, 512
FORMS = {"image_text": 1.0, "text_image": 1.0}


def encode(frames: np.ndarray) -> np.ndarray:
    """Codes that depend on every quarter of a picture: stands for a tower, which this room does not know."""
    quarters = frames.reshape(len(frames), 2, SIZE // 2, 2, SIZE // 2, 3).astype(np.int64).sum((2, 4))
    return quarters.reshape(len(frames), P, D) % K


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    """Twelve pictures wider than high with captions; one file is cut short, one has no caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 44, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}" if number != 7 else "")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    return FolderConfig(path=str(folder)).open(ReadOptions())


def coded(source: Source, folder: Path, both: bool) -> CodedSource:
    info = StoreInfo("data", "tower", P, D, K, len(source), variants=1 + both, shard_size=5)
    create_store(folder, info)
    for shard in range(info.shards):
        write_shard(folder, info, shard, SquareReader(source, SIZE, both), encode, lambda: None)
    return CodedSource(source, folder)


@pytest.mark.parametrize("forms", [None, FORMS, {"text_image": 1.0}], ids=["as read", "both ways", "drawn"])
def test_a_mixture_of_codes_is_the_mixture_of_pixels(
    pictures: Source, forms: dict[str, float] | None, tmp_path: Path
) -> None:
    """Same samples in the same order over epochs, bad ones replaced alike; frames are the codes of the very square that
    the form asks for: squashed to be read, its centre to be drawn."""
    stored = coded(pictures, tmp_path / "codes", both=forms is not None)
    feeds = [SampleFeed(Mixture([Entry(source, forms=forms)], seed=4), SIZE) for source in (pictures, stored)]
    seen = set()
    for number in range(40):
        plain, swapped = (feed[number] for feed in feeds)
        assert (swapped.id, swapped.form) == (plain.id, plain.form)
        words = [[part.text for turn in one.turns for part in turn.parts] for one in (plain, swapped)]
        assert words[0] == words[1]
        assert np.array_equal(np.stack(swapped.frames), encode(np.stack(plain.frames)))
        seen.add(plain.form)
    assert seen == set(forms or ["image_text"])
    assert feeds[0].take_skips() == feeds[1].take_skips() != {}


def test_a_source_that_changed_is_noticed(pictures: Source, tmp_path: Path) -> None:
    """Codes of other pictures are worse than none: another number of samples is an error."""
    stored = coded(pictures, tmp_path / "codes", both=False)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (20, 20)).save(other / "a.png")
    (other / "a.txt").write_text("black")
    with pytest.raises(ValueError, match="holds codes of 12 samples, but source 'other' has 1 now"):
        CodedSource(FolderConfig(path=str(other)).open(ReadOptions()), stored.store.folder)
