"""Data files that no run can use: a name, how the file is made, and a part of the English complaint.

A body is bytes, or a function that makes the file at a path. Single bad rows are in rows.py.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, Callable, Union

GOOD = '{"text": "好"}'
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
Body = Union[bytes, Callable[[Path], None]]
Case = tuple[str, Body, str]


def rows(*values: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def long_line(opening: str, megabytes: int = 20) -> Callable[[Path], None]:
    """One line that never ends."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(opening.encode())
            for _ in range(megabytes):
                file.write(b"word " * 200_000)

    return make


def parquet(**columns: list) -> Callable[[Path], None]:
    """A real Parquet file of these columns."""

    def make(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return make


def truncated_parquet(path: Path) -> None:
    """The first half of a real one."""
    parquet(text=["a"] * 999)(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def loop(path: Path) -> None:
    """A link that leads to itself."""
    path.symlink_to(path.name)


BROKEN: list[Case] = [  # nothing in the file can be read, or nothing after the place that is named
    ("a.json", f'[{GOOD},\n{GOOD},\n{{"text": "x" "y"}}]'.encode(), "a.json:3: broken JSON"),
    ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]".encode(), "a.json:3: broken JSON"),
    ("a.json", f"[{GOOD},\n{GOOD},\n]".encode(), "comma after the last"),
    ("a.json", f"[{GOOD},\n{GOOD}".encode(), "a.json:2"),
    ("a.json", f"[\n{GOOD}\n]\n]".encode(), "a.json:4: broken JSON"),
    ("a.jsonl", f"[\n{GOOD},\n{GOOD}".encode(), "a.jsonl:3"),
    ("a.json", b'{"data": [\n{"text": "a"}\n], 3}', "a.json:3: broken JSON"),
    ("a.json", b'{"data":\n' + b"[" * 99_999, "a.json:2"),
    ("a.json", b"[{'text': 'a'}]", "double quotes"),
    ("a.json", b'[{"text": "a"}, // done\n]', "broken JSON"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', "broken JSON"),
    ("a.json", b"[" * 200_000, "breaks off"),
    ("a.json", b'{"text": "a"', "breaks off"),
    ("a.json", b"]", "broken JSON"),
    ("a.csv", b"text,text\na,b\n", "a.csv:1: the header names a column twice"),
    ("a.csv", b'"text\na\n', "a.csv:1-2: CSV quotes do not match"),
    ("a.csv", b"question_zh,answer_zh\n" + b"1,2\n" * 400, "a.csv:1: no known shape of row: its keys are"),
    ("a.csv", b"\n\nfoo;bar\n1;2\n", "a.csv:3: no known shape of row: its keys are 'foo', 'bar'"),
    ("a.tsv", b"prompt\tanswer\n1\t2\n", "a.tsv:1: no known shape"),
    ("a.csv", b"instruction\nwhat\n", "a.csv:1: no known shape"),
    ("a.csv", b"hello\nhow are you\n", "a.csv:1: no known shape"),
    ("a.csv", b"\x1b[2J,x\n1,2\n", "\\x1b[2J"),
    ("a.parquet", b"PAR1 this is not one PAR1", "not a readable Parquet file"),
    ("a.parquet", b"\0" * 64, "not a readable Parquet file"),
    ("a.parquet", truncated_parquet, "not a readable Parquet file"),
    ("a.parquet", parquet(a=["x"] * 300, b=["y"] * 300), "a.parquet: no known shape of row: its keys are 'a', 'b'"),
    ("a.parquet", rows(CHAT), "not a readable Parquet file"),
    ("a.jsonl", b"", "the file is empty"),
    ("a.csv", b"", "the file is empty"),
    ("a.parquet", b"", "the file is empty"),
    ("a.xlsx", b"PK\3\4", "save a spreadsheet as CSV"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode()), "unpack"),
    ("a.zip", b"PK\5\6" + b"\0" * 18, "unpack"),
    ("a.png", b"\x89PNG", "unknown kind of file '.png'"),
    ("a.txt", b"hello", "unknown kind of file '.txt'"),
    ("a.pkl", b"\x80\4.", "unknown kind of file '.pkl'"),
    ("a.jsonl.bak", rows(CHAT), "unknown kind of file '.bak'"),
    ("a.jsonl", GOOD.encode() + b'\n{"text": "\xff\xff"}', "a.jsonl:2: byte 26 "),
    ("a.jsonl", GOOD.encode() + b'\n{"text": "\xed\xa0\x80"}', "a.jsonl:2: byte"),  # a surrogate, spelt as bytes
    ("a.jsonl", rows({"text": "好"}) + '{"text": "你好"}\xa0\n'.encode("gb18030") + b"\xff", "byte"),
    ("a.jsonl", "{}\n".encode("utf-16-le"), "without a BOM"),
    ("a.jsonl", "{}\n".encode("utf-32-be"), "without a BOM"),
    ("a.jsonl", "{}\n".encode("utf-16") + b"\n", "which the BOM promises"),
    ("a.jsonl", b"\xef\xbb\xbf\xff", "which the BOM promises"),
    ("a.jsonl", b"\0" * 4096, "is no text"),
    ("no/such.jsonl", lambda path: None, "no such data file"),
    ("folder.jsonl", Path.mkdir, "this is a folder"),
    ("loop.jsonl", loop, "loop.jsonl"),
    ("dangling.jsonl", lambda path: path.symlink_to("nowhere"), "no such data file"),
    ("n" * 300 + ".jsonl", lambda path: None, "name too long"),
    ("new\nline \x1b[31m.jsonl", lambda path: None, "new\\nline \\x1b[31m.jsonl: no such data file"),
]
if hasattr(os, "mkfifo"):
    BROKEN.append(("pipe.jsonl", os.mkfifo, "not a file with content"))

UNUSABLE: list[Case] = [  # it reads, but not one row can be used
    ("a.jsonl", b"\n \n\t\n", "holds no rows"),
    ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    ("a.json", b"[]", "holds no rows"),
    ("a.json", b'{"data": []}', "holds no rows"),
    ("a.csv", b"text\n", "holds no rows"),
    ("a.csv", b"text,n\n\n,\n", "holds no rows"),
    ("a.parquet", parquet(text=[]), "holds no rows"),
    ("a.parquet", parquet(text=[None, None]), "a.parquet:row 0: content is not text: text: null"),
    ("a.parquet", parquet(text=[1, 2]), "a.parquet:row 0: content is not text: text: a number"),
    ("a.parquet", parquet(text=[b"x"]), "a.parquet:row 0: content is not text"),
    ("a.parquet", parquet(messages=[["a", "b"]]), "a message is not an object"),
    ("a.json", b"null", "a.json:1: the row is not an object: null"),
    ("a.json", b"3", "a.json:1: the row is not an object: a number"),
    ("a.json", b'"text"', "the row is not an object: text"),
    ("a.json", b"{}", "its keys are (none)"),
    ("a.json", b'{"data": {"text": "a"}}', "its keys are 'data'"),
    ("a.json", b"[[[[[]]]]]", "the row is not an object: a list"),
    ("a.json", b"[[1, 2], [3]]", "the row is not an object: a list"),
    ("a.json", b'[{"\xf0\x9f\x98\x80": 1}]', "its keys are '😀'"),
    ("a.jsonl", b"<!DOCTYPE html>\n<html></html>\n", "a.jsonl:1: broken JSON"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a.jsonl:1: broken JSON"),
    ("a.jsonl", b"- role: user\n  content: hi\n", "a.jsonl:1: broken JSON"),
    ("a.jsonl", b"question,answer\n1,2\n", "a.jsonl:1: broken JSON"),
    ("a.jsonl", "问：你好\n答：你好\n".encode("gbk"), "a.jsonl:1: broken JSON"),
    ("a.jsonl", "caf\xe9\n".encode("latin-1"), "a.jsonl:1: byte 3 fits neither"),
    ("a.jsonl", b'{"text": "\\ud83d\\ude00 \\udc00"}\n', "a.jsonl:1: content holds a broken character"),
    ("a.jsonl", b'{"text": "a\0b"}\n', "a.jsonl:1: content holds a broken character"),
    ("a.jsonl", rows({"Messages": CHAT["messages"]}), "its keys are 'Messages'"),
    ("a.jsonl", rows({"chosen": CHAT["messages"], "rejected": CHAT["messages"]}), "no known shape"),
    ("a.jsonl", rows({"mess\x1b]0;owned\x07ages": 1}), "\\x1b]0;owned\\x07"),
    ("a.jsonl", rows({"messages": [{"role": "\x1b[2Jroot\r", "content": "x"}]}), "\\x1b[2Jroot\\r"),
    ("a.csv", b"text,n\na\nb\n", "a.csv:2: wrong number of fields: 1, but the header has 2"),
    ("a.csv", b'text,n\n"a" b,1\n', "a.csv:2: CSV quotes do not match"),
    ("a.csv", b"text\n \n\t\n", "a.csv:2: content is empty"),
    ("a.csv", b'messages\n"[{""role"": ""user""}]"\n', "a.csv:2: content is not text"),
    ("a.csv", b"messages\nhello\n", "a.csv:2: broken JSON inside a column"),
    ("a.csv", b"text,n\n" + b'"a\n","b"\n' * 2 + b"x,y,z\n" * 2, "a.csv:6: wrong number"),
    ("long.jsonl", long_line('{"text": "'), "long.jsonl:1: a row of more than 8,000,000 characters"),
    ("long.jsonl", long_line("[" * 9), "long.jsonl"),
    ("long.jsonl", long_line('{"text": {'), "long.jsonl"),
    ("long.csv", long_line("text\n"), "long.csv:2: a row of more than 8,000,000 characters"),
    ("long.csv", long_line('text\n"'), "long.csv:2: a row of more than 8,000,000 characters"),
    ("long.tsv", long_line("text\n"), "long.tsv:2: a row of more than 8,000,000 characters"),
    ("long.json", ('[{"text": "' + "word " * 4_000_000 + '"}]').encode(), "long.json:1: a row of more than 8,000,000"),
    ("deep.jsonl", b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON nested too deep"),
]
