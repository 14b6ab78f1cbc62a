"""Old pickle shards are read as data: what is plain comes through, all else is refused and nothing of it runs."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.conftest import encoded, picture
from data.sources.telling import told
from vilau.data.pickle_convert import convert_pickles
from vilau.data.pickles import UnsafePickle, load_pickle
from vilau.data.sources.llava import LlavaConfig
from vilau.data.sources.mmc4 import Mmc4Config
from vilau.data.sources.source import ReadOptions
from vilau.data.sources.webdataset import WebdatasetConfig

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data_comes_back(value: Any, protocol: int) -> None:
    """Whatever Python itself writes of plain data is read the same, in all protocols."""
    assert load_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_numbers_and_mappings_come_back(protocol: int) -> None:
    """Numpy's arrays of numbers in either order, its scalars, sets and ordered mappings are data too."""
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(3, 2)),
        np.zeros((0, 3), np.uint8),
        np.array(["a", "bc"]),
        np.array(3.5),
    ]
    for array in arrays:
        got = load_pickle(pickle.dumps([array, (array,)], protocol))
        for one in (got[0], got[1][0]):
            assert one.dtype == array.dtype and np.array_equal(one, array)
    assert load_pickle(pickle.dumps(np.float64(2.5), protocol)) == 2.5
    assert load_pickle(pickle.dumps(OrderedDict(a=[b"\x00\xff"]), protocol)) == {"a": [b"\x00\xff"]}
    if protocol >= 4:  # older ones build sets by calling a class
        assert load_pickle(pickle.dumps([{1, 2}, frozenset({3})], protocol)) == [{1, 2}, frozenset({3})]
    shared: list[Any] = [1]
    twice = load_pickle(pickle.dumps([shared, shared], protocol))
    assert twice[0] is twice[1]


class Evil:
    """Runs a command when Python's own reader sees it."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


class Stateful:
    """An ordinary object, whose class would have to be imported."""

    def __init__(self) -> None:
        self.value = 1


def attacks(marker: str) -> dict[str, bytes]:
    """Pickles that would write a file, import a module, or set an object's state."""
    command = f"touch {marker}"
    array = pickle.dumps(np.zeros(2), 2)
    return {
        "system": pickle.dumps([{"text": Evil(os.system, command)}]),
        "old-system": pickle.dumps(Evil(os.system, command), 0),
        "exec": pickle.dumps(Evil(exec, f"open({marker!r}, 'w')")),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": pickle.dumps(Stateful(), 2),
        "getattr": b"c__builtin__\ngetattr\n(cos\nS'system'\ntR.",
        "name-only": b"cos\nsystem\n.",
        "nested-name": b"cnumpy\nndarray.tofile\n.",
        "known-name-as-data": b"]cnumpy\nndarray\na.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pname\n.",
        "buffer": b"\x80\x05\x97.",
        "state": b"}}S'a'\nI1\nsb.",
        "objects": pickle.dumps(np.array([Evil(os.system, command)], dtype=object)),
        "structured": pickle.dumps(np.zeros(2, dtype=[("a", "i4")])),
        "codec": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        "call-of-data": b"I1\n(tR.",
        "array-class": array.replace(b"cnumpy\nndarray\n", b"cnumpy\nmatrix\n"),
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_programs_are_refused_and_do_not_run(name: str, tmp_path: Path) -> None:
    """Each does harm, or imports code, in a careless reader; here the file that it would write is not there."""
    marker = tmp_path / "ran"
    data = attacks(str(marker))[name]
    list(pickletools.genops(data))  # the attack is a well-formed pickle, not refused for being broken
    with pytest.raises(UnsafePickle):
        load_pickle(data)
    (tmp_path / "shard.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="shard.pkl is refused"):
        convert_pickles(tmp_path / "shard.pkl", tmp_path / "out", allow=True)
    assert not marker.exists() and list((tmp_path / "out").iterdir()) == []


def test_the_attack_would_work_elsewhere(tmp_path: Path) -> None:
    """The test above would prove nothing if its attack were harmless: Python's own reader runs it."""
    marker = tmp_path / "ran"
    pickle.loads(attacks(str(marker))["system"])
    assert marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"]",
        b"no pickle",
        b".",
        b"t.",
        b"0.",
        b"h\x05.",
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"r\xff\xff\xff\xff.",
        b"]q\x00" + b"(h\x00" * 3,
        pickle.dumps([1, 2, "abc"])[:-4],
        b"K\x01" + b"2" * 40 + b"h.",
    ],
)
def test_damaged_files_are_errors_in_words(data: bytes) -> None:
    """Cut files and absurd lengths or places in memory cost neither a crash nor much memory."""
    with pytest.raises(ValueError, match="damaged|plain data"):
        load_pickle(data)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_give_data_or_an_error(data: bytes) -> None:
    """No sequence of bytes gets another exception out of the reader."""
    with contextlib.suppress(ValueError):
        load_pickle(data + b".")


def test_content_cannot_be_multiplied() -> None:
    """A short file that encodes one long text again and again would fill the memory."""
    bomb = b"(c_codecs\nencode\nq\x00X" + struct.pack("<I", 10_000) + b"a" * 10_000 + b"q\x01"
    bomb += b"".join(b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" for _ in range(20)) + b"l."
    with pytest.raises(UnsafePickle, match="more out of its content"):
        load_pickle(bomb)


def shard(path: Path, records: list[Any], protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(records, protocol))
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_documents_are_converted_and_read(tmp_path: Path, options: ReadOptions, protocol: int) -> None:
    """MMC4 shards, with base64 as text or bytes, become JSONL that the mmc4 format reads."""
    coded = base64.b64encode(encoded(1)).decode()
    records = [
        {
            "text_list": ["one.", "two."],
            "image_info": [{"image_base64": coded, "matched_text_index": 1, "matched_sim": np.float64(0.5)}],
            "similarity_matrix": np.zeros((1, 2)).tolist(),
        },
        {"text_list": ["three."], "image_info": [{"rawbytes": encoded(2), "matched_text_index": 0}]},
        {"text_list": ["bad."], "image_info": "none"},
    ]
    shard(tmp_path / "in" / "a.pkl", records, protocol)
    report = convert_pickles(tmp_path / "in", tmp_path / "out", allow=True)
    assert (report.records, dict(report.left_out)) == (2, {"image_info is no list of mappings": 1})
    source = Mmc4Config(path=str(tmp_path / "out" / "a.jsonl")).open(options)
    assert [told(source.read(index))[1] for index in range(2)] == ["document: one. <1> two.", "document: <2> three."]


def test_pairs_are_converted_and_read(tmp_path: Path, options: ReadOptions) -> None:
    """COYO shards, with pictures as base64, bytes or pixels, become tar shards."""
    records = [
        {"image": base64.b64encode(encoded(0, "JPEG")).decode(), "text": " a dog "},
        {"rawbytes": encoded(1), "caption": "a cat"},
        {"image": picture(2), "text": "a fox"},
        {"image": "?", "text": "broken"},
        {"image": encoded(3), "text": ""},
    ]
    report = convert_pickles(shard(tmp_path / "b.pkl", records), tmp_path / "out", allow=True)
    assert report.records == 3 and report.left_out == {"a picture that is not base64": 1, "no caption": 1}
    source = WebdatasetConfig(path=str(tmp_path / "out")).open(options)
    assert [told(source.read(index))[1:] for index in range(3)] == [
        ["user: <0>", "assistant: a dog"],
        ["user: <1>", "assistant: a cat"],
        ["user: <2>", "assistant: a fox"],
    ]


def test_questions_are_converted_and_read(tmp_path: Path, options: ReadOptions) -> None:
    """VFLAN shards, whose fields end in colons, become conversations with the pictures before the question."""
    coded = base64.b64encode(encoded(4)).decode()
    records = [
        {"question": "<image>\nwhat?", "answer:": "a dog\n", "image:": [coded]},
        {"question": "same?", "answer": "no", "image": [coded, "5.png"]},
        {"question": "two and two?", "answer": "four", "image": []},
    ]
    (tmp_path / "5.png").write_bytes(encoded(5))
    convert_pickles(shard(tmp_path / "c.pkl", records), tmp_path / "out", allow=True)
    source = LlavaConfig(path=str(tmp_path / "out" / "c.jsonl"), media=str(tmp_path)).open(options)
    assert [told(source.read(index))[1:] for index in range(3)] == [
        ["user: <4> what?", "assistant: a dog"],
        ["user: <4> <5> same?", "assistant: no"],
        ["user: two and two?", "assistant: four"],
    ]


def test_shared_and_looped_content_is_counted_as_written(tmp_path: Path) -> None:
    """Lists within lists of themselves would make endless JSON out of a few bytes."""
    layers: list[Any] = ["x"]
    for _ in range(30):
        layers = [layers, layers]
    loop: list[Any] = []
    loop.append(loop)
    records = [{"text_list": ["a"], "image_info": [], "extra": extra} for extra in (layers, "fine")]
    report = convert_pickles(shard(tmp_path / "d.pkl", records), tmp_path / "out", allow=True)
    assert report.records == 1 and sum(report.left_out.values()) == 1
    assert json.loads((tmp_path / "out" / "d.jsonl").read_text())["extra"] == "fine"
    shard(tmp_path / "e.pkl", [{"text_list": ["a"], "image_info": [], "extra": loop}])
    assert convert_pickles(tmp_path / "e.pkl", tmp_path / "out", allow=True).records == 0


def test_nothing_happens_unasked_or_over_files(tmp_path: Path) -> None:
    """Pickles are read only with the switch, only in known layouts, and never over a file that is there."""
    path = shard(tmp_path / "a.pkl", [{"image": picture(0), "text": "a"}])
    with pytest.raises(ValueError, match="--allow-pickle"):
        convert_pickles(path, tmp_path / "out", allow=False)
    convert_pickles(path, tmp_path / "out", allow=True)
    with pytest.raises(ValueError, match="is there already"):
        convert_pickles(path, tmp_path / "out", allow=True)
    with pytest.raises(ValueError, match="no known layout; .* fields a, b"):
        convert_pickles(shard(tmp_path / "x.pkl", [{"a": 1, "b": 2}]), tmp_path / "out", allow=True)
    with pytest.raises(ValueError, match="holds a dict"):
        convert_pickles(shard(tmp_path / "y.pkl", {"a": 1}), tmp_path / "out", allow=True)  # type: ignore[arg-type]
    (tmp_path / "z.txt").write_text("x")
    with pytest.raises(ValueError, match="no .pkl file"):
        convert_pickles(tmp_path / "z.txt", tmp_path / "out", allow=True)


@pytest.fixture
def options(tmp_path: Path) -> ReadOptions:
    """Options with an index folder of the test's own."""
    return ReadOptions(num_frames=2, cache=tmp_path / "indices")
