"""Turns the tokens of an answer into text as they are generated, one decoded piece at a time."""

from __future__ import annotations

from typing import Any, Callable

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
CHARACTER_TOKENS = 4  # a character is 4 bytes of UTF-8 at most, and a token at least one
WINDOW = 16  # tokens after which the window is moved on


class AnswerStreamer:
    """Calls `on_text` with each new piece of an answer; follows transformers' streamer protocol (`put`, `end`).

    Only a window of the last tokens is decoded at each new one, so a token costs the same however long the answer
    already is. A character whose bytes are spread over several tokens (Chinese, emoji) is held back until it is whole.
    The pieces joined are the decoded answer.
    """

    def __init__(self, tokenizer: Any, stop_ids: list[int], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.stop_ids, self.on_text = tokenizer, stop_ids, on_text
        self.ids: list[int] = []
        self._start = 0  # the window is ids[_start:]
        self._shown = 0  # characters of the window's text that `on_text` has received
        self._unfinished = 0  # tokens since the text last ended with a whole character
        self._prompt_passed = False

    def put(self, value: Any) -> None:
        """Receive a tensor of token ids from `generate`: the prompt at first, then the answer's tokens."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.flatten().tolist():
            self.add(token)

    def add(self, token: int) -> None:
        """Append one token of the answer; a stop token is ignored."""
        if token in self.stop_ids:
            return
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self._start :])
        self._show(text[: self._whole(text)])
        is_settled = not 0 < self._unfinished < CHARACTER_TOKENS
        if is_settled and len(self.ids) - self._start >= WINDOW:
            self._move_window(text)

    def end(self) -> None:
        """Show what was held back: nothing more comes."""
        self._show(self.tokenizer.decode(self.ids[self._start :]))

    def _whole(self, text: str) -> int:
        """Number of leading characters of `text` that later tokens cannot change."""
        if not text.endswith(UNFINISHED):
            self._unfinished = 0
            return len(text)
        self._unfinished += 1
        if self._unfinished < CHARACTER_TOKENS:
            return len(text.rstrip(UNFINISHED))
        return len(text) - 1  # bytes that are no character; only the last of them may begin one

    def _show(self, text: str) -> None:
        self.on_text(text[self._shown :])
        self._shown = max(self._shown, len(text))

    def _move_window(self, text: str) -> None:
        """Start the window at a later token, if the text from there on is the end of the window's `text`.

        At least CHARACTER_TOKENS tokens stay, so that a character begun by the last ones lies in the window as a whole.
        """
        last = len(self.ids) - CHARACTER_TOKENS
        for start in range(last, last - CHARACTER_TOKENS, -1):
            kept = self.tokenizer.decode(self.ids[start:])
            dropped = len(text) - len(kept)
            if text.endswith(kept) and dropped <= self._shown:
                self._start, self._shown = start, self._shown - dropped
                return
