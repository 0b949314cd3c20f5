"""An answer in pieces, as it is written."""

from __future__ import annotations

from typing import Any, Callable


class Pieces:
    """transformers' streamer protocol; holds a piece back while a character is still half written."""

    def __init__(self, tokenizer: Any, stop_ids: list[int], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.stop_ids, self.on_text = tokenizer, stop_ids, on_text
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_passed = False

    def put(self, value: Any) -> None:
        """The prompt at first, then one token or more."""
        if not self.prompt_passed:  # the first call brings the prompt
            self.prompt_passed = True
            return
        for token in value.flatten().tolist():
            self.add(token)

    def add(self, token: int) -> None:
        """One token of the answer."""
        if token in self.stop_ids:
            return
        self.ids.append(token)
        words = self.tokenizer.decode(self.ids)
        if not words.endswith("\ufffd"):
            self._show(words)

    def end(self) -> None:
        """Show what was held back."""
        self._show(self.tokenizer.decode(self.ids))

    def _show(self, words: str) -> None:
        self.on_text(words[self.shown :])
        self.shown = len(words)
