"""Chat models: answer a list of messages, whole or streamed. The base below an adapter is a chat model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.chat_template import render, token_ids_of
from lora_practice.inference.streamer import AnswerStreamer

if TYPE_CHECKING:
    from lora_practice.fast.decode.decoder import Decoder


@dataclass
class ChatModel:
    """A causal language model with its tokenizer, which answers chats.

    Attributes:
        stop_ids: token ids that end an answer.
        decoder: the fast path of generation (several times faster, the same greedy tokens); None where it does not
            serve this model, which then runs transformers' own `generate`.
        cut_at: number of tokens at which the last answer was cut off; 0 if it ended by itself.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    decoder: Optional[Decoder] = None
    cut_at: int = 0

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Optional[Callable[[str], None]] = None,
    ) -> str:
        """The model's next turn, up to its end-of-turn token, which is not part of it.

        Args:
            temperature: 0 takes the likeliest token each time (greedy); above 0 it samples, within `top_p`.
            on_text: receives the answer piece by piece while it is generated.

        Raises:
            UserError: the template refuses the messages, or they are longer than the model can take.
        """
        streamer = AnswerStreamer(self.tokenizer, self.stop_ids, on_text) if on_text else None
        tokens = self.generate_ids(self._prompt_ids(messages), max_new_tokens, temperature, top_p, streamer)
        self.cut_at = max_new_tokens if len(tokens) >= max_new_tokens else 0
        return self.tokenizer.decode(tokens)

    def stream(self, messages: Sequence[dict[str, str]], max_new_tokens: int = 128) -> Iterator[str]:
        """The greedy answer, one token's text at a time; each token is computed when it is asked for.

        Several models can so be streamed in turn.

        Raises:
            UserError: see `answer`.
        """
        texts: list[str] = []
        streamer = AnswerStreamer(self.tokenizer, self.stop_ids, texts.append)
        for token in self._stream_ids(self._prompt_ids(messages), max_new_tokens):
            texts.clear()
            streamer.add(token)
            yield "".join(texts)
        self.cut_at = max_new_tokens if len(streamer.ids) >= max_new_tokens else 0
        texts.clear()
        streamer.end()
        yield "".join(texts)

    def generate_ids(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        streamer: Optional[AnswerStreamer] = None,
    ) -> list[int]:
        """The ids of the answer to a prompt, shown by `streamer` as they come.

        Returns:
            Fewer than `max_new_tokens` ids if the answer ended by itself; the stop token is not among them.
        """
        if self.decoder is None:
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            written = self._generate(prompt_ids, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
            answer_ids = written.sequences[0][len(prompt_ids) :].tolist()
            return [token for token in answer_ids if token not in self.stop_ids]
        answer_ids = []
        for token in self.decoder.tokens(prompt_ids, max_new_tokens, self.stop_ids, temperature, top_p):
            answer_ids.append(token)
            if streamer:
                streamer.add(token)
        if streamer:
            streamer.end()
        return answer_ids

    def _stream_ids(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """The ids of the greedy answer to the prompt `ids`, one at a time."""
        if self.decoder is not None:
            yield from self.decoder.tokens(ids, max_new_tokens, self.stop_ids)
            return
        cache_name, cache = compat.generation_cache(), None  # keys and values of all tokens but the last
        for _ in range(max_new_tokens):
            step = self._generate(ids, max_new_tokens=1, do_sample=False, **{cache_name: cache})
            cache, ids = step.get(cache_name), step.sequences[0].tolist()
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

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the messages and of the opening of the next answer."""
        fix = text("去掉 --system 试试", "try without --system")
        rendered = render(self.tokenizer, list(messages), fix=fix, prompt=True)
        ids = token_ids_of(self.tokenizer, rendered)
        longest = self.model.config.max_position_embeddings
        if len(ids) >= longest:
            raise UserError(
                text(
                    f"对话有 {len(ids)} 个 token，模型最多 {longest} 个",
                    f"the conversation has {len(ids)} tokens; the model takes {longest}",
                ),
                fix=text("缩短提问，或用 /reset 重新开始", "ask something shorter, or start over with /reset"),
            )
        return ids


class AdapterOff(ChatModel):
    """The base below an adapter, generated by transformers: the adapter is disabled while an answer is generated."""

    def _generate(self, ids: list[int], **options: Any) -> Any:
        with self.model.disable_adapter():
            return super()._generate(ids, **options)


def without_adapter(chat_model: ChatModel) -> ChatModel:
    """The base of a chat model that was loaded with `keep_base`; both share their weights.

    Raises:
        UserError: there is no adapter in it to turn off.
    """
    if not hasattr(chat_model.model, "disable_adapter"):
        what = text("这是完整的模型，没有可以关掉的适配器", "this is a whole model: there is no adapter to turn off")
        raise UserError(what)
    with chat_model.model.disable_adapter():
        decoder = decoder_of(chat_model.model, chat_model.decoder)
        return AdapterOff(chat_model.model, chat_model.tokenizer, chat_model.stop_ids, decoder)


def decoder_of(model: Any, like: Optional[Decoder] = None) -> Optional[Decoder]:
    """The fast path of generation for this model in its present state (adapter on or off); None if it is not served.

    `like`, the decoder of the same model in another state, shares its copy of the base's weights.
    """
    from lora_practice.fast import NotServed
    from lora_practice.fast.decode.decoder import build_decoder

    try:
        return build_decoder(model, like=like)
    except NotServed:
        return None


def as_chat_model(model: Any, tokenizer: Any, decoder: Optional[Decoder] = None) -> ChatModel:
    """A chat model that stops at the tokenizer's end of turn and at the model's own end-of-text tokens."""
    model.config.use_cache = True
    return ChatModel(model.eval(), tokenizer, stop_ids(tokenizer, model.generation_config.eos_token_id), decoder)


def stop_ids(tokenizer: Any, eos: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's end of turn, then the model's own ends of text.

    Args:
        eos: `eos_token_id` of the model's generation config: an id, a list of ids, or None.
    """
    others = eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(one for one in others if isinstance(one, int))]))
