"""The benchmark runs from its one command and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_compares_plain_trl_with_ours_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--quick", "--loads", "short", "--only", "reference", "ours, bf16", "--json", str(out)]
    done = subprocess.run([sys.executable, "-m", "bench", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text("utf-8"))["results"]["short"]
    assert {"TRL, reference settings", "ours, bf16", "ours, bf16, no sharing", "ours, bf16, torch only"} == set(results)
    plain, ours = results["TRL, reference settings"][0], results["ours, bf16"][0]
    assert abs(plain["losses"][0] - ours["losses"][0]) < 0.005 * plain["losses"][0]
    assert ours["tokens"] == plain["tokens"] and ours["gflops"] > 0
    assert all(name in done.stdout for name in results)


def test_the_pieces_of_a_step_sum_up_to_it() -> None:
    words = [sys.executable, "-m", "bench.pieces", "--steps", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:])
    whole = int(rows.pop("all"))
    assert abs(sum(map(int, rows.values())) - whole) <= len(rows)  # each is rounded
    assert min(map(int, rows.values())) >= 0 and {"matmuls of the layers", "attention, backward"} <= set(rows)


def test_a_run_is_told_beside_its_estimate() -> None:
    words = [sys.executable, "-m", "bench.estimates", "--only", "defaults", "--steps", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = done.stdout.splitlines()[2].strip("| ").split(" | ")
    assert row[0] == "defaults" and 0.8 < float(row[6]) < 1.2 and float(row[1]) > 0
