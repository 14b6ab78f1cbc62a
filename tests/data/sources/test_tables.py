"""Rows of CSV and TSV files are reached by seeking, as records of JSON files are."""

from __future__ import annotations

import csv
import io
import pickle
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vilau.data.sources.source import BadSample
from vilau.data.sources.strings import Strings
from vilau.data.sources.tables import Rows, open_table

CELLS = st.text(st.sampled_from('a",\t\n é'), max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), ending=st.sampled_from([".csv", ".tsv"]))
def test_any_table_is_cut_at_its_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ending: str
) -> None:
    """Quotes, separators and line breaks within cells do not mislead the search for borders."""
    path = tmp_path_factory.mktemp("table") / f"a{ending}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([("x", "y"), *rows])
    read = pickle.loads(pickle.dumps(open_table(str(path))))
    assert [tuple(read.read(index).values()) for index in range(len(read))] == rows


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from('ab"|\n\r'), max_size=24), ending=st.sampled_from([".csv", ".tsv"]))
@example('a 15" laptop|b\nc|d\n', ".tsv")
@example('"a""b" c"\n"\r\n"\r\nb', ".csv")
def test_rows_are_those_of_pythons_csv(tmp_path_factory: pytest.TempPathFactory, text: str, ending: str) -> None:
    """A stray quote is text and swallows nothing: any file in which quoted fields close has the rows that csv reads."""
    delimiter = "\t" if ending == ".tsv" else ","
    text = text.replace("|", delimiter)

    def rows_of(words: str) -> int:
        return sum(bool(row) for row in csv.reader(io.StringIO(words, newline=""), delimiter=delimiter))

    assume(rows_of(text) and rows_of(text + "\nlast") == rows_of(text) + 1)  # quoted fields close
    path = tmp_path_factory.mktemp("table") / f"a{ending}"
    path.write_bytes(b"x\n" + text.encode())
    assert len(Rows(str(path))) == rows_of(text)


def test_a_quote_that_never_closes_costs_one_row(tmp_path: Path) -> None:
    """The rest of the file is read, and the row is a bad sample that says why."""
    (tmp_path / "a.tsv").write_text('name\ttext\na\tone\n15" b\t"two\nc\tthree\nd\tfour\n')
    read = Rows(str(tmp_path / "a.tsv"))
    assert [read.read(index)["text"] for index in (0, 2, 3)] == ["one", "three", "four"] and len(read) == 4
    with pytest.raises(BadSample, match="a.tsv, record 1: a quoted field never closes"):
        read.read(1)
    (tmp_path / "b.csv").write_text('name,"text\na,b\n')
    with pytest.raises(ValueError, match="b.csv: a quoted name in its first line never closes"):
        Rows(str(tmp_path / "b.csv"))


def test_files_of_several_columns_count_through(tmp_path: Path) -> None:
    """Every file names its own columns; a row of another length is one bad sample."""
    (tmp_path / "a.csv").write_text("n,m\n1,2\n\n3\n")
    (tmp_path / "b.tsv").write_text("n\n4\n")
    read = Rows(str(tmp_path))
    assert (len(read), read.columns(1), read.read(2), read.where(2)) == (3, ["n"], {"n": "4"}, "b.tsv, record 0")
    with pytest.raises(BadSample, match="a.csv, record 1: 1 values for 2 columns"):
        read.read(1)


def test_strings_keep_names_of_any_bytes() -> None:
    """File names that are no UTF-8 come back as they were; numbers out of range are errors."""
    names = Strings(["", "é", "bad\udcff"])
    assert [names[index] for index in range(len(names))] == ["", "é", "bad\udcff"]
    with pytest.raises(IndexError, match="string 3"):
        _ = names[3]
