"""`lora-practice check-data` on real files, with the embedded tokenizer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from journey_harness import run

from lora_practice.console.terminal import columns


def check(folder: Path, *flags: str, lang: str = "en") -> subprocess.CompletedProcess:
    return run(folder, "-m", "lora_practice.cli", "check-data", *flags, LORA_PRACTICE_LANG=lang)


def test_a_good_file_is_ready_and_plain_when_piped(embedded_rows: Path, tmp_path: Path) -> None:
    for lang, verdict in (("zh", "可以训练。"), ("en", "Ready to train.")):
        done = check(tmp_path, str(embedded_rows), lang=lang)
        assert done.returncode == 0
        assert done.stdout.rstrip().endswith(verdict)
        assert "\x1b" not in done.stdout
        assert "--model_name" in done.stdout and "SmolLM2-135M-Instruct" in done.stdout  # whose tokenizer counted
        assert all(columns(line) <= 80 for line in done.stdout.splitlines() if str(embedded_rows) not in line)


def test_a_machine_reads_the_same_facts(embedded_rows: Path, tmp_path: Path) -> None:
    facts = json.loads(check(tmp_path, str(embedded_rows), "--json", "--max-length", "32").stdout)
    assert facts["rows"] == sum(1 for _ in embedded_rows.open(encoding="utf-8"))
    assert facts["shapes"] == {"messages": facts["rows"]}
    assert sum(one["rows"] for one in facts["lengths"]) == facts["rows"]
    assert facts["counts"]["cut"] > 100
    assert len([one for one in facts["problems"] if one["kind"] == "cut"]) == 100
    assert facts["trainable"] == (facts["rows_trained"] > 0)


def test_a_chinese_row_is_shown_in_whole_characters_with_its_trained_part_marked(tmp_path: Path) -> None:
    row = {"prompt": "介绍一下鑫源", "completion": "鑫源是一家公司 🙂"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "gb18030")
    shown = check(tmp_path, "own.jsonl", "--show", "1").stdout
    assert shown.startswith("own.jsonl:1: ")
    assert "(one character may be several tokens: no · within it)" in shown
    assert "〔鑫·源·是·一·家·公·司· 🙂·<|im_end|>〕" in shown
    assert "\ufffd" not in shown
    parts = json.loads(check(tmp_path, "own.jsonl", "--show", "1", "--json").stdout)["pieces"]
    assert "".join(one["text"] for one in parts if one["trained"]) == "鑫源是一家公司 🙂<|im_end|>"


def test_problems_and_mistakes_end_with_their_own_codes(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "utf-8")
    done = check(tmp_path, "own.jsonl")
    assert done.returncode == 1
    assert "own.jsonl:2: broken JSON" in done.stdout
    plain = check(tmp_path, "own.jsonl", "--show", "1").stdout
    assert "trained" in plain and "several tokens" not in plain
    for flags, word in (
        (["own.jsonl", "--show", "2"], "own.jsonl:2: broken JSON"),
        (["own.jsonl", "--show", "9"], "there is no row 9"),
        (["own.jsonl", "--show", "0"], "--show"),
        (["missing.jsonl"], "missing.jsonl: no such data file"),
        (["own.jsonl", "--model_name", "./nowhere"], "no such model folder"),
    ):
        wrong = check(tmp_path, *flags)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        (line,) = wrong.stderr.splitlines()
        assert word in line
    assert {one.name for one in tmp_path.iterdir()} == {"own.jsonl", "home"}


def test_chinese_answers_are_pointed_out_since_the_embedded_base_hardly_knows_chinese(
    embedded_rows: Path, tmp_path: Path
) -> None:
    answers = ("请先检查电源和网线，然后重新启动打印机。", "鑫源公司成立于二零零三年，总部设在苏州工业园区。")
    rows = [json.dumps({"prompt": "你好", "completion": one}, ensure_ascii=False) for one in answers]
    (tmp_path / "own.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    done = check(tmp_path, "own.jsonl")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("Ready to train.")
    assert "is Chinese, Japanese or Korean, but this base's tokenizer takes" in done.stdout
    (warning,) = json.loads(check(tmp_path, "own.jsonl", "--json").stdout)["warnings"]
    tokens = float(warning.partition("takes ")[2].split()[0])
    assert 1.8 <= tokens <= 2.2
    assert json.loads(check(tmp_path, str(embedded_rows), "--json").stdout)["warnings"] == []
