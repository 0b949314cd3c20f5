"""A source of data -> the training examples of one run; what was left out on the way is said once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

from tqdm import tqdm

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.data import conversations
from lora_practice.data.conversations import Conversation
from lora_practice.data.examples import Examples
from lora_practice.data.good_rows import GoodRows
from lora_practice.data.language import AnswerLanguage
from lora_practice.data.row_view import preview
from lora_practice.data.tokenization import Encoder
from lora_practice.sources import embedded
from lora_practice.sources.find import Source, load_hub_rows


class DataSettings(Protocol):
    """The settings that decide the training set, as in TrainSettings."""

    @property
    def train_subset_size(self) -> int: ...
    @property
    def eval_subset_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def assistant_only_loss(self) -> bool: ...
    @property
    def skip_bad_rows(self) -> bool: ...


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run: `train`, and `held_out` for measuring only. `facts` go into run_record.json.

    `held_out_conversations` are what `held_out` was made from.
    """

    train: Examples
    held_out: Examples
    facts: dict[str, Any] = field(default_factory=dict)
    held_out_conversations: Sequence[Conversation] = ()


def prepare(source: Source, config: Optional[str], tokenizer: Any, settings: DataSettings) -> PreparedData:
    """Read, check, hold out and tokenise the rows of `source`; `config` is a Hub data set's subset.

    Rows are streamed, so memory holds only their tokens, unless rows are held out: those are chosen among all, which
    keeps the conversations in memory too.

    Raises:
        UserError: the data cannot be read, has bad rows, is empty, or has nothing to train on.
    """
    limit = settings.train_subset_size + settings.eval_subset_size if settings.train_subset_size else None
    good_rows = GoodRows(_open(source, config), limit, settings.skip_bad_rows, source.name)
    kept, held_out = hold_out(good_rows, settings.eval_subset_size, settings.seed)
    encoder = Encoder(tokenizer, settings.max_length, settings.assistant_only_loss)
    language = AnswerLanguage()
    progress = tqdm(kept, text("读取数据", "reading the data"), delay=3, unit=text(" 行", " rows"), leave=False)
    train = Examples(encoder.encode(language.watch(progress)))
    if good_rows.tally.bad:
        tell(str(good_rows.tally))
    if source.kind == "embedded":
        tell(_embedded_counts(**embedded.conversation_counts()))
    for line in encoder.lost.lines(settings.max_length):
        tell(line)
    if not train:
        raise UserError(
            text("没有一行包含可训练的 token", "not one row has a token to train on"),
            where=source.name,
            fix=text(
                "加大 --max_length，或检查数据里有没有助手的回答",
                "raise --max_length, or look for answers in the data",
            ),
        )
    if warning := language.warning(tokenizer):
        tell(warning)
    held_out_encoder = Encoder(tokenizer, settings.max_length, settings.assistant_only_loss)
    held_out_examples = Examples(held_out_encoder.encode(held_out))
    for line in held_out_encoder.lost.lines(settings.max_length):
        tell(text("验证集：", "validation set: ") + line)
    facts = {
        "rows_read": good_rows.tally.good,
        "rows_trained": len(train),
        "rows_held_out": len(held_out_examples),
        "rows_lost": encoder.lost.counts,
        "bad_rows_skipped": good_rows.tally.causes,
        "first_row": preview(tokenizer, train[0]),
        "tokens": train.tokens,
        "trained_tokens": train.trained_tokens,
        "fingerprint": train.fingerprint(),
    }
    return PreparedData(train, held_out_examples, facts, held_out)


def _embedded_counts(usable: int, distinct: int, most_repeated: int) -> str:
    return text(
        f"内置对话：{usable} 段可用，去重后 {distinct} 段（重复最多的一段原有 {most_repeated} 份）",
        f"embedded conversations: {usable} usable, {distinct} distinct, each kept once (one stood there "
        f"{most_repeated} times)",
    )


def hold_out(rows: Iterable[Conversation], count: int, seed: int) -> tuple[Iterable[Conversation], list[Conversation]]:
    """(rows to train on, `count` held-out rows drawn at random); copies of held-out rows are in neither.

    Raises:
        UserError: no row would be left to train on.
    """
    if not count:
        return rows, []
    found = list(rows)
    drawn = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    held_out_contents = {found[i].content for i in drawn}
    kept = [row for row in found if row.content not in held_out_contents]
    if not kept:
        raise UserError(
            text(f"分出 {count} 行作验证集后，没有可训练的行了", "no row is left to train on"),
            where="--eval_subset_size",
            fix=text("改小一点", "make it smaller"),
        )
    copies = len(found) - len(kept) - len(drawn)
    if copies:
        zh, en = f"{copies} 行与验证集内容相同，不参加训练", "the same as validation rows and not trained on"
        tell(text(zh, f"{copies} rows are {en}" if copies > 1 else f"1 row is {en}"))
    return kept, [found[i] for i in sorted(drawn)]


def _open(source: Source, config: Optional[str]) -> Iterable[conversations.Outcome]:
    if source.kind == "hub":
        return conversations.read_dataset(load_hub_rows(source, config), source.name)
    assert source.path is not None
    reader = conversations.read_file(source.path)
    if reader.encoding not in ("", "utf-8"):
        name = {"gb18030": "GBK (gb18030)"}.get(reader.encoding, reader.encoding)
        tell(text(f"{source.name} 的编码是 {name}", f"{source.name} is encoded in {name}"))
    return reader
