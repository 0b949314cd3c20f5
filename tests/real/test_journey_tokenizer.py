"""The tokenizer group of the output folder, as older readers understand it."""

from __future__ import annotations

import json

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers

WORDS = [
    "Hello, how are you today?",
    "  two spaces\n\nand lines\t",
    "你好，世界！今天天气怎么样？",
    "naïve café — “quoted”",
    "🙂 emoji",
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize("words", WORDS)
def test_vocab_and_merges_give_the_same_ids_in_a_reader_of_the_two_old_files(trained, tokenizer, words):
    files = str(trained.folder / "vocab.json"), str(trained.folder / "merges.txt")
    wanted = tokenizer(words)["input_ids"]
    assert ByteLevelBPETokenizer(*files, add_prefix_space=False).encode(words).ids == wanted
    plain = Tokenizer(models.BPE.from_file(*files))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain.encode(words).ids == wanted


def test_tokenizer_json_loads_alone_and_agrees_with_digits_too(trained, tokenizer):
    alone = Tokenizer.from_file(str(trained.folder / "tokenizer.json"))
    for words in [*WORDS, "<|im_start|>user\n12345 + 67<|im_end|>"]:
        assert alone.encode(words).ids == tokenizer(words)["input_ids"]


def test_the_configuration_names_nothing_that_transformers_4_does_not_know(trained):
    config = json.loads((trained.folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] in ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
    assert not isinstance(config.get("extra_special_tokens"), list)
    named = json.loads((trained.folder / "special_tokens_map.json").read_text("utf-8"))
    assert named["eos_token"] == "<|im_end|>" and named["pad_token"]
    assert {*named["additional_special_tokens"]} == {"<|im_start|>", "<|im_end|>"}


def test_the_template_stands_in_both_places_and_renders_the_same(trained, tokenizer):
    config = json.loads((trained.folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == (trained.folder / "chat_template.jinja").read_text("utf-8")
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=config["chat_template"]) == wanted


@pytest.mark.parametrize("place", [".", "checkpoint-8", "merged"])
def test_transformers_loads_the_folder_with_the_same_ids_ends_and_template(trained, tokenizer, place):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(trained.folder / place)
    for words in [*WORDS, "<|im_start|>12345<|im_end|>"]:
        assert again(words)["input_ids"] == tokenizer(words)["input_ids"]
    assert set(again("a")) == {"input_ids", "attention_mask"}  # what `model.generate(**inputs)` takes
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
