"""The good rows of a data set, as many as are wanted, and a tally of the bad ones: never a silent drop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import Conversation, Outcome

SHOWN = 5  # bad rows shown in full, and remembered per cause


@dataclass(frozen=True)
class Tally:
    """What `collect` saw: rows kept, and bad rows by cause (in the user's language)."""

    good: int
    causes: dict[str, int]
    first: tuple[BadRow, ...]  # the first few bad rows, for show

    @property
    def bad(self) -> int:
        return sum(self.causes.values())

    def __str__(self) -> str:
        """One line such as "2 bad rows left out: broken JSON x2 (a.jsonl:3, a.jsonl:9)"; empty if none."""
        if not self.bad:
            return ""
        parts = []
        for cause, count in self.causes.items():
            origins = [bad.origin for bad in self.first if bad.cause == cause]
            more = "..." if count > len(origins) else ""
            parts.append(f"{cause} x{count}" + (f" ({', '.join(origins)}{more and ', ' + more})" if origins else ""))
        return text(f"跳过 {self.bad} 行坏数据：", f"{counted(self.bad, 'bad row')} left out: ") + "; ".join(parts)


class GoodRows:
    """Iterating yields the first `limit` good rows (all if None) and reads no further; `tally` says what was bad.

    `where` names the data set in errors.

    Raises:
        UserError: at the end, for bad rows and not `skip_bad_rows` (up to 5 are shown, all up to the end or the
            limit are counted), or for no good row at all.
    """

    def __init__(self, rows: Iterable[Outcome], limit: int | None, skip_bad_rows: bool, where: str = "") -> None:
        self.rows, self.limit, self.skip_bad_rows, self.where = rows, limit, skip_bad_rows, where
        self.tally = Tally(0, {}, ())

    def __iter__(self) -> Iterator[Conversation]:
        good = 0
        causes: dict[str, int] = {}
        first: list[BadRow] = []
        for row in self.rows:
            if isinstance(row, BadRow):
                # the first of each cause, so that Tally can place every cause
                if causes.get(row.cause, 0) < SHOWN:
                    first.append(row)
                causes[row.cause] = causes.get(row.cause, 0) + 1
                continue
            good += 1
            if self.skip_bad_rows or not causes:  # else nothing will be trained: only count on
                yield row
            if self.limit is not None and good >= self.limit:
                break
        self.tally = Tally(good, causes, tuple(first))
        if self.tally.bad and not (self.skip_bad_rows and good):
            raise _refusal(self.tally, self.where)
        if not good:
            raise UserError(
                text("数据里一行也没有", "the data set holds no rows"),
                self.where,
                text("换一个有数据的文件或数据集", "name a file or data set that holds rows"),
            )


def collect(
    rows: Iterable[Outcome], limit: int | None, skip_bad_rows: bool, where: str = ""
) -> tuple[list[Conversation], Tally]:
    """All of `GoodRows` in a list, and its tally."""
    good = GoodRows(rows, limit, skip_bad_rows, where)
    return list(good), good.tally


def _refusal(tally: Tally, where: str) -> UserError:
    shown = [str(bad) for bad in tally.first[:SHOWN]]
    more = tally.bad - len(shown)
    if more:
        shown.append(text(f"……还有 {more} 行", f"... and {more} more"))
    total = tally.good + tally.bad
    return UserError(
        text(f"读了 {total} 行，坏了 {tally.bad} 行：", f"{counted(tally.bad, 'bad row')} among the {total} read:"),
        where,
        text("改好它们，或加 --skip_bad_rows 跳过", "mend them, or leave them out with --skip_bad_rows")
        if tally.good
        else text("一行能用的也没有：请改好它们", "not one row can be used: mend them (--skip_bad_rows cannot help)"),
        shown,
    )
