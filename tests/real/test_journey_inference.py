"""Talking to what was trained: every kind of folder, streamed, ended at the end of turn, on a terminal too."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from journey_harness import INFER, environment, infer, refused, succeeded

from lora_practice.inference import load as load_chat
from lora_practice.machine.device import Facts, choose_device

CPU = choose_device(Facts())
SHORT = ("--max-new-tokens", "12")
QUESTION = "My printer is not printing."


@pytest.fixture(scope="module")
def chat_model(trained):
    return load_chat.load_chat_model(str(trained.folder), CPU)


def by_hand(folder: Path, base: Path, prompt: str, tokens: int) -> str:
    """The greedy answer as transformers and peft give it without our code."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(trained, embedded_model) -> dict[str, str]:
    return {prompt: by_hand(trained.folder, embedded_model, prompt, 12) for prompt in (QUESTION, "Tell me a joke.")}


def test_greedy_answers_are_those_of_transformers_and_peft_by_hand(trained, tmp_path, expected):
    prompts = [word for prompt in expected for word in ("--prompt", prompt)]
    done = succeeded(infer(tmp_path, "--model-dir", str(trained.folder), *SHORT, *prompts))
    assert done.stdout == "".join(f"> {prompt}\n{answer}\n" for prompt, answer in expected.items())
    assert done.stderr.count("(cut at 12 tokens: --max_new_tokens N)") == 2
    command = [sys.executable, INFER, "--model-dir", str(trained.folder), *SHORT]
    options: dict = {"input": "\n".join(expected), "capture_output": True, "text": True, "encoding": "utf-8"}
    piped = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path / "home"), timeout=300, **options)
    assert succeeded(piped).stdout == done.stdout


def test_a_checkpoint_answers_the_same_even_when_the_cache_was_moved(trained, tmp_path, expected, embedded_model):
    copy = Path(shutil.copytree(trained.folder, tmp_path / "copy"))
    for place in (copy, copy / "checkpoint-8"):
        config = json.loads((place / "adapter_config.json").read_text("utf-8"))
        config["base_model_name_or_path"] = f"/no/such/cache/{embedded_model.name}"
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "moved").symlink_to(embedded_model.parent)
    flags = ("--model-dir", "copy/checkpoint-8", *SHORT, "--prompt", QUESTION)
    done = succeeded(infer(tmp_path, *flags, LORA_PRACTICE_CACHE=str(tmp_path / "moved")))
    assert done.stdout == expected[QUESTION] + "\n"


def test_a_merged_folder_answers_without_any_base(trained, tmp_path, expected):
    flags = ("--model-dir", str(trained.folder / "merged"), *SHORT, "--prompt", QUESTION)
    done = succeeded(infer(tmp_path, *flags, LORA_PRACTICE_CACHE=str(tmp_path / "empty"), HF_HUB_OFFLINE="1"))
    assert done.stdout[:20] == expected[QUESTION][:20]  # rounded to fp16 once, so a late word may differ
    assert not (tmp_path / "empty").exists()


def test_a_folder_without_tokenizer_takes_the_named_one_and_says_so(copied, tmp_path, expected, embedded_model):
    for file in copied.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt", "chat_template.jinja"):
            file.unlink()
    flags = ("--model-dir", "copy", "--base-model", str(embedded_model), *SHORT, "--prompt", QUESTION)
    done = succeeded(infer(tmp_path, *flags))
    assert "no tokenizer in the folder" in done.stderr
    assert done.stdout == expected[QUESTION] + "\n"


def test_the_answer_comes_piece_by_piece_and_nothing_is_stripped_or_lost(chat_model):
    pieces: list[str] = []
    messages = [{"role": "user", "content": "用中文说：你好，世界！"}]
    answer = chat_model.answer(messages, max_new_tokens=24, on_text=pieces.append)
    assert "".join(pieces) == answer and len([piece for piece in pieces if piece]) > 3
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_the_answer_ends_at_the_end_of_turn(chat_model):
    answer = chat_model.answer([{"role": "user", "content": "What is the capital of France? One sentence."}], 128)
    assert "<|im_end|>" not in answer and "<|im_start|>" not in answer
    assert len(chat_model.tokenizer(answer)["input_ids"]) < 100


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(chat_model):
    from transformers import set_seed

    def sample(seed: int) -> str:
        set_seed(seed)
        return chat_model.answer([{"role": "user", "content": "Tell me a story."}], 16, temperature=1.0, top_p=0.95)

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("no/such/folder", "no such folder"),
        ("empty", "no trained model here"),
        ("a-file", "no such folder"),
    ],
)
def test_a_wrong_folder_is_one_clear_line(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("x")
    refused(infer(tmp_path, "--model-dir", folder, "--prompt", "Hi"), words, folder)


def test_a_damaged_adapter_is_one_clear_line(copied, tmp_path):
    with open(copied / "adapter_model.safetensors", "r+b") as file:
        file.truncate(10_000)
    refused(infer(tmp_path, "--model-dir", "copy", "--prompt", "Hi"), "copy", "damaged")


def test_without_prompt_and_terminal_it_says_what_to_pass(tmp_path):
    refused(infer(tmp_path), "--prompt")


class Terminal:
    """inference.py on a pseudo-terminal, as a person has it."""

    def __init__(self, place: Path, *flags: str) -> None:
        pty = pytest.importorskip("pty")
        self.master, slave = pty.openpty()
        env = environment(place / "home", TERM="dumb")
        command = [sys.executable, INFER, *flags]
        self.process = subprocess.Popen(command, cwd=place, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.words = ""

    def type(self, line: str) -> None:
        """As a person does, not in the moment between the prompt and the first key that it can take."""
        import termios

        deadline = time.monotonic() + 30
        while termios.tcgetattr(self.master)[3] & termios.ICANON:
            assert time.monotonic() < deadline, self.words
            time.sleep(0.01)
        os.write(self.master, line.encode())

    def read_until(self, wanted: str, seconds: float = 90) -> str:
        """What came since the last call, up to `wanted`."""
        deadline, start = time.monotonic() + seconds, len(self.words)
        while wanted not in self.words[start:]:
            assert time.monotonic() < deadline, self.words
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.words += os.read(self.master, 4096).decode("utf-8", "replace").replace("\r\n", "\n")
                except OSError:  # Linux says so when the other side is closed
                    assert wanted in self.words[start:], self.words
        return self.words[start:].split(wanted)[0]


def test_a_chat_on_a_terminal_remembers_and_forgets_on_reset_and_ends_with_ctrl_d(trained, tmp_path, chat_model):
    def answer(*turns: str) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return chat_model.answer(messages, max_new_tokens=12)

    first = answer(QUESTION)
    second = answer(QUESTION, first, QUESTION)
    terminal = Terminal(tmp_path, "--model-dir", str(trained.folder), *SHORT)
    try:
        terminal.read_until("you> ")
        for typed, wanted in ((QUESTION, first), (QUESTION, second), ("/reset", "started over"), (QUESTION, first)):
            terminal.type(typed + "\n")
            said = terminal.read_until("you> ")
            said = said.removeprefix(typed).replace("(cut at 12 tokens: --max_new_tokens N)", "")
            assert said.strip() == wanted.strip()
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        assert "Traceback" not in terminal.words
    finally:
        terminal.process.kill()
        terminal.process.wait()
        with contextlib.suppress(OSError):
            os.close(terminal.master)
