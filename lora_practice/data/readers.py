"""Rows of a local data file, one at a time, each with its line or row number.

JSONL, JSON, CSV, TSV and Parquet, in UTF-8, UTF-16 or GB18030. A JSON document (one list) is held in memory; JSONL,
CSV and Parquet files are streamed, however long.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, TextIO

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.bad_row import BLANK, MAX_ROW, BadRow, Lines, Located, RowTooLong, too_long
from lora_practice.data.encoding import detect_encoding
from lora_practice.data.json_reader import json_rows
from lora_practice.sources.find import DATA_SUFFIXES, no_such_data_file


@dataclass(frozen=True)
class RowFile:
    """A checked data file. Iterating reads it from the start, lazily.

    Yields (origin, row) with origin "data.jsonl:41" (the line where the row starts, from 1) or
    "data.parquet:row 12" (from 0, as in dataset[12]), or a BadRow. The row may be any JSON value.
    `encoding` is Python's name of the text encoding; empty for Parquet. `check_columns` is called once with the column
    names of a table, and raises BadRow if no row of that table can be used.
    """

    path: Path
    encoding: str
    check_columns: Optional[Callable[[Sequence[str]], None]] = None

    def __iter__(self) -> Iterator[Located]:
        suffix = self.path.suffix.lower()
        try:
            if suffix == ".parquet":
                yield from self._parquet_rows()
                return
            table = suffix in (".csv", ".tsv")
            with open(self.path, encoding=self.encoding, newline="" if table else None) as handle:
                if table:
                    yield from self._table_rows(handle, tab=suffix == ".tsv")
                else:
                    yield from json_rows(self.path, handle)
        except (OSError, UnicodeDecodeError) as error:  # a disk was unplugged, or the file changed meanwhile
            raise UserError(
                text("读取中断：", "reading broke off: ") + str(error),
                str(self.path),
                text("检查磁盘和文件后重试", "check the disk and the file, then try again"),
            ) from error

    def _table_rows(self, handle: TextIO, tab: bool) -> Iterator[Located]:
        """Rows of a CSV or TSV with a header line; without a comma in the header, ';' or a tab is the delimiter."""
        head = next((line for line in iter(lambda: handle.readline(MAX_ROW), "") if line.strip(BLANK)), "")
        handle.seek(0)
        delimiter = "\t" if tab else next((mark for mark in ",;\t" if mark in head), ",")
        lines = Lines(handle)
        csv.field_size_limit(MAX_ROW)
        # strict: otherwise an unclosed quote would silently take in the rest of the file
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            start, lines.row_characters = lines.number + 1, 0
            origin = f"{self.path.name}:{start}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (RowTooLong, csv.Error) as error:
                bad = _bad_table_row(self.path.name, start, lines.number, error)
                if not header:
                    raise UserError(bad.reason, bad.origin, bad.fix) from error
                yield bad
                continue
            if not any(fields):  # a blank line, or the ",,," that spreadsheets leave at the end
                continue
            if not header:
                header = [field.strip(BLANK) for field in fields]
                self._check_header(header, origin)
            elif len(fields) != len(header):
                yield BadRow(
                    origin,
                    text("列数不对", "wrong number of fields"),
                    text(
                        "含逗号或换行的内容要用双引号括起来",
                        "put a field with a comma or line break in double quotes",
                    ),
                    text(
                        f"有 {len(fields)} 列，表头是 {len(header)} 列",
                        f"{len(fields)}, but the header has {len(header)}",
                    ),
                )
            else:
                yield origin, dict(zip(header, fields))

    def _check_header(self, header: list[str], origin: str) -> None:
        twice = sorted(column for column, count in Counter(header).items() if column and count > 1)
        if twice:
            named = ", ".join(repr(column[:30]) for column in twice[:8])
            raise UserError(
                text("表头里有重名的列：", "the header names a column twice: ") + named,
                origin,
                text("给每一列不同的名字", "give each column its own name"),
            )
        try:
            if self.check_columns:
                self.check_columns(header)
        except BadRow as bad:  # reported once, not for each row
            raise UserError(bad.reason, origin, bad.fix) from bad

    def _parquet_rows(self) -> Iterator[Located]:
        try:
            import pyarrow  # slow to import, and needed here only
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                text("读 Parquet 需要 pyarrow", "reading Parquet takes pyarrow"), str(self.path), "pip install pyarrow"
            ) from error

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as table:
                self._check_header(table.schema_arrow.names, self.path.name)
                for batch in table.iter_batches(batch_size=256):
                    for row in _batch_rows(batch):
                        origin = f"{self.path.name}:row {number}"
                        yield _undecodable(origin, row) if isinstance(row, Exception) else (origin, row)
                        number += 1
        except pyarrow.ArrowException as error:
            raise UserError(
                text("不是能读的 Parquet 文件：", "not a readable Parquet file: ") + str(error).split("\n")[0],
                str(self.path),
                text("重新下载或重新导出", "download it or write it again"),
            ) from error


def open_rows(path: str | Path, check_columns: Optional[Callable[[Sequence[str]], None]] = None) -> RowFile:
    """Check that `path` is a readable data file and detect its encoding (one pass over its bytes).

    Raises:
        UserError: it is missing, a folder, unreadable, empty, of an unknown kind, or in no known encoding.
    """
    path = Path(path).expanduser()
    accepted = ", ".join(DATA_SUFFIXES)
    try:
        if path.is_dir():
            raise UserError(
                text("这是文件夹，不是数据文件", "this is a folder, not a data file"),
                str(path),
                text(f"指定其中一个文件（{accepted}）", f"name one file inside it ({accepted})"),
            )
        if not path.exists():
            raise no_such_data_file(str(path))
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise UserError(
                text(f"不支持的文件类型 {path.suffix!r}", f"unknown kind of file {path.suffix!r}"),
                str(path),
                text(
                    f"可用的类型：{accepted}；表格请另存为 CSV，压缩包请先解压",
                    f"accepted: {accepted}; save a spreadsheet as CSV, unpack an archive first",
                ),
            )
        if not path.is_file():
            raise UserError(
                text("这不是普通文件", "this is not a file with content"),
                str(path),
                text("换一个有数据的文件", "name a file that holds rows"),
            )
        if path.stat().st_size == 0:
            raise UserError(
                text("文件是空的", "the file is empty"),
                str(path),
                text("换一个有数据的文件", "name a file that holds rows"),
            )
        with open(path, "rb") as handle:
            encoding = "" if path.suffix.lower() == ".parquet" else detect_encoding(handle, path)
            return RowFile(path, encoding, check_columns)
    except (OSError, ValueError) as error:
        raise UserError(
            text("打不开这个文件：", "cannot open this file: ") + str(getattr(error, "strerror", "") or error),
            str(path),
            text("检查路径和读取权限", "check the path and that you may read it"),
        ) from error


def _bad_table_row(name: str, start: int, end: int, error: Exception) -> BadRow:
    origin = f"{name}:{start}-{end}" if end > start else f"{name}:{start}"
    if isinstance(error, RowTooLong):
        return too_long(origin)
    if "NUL" in str(error):  # Python before 3.11
        return BadRow(
            origin,
            text("CSV 里有 NUL 字符", "the CSV holds a NUL character"),
            text("删掉 NUL 字符，或重新导出", "remove the NUL characters, or export it again"),
        )
    return BadRow(
        origin,
        text("CSV 的引号不成对", "CSV quotes do not match"),
        text('补上缺的双引号；内容里的双引号要写成 ""', 'close the double quote; inside a field write it as ""'),
        str(error),
    )


def _batch_rows(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; a row that cannot be decoded (text not in UTF-8) is replaced by the error."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [error]
    return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]


def _undecodable(origin: str, error: Exception) -> BadRow:
    return BadRow(
        origin,
        text("这一行无法解码", "this row cannot be decoded"),
        text("重新导出这个文件，文字用 UTF-8", "write the file again, with text as UTF-8"),
        str(error),
    )
