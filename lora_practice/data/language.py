"""Whether a base model's tokenizer knows the script that a data set answers in: Chinese, Japanese and Korean.

A byte-level BPE has one token for a common character of a language that it was built from. Of any other character it
has only the bytes, three of them in UTF-8, and pairs of bytes that happen to be common. So the tokens that one
character takes tell how much of the language stood in the tokenizer's corpus, and usually in the model's. Measured:
the embedded SmolLM2 takes 1.8 to 2.0 tokens for a Chinese character, 1.9 for a Japanese and 2.1 for a Korean one;
tokenizers built with Chinese take fewer than one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lora_practice.console.text import text
from lora_practice.data.chat_template import token_ids_of
from lora_practice.data.conversations import Conversation

# kana, Han (with extension A and the compatibility block), Hangul syllables
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
SAMPLED_ANSWERS, SAMPLED_CHARACTERS = 2000, 200  # answers looked at, and characters of each
LEAST_SHARE = 0.1  # CJK characters among all of the answers
MOST_TOKENS_PER_CHARACTER = 1.5  # of CJK; above it most characters have no token of their own


class AnswerLanguage:
    """Samples the answers of conversations that stream through `watch`; `warning` judges them afterwards."""

    def __init__(self) -> None:
        self.rows = self.characters = 0
        self.cjk: list[str] = []

    def watch(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """Yield the same conversations; the first SAMPLED_ANSWERS are sampled."""
        for conversation in conversations:
            if self.rows < SAMPLED_ANSWERS:
                self._sample(conversation)
            yield conversation

    def _sample(self, conversation: Conversation) -> None:
        answers = "".join(turn["content"] for turn in conversation.messages if turn["role"] == "assistant")
        sample = (conversation.raw_text or answers)[:SAMPLED_CHARACTERS]
        self.rows += 1
        self.characters += sum(not one.isspace() for one in sample)
        self.cjk += _CJK.findall(sample)

    def warning(self, tokenizer: Any) -> str:
        """One line where many answers are in a script that the tokenizer hardly knows; "" otherwise."""
        found = sum(map(len, self.cjk))
        if not found or found < LEAST_SHARE * self.characters:
            return ""
        tokens = sum(map(len, token_ids_of(tokenizer, self.cjk)))
        if tokens <= MOST_TOKENS_PER_CHARACTER * found:
            return ""
        share, each = found / self.characters, tokens / found
        other_base = "--model_name Qwen/Qwen2.5-0.5B"
        return text(
            f"注意：回答里 {share:.0%} 是中日韩文字，而这个底座的分词器平均每个字要用 {each:.1f} 个 token，说明它的"
            f"预训练语料里很少有这种文字：训练慢，也很难学好。建议换一个懂这种语言的底座，如 {other_base}",
            f"note: {share:.0%} of the answers is Chinese, Japanese or Korean, but this base's tokenizer takes "
            f"{each:.1f} tokens for a character: there was little of it in its pretraining, so training is slow and "
            f"teaches little. Choose a base that knows the language, such as {other_base}",
        )
