"""LoRA's variants, trained for real: the first lines say which path computes them; what is saved is used right."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from journey_harness import succeeded, train

from lora_practice.export import gguf, llama_cpp, merge, parity
from lora_practice.inference import load as load_chat
from lora_practice.machine.device import Facts, choose_device
from lora_practice.model.load import load_base
from lora_practice.report.checks import check_folder
from lora_practice.sources.find import Source

FAST, PLAIN = "fast path: ", "; taking the plain path"
VARIANTS: dict[str, tuple[tuple[str, ...], str, int]] = {  # flags, what the run says, rank of what is saved
    "rslora, some layers": (("--use_rslora", "--target_modules", "q_proj,v_proj"), FAST, 6),
    "dora": (("--use_dora",), "not served by the fast path: DoRA" + PLAIN, 6),
    "loraplus": (("--loraplus_lr_ratio", "16"), FAST, 6),
    "pissa": (("--init_lora_weights", "pissa_niter_4"), FAST, 12),
    "olora": (("--init_lora_weights", "olora"), FAST, 12),
    "4 bits": (("--load_in_4bit",), PLAIN, 6),
}
# Two steps of two short rows: on the plain path too a matter of seconds.
SHORT = ("--embedded", "--dataset_path", "rows.jsonl", "--gradient_accumulation_steps", "2", "--max_steps", "2")
ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request, tmp_path_factory, embedded_model, embedded_rows) -> tuple[str, Path, str]:
    """(name, output folder, what the run said)."""
    if request.param == "4 bits" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install -e '.[bnb]'")
    place = tmp_path_factory.mktemp("family")
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in (1, 2, 3, 4)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = (*SHORT, "--learning_rate", "1e-3", "--save_strategy", "no", *VARIANTS[request.param][0])
    return request.param, place / "out", succeeded(train(place, *flags, "--output_dir", "out")).stderr


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1]


def test_a_variant_says_its_path_and_merges_and_answers_as_pefts_own_model(variant, tmp_path, embedded_model):
    name, folder, said = variant
    assert VARIANTS[name][1] in said
    verdict = check_folder(folder)
    assert verdict.findings == [] and verdict.uses["inference"].possible
    assert {one.rank for one in verdict.adapter.modules} == {VARIANTS[name][2]}
    assert len({one.target for one in verdict.adapter.modules}) == (2 if "some layers" in name else 7)
    chat_model = load_chat.load_chat_model(str(folder), choose_device(Facts(memory=8 << 30)))
    assert (chat_model.decoder is None) == (name == "dora")
    assert chat_model.answer(ASK, max_new_tokens=8)
    base = load_base(Source("folder", str(embedded_model), embedded_model), "fp32")
    ids = chat_model.tokenizer("The quick brown fox")["input_ids"]
    without = logits(base, ids)
    wanted = logits(load_chat.with_adapter(base, folder), ids)
    assert float((wanted - without).abs().max()) > 0.01
    found = chat_model.decoder.logits(ids) if chat_model.decoder else logits(chat_model.model, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    _, difference = merge.merge_adapter(Path(shutil.copytree(folder, tmp_path / "copy")))
    assert difference < 0.25


# the others are saved as one of these, or as plain LoRA
@pytest.mark.parametrize("variant", ["rslora, some layers", "dora", "pissa"], indirect=True, scope="module")
@pytest.mark.skipif(bool(llama_cpp.missing()), reason="xllamacpp (llama.cpp) is not installed")
def test_every_file_exported_from_a_variant_answers_as_its_adapter(variant, tmp_path, monkeypatch):
    name, folder, _ = variant
    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[2:3])
    monkeypatch.setattr(parity, "LONGEST", 6)  # after two steps an answer need not end, and DoRA's is slow to come
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    lines = gguf.export_gguf(copy, ("f16",))
    passed = {line.form for line in lines if line.verdict == "PASS"} - {lines[0].form}
    files = {"merged-f16.gguf"} if name == "dora" else {"merged-f16.gguf", "adapter.gguf"}
    assert passed == {"merged/", *files}, parity.result_table(lines)
    assert {one.name for one in (copy / "gguf").glob("*.gguf")} == files
