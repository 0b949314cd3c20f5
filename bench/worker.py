"""One variant in its own process: trains a few steps, prints one line of JSON. Started by `python -m bench`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

from lora_practice.sources.environment import let_waiting_threads_sleep


def wall() -> float:
    """Wall-clock seconds, after the GPU has finished its queue."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": wall, "cpu": time.process_time}


def main() -> None:
    spec = json.loads(sys.argv[1])
    let_waiting_threads_sleep()
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    with open(spec["examples"], encoding="utf-8") as file:
        rows = json.load(file)[spec["load"]]
    trainer, engine = build(spec, Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    clock = CLOCKS[spec["clock"]]
    timer = step_timer(clock)
    trainer.add_callback(timer)
    trainer.train()
    seconds = sum(timer.seconds[1:])  # the first step is a warm-up
    tokens = sum(tokens_per_step(rows, spec)[1:])
    result = {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "peak_memory_mb": peak_memory_mb(spec["device"]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if engine is not None:
        result.update(kernels=engine.ops.name, **share_of_ceiling(engine, rows, spec, seconds, clock))
    print("RESULT " + json.dumps(result), flush=True)


def build(spec: dict, dataset: Any) -> tuple[Any, Any]:
    """(trainer, engine or None): plain TRL, or TRL's loop with the engine's step."""
    from trl import SFTTrainer

    from fine_tuning_practice import TrainSettings
    from lora_practice import fast
    from lora_practice.data.collator import Collator
    from lora_practice.model import load as load_model
    from lora_practice.model import lora
    from lora_practice.run.folder import OutputFolder
    from lora_practice.sources import embedded
    from lora_practice.sources.find import Source
    from lora_practice.training.build import memory_demand
    from lora_practice.training.memory_fit import ComputeConfig
    from lora_practice.training.trainer import PracticeTrainer

    variant, folder = SimpleNamespace(**spec["variant"]), embedded.model_dir()
    source = Source("folder", str(folder), folder)
    ours = variant.engine is not None
    settings = TrainSettings(lora_dropout=spec["dropout"])
    on_gpu = spec["device"] == "cuda"  # there the engine makes its fp16 copy itself, as in a run
    base = load_model.load_base(source, variant.dtype if ours and not on_gpu else "fp32")
    adapted, tokenizer = lora.add_lora(base, settings, source), load_model.load_tokenizer(source)
    window = spec["window"]
    batch = window if variant.batch > 1 else 1
    collate = Collator(tokenizer.pad_token_id)

    def without_parts(batch_rows: Any) -> Any:
        batch_of_rows = collate(batch_rows)
        batch_of_rows.pop("parts")  # read by the fast path only
        return batch_of_rows

    arguments = training_arguments(spec, variant, batch, len(dataset) // window)
    shared = {"model": adapted, "args": arguments, "train_dataset": dataset, "processing_class": tokenizer}
    if not ours:
        return SFTTrainer(**shared, data_collator=without_parts), None
    engine = fast.build(adapted.to(spec["device"]), load_model.torch_dtype(variant.dtype), seed=42, **variant.engine)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    planned = replace(settings, per_device_train_batch_size=batch, gradient_accumulation_steps=window // batch)
    trainer = PracticeTrainer(
        folder=OutputFolder(Path(spec["scratch"])),
        engine=engine,
        demand=memory_demand(planned, max(lengths), sum(lengths), is_fast=True),
        compute_config=ComputeConfig(variant.dtype, batch, engine.token_budget),
        data_collator=collate,
        **shared,
    )
    return trainer, engine


def training_arguments(spec: dict, variant: Any, batch: int, steps: int) -> Any:
    """SFTConfig of a variant."""
    from lora_practice import compat

    return compat.sft_config(
        output_dir=spec["scratch"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=spec["window"] // batch,
        max_steps=steps,
        learning_rate=2e-4,
        max_grad_norm=0.3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=spec["device"] == "cpu",
        bf16=variant.dtype == "bf16" and variant.engine is None,
        fp16=variant.dtype == "fp16",  # with loss scaling, which the engine supports
        gradient_checkpointing=variant.checkpointing,
        max_length=512,
        seed=42,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        log_level="error",
    )


def step_timer(clock: Callable[[], float]) -> Any:
    """Trainer callback whose `seconds` has one entry per optimizer step, optimizer included."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(clock() - self.started)

    return Timer()


def step_rows(rows: list[dict], spec: dict) -> list[list[dict]]:
    """The examples of each optimizer step, in the order of the trainer's own (seeded) sampler."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(42)
    order = torch.randperm(len(rows), generator=generator).tolist()
    window = spec["window"]
    return [[rows[i] for i in order[at : at + window]] for at in range(0, len(order) - window + 1, window)]


def tokens_per_step(rows: list[dict], spec: dict) -> list[int]:
    """Tokens of each step's examples, whether computed or shared."""
    return [sum(len(row["input_ids"]) for row in step) for step in step_rows(rows, spec)]


def share_of_ceiling(
    engine: Any, rows: list[dict], spec: dict, seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """GFLOP/s of the matmuls that the steps need, and of the same matmuls alone on this machine (the ceiling)."""
    import torch

    from lora_practice.fast.matmul import matmul, matmul_transposed
    from lora_practice.fast.step_plan import plan_step

    groups = [group for layer in engine.weights.layers for group in layer.groups]
    linear = sum(group.matrix.shape[0] * group.width for group in groups)
    head = engine.weights.head.numel()
    needed, sizes = 0.0, []
    for step in step_rows(rows, spec)[1:]:
        pairs = [(row["input_ids"], row["labels"]) for row in step]
        for plan in plan_step(pairs, engine.token_budget or None, engine.share_prefix):
            needed += 4.0 * (plan.rows * linear + plan.label_rows.numel() * head)
            sizes.append(plan.rows)
    n = sizes[len(sizes) // 2]
    operations = ceiling_seconds = 0.0
    for group in [*groups[:4], None]:
        matrix = engine.weights.head if group is None else group.matrix
        rows_now = min(n, 128) if group is None else n
        matmuls = len(groups) // 4 if group is not None else 1  # with a matrix of this shape in the model
        x = torch.randn(rows_now, matrix.shape[1]).to(matrix)
        y = torch.randn(rows_now, matrix.shape[0]).to(matrix)
        plain = lambda x=x, m=matrix: x @ m.t(), lambda y=y, m=matrix: y @ m
        ours = lambda x=x, m=matrix: matmul_transposed(x, m), lambda y=y, m=matrix: matmul(y, m)
        best = min(_seconds(clock, *pair) for _ in range(8) for pair in (plain, ours))
        operations += matmuls * 4.0 * rows_now * matrix.numel()
        ceiling_seconds += matmuls * best
    ceiling = operations / ceiling_seconds / 1e9
    return {"gflops": needed / seconds / 1e9, "ceiling_gflops": ceiling, "rows_per_micro_batch": n}


def _seconds(clock: Callable[[], float], *functions: Callable[[], Any]) -> float:
    """Seconds of calling all functions once."""
    started = clock()
    for function in functions:
        function()
    return clock() - started


def peak_memory_mb(device: str) -> float:
    """Peak memory so far: allocated on the GPU, or resident of this process."""
    import torch

    from lora_practice.machine.device import peak_memory

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_memory() / 1e6


if __name__ == "__main__":
    main()
