"""A model that answers chats, whole or piece by piece; the base below an adapter is one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.chat_template import render, token_ids_of
from lora_practice.inference.streamer import Pieces

if TYPE_CHECKING:
    from lora_practice.fast.decode.decoder import Decoder


@dataclass
class ChatModel:
    """A model that answers chats; `stop_ids` are the tokens that end an answer.

    `decoder` generates where it serves the model (several times faster, the same greedy tokens); without one it
    is transformers' own `generate`. `cut`: the tokens at which the last answer was cut, 0 if it ended by itself.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    decoder: Optional[Decoder] = None
    cut: int = 0

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Optional[Callable[[str], None]] = None,
    ) -> str:
        """The model's next turn, as it wrote it; ends at the end-of-turn token, which is not part of it.

        `temperature` 0 takes the likeliest token each time. `on_text` receives the answer piece by piece.

        Raises:
            UserError: the template refuses the messages, or they are longer than the model can take.
        """
        pieces = Pieces(self.tokenizer, self.stop_ids, on_text) if on_text else None
        tokens = self.write(self._asked(messages), max_new_tokens, temperature, top_p, pieces)
        self.cut = max_new_tokens if len(tokens) >= max_new_tokens else 0
        return self.tokenizer.decode(tokens)

    def stream(self, messages: Sequence[dict[str, str]], max_new_tokens: int = 128) -> Iterator[str]:
        """The likeliest answer in pieces, a token's worth each: computed when it is asked for, so that several answers
        can be written in turn.

        Raises:
            UserError: as `answer` does.
        """
        said: list[str] = []
        pieces = Pieces(self.tokenizer, self.stop_ids, said.append)
        for token in self._tokens(self._asked(messages), max_new_tokens):
            said.clear()
            pieces.add(token)
            yield "".join(said)
        self.cut = max_new_tokens if len(pieces.ids) >= max_new_tokens else 0
        said.clear()
        pieces.end()
        yield "".join(said)

    def write(
        self, ids: list[int], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, pieces: Any = None
    ) -> list[int]:
        """The tokens after `ids`, shown by `pieces`; fewer than `max_new_tokens` when the answer ended by itself."""
        if self.decoder is None:
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            written = self._generate(ids, max_new_tokens=max_new_tokens, streamer=pieces, **sampling).sequences[0]
            return [token for token in written[len(ids) :].tolist() if token not in self.stop_ids]
        told = []
        for token in self.decoder.tokens(ids, max_new_tokens, self.stop_ids, temperature, top_p):
            told.append(token)
            if pieces:
                pieces.add(token)
        if pieces:
            pieces.end()
        return told

    def _tokens(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """The tokens of `write`, one at a time."""
        if self.decoder is not None:
            yield from self.decoder.tokens(ids, max_new_tokens, self.stop_ids)
            return
        cache, known = compat.generation_cache(), None  # keys and values of all tokens but the last
        for _ in range(max_new_tokens):
            step = self._generate(ids, max_new_tokens=1, do_sample=False, **{cache: known})
            known, ids = step.get(cache), step.sequences[0].tolist()
            if ids[-1] in self.stop_ids:
                return
            yield ids[-1]

    def _generate(self, ids: list[int], **options: Any) -> Any:
        """transformers' own `generate`: `sequences` (1, T) and `past_key_values`."""
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            return self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **options,
            )

    def _asked(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt in tokens."""
        fix = text("去掉 --system 试试", "try without --system")
        rendered = render(self.tokenizer, list(messages), fix=fix, prompt=True)
        ids = token_ids_of(self.tokenizer, rendered)
        longest = self.model.config.max_position_embeddings
        if len(ids) >= longest:
            raise UserError(
                text(
                    f"对话有 {len(ids)} 个 token，模型最多 {longest}", f"{len(ids)} tokens; the model takes {longest}"
                ),
                fix=text("缩短提问，或用 /reset 重来", "ask something shorter, or begin anew with /reset"),
            )
        return ids


class Bare(ChatModel):
    """The base below an adapter, where transformers generates: the adapter is off for the time of an answer."""

    def _generate(self, ids: list[int], **options: Any) -> Any:
        with self.model.disable_adapter():
            return super()._generate(ids, **options)


def without_adapter(talk: ChatModel) -> ChatModel:
    """The base of a Talker that was loaded with `keep_base`: what the adapter changed can be heard.

    Raises:
        UserError: there is no adapter in it to turn off.
    """
    if not hasattr(talk.model, "disable_adapter"):
        what = text("这是完整的模型，没有可以关掉的适配器", "this is a whole model: there is no adapter to turn off")
        raise UserError(what)
    with talk.model.disable_adapter():
        return Bare(talk.model, talk.tokenizer, talk.stop_ids, decoder_of(talk.model, talk.decoder))


def decoder_of(model: Any, like: Optional[Decoder] = None) -> Optional[Decoder]:
    """The fast path of generation for this model as it is now (adapter on or off); None where it is not served.

    `like`, that of the same model before, shares its copy of the weights.
    """
    from lora_practice.fast import NotServed
    from lora_practice.fast.decode.decoder import build_decoder

    try:
        return build_decoder(model, like=like)
    except NotServed:
        return None


def talker(model: Any, tokenizer: Any, decoder: Optional[Decoder] = None) -> ChatModel:
    """A Talker that stops at the tokenizer's end of turn and at the model's own ends of text."""
    model.config.use_cache = True
    return ChatModel(model.eval(), tokenizer, stop_ids(model, tokenizer), decoder)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end of turn and the model's own ends of text, in order."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(end for end in ends if isinstance(end, int))})
