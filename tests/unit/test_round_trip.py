"""Promise: any valid data, in any shape, format and encoding, reads back equal, with the right origins."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_practice.data.conversations import Conversation, read_file

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "gb18030"]
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda words: not words.isspace()
)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
DATA = st.lists(PAIRS, min_size=1, max_size=5)


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": words} for pair in pairs for role, words in zip(("user", "assistant"), pair)]


def row_of(pairs: list[tuple[str, str]], shape: str) -> dict[str, Any]:
    if shape == "messages":
        return {"messages": turns(pairs)}
    if shape == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in turns(pairs)]}
    ask, answer = {"alpaca": ("instruction", "output"), "prompt": ("prompt", "completion")}[shape]
    history = [list(pair) for pair in pairs[:-1]]
    return {ask: pairs[-1][0], answer: pairs[-1][1], "history": history}


def spell(rows: list[dict], kind: str, ascii_only: bool) -> tuple[str, list[int]]:
    """The file's text and the line where each row starts, counted without the reader's help."""
    body, lines = "[\n" if kind in ("list", "data") else "", []
    body = '{"note": "行",\n "data": ' + body if kind == "data" else body
    for row in rows:
        lines.append(body.count("\n") + 1)
        spelled = json.dumps(row, ensure_ascii=ascii_only, indent=None if kind == "lines" else 1)
        body += spelled + ("\n\n" if kind == "lines" else "\n," if row is not rows[-1] else "")
    return body + {"lines": "", "list": "]", "data": "]}"}[kind], lines


@settings(max_examples=150, deadline=None)
@given(
    data=DATA,
    shape=st.sampled_from(["messages", "conversations", "alpaca", "prompt"]),
    kind=st.sampled_from(["lines", "list", "data"]),
    suffix=st.sampled_from([".jsonl", ".ndjson", ".json"]),
    encoding=st.sampled_from(ENCODINGS),
    ascii_only=st.booleans(),
)
def test_json_of_any_kind_and_encoding_reads_back_the_same(
    data: list, shape: str, kind: str, suffix: str, encoding: str, ascii_only: bool
) -> None:
    rows = [row_of(pairs, shape) for pairs in data]
    body, lines = spell(rows, kind, ascii_only)
    if kind == "data" and suffix != ".json":
        suffix = ".json"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"数据{suffix}"
        path.write_bytes(body.encode(encoding))
        opened = read_file(path)
        assert opened.encoding in (encoding, "utf-8")
        # GB18030 bytes can by chance be valid UTF-8; such a file has no one true reading
        if opened.encoding == encoding or body.isascii():
            outcomes = list(opened)
            assert [one.origin for one in outcomes] == [f"数据{suffix}:{line}" for line in lines]
            assert [one.as_dicts() for one in outcomes if isinstance(one, Conversation)] == [turns(p) for p in data]


@settings(max_examples=80, deadline=None)
@given(data=DATA, encoding=st.sampled_from(ENCODINGS[:3]), mark=st.sampled_from(",;\t"))
def test_a_table_reads_back_the_same_with_the_line_where_each_row_starts(data: list, encoding: str, mark: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=mark, quoting=csv.QUOTE_ALL)
    writer.writerow(["instruction", "output", "history"])
    lines = []
    for pairs in data:
        lines.append(len(io.StringIO(out.getvalue(), newline="").readlines()) + 1)
        row = row_of(pairs, "alpaca")
        writer.writerow([row["instruction"], row["output"], json.dumps(row["history"])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("t.tsv" if mark == "\t" else "t.csv")
        path.write_bytes(out.getvalue().encode(encoding))
        outcomes = list(read_file(path))
    assert [one.origin for one in outcomes] == [f"{path.name}:{line}" for line in lines]
    assert [one.as_dicts() for one in outcomes if isinstance(one, Conversation)] == [turns(p) for p in data]


@settings(max_examples=20, deadline=None)
@given(data=DATA, shape=st.sampled_from(["messages", "conversations", "alpaca"]))
def test_parquet_reads_back_the_same_and_counts_rows_from_zero(data: list, shape: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([row_of(p, shape) for p in data]), path, row_group_size=2)
        outcomes = list(read_file(path))
    assert [one.origin for one in outcomes] == [f"p.parquet:row {number}" for number in range(len(data))]
    assert [one.as_dicts() for one in outcomes if isinstance(one, Conversation)] == [turns(p) for p in data]
