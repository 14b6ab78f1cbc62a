"""Stores of codes: the same samples by the same numbers as without, whole or not there, whoever wrote them."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vilau.data.codes import (
    CodeStore,
    StoreInfo,
    create_store,
    missing_shards,
    read_info,
    verify,
    write_shard,
)
from vilau.data.nano.dataset import FORM_OF, NanoDataset
from vilau.data.nano.world import World
from vilau.data.sample import Sample
from vilau.data.sources.source import BadSample, image_text

P, D, K = 4, 3, 512
MIXTURE = dict.fromkeys((name for name in FORM_OF if name != "easy_vqa"), 1.0)


class Samples:
    """The nano world's samples of every form, with every ninth bad; calling it gives the squares too."""

    def __init__(self, count: int = 50) -> None:
        self.inner = NanoDataset(World.load(None, objects=12, styles=("noto",)), MIXTURE, "train", 3, 32, 2, 0.0, count)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        if index % 9 == 4:
            raise BadSample("broken_image", f"picture {index} is cut short")
        return self.inner[index]

    def __call__(self, index: int) -> tuple[Sample, tuple[np.ndarray, ...]]:
        return self[index], self[index].frames


def encode(frames: np.ndarray) -> np.ndarray:
    """Codes that depend on every quarter of a picture: stands for a tower, which this room does not know."""
    quarters = frames.reshape(len(frames), 2, 16, 2, 16, 3).astype(np.int64).sum((2, 4))  # (F, 2, 2, 3)
    return quarters.reshape(len(frames), P, D) % K


def make(folder: Path, samples: Samples, shard_size: int = 20) -> StoreInfo:
    info = StoreInfo("data", "tower", P, D, K, len(samples), shard_size=shard_size)
    create_store(folder, info)
    for shard in missing_shards(folder, info):
        write_shard(folder, info, shard, samples, encode, lambda: None)
    return info


def test_samples_come_back_by_number_with_codes_for_pixels(tmp_path: Path) -> None:
    """Texts, roles, forms, ids and facts are unchanged, every frame is its codes, bad samples keep their reason."""
    samples = Samples()
    make(tmp_path, samples)
    store = pickle.loads(pickle.dumps(CodeStore(tmp_path, shards_in_memory=1)))
    assert len(store) == 50
    for number in (7, 49, *range(50)):  # back and forth over shards
        if number % 9 == 4:
            with pytest.raises(BadSample, match=f"picture {number} is cut short") as caught:
                store[number]
            assert caught.value.kind == "broken_image"
            continue
        before, after = samples[number], store[number]
        assert (after.id, after.form, dict(after.meta)) == (before.id, before.form, dict(before.meta))
        for turn, other in zip(before.turns, after.turns, strict=True):
            assert turn.role == other.role
            assert [(p.kind, p.text, len(p.frames)) for p in turn.parts] == [
                (p.kind, p.text, len(p.frames)) for p in other.parts
            ]
        expected = encode(np.stack(before.frames)) if before.frames else []
        assert all(np.array_equal(a, b) for a, b in zip(after.frames, expected, strict=True))
    with pytest.raises(IndexError, match="the store has 50"):
        store[50]


ODD = "a\u2028b\u2029c\x85d\x0be\x1cf"


class Captions(Samples):
    """Pictures whose captions no editor would write."""

    texts: tuple[str, ...] = (ODD, "cut \ud83d short", "plain")

    def __getitem__(self, index: int) -> Sample:
        if index == len(self.texts):
            raise BadSample("missing_file", f"no file {ODD}\udcff")
        return image_text(f"odd/{index}", np.full((32, 32, 3), index, np.uint8), self.texts[index])

    def __len__(self) -> int:
        return len(self.texts) + 1


def test_any_text_comes_back(tmp_path: Path) -> None:
    """Other line separators than \\n, and halves of characters as broken JSON gives them, are text like any other."""
    samples = Captions()
    make(tmp_path, samples)
    store = CodeStore(tmp_path)
    assert [store[n].turns[1].parts[0].text for n in range(3)] == list(samples.texts)
    with pytest.raises(BadSample, match="no file"):
        store[3]
    assert verify(store, samples, encode, range(4)) == 3


def test_stores_with_raw_characters_are_read(tmp_path: Path) -> None:
    """Stores written before, whose texts were not escaped, are whole too."""
    make(tmp_path, Captions())
    path = tmp_path / "shard-000000.jsonl"
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    records[1]["turns"][1]["parts"][0]["text"] = ODD
    records[3]["message"] = ODD
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert CodeStore(tmp_path)[1].turns[1].parts[0].text == ODD


def test_work_is_shared_and_resumed_by_shard(tmp_path: Path) -> None:
    """Shards written by two processes, one of them killed, are those of one process; files of others are left alone."""
    samples = Samples()
    info = make(tmp_path / "one", samples)
    create_store(tmp_path / "two", info)
    write_shard(tmp_path / "two", info, 2, samples, encode, lambda: None)
    (tmp_path / "two" / ".shard-000001.safetensors.99.partial").write_bytes(b"half")
    assert missing_shards(tmp_path / "two", info) == [0, 1]
    with pytest.raises(ValueError, match="2 of 3 shards are not written yet"):
        CodeStore(tmp_path / "two")
    make(tmp_path / "two", samples)
    for path in (tmp_path / "one").glob("[!.]*"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    """Going on with another tower or other data would mix codes: the difference is named."""
    info = make(tmp_path, Samples(5))
    assert read_info(tmp_path) == info
    with pytest.raises(ValueError, match="made with another tower, depth"):
        create_store(tmp_path, replace(info, tower="other", depth=9))
    with pytest.raises(ValueError, match="is no store of codes"):
        CodeStore(tmp_path / "nowhere")


def test_damage_is_named(tmp_path: Path) -> None:
    """A shard cut short is an error before any of its samples is used, never other samples' codes."""
    make(tmp_path, Samples(30))
    path = tmp_path / "shard-000000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="shard 0 is incomplete"):
        CodeStore(tmp_path)[0]
    (tmp_path / "shard-000001.safetensors").write_bytes(b"zero")
    with pytest.raises(ValueError, match="shard 1 is damaged"):
        CodeStore(tmp_path)[25]


def test_verification_finds_what_differs(tmp_path: Path) -> None:
    """Encoding a share again tells whether the store is what this tower makes of these samples."""
    samples = Samples(30)
    make(tmp_path, samples)
    store = CodeStore(tmp_path)
    frames = sum(len(samples[n].frames) for n in range(30) if n % 9 != 4)
    assert verify(store, samples, encode, range(30)) == frames > 20
    with pytest.raises(ValueError, match="is not what the store holds"):
        verify(store, samples, lambda frames: (encode(frames) + 1) % K, range(30))


@pytest.mark.parametrize(("lost", "said"), [((), "sample 4 .* can be read now"), ((0,), "sample 0 .* any more")])
def test_verification_finds_what_became_good_or_bad(lost: tuple[int, ...], said: str, tmp_path: Path) -> None:
    """A picture that was mended or lost since is a store that no longer fits, with the remedy; never the old reason."""
    make(tmp_path, Samples(30))

    def read(index: int) -> tuple[Sample, tuple[np.ndarray, ...]]:
        if index in lost:
            raise BadSample("missing_file", f"picture {index} is gone")
        sample = Samples(30).inner[index]
        return sample, sample.frames

    with pytest.raises(ValueError, match=f"{said}.*remove that folder and run `vilau data codes`") as caught:
        verify(CodeStore(tmp_path), read, encode, [0, 4])
    assert not isinstance(caught.value, BadSample)
