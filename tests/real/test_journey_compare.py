"""`compare` and `chat` on a real run: the losses that the run measured, its answers, on a pipe and a terminal."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs.folders import edit, tensors
from journey_harness import environment, refused, run, succeeded

from lora_practice.inference import compare
from lora_practice.machine.device import Facts, choose_device

CLI = ("-m", "lora_practice.cli")
QUESTION = "My printer is not printing."


def first_question(trained):
    """A sample that asks one line and nothing before it."""
    return next(one for one in trained.record["samples"] if "earlier" not in one and "\n" not in one["prompt"])


def test_the_losses_are_those_that_the_run_measured_and_answers_differ(trained, tmp_path):
    sample = first_question(trained)
    words = (*CLI, "compare", str(trained.folder), "--prompt", sample["prompt"], "--max-new-tokens", "12", "--json")
    done = succeeded(run(tmp_path, *words, LORA_PRACTICE_LANG="zh"))  # the keys are the same in every language
    found = json.loads(done.stdout)
    held_out, recorded = found["held_out"], trained.record["held_out_loss"]
    assert held_out["rows"] == 4
    assert held_out["loss"]["base"] == pytest.approx(recorded["before"], abs=2e-3)
    assert held_out["loss"]["fine-tuned"] == pytest.approx(recorded["after"], abs=2e-3)
    answers = found["answers"][0]["answers"]
    assert sample["base"].startswith(answers["base"].strip()[:20])
    assert sample["adapter"].startswith(answers["fine-tuned"].strip()[:20])


def test_two_folders_are_compared_and_data_that_changed_is_said(trained, copied, tmp_path):
    record = json.loads((copied / "run_record.json").read_text("utf-8"))
    record["data"]["fingerprint"] = "0" * 64
    (copied / "run_record.json").write_text(json.dumps(record), "utf-8")
    words = ("--prompt", QUESTION, "--max-new-tokens", "6")
    done = succeeded(run(tmp_path, *CLI, "compare", str(trained.folder), "copy", *words))
    first, second = (line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("["))
    assert first == second
    assert "may have seen the validation rows" in done.stderr
    done = succeeded(run(tmp_path, *CLI, "compare", "copy", *words))
    assert "the data is not what it was" in done.stderr
    done = succeeded(run(tmp_path, *CLI, "compare", str(trained.folder), *words))
    assert "loss on 4 validation rows (lower is better): base " in done.stdout
    record["data"].pop("rows_held_out")  # and its output_dir is where it lay before it was moved
    (copied / "run_record.json").write_text(json.dumps(record), "utf-8")
    done = succeeded(run(tmp_path, *CLI, "compare", "copy", *words))
    assert "not compared: copy: this run has no validation set" in done.stderr
    refused(run(tmp_path, *CLI, "compare", "copy", "copy"), "both folders are the same one")


@pytest.mark.filterwarnings("error:.*past_key_values")
@pytest.mark.parametrize("path", ["fast path", "transformers"])
def test_both_columns_are_written_in_turn_and_say_what_each_says_alone(trained, copied, path):
    tensors(lambda found: {name: value * (3 if "lora_B" in name else 1) for name, value in found.items()})(copied)
    edit("run_record.json", files={})(copied)
    for other in (None, str(copied)):
        sides = compare.two_sides(str(trained.folder), other, choose_device(Facts(memory=8 << 30)))
        chat_models = {side.key: side.chat_model for side in sides}
        assert all(one.decoder is not None for one in chat_models.values())
        if path == "transformers":
            chat_models = {
                key: dataclasses.replace(one, model=one.model.float(), decoder=None) for key, one in chat_models.items()
            }
        asked = [{"role": "user", "content": "Do you have feelings?"}]
        texts = list(compare.in_turn({key: one.stream(asked, 12) for key, one in chat_models.items()}))
        grown = [
            next(key for key in chat_models if old[key] != new[key]) for old, new in zip(texts, texts[1:]) if old != new
        ]
        both = grown[: 2 * min(map(grown.count, chat_models))]
        assert len(both) > 6 and both == [*chat_models] * (len(both) // 2)
        assert texts[-1] == {key: one.answer(asked, max_new_tokens=12) for key, one in chat_models.items()}
        assert len({*texts[-1].values()}) == 2
        first, second = (one.model.get_base_model().get_input_embeddings().weight for one in chat_models.values())
        assert first.data_ptr() == second.data_ptr()  # one base in memory


def test_a_piped_chat_answers_each_line_and_hears_the_base(trained, tmp_path):
    sample = first_question(trained)
    question = sample["prompt"]
    lines = f"{question}\n/reset\n/adapter off\n{question}\n/save kept.jsonl\n"
    command = [sys.executable, *CLI, "chat", str(trained.folder), "--max-new-tokens", "12"]
    options: dict = {"input": lines, "capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path / "home"), **options)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "\x1b" not in done.stdout
    asked, adapted, once_more, bare = (line.strip() for line in done.stdout.splitlines() if line.strip())
    assert asked == once_more == f"> {question}"
    assert sample["adapter"].strip().startswith(adapted[:20]) and sample["base"].strip().startswith(bare[:20])
    assert json.loads((tmp_path / "kept.jsonl").read_text("utf-8"))["messages"][0]["content"] == question


@pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="no pseudo-terminals here")
def test_a_chat_on_a_real_terminal_edits_breaks_lines_stops_an_answer_and_ends(trained, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    command = [*CLI, "chat", str(trained.folder), "--max-new-tokens", "60"]
    env = environment(tmp_path / "home", TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    terminal = pexpect.spawn(sys.executable, command, cwd=str(tmp_path), env=env, encoding="utf-8", timeout=120)
    terminal.expect("a chat with " + re.escape(str(trained.folder)))
    terminal.expect("/save FILE")
    terminal.expect("you>")  # the space after it is drawn by moving the cursor
    terminal.send("first line\x1b\rsecond line\r")
    terminal.send("/adapter off\r")
    terminal.expect("the base answers now")
    terminal.expect(r"base\)>")
    terminal.send("/save kept.jsonl\r")
    terminal.expect("saved to kept.jsonl")
    terminal.send("half a quest\x03")  # drops the line, not the chat
    terminal.send("/exit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert (
        json.loads((tmp_path / "kept.jsonl").read_text("utf-8"))["messages"][0]["content"] == "first line\nsecond line"
    )
    assert "+first line" in Path(environment(tmp_path / "home")["LORA_PRACTICE_CACHE"], "chat_history").read_text(
        "utf-8"
    )


def test_report_can_make_the_answers_afterwards(copied):
    record = json.loads((copied / "run_record.json").read_text("utf-8"))
    before = record.pop("samples")
    (copied / "run_record.json").write_text(json.dumps(record), "utf-8")
    succeeded(run(copied.parent, *CLI, "report", "copy", "--answers"))
    after = json.loads((copied / "run_record.json").read_text("utf-8"))["samples"]
    assert after == before
    assert before[1]["adapter"].strip()[:20] in (copied / "report.html").read_text("utf-8").replace("&#39;", "'")
