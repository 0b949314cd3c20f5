"""The good rows of a data set, up to a limit, with a count of the bad ones: none is dropped silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import Conversation, Outcome

SHOWN = 5  # bad rows shown in full, and remembered for each cause


@dataclass(frozen=True)
class Tally:
    """Counts of the rows that were read: good ones, and bad ones by cause (in the user's language)."""

    good: int
    causes: dict[str, int]
    first: tuple[BadRow, ...]  # the first bad rows of each cause, to be shown

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
            shown = text("、", ", ").join([*origins, *(["..."] if count > len(origins) else [])])
            parts.append(f"{cause} x{count}" + (text(f"（{shown}）", f" ({shown})") if origins else ""))
        return text(f"跳过 {self.bad} 行坏数据：", f"{counted(self.bad, 'bad row')} left out: ") + text(
            "；", "; "
        ).join(parts)


class GoodRows:
    """An iterable of the first `limit` good rows (all if None); `tally` has the counts once it is exhausted.

    `where` names the data set in errors.

    Raises:
        UserError: at the end of the iteration, if there were bad rows and `skip_bad_rows` is False (up to 5 are shown,
            all up to the end or the limit are counted), or if there was no good row at all.
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
                # a few of each cause, so that Tally can give an origin for every cause
                if causes.get(row.cause, 0) < SHOWN:
                    first.append(row)
                causes[row.cause] = causes.get(row.cause, 0) + 1
                continue
            good += 1
            if self.skip_bad_rows or not causes:  # otherwise the run will be refused: only count the rest
                yield row
            if self.limit is not None and good >= self.limit:
                break
        self.tally = Tally(good, causes, tuple(first))
        if self.tally.bad and not (self.skip_bad_rows and good):
            raise _refusal(self.tally, self.where)
        if not good:
            raise UserError(
                text("数据是空的，一行也没有", "the data set holds no rows"),
                self.where,
                text("换一个有数据的文件或数据集", "name a file or data set that holds rows"),
            )


def collect(
    rows: Iterable[Outcome], limit: int | None, skip_bad_rows: bool, where: str = ""
) -> tuple[list[Conversation], Tally]:
    """The rows of `GoodRows` as a list, and its tally."""
    good = GoodRows(rows, limit, skip_bad_rows, where)
    return list(good), good.tally


def _refusal(tally: Tally, where: str) -> UserError:
    shown = [str(bad) for bad in tally.first[:SHOWN]]
    more = tally.bad - len(shown)
    if more:
        shown.append(text(f"……还有 {more} 行", f"... and {more} more"))
    total = tally.good + tally.bad
    return UserError(
        text(f"读到 {total} 行，其中坏行 {tally.bad} 行：", f"{counted(tally.bad, 'bad row')} among the {total} read:"),
        where,
        text("改好这些行，或加 --skip_bad_rows 跳过", "mend these rows, or leave them out with --skip_bad_rows")
        if tally.good
        else text("没有一行可用：先改好这些行", "not one row can be used: mend these (--skip_bad_rows cannot help)"),
        shown,
    )
