"""Training and generation compared with plain TRL. Run: python -m bench [--quick] [--json FILE]

Each variant trains in its own process; the processes alternate, so that a slow minute of the machine affects all of
them. Tokens per second count the examples' own tokens, so skipped work shows up as speed. The first optimizer step of
each process is a warm-up and not counted; the best round of each variant is shown. With a usable NVIDIA GPU the
comparison runs there, in fp16 (`--device cpu` for the CPU).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.examples import write_examples
from bench.variants import CPU_VARIANTS, GENERATION, GPU_VARIANTS
from lora_practice.sources.environment import let_waiting_threads_sleep


def main() -> None:
    options = parse()
    let_waiting_threads_sleep()
    known = GPU_VARIANTS if options.device == "cuda" else CPU_VARIANTS
    variants = [v for v in known if not options.only or any(word in v.name for word in options.only)]
    loads = {"short": (8, options.short_steps), "long": (options.long_window, options.long_steps)}
    results: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        examples = Path(scratch) / "examples.json"
        counts = [window * (steps + 1) for window, steps in loads.values()]
        write_examples(examples, counts[0], counts[1], options.assistant_only)
        for round_number in range(options.rounds):
            for load in options.loads:
                for variant in variants:
                    spec = {
                        "variant": asdict(variant),
                        "load": load,
                        "window": loads[load][0],
                        "examples": str(examples),
                        "scratch": scratch,
                        "threads": options.threads,
                        "clock": options.clock,
                        "dropout": options.dropout,
                        "device": options.device,
                    }
                    print(f"round {round_number + 1}, {load}: {variant.name} ...", file=sys.stderr, flush=True)
                    result = run("bench.worker", variant.name, spec)
                    results.setdefault(load, {}).setdefault(variant.name, []).append(result)
    report = {"machine": machine(), "options": vars(options), "results": results}
    if not options.only and options.device == "cpu":
        report["generation"] = {name: generation(name, how, options) for name, how in GENERATION.items()}
    print(table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one round: a few minutes")
    parser.add_argument("--json", metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--rounds", type=int, help="runs of each variant (default 2; with --quick 1)")
    parser.add_argument("--loads", nargs="+", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants whose name contains a WORD")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: CPU seconds, for a machine with other load; only with --threads 1",
    )
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--assistant-only", action="store_true", help="labels on answers only (default: all tokens)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a usable GPU")
    options = parser.parse_args()
    options.device = options.device or default_device()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1: waiting threads use CPU time")
    options.rounds = options.rounds or (1 if options.quick else 2)
    options.short_steps = 3 if options.quick else 10
    options.long_window, options.long_steps = (2, 1) if options.quick else (8, 2)
    return options


def default_device() -> str:
    """The device that a training run would choose: "cuda" or "cpu"."""
    from lora_practice.machine.device import choose_device
    from lora_practice.machine.facts import read_facts

    return choose_device(read_facts()).device


def generation(name: str, how: str, options: argparse.Namespace) -> dict:
    """Result of the fastest round of one way to generate."""
    print(f"generation: {name} ...", file=sys.stderr, flush=True)
    spec = {"how": how, "threads": options.threads, "clock": options.clock}
    runs = [run("bench.generation", name, spec) for _ in range(options.rounds)]
    return max(runs, key=lambda result: result["tokens_per_second"])


def run(module: str, name: str, spec: dict) -> dict:
    """Run a module with its spec in a new process; its result is the output line that starts with RESULT."""
    command = [sys.executable, "-m", module, json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1][len("RESULT ") :])


def machine() -> dict[str, str]:
    """Processor, GPU, system and versions of the installed packages."""
    from lora_practice.compat import installed
    from lora_practice.machine.facts import read_facts

    facts = read_facts()
    return {"processor": facts.cpu, "gpu": facts.gpu, "system": platform.platform(terse=True), **installed()}


def table(report: dict) -> str:
    """Markdown: one table per load, then one for generation."""
    lines = []
    for load, variants in report["results"].items():
        best = {name: max(runs, key=lambda run: run["tokens_per_second"]) for name, runs in variants.items()}
        base = next(iter(best.values()))["tokens_per_second"]
        lines += [
            f"\n### {load}\n",
            "| variant | tok/s | ratio | peak MB | share of the GEMM ceiling | losses |",
            "|---|---|---|---|---|---|",
        ]
        for name, result in best.items():
            share = ""
            if "gflops" in result:
                gflops, ceiling = result["gflops"], result["ceiling_gflops"]
                share = f"{gflops / ceiling:.0%} of {ceiling:.0f} GFLOP/s"
            losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:4])
            speed = result["tokens_per_second"]
            memory = result["peak_memory_mb"]
            lines.append(f"| {name} | {speed:.1f} | {speed / base:.2f} | {memory:.0f} | {share} | {losses} |")
    return "\n".join(lines + generation_table(report.get("generation", {})))


def generation_table(results: dict) -> list[str]:
    """Lines of a Markdown table: greedy generation with an unmerged adapter."""
    if not results:
        return []
    lines = ["\n### generation\n", "| variant | tok/s | ratio | peak MB | tokens |", "|---|---|---|---|---|"]
    first = next(iter(results.values()))
    for name, result in results.items():
        speed, same = (
            result["tokens_per_second"],
            "the same" if result["generated"] == first["generated"] else "different",
        )
        ratio, memory = speed / first["tokens_per_second"], result["peak_memory_mb"]
        lines.append(f"| {name} | {speed:.1f} | {ratio:.2f} | {memory:.0f} | {same} |")
    return lines


if __name__ == "__main__":
    main()
