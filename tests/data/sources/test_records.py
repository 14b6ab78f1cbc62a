"""Records of large JSON files are reached by seeking, whatever the layout of the file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.data.sources.records import Records, peek
from vilau.data.sources.source import BadSample

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"]}', "{[", ","]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_any_json_list_is_cut_at_its_records(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]], indent: int | None, ascii_only: bool
) -> None:
    """Quotes, brackets and commas within texts, and any layout, do not mislead the search for borders."""
    folder = tmp_path_factory.mktemp("list")
    dumped = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    (folder / "a.json").write_text(dumped, encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        read = Records(str(folder / name))
        assert [read.read(index) for index in range(len(read))] == records


def test_lines_may_be_blank_marked_or_ended_as_on_windows(tmp_path: Path) -> None:
    """Byte order mark, CRLF, blank lines and a missing last line end are everyday life."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\r\n \n{"n": 1}\n\n{}\n{"n": 3}')
    read = Records(str(tmp_path / "a.jsonl"))
    assert [read.read(index) for index in range(len(read))] == [{"n": 0}, {"n": 1}, {}, {"n": 3}]


def test_lines_of_blanks_are_no_records(tmp_path: Path) -> None:
    """However many blanks a line has; one that begins with some is a record all the same."""
    (tmp_path / "a.jsonl").write_bytes(b'      \n{"n": 0}\n    \t  \r\n  {"n": 1}\n\r\n   ')
    read = Records(str(tmp_path / "a.jsonl"))
    assert [read.read(index) for index in range(len(read))] == [{"n": 0}, {"n": 1}]


def test_what_is_no_mapping_in_a_list_is_a_bad_sample(tmp_path: Path) -> None:
    """Numbers, texts, null and lists count, so that nothing of a file is left out silently."""
    listed: list[object] = [None, {"n": 1}, 2.5, "a, [b", {"n": 4}, True, [6], -7, {}, "", 1]
    for layout in ({}, {"indent": 1}, {"separators": (",", ":")}):
        path = tmp_path / f"{len(layout)}{layout.get('indent')}.json"
        path.write_text(json.dumps(listed, **layout))  # type: ignore[arg-type]
        read = Records(str(path))
        assert len(read) == len(listed)
        for index, expected in enumerate(listed):
            if isinstance(expected, dict):
                assert read.read(index) == expected
                continue
            with pytest.raises(BadSample, match=f"record {index}: a .*, not a mapping") as caught:
                read.read(index)
            assert caught.value.kind == "bad_record"
    (tmp_path / "torn.json").write_text('[{"n": 0} nul, {"n": 1}]')
    with pytest.raises(BadSample, match="record 1: not valid JSON"):
        Records(str(tmp_path / "torn.json")).read(1)


def test_a_broken_line_is_one_bad_sample(tmp_path: Path) -> None:
    """One line that is no JSON, or no mapping, costs one sample, with its place in the message."""
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": \n[1, 2]\n{"n": 3}\n')
    read = Records(str(tmp_path / "a.jsonl"))
    assert len(read) == 4 and read.read(3) == {"n": 3}
    for index, kind in ((1, "bad_json"), (2, "bad_record")):
        with pytest.raises(BadSample, match=f"a.jsonl, record {index}") as caught:
            read.read(index)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"n": 0}, {"n": 1', "cut short"),
        ('[{"n": "0}, {"n": 1}]', "cut short"),
        ("[]", "not one record"),
        ("\n \n", "not one record"),
        ("", "not one record"),
        ("PK\x03\x04 a zip file", "unpack"),
        ("text", "neither a JSON list nor JSONL"),
    ],
)
def test_a_wrong_file_is_refused_when_opened(tmp_path: Path, content: str, said: str) -> None:
    """A download cut short or a file of another kind must not look like a small data set."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        Records(str(tmp_path / "a.json"))


def test_several_files_count_through_and_survive_pickling(tmp_path: Path) -> None:
    """A folder's files are one list; loader processes get copies that open files of their own."""
    (tmp_path / "b.json").write_text('[{"n": 2}, {"n": 3}]')
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": 1}\n')
    (tmp_path / "readme.md").write_text("no records")
    for read in (Records(str(tmp_path)), pickle.loads(pickle.dumps(Records(str(tmp_path))))):
        assert [read.read(index)["n"] for index in range(4)] == [0, 1, 2, 3]
        assert [read.path(index).name for index in (1, 2)] == ["a.jsonl", "b.json"]
        assert read.where(3) == "b.json, record 1"
    with pytest.raises(IndexError, match="record 4"):
        read.read(4)


def test_an_index_is_written_once_and_never_outlives_its_file(tmp_path: Path) -> None:
    """The second opening reads the index alone; a file that changed is read anew."""
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"n": 0}\n')
    assert len(Records(str(path), cache)) == 1 and len(list(cache.iterdir())) == 1
    path.write_text('{"n": 0}\n{"n": 1}\n')
    assert len(Records(str(path), cache)) == 2


def test_peeking_reads_the_first_records_only(tmp_path: Path) -> None:
    """Formats are told apart by a few records, even of a file whose end is broken."""
    (tmp_path / "a.json").write_text("[" + '{"n": 0}, ' * 40 + '{"n"')
    assert len(list(peek(tmp_path / "a.json"))) == 16
    (tmp_path / "b.jsonl").write_text('{"n": 0}\n{"n"')
    assert list(peek(tmp_path / "b.jsonl")) == [{"n": 0}]
    assert list(peek(tmp_path / "missing.json")) == []
