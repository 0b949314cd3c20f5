"""Chinese answers on a base that hardly knows Chinese are pointed out; known scripts and few characters are not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_practice.data.conversations import Conversation, from_row
from lora_practice.data.held_out import RecordedDataSettings
from lora_practice.data.language import SAMPLED_ANSWERS, AnswerLanguage
from lora_practice.data.prepare import prepare
from lora_practice.sources.find import Source

CHINESE = "请先检查电源和网线，然后重新启动打印机，再在电脑上重新添加它。"
ENGLISH = "Please check the power and the cable first, then restart the printer and add it again."


def tokenizer_built_from(*texts: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as SmolLM2's and Qwen's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def english() -> PreTrainedTokenizerFast:
    return tokenizer_built_from(*[ENGLISH] * 9)


def warning(tokenizer: PreTrainedTokenizerFast, answers: Iterable[str], question: str = "Hi") -> str:
    watched = AnswerLanguage()
    rows = [from_row({"prompt": question, "completion": answer}, "a:1") for answer in answers]
    assert list(watched.watch(rows)) == rows
    return watched.warning(tokenizer)


def test_chinese_answers_on_an_english_base(english: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    told = warning(english, [CHINESE] * 5)
    assert told.startswith("note: 90% of the answers is Chinese") and "takes 3.0 tokens" in told
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    assert "90% 是中日韩文字" in warning(english, [CHINESE] * 5)
    assert warning(english, ["プリンターを再起動してください"]) and warning(english, ["프린터를 다시 시작하십시오"])


def test_a_tokenizer_that_knows_the_characters_is_fine() -> None:
    assert warning(tokenizer_built_from(*[CHINESE] * 9, *[ENGLISH] * 9), [CHINESE] * 5) == ""


def test_only_the_answers_count_and_few_characters_do_not(english: PreTrainedTokenizerFast) -> None:
    assert warning(english, [ENGLISH] * 5, question=CHINESE) == ""
    assert warning(english, [ENGLISH] * 9 + [CHINESE]) == ""
    assert warning(english, [ENGLISH] * 2 + [CHINESE]) != ""
    assert warning(english, ["Résumé, Straße, Привет, مرحبا 🙂"]) == "" == warning(english, [])


def test_plain_text_counts_and_a_long_file_is_sampled(english: PreTrainedTokenizerFast) -> None:
    rows = [Conversation((), "a:1", CHINESE)] * (SAMPLED_ANSWERS + 5)
    watched = AnswerLanguage()
    assert len(list(watched.watch(rows))) == len(rows)
    assert watched.warning(english) and watched.rows == SAMPLED_ANSWERS


def test_a_run_says_so_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = RecordedDataSettings(0, 0, 42, 512, True, False)
    for answer, words in ((CHINESE, "is Chinese, Japanese or Korean"), ("I am fine", "")):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"prompt": "hello", "completion": answer}) + "\n", "utf-8")
        prepare(Source("file", "rows.jsonl", file), None, make_tokenizer(), settings)
        told = capsys.readouterr().err
        assert words in told and bool(words) == bool(told)
