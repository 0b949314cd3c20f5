"""The Modelfile: what Ollama makes of a chat is what the jinja template makes of it, or there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
from gguf_folders import ollama_prompt

from lora_practice.export.ollama import modelfile, template_turns

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# every turn but the last loses its mark: no turn is written the same way twice
REWRITES = (
    "{% for m in messages %}{% if loop.last %}<|im_start|>{% endif %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
COUNTS = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
ASK = {"role": "user", "content": 'Hi, {{ friend }} \\ "quoted"\n你好'}
CHATS = [
    [ASK],
    [ASK, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "1 + 1"}],
    [{"role": "system", "content": "Be brief. 简短。"}, ASK],
    [{"role": "system", "content": "x"}, ASK, {"role": "assistant", "content": "a\n\nb"}, ASK],
]


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "MISTRAL", "QWEN3", "SMOLLM2"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_ollama_sends_the_token_ids_of_the_jinja_template(name, adds_bos):
    tokenizer = tiny.make_tokenizer(SMOLLM2 if name == "SMOLLM2" else getattr(tiny, name))
    turns = template_turns(tokenizer, adds_bos)
    assert turns is not None
    written = modelfile(turns, ["<|im_end|>"], "merged-q8_0.gguf", ["merged-f16.gguf"])
    assert 'PARAMETER stop "<|im_end|>"\n' in written and "\nFROM ./merged-q8_0.gguf\n" in written
    for chat in CHATS if name != "MISTRAL" else CHATS[:2]:  # MISTRAL takes no system message
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if adds_bos and wanted.startswith("<s>"):
            wanted = wanted[len("<s>") :]  # the program that reads it puts it there
        prompt = ollama_prompt(written, chat)
        ids = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in (prompt, wanted)]
        assert ids[0] == ids[1]


def test_the_message_that_a_template_puts_first_by_itself_becomes_SYSTEM():
    turns = template_turns(tiny.make_tokenizer(SMOLLM2), False)
    written = modelfile(turns, ["<|im_end|>"], "m.gguf", [])
    assert '\nSYSTEM """You are a helpful AI assistant named SmolLM"""\n' in written
    assert "SYSTEM" not in modelfile(template_turns(tiny.make_tokenizer(), False), [], "m.gguf", [])


@pytest.mark.parametrize("template", [REWRITES, COUNTS, "{{ messages[0]['content'] }}", "{{ 1 // 0 }}"])
def test_a_template_that_turns_cannot_express_gets_no_modelfile(template):
    assert template_turns(tiny.make_tokenizer(template), False) is None
