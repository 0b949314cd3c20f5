"""Merging: a plain model that needs no base, in a folder below the adapter, which stays what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from journey_harness import refused, run, succeeded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_practice.export import merge

WORDS = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PLAIN_CHECK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(sys.argv[1])(open(sys.argv[2]).read(), return_tensors="pt")["input_ids"]
torch.save(model(ids).logits.detach(), sys.argv[3])
"""


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokenizer(WORDS, return_tensors="pt")["input_ids"]).logits


@pytest.fixture(scope="module")
def adapted(trained, embedded_model, tokenizer) -> torch.Tensor:
    """The logits of the base with the adapter beside it, in fp32."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(trained.folder)), tokenizer)


def test_the_merged_folder_loads_as_a_plain_model_without_the_base_at_hand(trained, tmp_path, adapted):
    (tmp_path / "check.py").write_text(PLAIN_CHECK, "utf-8")
    (tmp_path / "words").write_text(WORDS, "utf-8")
    alone = Path(shutil.copytree(trained.folder / "merged", tmp_path / "alone"))
    nothing = {"LORA_PRACTICE_CACHE": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    succeeded(run(tmp_path, "check.py", str(alone), "words", "logits.pt", **nothing))
    alone = torch.load(tmp_path / "logits.pt")
    assert float((alone - adapted).abs().max()) < 0.25  # fp16 weights; the adapter itself moves a logit by 2.5
    assert alone[0, -1].argmax() == adapted[0, -1].argmax()


def test_the_merged_weights_are_in_the_precision_of_the_base_and_complete(trained, embedded_model):
    merged = load_file(trained.folder / "merged" / "model.safetensors")
    original = load_file(embedded_model / "model.safetensors")
    assert merged.keys() == original.keys()
    assert {one.dtype for one in merged.values()} == {one.dtype for one in original.values()} == {torch.float16}
    changed = {name for name, one in merged.items() if not one.equal(original[name])}
    assert changed and all("_proj." in name for name in changed)


def test_the_merged_folder_says_where_to_stop_and_holds_the_tokenizer(trained):
    folder = trained.folder / "merged"
    config = json.loads((folder / "generation_config.json").read_text("utf-8"))
    ends = config["eos_token_id"]
    assert 2 in (ends if isinstance(ends, list) else [ends])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text("utf-8"))
    assert not (folder / "adapter_config.json").exists()
    assert {"tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja"} <= {f.name for f in folder.iterdir()}


def test_the_output_folder_still_loads_as_an_adapter(trained, tokenizer, adapted):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(trained.folder), dtype=torch.float32)
    assert torch.allclose(logits(model, tokenizer), adapted, atol=1e-4)


def test_merging_needs_no_second_training_and_is_not_done_twice(copied, tmp_path, trained):
    shutil.rmtree(copied / "merged")
    command = ("-m", "lora_practice.cli", "merge", "copy")
    done = succeeded(run(tmp_path, *command))
    assert "copy/merged/" in done.stderr and "rounding to 16 bits, as expected" in done.stderr
    assert done.stderr.rstrip().endswith("\n  lora-practice chat copy/merged")  # what to do next
    one, two = (load_file(place / "merged" / "model.safetensors") for place in (copied, trained.folder))
    assert all(one[name].equal(two[name]) for name in two)
    refused(run(tmp_path, *command), "already merged", "to use it: lora-practice chat", "merged")
    assert not list(copied.glob(".writing-*"))


def test_merging_a_folder_without_adapter_is_one_clear_line(tmp_path):
    (tmp_path / "nothing").mkdir()
    refused(run(tmp_path, "-m", "lora_practice.cli", "merge", "nothing"), "no adapter here", "nothing")


def test_a_disk_that_is_too_small_for_merging_is_said_before_anything_is_written(copied, monkeypatch):
    from lora_practice.console.errors import UserError

    shutil.rmtree(copied / "merged")
    usage = shutil.disk_usage(copied)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match="not enough disk"):
        merge.merge_adapter(copied)
    assert not (copied / "merged").exists() and not list(copied.glob(".writing-*"))
