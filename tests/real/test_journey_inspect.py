"""`inspect` on a really trained folder, and on copies of it that are spoiled as folders are spoiled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Callable

import pytest
from bad_inputs.folders import cut, edit, make_base, make_output, tensors
from journey_harness import run, succeeded

from lora_practice.run.file_kinds import file_kind

INSPECT = ("-m", "lora_practice.cli", "inspect")
WEIGHTS = "adapter_model.safetensors"
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def zero(name: str) -> Callable[[Path], None]:
    """Nothing in the matrices of this name."""
    return tensors(lambda found: {key: value * (0 if name in key else 1) for key, value in found.items()})


def adapter_of_a_smaller_base(folder: Path) -> None:
    """The weights of another adapter, trained on a model with other shapes, under the same names."""
    other = make_output(folder.parent / "other", make_base(folder.parent / "small"))
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())


def trained_with_every_label_ignored(folder: Path) -> None:
    """A step of plain PEFT and AdamW on the embedded model where each label is -100: its loss is over no token."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_practice.sources import embedded

    base, ids = str(embedded.model_dir()), torch.arange(8)[None]
    lora = LoraConfig(r=6, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-2)
    model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
    optimizer.step()
    for file in folder.iterdir():  # such a folder has no record of a run of ours
        if file.is_file():
            file.unlink()
    model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def test_a_trained_folder_is_whole_and_each_file_is_explained(trained, tmp_path):
    said = succeeded(run(tmp_path, *INSPECT, str(trained.folder))).stdout
    for name in (one.name + "/" * one.is_dir() for one in trained.folder.iterdir()):
        line, words = said[said.index(f"\n{name} ") + 1 :].splitlines()[:2]
        kind = file_kind(name)
        assert kind is not None and " yes" in line and words.strip() == f"{kind.en}: {kind.en_when}"
        assert all(use in line for use in kind.needed_for)
    assert "rank 6, alpha 8 (the update times 1.333), 210 matrices, 1,831,680 parameters" in said
    assert (
        "\n! " not in said
        and "\ninference  yes         lora-practice chat " in said
        and "\nresuming   not needed " in said
    )
    assert all(f"\n  {kind} " in said for kind in KINDS) and "moved most: model.layers." in said


def test_its_numbers_are_those_of_the_weights_that_peft_loads(trained, tmp_path, embedded_model):
    import torch

    from lora_practice.inference import load as load_chat
    from lora_practice.model.load import load_base
    from lora_practice.sources.find import Source

    found = json.loads(succeeded(run(tmp_path, *INSPECT, str(trained.folder), "--json")).stdout)
    base = load_base(Source("folder", str(embedded_model), embedded_model), "fp32")
    model = load_chat.with_adapter(base, trained.folder)
    whole = {name: one for name, one in model.get_base_model().named_modules() if hasattr(one, "get_delta_weight")}
    assert {one["module"] for one in found["layers"]} == set(whole)
    for one in found["layers"]:
        with torch.no_grad():
            change = whole[one["module"]].get_delta_weight("default")
        assert one["norm"] == pytest.approx(float(change.norm()), rel=1e-4) and one["norm"] > 0
        assert (one["rank"], tuple(one["shape"])) == (6, tuple(change.shape))
    assert found["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert all(one["whole"] and one["what"] and one["used"] for one in found["files"]) and not found["findings"]


@pytest.mark.parametrize(
    ("spoil", "zh", "en", "usable"),
    [
        (zero("lora_B"), "所有的 B 都是零", "every B is zero", False),
        (zero("layers.3.mlp.up_proj.lora_B"), "1 个 LoRA 模块的 B 是零", "B is zero in 1 LoRA module,", False),
        (trained_with_every_label_ignored, "所有的 B 都是零", "every B is zero", True),
        (edit("run_record.json", steps=0), "一步都没有训练", "not one step was trained", True),
        (
            edit("run_record.json", data={"trained_tokens": 0}),
            "没有一个 token 参与训练",
            "not one token was trained",
            True,
        ),
        (cut(WEIGHTS, 4_000_000), f"{WEIGHTS}: 已损坏", f"{WEIGHTS}: it is damaged", False),
        (adapter_of_a_smaller_base, "适配器属于另一个底座", "the adapter is of another base", False),
        (edit("adapter_config.json", base_model_name_or_path="gpt2"), "底座写的是 'gpt2'", "the base is 'gpt2'", False),
    ],
    ids=["zero", "a zero layer", "labels", "no step", "no token", "cut off", "other shapes", "other name"],
)
def test_what_is_wrong_with_a_spoiled_folder_is_said_in_chinese_and_english_and_as_json(copied, spoil, zh, en, usable):
    spoil(copied)
    said = succeeded(run(copied.parent, *INSPECT, "copy", LORA_PRACTICE_LANG="zh")).stdout
    assert any(zh in line for line in said.splitlines() if line.startswith("！")), said
    assert re.search(rf"\n推理 +{'能' if usable else '不能'} ", said)
    found = json.loads(succeeded(run(copied.parent, *INSPECT, "copy", "--json")).stdout)
    assert any(en in line for line in found["findings"]), found["findings"]
    assert found["uses"]["inference"]["possible"] is usable
