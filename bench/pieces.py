"""Profile of one optimizer step of the fast path. Run: python -m bench.pieces [--dtype bf16] [--load long]

Wall-clock milliseconds of each piece within the engine's step of 8 examples, measured inside whole steps, so that the
CPU caches are as cold as in a run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable

from lora_practice.sources.environment import let_waiting_threads_sleep

PIECES = {
    "attend": "attention",
    "attend_backward": "attention, backward",
    "lora_down": "LoRA down projections with dropout",
    "lora_down_backward": "LoRA down projections, backward",
    "lora_up_backward": "LoRA up projections, backward",
    "gate": "gated activation",
    "gate_backward": "gated activation, backward",
    "norm": "norms",
    "norm_from_rstd": "norms",
    "norm_backward": "norms, backward",
    "rope": "RoPE",
    "cross_entropy": "loss on the logits",
    "copy_matrices": "copying A, B and their gradients",
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.pieces", description=__doc__)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--load", choices=["short", "long"], default="short")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    let_waiting_threads_sleep()  # not in `build`: bench.busy compares how they wait
    engine, steps, _ = build(options.dtype, options.load, options.steps)
    clock = watch(engine)
    for step in steps:
        engine.step_loss_and_backward(step)
    clock.clear()  # the first round was a warm-up
    started = time.perf_counter()
    for step in steps:
        engine.step_loss_and_backward(step)
    seconds = time.perf_counter() - started
    clock["the rest: Python, casts, plans"] = seconds - sum(clock.values())
    print("| piece | ms a step |\n|---|---|")
    for name, spent in clock.most_common():
        print(f"| {name} | {1000 * spent / len(steps):.0f} |")
    print(f"| all | {1000 * seconds / len(steps):.0f} |")


def build(dtype: str, load: str, count: int) -> tuple[Any, list[list[tuple[list[int], list[int]]]], Any]:
    """(engine, examples of `count` steps, model)."""
    import torch

    from bench.examples import write_examples
    from fine_tuning_practice import TrainSettings
    from lora_practice import fast
    from lora_practice.model import load as load_model
    from lora_practice.model import lora
    from lora_practice.sources import embedded
    from lora_practice.sources.find import Source

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "examples.json"
        write_examples(path, 8 * count, 8 * count, False)
        rows = json.loads(path.read_text(encoding="utf-8"))[load]
    folder = embedded.model_dir()
    source = Source("folder", str(folder), folder)
    adapted = lora.add_lora(load_model.load_base(source, dtype), TrainSettings(lora_dropout=0.05), source)
    engine = fast.build(adapted, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], seed=42)
    examples = [(row["input_ids"], row["labels"]) for row in rows]
    return engine, [examples[at : at + 8] for at in range(0, len(examples) - 7, 8)], adapted


def watch(engine: Any) -> Counter[str]:
    """Seconds by piece, counted from now on."""
    from lora_practice.fast import lora_linear, loss

    clock: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock[name] += time.perf_counter() - started

        return run

    for module, what in ((lora_linear, "matmuls of the layers"), (loss, "matmuls of the head")):
        for name in ("matmul_transposed", "matmul"):
            setattr(module, name, timed(what, getattr(module, name)))
    for name, what in PIECES.items():
        setattr(engine.ops, name, timed(what, getattr(engine.ops, name)))
    return clock


if __name__ == "__main__":
    main()
