"""Promises about files: what is broken is named by its line, and long files cost no memory."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_practice.console.errors import UserError
from lora_practice.data import encoding
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import Conversation, read_file
from lora_practice.data.good_rows import collect
from lora_practice.sources.find import DATA_SUFFIXES


@settings(max_examples=300, deadline=None)
@given(
    body=st.binary(max_size=200)
    | st.text("[]{}\",:\\ \n\rdata1'", max_size=60).map(str.encode)
    | st.binary(max_size=60).map(lambda tail: b'{"text": "a"}\n' + tail),
    suffix=st.sampled_from(DATA_SUFFIXES),
)
def test_arbitrary_bytes_raise_nothing_but_a_user_error(body: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(body)
        try:
            outcomes = list(read_file(path))
        except UserError as error:
            assert error.what and error.where and error.fix
        else:
            assert all(isinstance(one, (Conversation, BadRow)) for one in outcomes)


GOOD = '{"text": "好"}'
TABLES = [  # (text of the CSV, origins of all rows, a part of the English complaint about the bad one)
    ('text,n\n"a\nb",1\nc\nd,2\n', ["2", "4", "5"], "1, but the header has 2"),
    ("text,n\na,b,c\n", ["2"], "3, but the header has 2"),
    ('text\n"a" b\nc\n', ["2", "3"], "quotes do not match"),
    ('text,n\na,1\n"b,2\nc,3\n', ["2", "3-4"], "quotes do not match"),
    ("text,n\n" + "a" * 8_100_000 + ",1\nb,2\n", ["2", "3"], "more than 8,000,000"),
]


@pytest.mark.parametrize(("body", "lines", "part"), TABLES, ids=range(len(TABLES)))
def test_a_bad_table_row_is_named_by_its_lines(
    body: str, lines: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    (tmp_path / "t.csv").write_text(body, encoding="utf-8")
    outcomes = list(read_file(tmp_path / "t.csv"))
    assert [one.origin for one in outcomes] == [f"t.csv:{line}" for line in lines]
    assert [part in str(one) for one in outcomes if isinstance(one, BadRow)] == [True]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_the_first_bad_byte_is_found_across_the_seams_between_chunks(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "READ_BYTES", chunk)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    body = f"{GOOD}\n好👋\n".encode()
    (tmp_path / "a.jsonl").write_bytes(body)
    assert read_file(tmp_path / "a.jsonl").encoding == "utf-8"
    (tmp_path / "a.jsonl").write_bytes(body + "好".encode() + b"\xff\n")
    with pytest.raises(UserError) as caught:
        read_file(tmp_path / "a.jsonl")
    assert caught.value.where.endswith("a.jsonl:3") and f"byte {len(body) + 3} " in caught.value.what


def test_a_table_in_gbk_from_a_chinese_spreadsheet_is_read_exactly(tmp_path: Path) -> None:
    turns = '"[{""role"":""user"",""content"":""你好，世界""},{""role"":""assistant"",""content"":""嗯""}]"'
    (tmp_path / "表.csv").write_bytes(f"messages,备注\r\n{turns},无\r\n".encode("gbk"))
    opened = read_file(tmp_path / "表.csv")
    (only,) = opened
    assert isinstance(only, Conversation) and (opened.encoding, only.origin) == ("gb18030", "表.csv:2")
    assert [turn["content"] for turn in only.messages] == ["你好，世界", "嗯"]


KINDS = [  # (name, text, lines of the good rows, lines of the bad ones)
    ("a.json", f'{{"data": [\n{GOOD}\n]}}', [2], []),
    ("a.json", f'{{"data": [{GOOD}], "n": 1}}', [1], []),
    ("a.jsonl", f'{{"data": [{GOOD},\n{GOOD}]}}', [1, 2], []),
    ("a.json", f"{GOOD}\n{GOOD}", [1, 2], []),
    ("a.json", f'{{"text": oops}}\n{GOOD}', [2], [1]),
    ("a.json", '{\n"text":\n"a"}\n{\n"text": "b"}', [1, 4], []),
    ("a.jsonl", '{\n"text":\n"a"}\n\n{\n"text": "b"}', [1, 5], []),
    ("a.jsonl", f"[{GOOD}, {GOOD},\n\n{GOOD}]", [1, 1, 3], []),
    ("a.jsonl", f"[1]\n{GOOD}", [2], [1]),
    ("a.jsonl", f"[{GOOD}, 3]", [1], [1]),
    ("a.jsonl", f"\ufeff{GOOD}\r\n\r\n\ufeff{GOOD}\r\n", [1, 3], []),
    ("a.jsonl", '{"text": "a\u2028b\x85c\x0bd"}\n' + GOOD, [1, 2], []),
    ("a.jsonl", '{"text": "a", "text": "b", "n": NaN}\n' + GOOD, [1, 2], []),
    ("a.json", "[]", [], []),
    ("a.jsonl", "\n \n", [], []),
    ("a.csv", "text\n", [], []),
    ("a.csv", "text\n\na\r\n\r\nb", [3, 5], []),
    ("a.csv", "text,n\n,\na,\n,\n", [3], []),
]


@pytest.mark.parametrize(("name", "body", "good", "bad"), KINDS, ids=range(len(KINDS)))
def test_the_content_decides_between_json_lines_and_a_document(
    name: str, body: str, good: list[int], bad: list[int], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(body.encode())
    outcomes = list(read_file(tmp_path / name))
    assert [one.origin for one in outcomes if isinstance(one, Conversation)] == [f"{name}:{n}" for n in good]
    assert [one.origin for one in outcomes if isinstance(one, BadRow)] == [f"{name}:{n}" for n in bad]


def test_a_row_too_deep_or_too_long_does_not_hide_its_neighbours_in_a_json_list(tmp_path: Path) -> None:
    deep, long = '{"x": ' + "[" * 50_000 + '"]"' + "]" * 50_000 + "}", '{"text": "' + "a" * 8_100_000 + '"}'
    (tmp_path / "a.json").write_text(f"[{GOOD},\n{deep},\n{long},\n{GOOD}]", encoding="utf-8")
    outcomes = list(read_file(tmp_path / "a.json"))
    assert [one.origin for one in outcomes] == ["a.json:1", "a.json:2", "a.json:3", "a.json:4"]
    assert [isinstance(one, BadRow) for one in outcomes] == [False, True, True, False]


def test_a_parquet_cell_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "p.parquet")
    outcomes = list(read_file(tmp_path / "p.parquet"))
    assert [(one.origin, isinstance(one, BadRow)) for one in outcomes] == [
        ("p.parquet:row 0", False),
        ("p.parquet:row 1", True),
        ("p.parquet:row 2", False),
    ]


def test_memory_stays_flat_however_long_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text((GOOD + "\n") * 800_000, encoding="utf-8")
    tracemalloc.start()
    try:
        assert len(collect(read_file(path), 1000, skip_bad_rows=False)[0]) == 1000
        for _ in zip(range(20_000), read_file(path)):
            pass
        assert tracemalloc.get_traced_memory()[1] < 6 << 20  # bytes; the file alone holds 13 MB
    finally:
        tracemalloc.stop()
