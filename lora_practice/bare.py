"""The base below an adapter, as a Talker of its own: what the adapter changed can be heard."""

from __future__ import annotations

from typing import Any

from lora_practice.errors import UserError, text
from lora_practice.generate import Talker, decoder_of


class Bare(Talker):
    """The base below an adapter, where transformers generates: the adapter is off for the time of an answer."""

    def _generate(self, *args: Any) -> list[int]:
        with self.model.disable_adapter():
            return super()._generate(*args)


def without_adapter(talk: Talker) -> Talker:
    """The base of a Talker that was loaded with `keep_base`.

    Raises:
        UserError: there is no adapter in it to turn off.
    """
    if not hasattr(talk.model, "disable_adapter"):
        what = text("这是完整的模型，没有可以关掉的适配器", "this is a whole model: there is no adapter to turn off")
        raise UserError(what)
    with talk.model.disable_adapter():
        return Bare(talk.model, talk.tokenizer, talk.stop_ids, decoder_of(talk.model))
