"""Export of a really trained adapter: llama.cpp answers as the adapter does; the proof sees what is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gguf_folders import ollama_prompt
from journey_harness import TRAIN, refused, run, succeeded

from lora_practice.cli import main as cli
from lora_practice.export import llama_cpp, parity

pytestmark = pytest.mark.skipif(bool(llama_cpp.missing()), reason="xllamacpp (llama.cpp) is not installed")
EXPORT = ("-m", "lora_practice.cli", "export")
FORMS = ["merged/", "merged-f16.gguf", "merged-q8_0.gguf", "adapter.gguf"]
# long enough for the adapter to change answers and to end them, which the base does not always
LEARNT = ("--embedded", "--train_subset_size", "160", "--max_steps", "20", "--gradient_accumulation_steps", "4")


@dataclass(frozen=True)
class Exported:
    """A trained folder after `lora-practice export`, and what that said."""

    folder: Path
    done: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def exported(tmp_path_factory, embedded_model, embedded_rows) -> Exported:
    """Only to be looked at."""
    place = tmp_path_factory.mktemp("exported")
    flags = ("--learning_rate", "1e-3", "--save_strategy", "no", "--output_dir", "out")
    succeeded(run(place, TRAIN, *LEARNT, *flags, timeout=900))
    return Exported(place / "out", run(place, *EXPORT, "out", timeout=900))


def verdicts(shown: str) -> dict[str, str]:
    """What the printed proof says of each form."""
    rows = [line.split() for line in shown.splitlines() if line.endswith(("PASS", "FAIL")) and line.startswith("  ")]
    return {row[0]: row[-1] for row in rows}


def words_in(reader, key: str):
    """The bytes of a string in a GGUF, which may be written to."""
    return reader.fields[key].parts[-1]


def test_every_form_passes_and_the_card_says_so(exported):
    succeeded(exported.done)
    assert verdicts(exported.done.stdout) == dict.fromkeys(["adapter", *FORMS], "PASS"), exported.done.stdout
    next_step = ["PASS", "with Ollama:", "  cd out/gguf && ollama create my-model -f Modelfile"]
    assert exported.done.stdout.splitlines()[-3:] == next_step and "the merged model is in" in exported.done.stderr
    assert {one.name for one in (exported.folder / "gguf").iterdir()} == {*FORMS[1:], "Modelfile"}
    card = (exported.folder / "README.md").read_text("utf-8")
    assert "## Exported forms: PASS" in card and all(f"\n| {form} | 4 | " in card for form in FORMS)
    assert not list(exported.folder.glob(".writing-*"))
    refused(run(exported.folder.parent, *EXPORT, "out"), "already exported", "--check")


def test_llama_cpp_says_what_plain_transformers_and_peft_say(exported, embedded_model, tokenizer):
    """The reference here is `generate` of transformers itself, not this project's own decoder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    chat = [{"role": "user", "content": "Do you have feelings?"}]  # of which the base talks on and on
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    def answer(model) -> list[int]:
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        return model.generate(torch.tensor([ids]), **options, pad_token_id=0)[0, len(ids) :].tolist()

    before = answer(base)
    wanted = answer(PeftModel.from_pretrained(base, str(exported.folder)))
    llama = llama_cpp.Llama(exported.folder / "gguf" / "merged-f16.gguf")
    assert llama.prompt_ids(chat) == ids
    said, ended = llama.greedy(ids, 24)
    assert said + [tokenizer.eos_token_id] * ended == wanted != before


def test_the_modelfile_writes_each_prompt_as_the_template_does(exported, tokenizer):
    modelfile = (exported.folder / "gguf" / "Modelfile").read_text("utf-8")
    assert "\nFROM ./merged-q8_0.gguf\n" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
    for chat in parity.PROMPTS:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ollama_prompt(modelfile, chat) == rendered


def test_files_that_lost_something_fail_the_proof_each_for_its_own_reason(exported, tmp_path, monkeypatch, capsys):
    """The very files, spoiled in place: q as transformers keeps it, a strange template, an adapter of zeros."""
    import gguf

    broken = Path(shutil.copytree(exported.folder, tmp_path / "broken"))
    f16, q8_0, adapter = (gguf.GGUFReader(broken / "gguf" / name, "r+") for name in FORMS[1:])
    for one in f16.tensors:
        if one.name.endswith("attn_q.weight"):
            heads = int(words_in(f16, "llama.attention.head_count")[0])
            rows, columns = one.data.shape
            halves = one.data.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)
            one.data[:] = halves.reshape(rows, columns).copy()
    template = words_in(q8_0, "tokenizer.chat_template")
    other = b"{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}{# "
    template[:] = list(other + b" " * (len(template) - len(other) - 3) + b" #}")
    for one in adapter.tensors:
        if one.name.endswith(".lora_b"):
            one.data[:] = 0
    for reader in (f16, q8_0, adapter):
        reader.data.flush()
    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[1:3])
    monkeypatch.setattr(parity, "LONGEST", 64)  # a model that lost its way talks on and on
    with pytest.raises(SystemExit) as left:
        cli(["export", str(broken), "--check"])
    assert left.value.code == 1
    shown = capsys.readouterr().out
    assert verdicts(shown) == {"adapter": "PASS", "merged/": "PASS", **dict.fromkeys(FORMS[1:], "FAIL")}, shown
    assert shown.splitlines()[-1] == "FAIL"
    f16_said, q8_0_said, adapter_said = re.split(r"\n  (?=\S)", shown)[-3:]
    assert "logits too far off" in f16_said and "other template tokens" not in f16_said
    assert "other template tokens" in q8_0_said
    assert "logits too far off" in adapter_said and "other template tokens" not in adapter_said
    card = (broken / "README.md").read_text("utf-8")
    assert card.count("## Exported forms: ") == card.count("## Exported forms: FAIL") == 1
