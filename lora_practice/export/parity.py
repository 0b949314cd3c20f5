"""The parity check: whether every exported form still answers as the adapter does, token for token.

Each form is compared with base + adapter (PEFT, fp32) on PROMPTS: the token ids of the rendered chat, the first
GREEDY tokens of the answer, the log-probabilities of its first token over the whole vocabulary, and whether it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, tell, text
from lora_practice.data.chat_template import render, token_ids_of
from lora_practice.export import llama_cpp
from lora_practice.export.merge import ROUNDING
from lora_practice.inference.chat_model import as_chat_model, decoder_of
from lora_practice.inference.load import find_base, folder_source, tokenizer_for, with_adapter
from lora_practice.model.load import load_base
from lora_practice.run.file_kinds import ADAPTER_GGUF, CARD, MERGED
from lora_practice.run.folder import PROOF, rewrite_card

GREEDY, LONGEST = 16, 256  # tokens that must agree; tokens in which an answer should end
# Largest difference of a log-probability, in nats, by what rounds it. merged/ rounds W + (alpha/r) B A to the base's 16
# bits: what is below half a unit in the last place of W vanishes. Measured: docs/export.md.
BOUNDS = {MERGED: ROUNDING, "f16": 0.55, "q8_0": 2.75, ADAPTER_GGUF: 0.3}
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
    """How one form answers each prompt.

    Attributes:
        ids: token ids of the rendered chats.
        first: log-probabilities of each answer's first token, float32 tensors (V,).
        tokens: the greedy answers, LONGEST tokens at most.
        ended: whether each answer ended by itself.
        logprobs: log-probabilities (V,) of the token after some ids.
    """

    ids: list[list[int]]
    first: list[Any]
    tokens: list[list[int]]
    ended: list[bool]
    logprobs: Callable[[list[int]], Any]


@dataclass
class FormResult:
    """The result of one form.

    Attributes:
        faults: why it does not equal the adapter; none if it passed.
        notes: what does not judge the export, such as a training that was too short.
        skipped: why it was not checked; "" if it was.
    """

    form: str
    bound: float = 0.0
    difference: float = 0.0
    same_tokens: int = 0
    ended: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or "-" for a form that was not checked."""
        return "-" if self.skipped else "FAIL" if self.faults else "PASS"


def check_forms(folder: Path, gguf: Path, base_gguf: Path) -> list[FormResult]:
    """Compare DIR/merged and each GGUF in `gguf` with the adapter in DIR, whose own result comes first.

    Args:
        base_gguf: the base as GGUF; adapter.gguf is checked on top of it. Not read without llama.cpp.

    Raises:
        UserError: the adapter or its base cannot be loaded.
    """
    base = find_base(folder)
    model = with_adapter(load_base(base, "fp32"), folder).eval()
    tokenizer = tokenizer_for(model, folder, base)
    prompts = [chat for chat in PROMPTS if _template_accepts(tokenizer, chat)]
    wanted = _answers_of_torch(model, tokenizer, prompts)
    with model.disable_adapter():
        effect = max(_distance(first, wanted.logprobs(ids)) for first, ids in zip(wanted.first, wanted.ids))
    results = [_adapter_result(wanted, effect)]
    for form, bound, answers in _forms(folder, gguf, base_gguf, tokenizer, prompts, model.config.vocab_size):
        reason = llama_cpp.missing() if form.endswith(".gguf") else ""
        if reason:
            results.append(FormResult(form, skipped=reason))
        else:
            results.append(compare_form(form, bound, wanted, answers(), effect))
    return results


def _adapter_result(wanted: FormAnswers, effect: float) -> FormResult:
    """The adapter's own result. That its answers do not end judges the training, not the export."""
    count = len(wanted.ids)
    result = FormResult("adapter (PEFT)", same_tokens=count, ended=sum(wanted.ended))
    if effect == 0:
        result.faults.append(text("适配器什么也没改变", "the adapter changes nothing"))
    if result.ended < count:
        open_ended = count - result.ended
        result.notes += [
            text(
                f"{count} 个回答里有 {open_ended} 个到 {LONGEST} 个 token 还没结束：是训练不够，不是导出的问题",
                f"{open_ended} of {count} answers do not end: that judges the training, not the export",
            ),
            text(
                "加大 --max_steps 或 --num_train_epochs，让模型学会在哪里结束",
                "train longer (--max_steps, --num_train_epochs): it learns where to end",
            ),
        ]
    return result


def compare_form(form: str, bound: float, wanted: FormAnswers, got: FormAnswers, effect: float) -> FormResult:
    """Compare the answers of one form with the adapter's.

    A greedy token may differ where the adapter itself holds both for nearly as likely: less than half of `bound`
    apart, which is what the rounding may move them.

    Args:
        bound: the largest difference of a log-probability that passes.
        effect: the largest difference that the adapter makes to its base. A form that is off by as much has lost it.
    """
    result = FormResult(form, bound, ended=sum(got.ended))
    result.difference = max(map(_distance, wanted.first, got.first))
    if got.ids != wanted.ids:
        result.faults.append(text("套用模板得到的 token 不同", "other template tokens"))
    if not result.difference <= bound:
        result.faults.append(text("logits 相差太大", "logits too far off"))
    elif not result.difference < effect:
        result.faults.append(
            text(
                f"舍入误差不小于适配器的作用（{effect:.3f}）：训练得更久，或换精度更高的形式",
                f"the rounding is as large as the adapter's effect ({effect:.3f}): train longer",
            )
        )
    for ids, ours, theirs in zip(wanted.ids, wanted.tokens, got.tokens):
        result.same_tokens += _same_tokens(ids, ours[:GREEDY], theirs[:GREEDY], wanted.logprobs, bound / 2)
    if result.same_tokens < len(wanted.ids):
        result.faults.append(text("回答的开头不同", "answers begin otherwise"))
    if any(ours and not theirs for ours, theirs in zip(wanted.ended, got.ended)):
        result.faults.append(text("适配器的回答会结束，它的不结束", "does not end where the adapter does"))
    return result


def result_table(results: Sequence[FormResult]) -> str:
    """The results for a terminal: one row for each form, then PASS or FAIL, and how many were not checked."""
    count = results[0].same_tokens
    rows = []
    for result in results:
        numbers = f"{result.same_tokens}/{count}  {result.difference:6.3f} <= {result.bound:<4}  {result.ended}/{count}"
        if result is results[0]:  # the adapter, with which the others are compared
            numbers = f"{'':3}  {'':14}  {result.ended}/{count}"
        verdict = "" if result.skipped else result.verdict
        rows.append(f"  {result.form:<19} {result.skipped or numbers}  {verdict}".rstrip())
        rows += [f"    {line}" for line in (*result.faults, *result.notes)]
    head = text(
        f"一致性检查（{count} 个提问）：开头 {GREEDY} 个 token 相同，logits 最大差，\n{LONGEST} 个 token 内结束的回答",
        f"parity check ({count} prompts): same first {GREEDY} tokens, largest logit difference,\n"
        f"answers that end within {LONGEST} tokens",
    )
    return "\n".join([head, *rows, _last_line(results)])


def _last_line(results: Sequence[FormResult]) -> str:
    """The verdict; where forms were not checked, on which ones it is, how many were not, and why."""
    verdict, skipped = overall_verdict(results), [result for result in results if result.skipped]
    if not skipped:
        return verdict
    checked = text("、", ", ").join(result.form for result in results[1:] if not result.skipped)
    said = f"{checked} {verdict}" if checked and verdict == "PASS" else verdict
    forms = text(f"；{len(skipped)} 种 GGUF ", f"; {counted(len(skipped), 'GGUF form')} ")
    return said + forms + skipped[0].skipped


def overall_verdict(results: Sequence[FormResult]) -> str:
    """FAIL if any form failed, PASS otherwise; forms that were not checked do not count."""
    return "FAIL" if any(result.faults for result in results) else "PASS"


def _unchecked(results: Sequence[FormResult]) -> int:
    return sum(bool(result.skipped) for result in results)


def write_to_card(folder: Path, results: Sequence[FormResult], versions: str) -> None:
    """Write the results into DIR/README.md, in place of earlier ones; a folder without a card is left alone.

    Args:
        versions: of the libraries that answered, for the card.
    """
    card = folder / CARD
    if not card.is_file():
        return
    rows = [
        f"| {result.form} | {result.same_tokens} | {result.difference:.3f} | {result.bound or ''} | {result.ended} | "
        f"{': '.join(filter(None, [result.skipped or result.verdict, '; '.join(result.faults + result.notes)]))} |"
        for result in results
    ]
    unchecked = f" ({_unchecked(results)} not checked)" if _unchecked(results) else ""
    section = "\n".join(
        [
            f"{BEGIN}\n## Exported forms: {overall_verdict(results)}{unchecked}\n",
            f"{results[0].same_tokens} prompts through each form, compared with base + adapter ({versions}): the same "
            f"template token ids, the same first {GREEDY} greedy tokens, the largest difference of a log-probability "
            f"of the first token, and answers that end within {LONGEST} tokens.\n",
            "| form | same answers | largest difference | bound | ended | |\n|---|---|---|---|---|---|",
            *rows,
            END,
        ]
    )
    before, _, rest = card.read_text("utf-8").partition(BEGIN)
    rewrite_card(folder, before.rstrip("\n") + "\n\n" + section + (rest.partition(END)[2] or "\n"))


def _forms(
    folder: Path, gguf: Path, base_gguf: Path, tokenizer: Any, prompts: Sequence[Any], rows: int
) -> Iterator[tuple[str, float, Callable[[], FormAnswers]]]:
    """(name of a form that was written, its bound, a function that loads it and answers)"""

    def merged() -> FormAnswers:
        model = load_base(folder_source(folder / MERGED), "fp32").eval()
        return _answers_of_torch(model, tokenizer, prompts)

    def file(path: Path, adapter: Optional[Path] = None) -> Callable[[], FormAnswers]:
        return lambda: _answers_of_llama(llama_cpp.Llama(path, adapter), rows, prompts)

    yield f"{MERGED}/", BOUNDS[MERGED], merged
    for precision in ("f16", "q8_0"):
        path = gguf / f"{MERGED}-{precision}.gguf"
        if path.is_file():
            yield path.name, BOUNDS[precision], file(path)
    if (gguf / ADAPTER_GGUF).is_file():
        yield ADAPTER_GGUF, BOUNDS[ADAPTER_GGUF], file(base_gguf, gguf / ADAPTER_GGUF)


def _answers_of_torch(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> FormAnswers:
    import torch

    def logprobs(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)

    chat_model = as_chat_model(model, tokenizer, decoder_of(model))
    ids = [token_ids_of(tokenizer, render(tokenizer, chat, prompt=True)) for chat in prompts]
    tokens = [chat_model.generate_ids(one, LONGEST) for one in ids]
    return FormAnswers(ids, [logprobs(one) for one in ids], tokens, [len(one) < LONGEST for one in tokens], logprobs)


def _answers_of_llama(llama: llama_cpp.Llama, rows: int, prompts: Sequence[list[dict[str, str]]]) -> FormAnswers:
    import torch

    def logprobs(ids: list[int]) -> Any:
        return torch.tensor(llama.logprobs(ids, rows))

    ids = [llama.prompt_ids(chat) for chat in prompts]
    answers = [llama.greedy(one, LONGEST) for one in ids]
    first = [logprobs(one) for one in ids]
    return FormAnswers(ids, first, [tokens for tokens, _ in answers], [ended for _, ended in answers], logprobs)


def _distance(one: Any, other: Any) -> float:
    """Largest difference over the tokens that both vocabularies have."""
    rows = min(len(one), len(other))
    return float((one[:rows] - other[:rows]).abs().max())


def _same_tokens(
    ids: list[int], ours: list[int], theirs: list[int], logprobs: Callable[[Any], Any], near: float
) -> bool:
    """Whether two answers to `ids` are the same, or first differ where both tokens are nearly as likely to `ours`."""
    if ours == theirs:
        return True
    shorter = min(len(ours), len(theirs))
    at = next((n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), shorter)
    if at >= shorter:  # one of them ended here
        return False
    choice = logprobs(ids + ours[:at])
    return float(choice[ours[at]] - choice[theirs[at]]) < near


def _template_accepts(tokenizer: Any, chat: list[dict[str, str]]) -> bool:
    """Whether the template takes this chat at all (some know no system messages)."""
    try:
        return bool(render(tokenizer, chat, prompt=True))
    except UserError as refusal:
        tell(str(refusal))
        return False
