"""One tiny fixture of every format, read, brought to the model's size and encoded: exactly these tokens are supervised.

Pictures are renders of the nano world. ``V`` stands for a run of supervised visual positions of one picture or frame.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.sources.conftest import write_tar
from data.sources.telling import said, write_records
from processing.conftest import build_tokenizer
from vilau.data.nano.scenes import Film, render, render_film, single
from vilau.data.nano.world import World
from vilau.data.sources.registry import FORMATS, detect_format, name_of
from vilau.data.sources.source import ReadOptions
from vilau.processing.augment import fit_sample
from vilau.processing.encode import encode_sample
from vilau.processing.templates import OURS, VICUNA_V1, ChatTemplate
from vilau.processing.videos import save_video

P, SIZE, FRAMES = 3, 32, 2
WORLD = World.load(objects=4)
TOKENIZERS = {
    "vilau": build_tokenizer(),
    "vicuna_v1": build_tokenizer(("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")),
}


def picture(name: str = "dog", colour: str = "blue", kind: str = "PNG") -> bytes:
    """The file of a render, wider than high, as pictures are."""
    out = io.BytesIO()
    pixels = np.concatenate([render(single(name, colour), WORLD, 24), render(single(name, colour), WORLD, 24)], 1)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def film(path: Path) -> None:
    """A short film beside the records."""
    save_video(render_film(Film("blue", "dog", "left"), WORLD, 32, 4), path)


def webdataset(folder: Path) -> Path:
    return write_tar(folder / "a.tar", [("0.png", picture()), ("0.txt", b"red")])


def generation(folder: Path) -> Path:
    record = json.dumps({"sharegpt4v": "red"}).encode()
    return write_tar(folder / "a.tar", [("0.jpg", picture(kind="JPEG")), ("0.json", record)])


def folder_of_pictures(folder: Path) -> Path:
    (folder / "a.webp").write_bytes(picture(kind="WEBP"))
    (folder / "a.txt").write_text("red\n")
    return folder


def parquet(folder: Path) -> Path:
    table = pa.table({"image": [{"bytes": picture(), "path": None}], "caption": ["red"]})
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def llava(folder: Path) -> Path:
    (folder / "0.png").write_bytes(picture())
    (folder / "1.png").write_bytes(picture("car"))
    rows = [
        {"image": "0.png", "conversations": said("<image>\nim", "red", "re", "im")},
        {"images": ["0.png", "1.png"], "conversations": said("<image>\n<image>\nim", "re")},
        {"conversations": said("im", "red")},
    ]
    return write_records(folder / "a.json", rows)


def video_json(folder: Path) -> Path:
    film(folder / "a.mp4")
    return write_records(folder / "a.jsonl", [{"video": "a.mp4", "q": "im", "a": "red", "fps": 8, "frame_count": 4}])


def mmc4(folder: Path) -> Path:
    infos = [{"image_base64": base64.b64encode(picture()).decode(), "matched_text_index": 1, "matched_sim": 0.3}]
    return write_records(folder / "a.jsonl", [{"text_list": ["re", "im"], "image_info": infos}])


def openvid(folder: Path) -> Path:
    film(folder / "a.mp4")
    (folder / "a.csv").write_text("video,caption,fps\na.mp4,red,8\n")
    return folder / "a.csv"


def messages(folder: Path) -> Path:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "im"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    row = {"messages": chat, "images": [{"bytes": picture(), "path": None}]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    return folder / "a.parquet"


def chat(folder: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": "im"}, {"role": "assistant", "content": "red"}]}]
    return write_records(folder / "a.jsonl", rows)


# Of each sample of a fixture: what is supervised in our template, and in the released one.
EXPECTED: dict[str, tuple[Callable[[Path], Path], list[tuple[str, str]]]] = {
    "webdataset": (webdataset, [("red </s>", "▁ red </s>")]),
    "folder": (folder_of_pictures, [("red </s>", "▁ red </s>")]),
    "parquet": (parquet, [("red </s>", "▁ red </s>")]),
    "generation": (generation, [("<image_start> V <image_end> </s>", "▁ <im_start> V <im_end> </s>")]),
    "llava": (
        llava,
        [
            ("red </s> im </s>", "▁ red </s> ▁ im </s>"),
            ("re </s>", "▁ re </s>"),
            ("red </s>", "▁ red </s>"),
        ],
    ),
    "video_json": (video_json, [("red </s>", "▁ red </s>")]),
    "mmc4": (
        mmc4,
        [("re <image_start> <image_end> im </s>", "▁ re ▁ <im_start> <im_end> <0x0A> im </s>")],
    ),
    "openvid": (openvid, [("<video_start> V V <video_end> </s>", "▁ <vi_start> V V <vi_end> </s>")]),
    "messages": (messages, [("red </s>", "▁ red </s>")]),
    "chat": (chat, [("red </s>", "▁ red </s>")]),
}


def supervised(sample: Any, template: ChatTemplate) -> str:
    """The supervised tokens of a sample in order, whole pictures and frames as ``V``."""
    tokenizer = TOKENIZERS[template.name]
    encoded = encode_sample(fit_sample(sample, SIZE), tokenizer, template, P)
    assert encoded.frames.shape[1:] in ((0, 0, 3), (SIZE, SIZE, 3))
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    shown, run = [], 0
    for token, is_text, is_visual in zip(tokens, encoded.text_targets, encoded.visual_targets, strict=True):
        run = run + 1 if is_visual else 0
        if is_text:
            shown.append(token)
        elif run and run % P == 0:
            shown.append("V")
    assert encoded.visual_targets.sum() == P * shown.count("V")
    return " ".join(shown)


def test_every_format_has_its_fixture() -> None:
    """A new format without an expectation here would be supervised by luck; the nano world is drawn, not read."""
    assert {name_of(kind) for kind in FORMATS} == set(EXPECTED) | {"nano"}


@pytest.mark.parametrize("name", EXPECTED)
def test_supervised_tokens_of_every_format(name: str, tmp_path: Path) -> None:
    """From files as people have them to the tokens that are learnt: the format is told by its content, nothing else."""
    build, expected = EXPECTED[name]
    folder = tmp_path / "data"
    folder.mkdir()
    path = build(folder)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 30_000
    config = detect_format(path)
    assert name_of(type(config)) == name
    source = config.open(ReadOptions(num_frames=FRAMES, cache=tmp_path / "cache"))
    samples = [source.read(index) for index in range(len(source))]
    got = [(supervised(sample, OURS), supervised(sample, VICUNA_V1)) for sample in samples]
    assert got == expected
