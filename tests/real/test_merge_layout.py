"""Adapter and merged weights in one place: what the libraries do with the layout that is not used (docs/merge.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

WORDS = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokenizer(WORDS, return_tensors="pt")["input_ids"]).logits


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def name_base(folder: Path, base: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


@pytest.fixture(scope="module")
def once(trained, embedded_model, tokenizer) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(plain(embedded_model), str(trained.folder)), tokenizer)


@pytest.fixture(scope="module")
def twice(trained, tokenizer) -> torch.Tensor:
    """The merged weights with the adapter added again."""
    return logits(PeftModel.from_pretrained(plain(trained.folder / "merged"), str(trained.folder)), tokenizer)


@pytest.fixture
def both(trained, tmp_path) -> Path:
    folder = tmp_path / "both"
    folder.mkdir()
    for place in (trained.folder / "merged", trained.folder):
        for file in place.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
    return folder


def test_transformers_5_adds_the_adapter_to_the_merged_weights_without_a_word(both, tokenizer, once, twice):
    """transformers 4 reads the base that the adapter names, and is right."""
    assert float((once - twice).abs().max()) > 1
    wanted = twice if Version(transformers.__version__).major >= 5 else once
    assert torch.allclose(logits(plain(both), tokenizer), wanted, atol=1e-3)


def test_peft_is_right_as_long_as_the_base_is_at_hand(both, tokenizer, once):
    model = AutoPeftModelForCausalLM.from_pretrained(str(both), dtype=torch.float32)
    assert torch.allclose(logits(model, tokenizer), once, atol=1e-3)
    name_base(both, str(both / "gone"))
    with pytest.raises((OSError, HFValidationError)):  # the second from transformers 4: it takes the path for a name
        AutoPeftModelForCausalLM.from_pretrained(str(both), local_files_only=True)


def test_a_folder_that_names_itself_as_the_base_is_wrong_for_both_libraries(both, tokenizer, twice):
    name_base(both, str(both))
    model = AutoPeftModelForCausalLM.from_pretrained(str(both), dtype=torch.float32)
    assert torch.allclose(logits(model, tokenizer), twice, atol=1e-3)
