"""Runs over data of one's own: one order whoever reads it, bad samples skipped and told of, mistakes said at once."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vilau.data.nano.dataset import ImageTextDataset
from vilau.data.nano.world import ASSETS, World
from vilau.processing.images import resize_square
from vilau.training.batches import step_batches
from vilau.training.config import TrainConfig, load_config
from vilau.training.data import build_pairs, load_tokenizer, stage_seed, validation_pairs
from vilau.training.engine import TrainingError
from vilau.training.run import build_stage, run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
STAGES = ("align", "vision_tower", "pretrain", "sft")
SMALL = (
    "model.vision_config.image_encoder_config.num_hidden_layers=1",
    "model.vision_config.image_encoder_config.hidden_size=32",
    "text_encoder.hidden_size=32",
    "text_encoder.num_hidden_layers=1",
    "model.vision_config.decoder_channels=8",
    "model.vision_config.decoder_groups=4",
    "model.vision_config.decoder_latent_channels=16",
)


def jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 900 megapixels."""
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    content = bytearray(out.getvalue())
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + content[24:29]
    content[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 drawn pictures, 48 pixels wide, with captions beside them."""
    root = tmp_path_factory.mktemp("own") / "pets"
    root.mkdir()
    scenes = ImageTextDataset(World.load(None, objects=12), "train", 3, 48, 96, easy_vqa=0)
    for number in range(96):
        pixels, caption = scenes[number]
        Image.fromarray(pixels[:, :40]).save(root / f"{number:03d}.png")
        (root / f"{number:03d}.txt").write_text(caption)
    return root


def own(config: str | Path, output: Path, sources: list[dict[str, Any]], *overrides: str) -> TrainConfig:
    """The debug configuration over sources, six steps a stage."""
    changes = [f"stages.{name}.steps=6" for name in STAGES]
    changes += [f"stages.{name}.mixture={{}}" for name in STAGES]
    changes += [f"output={output}", f"data.sources={json.dumps(sources)}", *SMALL, *overrides]
    return load_config(config, changes)


def folder(path: Path, **fields: Any) -> dict[str, Any]:
    """An entry of `data.sources`."""
    return {"format": "folder", "path": str(path), **fields}


def test_a_folder_of_pictures_trains_every_stage(pets: Path, tmp_path: Path) -> None:
    """From a folder of pictures with captions, through four stages, to a model that loads; both ways round"""
    steps = [f"stages.{name}.steps=2" for name in STAGES]
    config = own(CONFIG, tmp_path / "run", [folder(pets)], "data.augment={crop: random, flip: 0.5}", *steps)
    result = run(config, show_progress=False)
    from vilau.modeling.vila_u import VilaUModel

    assert VilaUModel.from_pretrained(result).config.vision_config.image_size == 32
    lines = [json.loads(line) for line in (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert {"text/image_text", "visual/text_image"} <= set(lines[-1])  # both ways round


@pytest.mark.parametrize("name", ["align", "pretrain"])
def test_own_data_has_one_global_order(name: Any, pets: Path, tmp_path: Path) -> None:
    """R10: 0, 1 and 3 workers, 1 and 2 processes and a resumed run read the same of four formats, augmentation too."""
    pictures = [(path.read_bytes(), path.with_suffix(".txt").read_bytes()) for path in sorted(pets.glob("*.png"))]
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number, pair in enumerate(pictures[:40]):
            for ending, content in zip(("png", "txt"), pair):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = {"image": [image for image, _ in pictures[40:]], "text": [words.decode() for _, words in pictures[40:]]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=8)
    sources = [
        folder(pets, weight=3),
        {"format": "webdataset", "path": str(tmp_path / "shard.tar")},
        {"format": "parquet", "path": str(tmp_path / "rows.parquet"), "epochs": 0.25},
        {"format": "nano", "samples": 50, "forms": {"text_image": 0.6, "text_video": 0.4, "pictures": 1}},
    ]
    config = own(CONFIG, tmp_path, sources, "data.augment={crop: random, flip: 0.5}")
    stage = build_stage(config, name, None)

    def content(batch: Any) -> list[Any]:
        if name == "align":
            return [batch.pixels.numpy().tobytes(), batch.captions.tolist()]
        return [batch.sample_ids, batch.forms, batch.input_ids.numpy().tobytes(), batch.frames.numpy().tobytes()]

    def read(workers: int, step: int = 0) -> list[Any]:
        return [content(batch) for (batch,), _ in step_batches(stage, step, 1, workers)]

    order = read(0)
    assert len({repr(step) for step in order}) == 6
    assert read(1) == order and read(3) == order
    assert read(1, step=4) == order[4:]
    for step in (0, 5):
        halves = [stage.make_batch(step, rank, 2) for rank in range(2)]
        whole = stage.make_batch(step, 0, 1)
        if name == "align":
            assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)
        else:
            assert sum((half.sample_ids for half in halves), ()) == whole.sample_ids


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """800 samples of which 8 are bad, each in a way of its own: a table of pictures and a table of films."""
    root = tmp_path_factory.mktemp("corrupt")
    scenes = ImageTextDataset(World.load(None, objects=12), "train", 4, 32, 64, easy_vqa=0)
    for number in range(64):
        (root / f"{number}.jpg").write_bytes(jpeg(scenes[number][0]))
    (root / "cut.jpg").write_bytes(jpeg(scenes[0][0])[:-200])
    (root / "words.jpg").write_bytes(b"these are words and no picture at all")
    (root / "empty.jpg").write_bytes(b"")
    (root / "bomb.png").write_bytes(bomb())
    rows = [json.dumps({"file_name": f"{n % 64}.jpg", "text": scenes[n % 64][1]}) for n in range(700)]
    for place, name in ((11, "cut.jpg"), (123, "words.jpg"), (222, "empty.jpg"), (333, "bomb.png"), (444, "gone.jpg")):
        rows[place] = json.dumps({"file_name": name, "text": "a cat"})
    rows[555] = json.dumps({"file_name": "1.jpg", "text": ""})
    rows[666] = '{"file_name": "1.jpg", "text": '
    (root / "captions.jsonl").write_text("\n".join(rows))
    frames = [Image.new("RGB", (32, 32), (80 * n, 90, 40)) for n in range(3)]
    frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    (root / "broken.gif").write_bytes((root / "film.gif").read_bytes()[:-30])
    films = [["film.gif", "a square that changes its colour"] for _ in range(100)]
    films[50][0] = "broken.gif"
    (root / "films.csv").write_text("video,caption\n" + "\n".join(",".join(row) for row in films))
    return [
        folder(root, name="pictures", weight="size", epochs=1),
        {"format": "openvid", "path": str(root / "films.csv"), "name": "films", "weight": "size", "epochs": 1},
    ]


KINDS = {
    "broken_image",
    "wrong_type",
    "empty_file",
    "too_large",
    "missing_file",
    "missing_text",
    "bad_json",
    "broken_video",
}


def test_corrupt_samples_are_skipped_and_counted(
    corrupt: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """R5: 1 % corrupt samples of 8 kinds; a tower trains through all of it and says at the end what it skipped."""
    steps = ("stages.vision_tower.steps=20", "stages.vision_tower.batch_size=40", "data.workers=2", "log_every=5")
    config = own(CONFIG, tmp_path / "run", corrupt, *steps)
    for name in ("align", "pretrain", "sft"):
        del config.stages[name]  # type: ignore[misc]
    feed = build_pairs(config, "vision_tower", 32, stage_seed(config, "vision_tower"))
    for number in range(800):
        feed[number]
    expected = feed.take_skips()  # type: ignore[union-attr]
    assert {kind for _, kind, _ in expected} == KINDS
    assert 8 <= sum(expected.values()) <= 12  # now and then a replacement is bad too

    result = run(config)
    assert (result / "model.safetensors").is_file()
    shown = re.sub(r"\s+", " ", capfd.readouterr().err)
    total = sum(expected.values())
    assert f"{total} of {800 + total} samples read were skipped" in shown
    for (source, kind, shard), count in expected.items():
        assert f"{source}: {kind} {count} (in {shard} {count})" in shown


def test_too_many_corrupt_samples_stop_the_run(corrupt: list[dict[str, Any]], tmp_path: Path) -> None:
    """R5: above the configured share the run stops, and names kinds, shards, the limit and the command to find them."""
    steps = ("stages.align.steps=20", "stages.align.batch_size=40", "log_every=5", "data.max_skipped_share=0.002")
    config = own(CONFIG, tmp_path / "run", corrupt, *steps, "data.workers=0")
    with pytest.raises(TrainingError, match=r"max_skipped_share allows \(0.2%\); `vilau data check`") as caught:
        run(config, show_progress=False)
    assert "pictures: " in str(caught.value) and "captions.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "overrides", "message"),
    [
        ([{"format": "foldr", "path": "x"}], (), "no format 'foldr'; did you mean 'folder'"),
        ([{"path": "x"}], (), r"data.sources.0.format is missing: one of .*webdataset"),
        ([{"format": "folder", "path": "x", "captons": "files"}], (), "unknown key .*captons.*did you mean 'captions'"),
        ([{"format": "folder", "path": "x", "forms": {"text": 1}}], (), "image_text and text_image"),
        ([{"format": "folder", "path": "/no/such/folder"}], (), "is not a folder"),
        ("pets", ("stages.align.mixture={pts: 1}",), "no source has the name 'pts'; did you mean 'pets'"),
        ("pets", ("stages.align.mixture={pets: 0}",), "weight 0.0, but it must be above 0"),
        ("pets", ("stages.align.mixture={text_image: 1}",), "are the `forms` of a source of format nano"),
        ("pets", ("stages.sft.jitter=2",), "stages.sft.jitter 2 has no effect with data.sources"),
        ([{"format": "nano", "forms": {"text_imag": 1}}], (), "no form 'text_imag'; did you mean 'text_image'"),
        ([{"format": "nano", "forms": {"text": 0}}], (), "share above 0"),
        ([{"format": "nano", "path": "/no/such/world"}], (), "source 'nano': no sprite archive"),
        ([{"format": "nano", "forms": {"text_image": 1, "question": 1}}], (), "source 'nano' holds the forms question"),
        ("pets", ("data.sources.0.weight=-2",), "weight -2.0, but it must be above 0"),
        ("pets", ("data.sources.0.epochs=0.5",), "reads 6 steps x 16 = 96 samples, but its sources give 48"),
        (
            "pets",
            ("data.tokenizer=/no/such/tokenizer",),
            "data.tokenizer: no tokenizer could be loaded from /no/such/tokenizer",
        ),
        ("pets", ("data.sources.0.min_side=100",), r"none of 32 samples tried can be used \(too_small 32\)"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    sources: Any, overrides: tuple[str, ...], message: str, pets: Path, tmp_path: Path
) -> None:
    """Wrong keys, formats, names, weights and whole sources: one error with the remedy, and nothing is trained."""
    entries = [folder(pets)] if sources == "pets" else sources
    with pytest.raises(ValueError, match=message):
        run(own(CONFIG, tmp_path / "run", entries, *overrides), show_progress=False)
    assert not (tmp_path / "run" / "align" / "checkpoints").exists()


def test_validation_pairs_are_plain(pets: Path, tmp_path: Path) -> None:
    """Towers are measured on held-out pictures as they are: no augmentation, each once, bad ones left out."""
    (tmp_path / "held").mkdir()
    for number in range(3):
        for ending in ("png", "txt"):
            (tmp_path / "held" / f"{number}.{ending}").write_bytes((pets / f"00{number}.{ending}").read_bytes())
    held = json.dumps([folder(tmp_path / "held")])
    overrides = (f"data.validation={held}", "data.augment={crop: random, flip: 0.5}")
    pairs = validation_pairs(own(CONFIG, tmp_path, [folder(pets)], *overrides), 32)
    captions = [(pets / f"00{number}.txt").read_text() for number in range(3)]
    assert sorted(words for _, words in pairs) == sorted(captions)
    for pixels, words in pairs:
        with Image.open(pets / f"00{captions.index(words)}.png") as picture:
            assert np.array_equal(pixels, np.asarray(resize_square(picture.convert("RGB"), 32)))
    limited = own(CONFIG, tmp_path, [folder(pets)], *overrides, "validation_samples=2")
    assert len(validation_pairs(limited, 32)) == 2
    with pytest.raises(ValueError, match=r"unknown key 'data.validation.0.folder.pth'; did you mean 'path'"):
        own(CONFIG, tmp_path, [folder(pets)], 'data.validation=[{"format": "folder", "path": "x", "pth": "y"}]')


def test_a_stage_may_name_its_sources(pets: Path, tmp_path: Path) -> None:
    """A stage's mixture chooses among the sources and gives them weights of its own."""
    sources = [folder(pets, name=name) for name in ("a", "b", "c")]
    config = own(CONFIG, tmp_path, sources, "stages.pretrain.mixture={a: 3, c: 1}")
    stage = build_stage(config, "pretrain", None)
    names = Counter(sample.split("/")[0] for step in range(4) for sample in stage.make_batch(step, 0, 1).sample_ids)
    assert names == {"a": 48, "c": 16}


def test_a_nano_source_takes_the_world_of_the_data(pets: Path, tmp_path: Path) -> None:
    """Objects and styles under `data` hold for it where it names none; held-out combinations are for validation."""
    nano = {"format": "nano", "forms": {"pictures": 1}}
    config = own(
        CONFIG, tmp_path, [nano, nano | {"objects": 5, "name": "few"}], f"data.validation={json.dumps([nano])}"
    )
    assert [source.objects for source in config.data.sources] == [12, 5]  # type: ignore[attr-defined]
    assert config.data.validation[0].objects == 12  # type: ignore[attr-defined]
    pairs = validation_pairs(config, 32)
    held = ImageTextDataset(World.load(None, objects=12), "heldout", 0, 32, 100_000)
    known = {held[number][0].tobytes() for number in range(3000)}
    assert len(pairs) == 64 and sum(pixels.tobytes() in known for pixels, _ in pairs) > 20


def test_a_folder_of_the_nano_world_has_its_tokenizer(tmp_path: Path) -> None:
    """What `vilau data nano` writes can be named as `data.world`, for sources too, although no tokenizer lies there."""
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "sprites.zip").write_bytes((ASSETS / "sprites.zip").read_bytes())
    config = own(CONFIG, tmp_path, [{"format": "nano"}], f"data.world={tmp_path / 'world'}")
    assert config.data.sources[0].path == str(tmp_path / "world")
    assert len(load_tokenizer(config)) == len(load_tokenizer(load_config(CONFIG)))
    assert len(build_stage(config, "pretrain", None).make_batch(0, 0, 1).sample_ids) == 16


def test_a_tokenizer_of_another_kind_gets_the_tokens_it_lacks(pets: Path, tmp_path: Path) -> None:
    """A plain tokenizer becomes one that the chat template can use; the model's vocabulary grows with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<s>": 2, "a": 3, "cat": 4, "on": 5}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    saved.save_pretrained(tmp_path / "tokenizer")
    config = own(CONFIG, tmp_path / "run", [folder(pets)], f"data.tokenizer={tmp_path / 'tokenizer'}")
    tokenizer = load_tokenizer(config)
    assert tokenizer.convert_tokens_to_ids("<image_start>") >= 6 and tokenizer.pad_token_id is not None
    assert tokenizer("a cat").input_ids[-2:] == [3, 4]
    stage = build_stage(config, "pretrain", None)
    batch = stage.make_batch(0, 0, 1)
    assert int(batch.input_ids.max()) < stage.model.config.text_config.vocab_size == len(tokenizer)
