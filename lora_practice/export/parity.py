"""The proof that every exported form is the adapter still: the same prompts, token for token.

Each form is compared with base + adapter (PEFT, fp32) on PROMPTS: the token ids of the rendered chat, the first
GREEDY tokens of the answer, the log-probabilities of its first token over the whole vocabulary, and whether it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.data.chat_template import render, token_ids_of
from lora_practice.export import llama_cpp
from lora_practice.inference.chat_model import as_chat_model, decoder_of
from lora_practice.inference.load import find_base, tokenizer_for, with_adapter
from lora_practice.model.load import load_base
from lora_practice.run.folder import CARD, PROOF, rewrite_card
from lora_practice.sources.find import Source

GREEDY, LONGEST = 16, 256  # tokens that must agree; tokens in which an answer must end
# Largest difference of a log-probability, in nats, by what rounds it. Measured: docs/export.md.
BOUNDS = {"merged": 0.25, "f16": 0.3, "q8_0": 2.5}
BEGIN, END = PROOF
_ASK = {"role": "user", "content": "What is the capital of France?"}
PROMPTS: tuple[list[dict[str, str]], ...] = (
    [_ASK],
    [{"role": "user", "content": "用一句话介绍你自己。"}],
    [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Why is rain wet? 😀"},
    ],
    [_ASK, {"role": "assistant", "content": "It is Paris."}, {"role": "user", "content": "And 12 + 30?\n\nThank you."}],
)


@dataclass
class FormAnswers:
    """What one form made of each prompt; `logprobs` asks it for the token after some ids."""

    ids: list[list[int]]
    first: list[Any]  # (V,) float32 tensors
    tokens: list[list[int]]
    stopped: list[bool]
    logprobs: Callable[[list[int]], Any]


@dataclass
class Line:
    """One form's result; `faults` is empty when it passed, `skipped` says why it was not checked."""

    form: str
    bound: float = 0.0
    difference: float = 0.0
    same_tokens: int = 0
    stopped: int = 0
    faults: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL or "-"."""
        return "-" if self.skipped else "FAIL" if self.faults else "PASS"


def prove(folder: Path, gguf: Path, base_gguf: Path) -> list[Line]:
    """Compare DIR/merged and each GGUF in `gguf` with the adapter in DIR.

    Args:
        base_gguf: the base as GGUF; adapter.gguf is checked on top of it. Not read without llama.cpp.

    Raises:
        UserError: the adapter or its base cannot be loaded.
    """
    base = find_base(folder)
    model = with_adapter(load_base(base, "fp32"), folder).eval()
    tokenizer = tokenizer_for(model, folder, base)
    prompts = [chat for chat in PROMPTS if _taken(tokenizer, chat)]
    wanted = _ask_torch(model, tokenizer, prompts)
    with model.disable_adapter():
        effect = max(_distance(a, wanted.logprobs(ids)) for a, ids in zip(wanted.first, wanted.ids))
    adapter_line = Line("adapter (PEFT)", same_tokens=len(prompts), stopped=sum(wanted.stopped))
    if not all(wanted.stopped):
        adapter_line.faults.append(text("有的回答停不下来", "an answer does not end"))
    if effect == 0:
        adapter_line.faults.append(text("适配器什么也没改", "the adapter changes nothing"))
    lines = [adapter_line]
    for form, bound, ask in _forms(folder, gguf, base_gguf, tokenizer, prompts, model.config.vocab_size):
        reason = llama_cpp.missing() if form.endswith(".gguf") else ""
        lines.append(Line(form, skipped=reason) if reason else compare_form(form, bound, wanted, ask(), effect))
    return lines


def compare_form(form: str, bound: float, wanted: FormAnswers, got: FormAnswers, effect: float) -> Line:
    """The line of one form. A greedy token may be another where `wanted` holds both for nearly as likely.

    Nearly: less than half of `bound` apart, which is what the rounding may move them. `effect` is what the adapter
    itself changes; a form that is off by as much has lost it.
    """
    line = Line(form, bound, stopped=sum(got.stopped))
    line.difference = max(map(_distance, wanted.first, got.first))
    if got.ids != wanted.ids:
        line.faults.append(text("模板的 token 不同", "other template tokens"))
    if not line.difference <= bound:
        line.faults.append(text("logits 差得太多", "logits too far off"))
    elif not line.difference < effect:
        line.faults.append(text("误差和适配器的作用一样大", "the rounding is as large as the adapter's effect"))
    for ids, ours, theirs in zip(wanted.ids, wanted.tokens, got.tokens):
        line.same_tokens += _same_words(ids, ours[:GREEDY], theirs[:GREEDY], wanted.logprobs, bound / 2)
    if line.same_tokens < len(wanted.ids):
        line.faults.append(text("回答的开头不同", "answers begin otherwise"))
    if any(ours and not theirs for ours, theirs in zip(wanted.stopped, got.stopped)):
        line.faults.append(text("停不下来", "does not end"))
    return line


def show(lines: Sequence[Line]) -> str:
    """The proof for a terminal: one line for each form, then PASS or FAIL, and how many were not checked."""
    count = lines[0].same_tokens
    rows = []
    for line in lines:
        numbers = f"{line.same_tokens}/{count}  {line.difference:6.3f} <= {line.bound:<4}  {line.stopped}/{count}"
        if line is lines[0]:
            numbers = f"{'':3}  {'':14}  {line.stopped}/{count}"
        rows.append(f"  {line.form:<19} {line.skipped or numbers}  {'' if line.skipped else line.verdict}".rstrip())
        rows += [f"    {fault}" for fault in line.faults]
    head = text(
        f"证明（{count} 个提问）：开头 {GREEDY} 个 token 相同，logits 最大差，{LONGEST} 个 token 内结束",
        f"proof ({count} prompts): same first {GREEDY} tokens, largest logit difference,\n"
        f"answers that end within {LONGEST} tokens",
    )
    left = _unchecked(lines)
    but = text(f"（{left} 种没有检查）", f" ({left} not checked)") if left else ""
    return "\n".join([head, *rows, verdict(lines) + but])


def verdict(lines: Sequence[Line]) -> str:
    """FAIL if any form failed, PASS if not; those not checked are left out."""
    return "FAIL" if any(line.faults for line in lines) else "PASS"


def _unchecked(lines: Sequence[Line]) -> int:
    return sum(bool(line.skipped) for line in lines)


def write_proof(folder: Path, lines: Sequence[Line], versions: str) -> None:
    """Put the proof into DIR/README.md, in place of an earlier one; a folder without a card is left alone."""
    card = folder / CARD
    if not card.is_file():
        return
    rows = [
        f"| {line.form} | {line.same_tokens} | {line.difference:.3f} | {line.bound or ''} | {line.stopped} | "
        f"{line.skipped or line.verdict}{': ' if line.faults else ''}{'; '.join(line.faults)} |"
        for line in lines
    ]
    but = f" ({_unchecked(lines)} not checked)" if _unchecked(lines) else ""
    words = "\n".join(
        [
            f"{BEGIN}\n## Exported forms: {verdict(lines)}{but}\n",
            f"{lines[0].same_tokens} prompts through each form, compared with base + adapter ({versions}): the same "
            f"template token ids, the same first {GREEDY} greedy tokens, the largest difference of a log-probability "
            f"of the first token, and answers that end within {LONGEST} tokens.\n",
            "| form | same answers | largest difference | bound | ended | |\n|---|---|---|---|---|---|",
            *rows,
            END,
        ]
    )
    before, _, rest = card.read_text("utf-8").partition(BEGIN)
    rewrite_card(folder, before.rstrip("\n") + "\n\n" + words + (rest.partition(END)[2] or "\n"))


def _forms(
    folder: Path, gguf: Path, base_gguf: Path, tokenizer: Any, prompts: Sequence[Any], rows: int
) -> Iterator[tuple[str, float, Callable[[], FormAnswers]]]:
    def merged() -> FormAnswers:
        place = folder / "merged"
        return _ask_torch(load_base(Source("folder", str(place), place), "fp32").eval(), tokenizer, prompts)

    def file(path: Path, adapter: Optional[Path] = None) -> Callable[[], FormAnswers]:
        return lambda: _ask_llama(llama_cpp.Llama(path, adapter), rows, prompts)

    yield "merged/", BOUNDS["merged"], merged
    for kind in ("f16", "q8_0"):
        path = gguf / f"merged-{kind}.gguf"
        if path.is_file():
            yield path.name, BOUNDS[kind], file(path)
    if (gguf / "adapter.gguf").is_file():
        yield "adapter.gguf", BOUNDS["f16"], file(base_gguf, gguf / "adapter.gguf")


def _ask_torch(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> FormAnswers:
    import torch

    def logprobs(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)

    chat_model = as_chat_model(model, tokenizer, decoder_of(model))
    ids = [token_ids_of(tokenizer, render(tokenizer, chat, prompt=True)) for chat in prompts]
    tokens = [chat_model.generate_ids(one, LONGEST) for one in ids]
    return FormAnswers(ids, [logprobs(one) for one in ids], tokens, [len(one) < LONGEST for one in tokens], logprobs)


def _ask_llama(llama: llama_cpp.Llama, rows: int, prompts: Sequence[list[dict[str, str]]]) -> FormAnswers:
    import torch

    def logprobs(ids: list[int]) -> Any:
        return torch.tensor(llama.logprobs(ids, rows))

    ids = [llama.prompt_ids(chat) for chat in prompts]
    answers = [llama.greedy(one, LONGEST) for one in ids]
    first = [logprobs(one) for one in ids]
    return FormAnswers(ids, first, [tokens for tokens, _ in answers], [ended for _, ended in answers], logprobs)


def _distance(one: Any, other: Any) -> float:
    """Largest difference over the tokens that both have; infinite for other vocabularies' rows of NaN."""
    rows = min(len(one), len(other))
    return float((one[:rows] - other[:rows]).abs().max())


def _same_words(
    ids: list[int], ours: list[int], theirs: list[int], logprobs: Callable[[Any], Any], near: float
) -> bool:
    if ours == theirs:
        return True
    at = next((n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    if at >= min(len(ours), len(theirs)):  # one of them ended here
        return False
    choice = logprobs(ids + ours[:at])
    return float(choice[ours[at]] - choice[theirs[at]]) < near


def _taken(tokenizer: Any, chat: list[dict[str, str]]) -> bool:
    """Whether the template takes this chat at all (some know no system messages)."""
    try:
        return bool(render(tokenizer, chat, prompt=True))
    except UserError as refusal:
        tell(str(refusal))
        return False
