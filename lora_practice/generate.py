"""Load what was trained and let it answer: an output folder, a checkpoint, a merged folder or a Hub name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

from lora_practice import adapter, adapter_config, embedded
from lora_practice.adapter import WEIGHTS
from lora_practice.artifacts import checkpoints
from lora_practice.data.template import render
from lora_practice.errors import UserError, at_home, reason_of, tell, text
from lora_practice.machine import Machine, fits_in_fp32
from lora_practice.model import check_vocabulary, load_base, load_tokenizer, stored_bytes
from lora_practice.pieces import Pieces
from lora_practice.sources import Source, fetch_repository, find_model
from lora_practice.stored import read_record

if TYPE_CHECKING:
    from lora_practice.fast.decode import Decoder


@dataclass
class Talker:
    """A model that answers chats; `stop_ids` are the tokens that end an answer.

    `decoder` generates where it serves the model (several times faster, the same greedy tokens); without one it
    is transformers' own `generate`.
    """

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    decoder: Optional[Decoder] = None

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
        ids = self.tokenizer(self._rendered(list(messages)), add_special_tokens=False)["input_ids"]
        longest = self.model.config.max_position_embeddings
        if len(ids) >= longest:
            raise UserError(
                text(
                    f"对话有 {len(ids)} 个 token，模型最多 {longest}", f"{len(ids)} tokens; the model takes {longest}"
                ),
                fix=text("缩短提问，或用 /reset 重来", "ask something shorter, or begin anew with /reset"),
            )
        pieces = Pieces(self.tokenizer, self.stop_ids, on_text) if on_text else None
        return self.tokenizer.decode(self.write(ids, max_new_tokens, temperature, top_p, pieces))

    def write(
        self, ids: list[int], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, pieces: Any = None
    ) -> list[int]:
        """The tokens after `ids`, shown by `pieces`; fewer than `max_new_tokens` when the answer ended by itself."""
        if self.decoder is None:
            return self._generate(ids, max_new_tokens, temperature, top_p, pieces)
        add = pieces.add if pieces else None
        written = self.decoder.generate(ids, max_new_tokens, self.stop_ids, temperature, top_p, on_token=add)
        if pieces:
            pieces.end()
        return written

    def _generate(
        self, ids: list[int], max_new_tokens: int, temperature: float, top_p: float, pieces: Optional[Pieces]
    ) -> list[int]:
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **sampling,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=pieces,
            )
        return [token for token in output[0, len(ids) :].tolist() if token not in self.stop_ids]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return render(self.tokenizer, messages, fix=text("去掉 --system 试试", "try without --system"), prompt=True)


def load(model_dir: str, machine: Machine, base_model: Optional[str] = None, keep_base: bool = False) -> Talker:
    """Load an adapter folder, checkpoint, merged or plain model folder, or a Hub name.

    With `keep_base` the adapter is not merged in memory, so that `without_adapter` can answer too.

    Raises:
        UserError: no such folder, neither adapter nor model in it, or its base cannot be found.
    """
    folder = _local_folder(model_dir)
    here = Source("folder", str(folder), folder)
    has_adapter = (folder / "adapter_config.json").is_file()
    base = find_base(folder, base_model) if has_adapter else here
    on_cpu = machine.device == "cpu"
    dtype = "stored" if on_cpu else machine.precision
    if dtype == "fp32" and not fits_in_fp32(stored_bytes(base.path), machine.facts.gpu_memory):
        dtype = "fp16"
    model = load_base(base, dtype)
    if has_adapter:
        model = with_adapter(model, folder)
    tokenizer = tokenizer_for(model, here, base, base_model)
    decoder = decoder_of(model)
    if decoder is None:
        model = model.float() if on_cpu else model
        if has_adapter and not keep_base:  # merged in memory it answers the same, faster
            model = model.merge_and_unload()
    return talker(model.to(machine.device), tokenizer, decoder)


def tokenizer_for(model: Any, here: Source, base: Source, base_model: Optional[str] = None) -> Any:
    """The tokenizer in the folder `here`, or where it has none the base's (`base_model`'s for a plain model).

    Raises:
        UserError: it is not the one that the base was trained with, or too large for the model.
    """
    assert here.path is not None and base.path is not None
    tokens, has_adapter = here, base is not here
    if not (here.path / "tokenizer_config.json").is_file() and (has_adapter or base_model):
        tokens = base if has_adapter else find_model(str(base_model), is_default=False, flag="--base-model")
        zh, en = f"文件夹里没有分词器，用 {tokens.name} 的", f"no tokenizer in the folder: using {tokens.name}'s"
        tell(text(zh, en))
    elif has_adapter:
        adapter.check_same_tokens(here.path, base.path)
    tokenizer = load_tokenizer(tokens)
    check_vocabulary(model, tokenizer, tokens.name)
    return tokenizer


def decoder_of(model: Any) -> Optional[Decoder]:
    """The fast path of generation for this model as it is now (adapter on or off); None where it is not served."""
    from lora_practice.fast import NotServed
    from lora_practice.fast.decode import build_decoder

    try:
        return build_decoder(model)
    except NotServed:
        return None


def talker(model: Any, tokenizer: Any, decoder: Optional[Decoder] = None) -> Talker:
    """A Talker that stops at the tokenizer's end of turn and at the model's own ends of text."""
    model.config.use_cache = True
    return Talker(model.eval(), tokenizer, stop_ids(model, tokenizer), decoder)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end of turn and the model's own ends of text, in order."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(end for end in ends if isinstance(end, int))})


def find_base(folder: Path, base_model: Optional[str] = None) -> Source:
    """The base that this adapter was trained on, found on this machine again.

    The adapter's own word comes first; an embedded base is found in the cache wherever that is now.
    """
    if base_model:
        return find_model(base_model, is_default=False, flag="--base-model")
    trained_on = (read_record(folder) or {}).get("model") or {}
    named = adapter_config.base_name(folder, trained_on, own=embedded.MODEL.folder)
    if trained_on.get("kind") == "embedded" or adapter_config.last_part(named) == embedded.MODEL.folder:
        return find_model("", is_default=True, want_embedded=True)
    if trained_on.get("kind") == "hub" and trained_on.get("name") == named:
        from huggingface_hub import constants

        kept = Path(str(trained_on.get("path")))
        if Path(constants.HF_HUB_CACHE).resolve() in kept.resolve().parents and (kept / "config.json").is_file():
            return Source("hub", named, kept, named, trained_on.get("revision"))  # the very files; the Hub is not asked
    found = find_model(named, is_default=False, flag="--base-model")
    if found.kind == "folder":  # chosen by what lies in the folder, which may have come from elsewhere
        tell(text(f"底座：{found.path}", f"base: {found.path}"))
    return found


def _local_folder(model_dir: str) -> Path:
    folder = at_home(model_dir)
    if folder.is_dir():
        if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            zh, en = (
                "里面没有训练好的模型（没有 adapter_config.json）",
                "no trained model here (no adapter_config.json)",
            )
            fix = text("先训练：python fine_tuning_practice.py", "train first: python fine_tuning_practice.py")
            if saved := checkpoints(folder):
                fix = text(f"训练还没完成，可以先用 {saved[-1]}", f"the run is unfinished; try {saved[-1]}")
            raise UserError(text(zh, en), model_dir, fix)
        return folder
    if folder.exists() or model_dir.count("/") != 1 or model_dir.startswith((".", "/", "~", "outputs/")):
        raise UserError(
            text("没有这个文件夹", "no such folder"),
            where=model_dir,
            fix=text("先训练：python fine_tuning_practice.py", "train first: python fine_tuning_practice.py"),
        )
    return fetch_repository(model_dir)


def with_adapter(base: Any, folder: Path) -> Any:
    """The PEFT model of `base` and the adapter in `folder`.

    Raises:
        UserError: the adapter is damaged, or of another base.
    """
    from peft import PeftModel

    if not (folder / WEIGHTS).is_file():  # PEFT would look for it on the Hub
        what = text(f"缺少 {WEIGHTS}，适配器不完整", f"{WEIGHTS} is missing: the adapter is not whole")
        fix = text("重新训练，或从备份里找回它", "train again, or bring it back from a copy")
        raise UserError(what, str(folder), fix)
    adapter.check_modules(base, adapter_config.read_config(folder), folder)
    try:
        with warnings.catch_warnings():  # `misfit` says it in one line
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes PEFT raise nearly anything
        raise _damaged(reason_of(error), folder) from error
    if reason := adapter.misfit(model, folder):
        raise _damaged(reason, folder)
    changes = [float(p.abs().max()) for n, p in model.named_parameters() if "lora_B" in n]
    if changes and max(changes) == 0:
        tell(text("注意：这个适配器全是零，回答与底座相同", "note: this adapter is all zero: answers are the base's"))
    return model


def _damaged(reason: str, folder: Path) -> UserError:
    what = text(f"适配器与底座不配或已损坏：{reason}", f"the adapter is damaged or of another base: {reason}")
    return UserError(what, where=str(folder))
