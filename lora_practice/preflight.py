"""What a run will take on this machine, found by really doing two steps of it and taking them back."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_practice import disk, embedded, variants
from lora_practice.artifacts import step_of
from lora_practice.data.examples import Examples
from lora_practice.errors import text
from lora_practice.machine import peak_memory
from lora_practice.sources import Source
from lora_practice.trainer import PracticeTrainer


@dataclass(frozen=True)
class Estimate:
    """Of the whole run, or of what is left of a resumed one. Seconds without loading; memory of this process."""

    steps: int
    step_seconds: float
    seconds: float
    peak_memory_mb: int
    disk_mb: int
    download_mb: int

    def record(self) -> dict[str, Any]:
        """For run_record.json, where `seconds` and `peak_memory_mb` of the run itself stand beside it."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def estimate(
    trainer: PracticeTrainer, base: Source, steps: int, settings: Any, held_out: Examples, download_mb: float
) -> Estimate:
    """Do one micro-batch of the longest rows and one step of typical ones (on the plain path a quarter of one)."""
    arguments = trainer.args
    lengths = lengths_of(trainer)
    window = min(len(lengths), arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = arguments.per_device_train_batch_size
    if trainer.engine is not None:
        longest = max(1, min(window, trainer.engine.token_budget // lengths[by_length[-1]]))
    probe(trainer, by_length[-longest:])
    tried = window if trainer.engine is not None else max(longest, window // 4)
    # the middle of each of so many equal shares: together about as long, in as many parts, as rows are on average
    parts = parts_of(trainer)
    by_parts = sorted(by_length, key=parts.__getitem__)
    typical = [by_parts[int((i + 0.5) * len(lengths) / tried)] for i in range(tried)]
    taken = probe(trainer, typical) * window * (sum(lengths) / len(lengths)) / sum(lengths[i] for i in typical)
    rows = steps * window if arguments.max_steps > 0 else len(lengths) * arguments.num_train_epochs
    left = 1.0 - step_of(trainer.folder.checkpoint) / max(1, steps)
    # measuring the held-out rows is the forward half of training on as many tokens
    measured = _measurements(settings, steps) * held_out.tokens / (sum(lengths) / len(lengths)) / 2
    seconds = taken * (rows + measured) / window * left
    peak_mb = round(most_held(arguments.device) / 1e6)
    disk_mb = round(_disk(trainer, base, steps, settings.merge_adapter) / 1e6)
    return Estimate(steps, taken, seconds, peak_mb, disk_mb, round(download_mb))


def short_of_disk(plan: Estimate, trainer: PracticeTrainer) -> str:
    """A line for a run that will fill the disk, "" for any other; a resumed one has written a part of it already."""
    free = round(disk.free_bytes(trainer.folder.path) / 1e6)
    if trainer.folder.resumed or plan.disk_mb <= free:
        return ""
    zh, en = f"磁盘只剩 {free} MB，存盘会停在半路", f"only {free} MB of disk are free: a save will stop the run"
    fewer_would_do = _checkpoints(trainer, plan.steps) > 2  # with --save_total_limit 1 there are two for a moment
    or_fewer = text("，或 --save_total_limit 1", ", or --save_total_limit 1") if fewer_would_do else ""
    return text(f"{zh}：腾出空间", f"{en}; free some") + or_fewer


def probe(trainer: PracticeTrainer, rows: Sequence[int]) -> float:
    """Seconds of one optimizer step on these rows of the training set; forward, backward and the update are real.

    Nothing is changed by it: no weight, no gradient, no random number, no metric. The update is made on a copy.
    """
    dataset: Any = trainer.train_dataset
    tried = [dataset[i] for i in rows]
    with trainer.trying(), _no_collection():
        started = time.perf_counter()
        trainer.try_step(tried)
        _update_copy(trainer)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks for garbage in all that the libraries hold now and then: a quarter of a second, in few steps."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def fetched_mb(source: Source, since: float) -> float:
    """Megabytes that were downloaded for this source after the time `since` (a Hub data set has no path: 0)."""
    if source.path is None or source.kind not in ("hub", "embedded"):
        return 0.0
    if source.kind == "embedded":
        folder, wheel = source.path, embedded.MODEL
        if not folder.is_dir():
            folder, wheel = folder.parent, embedded.CONVERSATIONS
        return wheel.megabytes if (folder / embedded.MANIFEST).stat().st_mtime >= since else 0.0
    found = [one.stat() for one in source.path.iterdir()]
    return sum(one.st_size for one in found if one.st_mtime >= since) / 1e6


def _update_copy(trainer: PracticeTrainer) -> None:
    copies = [one.detach().clone().requires_grad_() for one in trainer.trainable]
    for one, original in zip(copies, trainer.trainable):
        one.grad = original.grad
    torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm)
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    kind(copies, **options).step()


def lengths_of(trainer: PracticeTrainer) -> list[int]:
    """Tokens of each row of the training set."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    return pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_pylist()


def parts_of(trainer: PracticeTrainer) -> list[int]:
    """Examples in each row of the training set: several where rows are packed."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    if "lengths" not in dataset.column_names:
        return [1] * len(dataset)
    return pyarrow.compute.list_value_length(dataset.data.column("lengths")).to_pylist()


def _measurements(settings: Any, steps: int) -> int:
    """How often the held-out rows are measured while training."""
    often = {"no": 0, "steps": math.ceil(steps / settings.eval_steps), "epoch": math.ceil(settings.num_train_epochs)}
    return often[settings.eval_strategy]


def most_held(device: Any) -> int:
    """Bytes that this process held at most: on its card, or in main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _disk(trainer: PracticeTrainer, base: Source, steps: int, merge: bool) -> int:
    """Bytes: the adapter, its checkpoints (with two moments for each weight), the tokenizers, the merged model."""
    model = trainer.model
    trained = sum(one.numel() * 4 for one in model.parameters() if one.requires_grad)
    adapter = trained * variants.ranks_saved(model)
    files = [one for one in Path(base.path or "").glob("*.json") if one.is_file()]
    tokenizer = sum(one.stat().st_size for one in files)
    merged = sum(one.stat().st_size for one in Path(base.path or "").glob("*.safetensors")) if merge else 0
    number = _checkpoints(trainer, steps)
    return adapter + tokenizer + number * (adapter + 2 * trained + tokenizer) + merged


def _checkpoints(trainer: PracticeTrainer, steps: int) -> int:
    """How many lie on the disk at most: the oldest goes when the newest is whole."""
    arguments = trainer.args
    kept = {"no": 0, "epoch": math.ceil(arguments.num_train_epochs), "steps": steps // arguments.save_steps + 1}
    number = kept[str(getattr(arguments.save_strategy, "value", arguments.save_strategy))]
    return int(min(number, (trainer.keep_checkpoints or number) + 1))
