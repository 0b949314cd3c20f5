"""`inspect` says what each file is, what the folder is good for, and finds adapters that are not what they seem."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs.folders import cut, edit, make_base, make_output, swap_tokenizer, tensors, write
from safetensors.numpy import save_file

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import columns
from lora_practice.report.adapter_stats import lora_scale, measure_adapter
from lora_practice.report.base_weights import relative_changes
from lora_practice.report.checks import Use, check_folder
from lora_practice.report.folder_text import verdict_as_json, verdict_lines
from lora_practice.run.file_kinds import file_kind
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.storage import manifest, signature


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspected")
    folder = make_output(place / "out", make_base(place / "base"))
    write("README.md", b"# a card\n")(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_norms_are_those_of_the_full_product(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 20)).astype("f4"), random.normal(size=(7, 3)).astype("f4")
    names = ("layers.4.q_proj.lora_A.weight", "layers.4.q_proj.lora_B.weight")
    save_file(
        {f"base_model.model.{name}": value for name, value in zip(names, (a, b))},
        tmp_path / "adapter_model.safetensors",
    )
    layer = measure_adapter(tmp_path, {"lora_alpha": 6}).modules[0]
    whole = 2.0 * b.astype("f8") @ a.astype("f8")
    assert layer.norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
    assert layer.top == pytest.approx(np.linalg.svd(whole, compute_uv=False)[0], rel=1e-6)
    assert layer.rms == pytest.approx(math.sqrt((whole**2).mean()), rel=1e-6)
    assert (layer.module, layer.target, layer.depth, layer.rank, layer.shape) == (
        "layers.4.q_proj",
        "q_proj",
        4,
        3,
        (7, 20),
    )


def test_the_scale_is_pefts_own():
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"1": 10}, "target_modules": ["0", "1"]}
    for rslora in (False, True):
        config = LoraConfig(**options, use_rslora=rslora)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), config)
        for name in ("0", "1"):
            ours = lora_scale(name, 4, {**options, "use_rslora": rslora})
            assert ours == pytest.approx(model.get_submodule(f"base_model.model.{name}").scaling["default"])


def test_bfloat16_weights_are_read_without_torch(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    exact = measure_adapter(folder, {"lora_alpha": 8}).norm
    import torch

    save_file({name: value.to(torch.bfloat16) for name, value in load_file(file).items()}, file)
    assert measure_adapter(folder, {"lora_alpha": 8}).norm == pytest.approx(exact, rel=1e-2)


def test_a_whole_folder_has_no_findings_and_says_what_it_is_good_for(folder):
    verdict = check_folder(folder)
    assert verdict.findings == [] and verdict.base is not None
    assert verdict.uses["inference"].possible is True
    assert verdict.uses["resuming"] == Use(False, "the run is finished", needed=False)
    assert verdict.uses["sharing"] == Use(False, "its base is not on the Hub: nobody else has it")


@pytest.mark.parametrize(
    ("damage", "finding", "inference"),
    [
        (tensors(lambda t: {n: v * (0 if "lora_B" in n else 1) for n, v in t.items()}), "every B is zero", True),
        (tensors(lambda t: {n: v * float("nan") for n, v in t.items()}), "hold NaN or infinity", False),
        (tensors(lambda t: {n: v for n, v in t.items() if "q_proj.lora_B" not in n}), "only one of A and B", False),
        (
            tensors(lambda t: {n: v[:, :5].contiguous() if "lora_A" in n else v for n, v in t.items()}),
            "another base",
            False,
        ),
        (tensors(lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}), "another base", False),
        (cut("adapter_model.safetensors", 3000), "adapter_model.safetensors: it is damaged", False),
        (write("adapter_config.json", b"{"), "adapter_config.json: it is damaged", False),
        (write("tokenizer.json", b""), "tokenizer.json: it is empty", False),
        (swap_tokenizer, "the tokenizer is not the one", False),
        (cut("training_args.bin", 100), "training_args.bin: it is damaged", True),
        (edit("run_record.json", steps=0), "not one step was trained", True),
        (edit("run_record.json", data={"trained_tokens": 0}), "not one token was trained", True),
        (edit("run_record.json", model={"name": "someone/else"}), "in run_record.json", False),
        (write("model.safetensors", (8).to_bytes(8, "little") + b"{}      "), "adds the adapter twice", True),
    ],
)
def test_what_is_wrong_is_found(folder, damage, finding, inference):
    damage(folder)
    verdict = check_folder(folder)
    assert any(finding in one for one in verdict.findings), verdict.findings
    assert verdict.uses["inference"].possible is inference, verdict.uses


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", (9).to_bytes(8, "little") + b'{"a": ']
)
def test_a_base_whose_file_is_no_safetensors_is_a_finding(folder, content):
    """Such as a Git LFS pointer, whose first eight bytes would be a length of 10**18."""
    base = check_folder(folder).base
    whole = (base / "model.safetensors").read_bytes()
    write("model.safetensors", content)(base)
    verdict = check_folder(folder)
    (base / "model.safetensors").write_bytes(whole)
    assert any("model.safetensors is damaged" in one for one in verdict.findings), verdict.findings
    assert verdict.uses["inference"].possible is False


def test_weights_other_than_the_run_wrote_are_damage_and_an_edited_card_is_not(folder):
    names = ("adapter_model.safetensors", "README.md")
    edit("run_record.json", files={name: manifest.sha256(folder / name) for name in names})(folder)
    assert check_folder(folder).findings == []
    tensors(lambda t: {n: v * 2 for n, v in t.items()})(folder)
    write("README.md", "# 我的模型\n".encode())(folder)
    entries = {item.name: item for item in check_folder(folder).entries}
    assert entries["adapter_model.safetensors"].fault == "not what the run wrote"
    assert entries["README.md"].changed and not entries["README.md"].fault


def test_checkpoints_whole_and_not_and_what_can_be_resumed(folder, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent / "config"))
    signature._own_key.cache_clear()
    edit("run_record.json", status="interrupted")(folder)
    for number in (2, 10):
        checkpoint = folder / f"checkpoint-{number}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"state")
        signature.sign_checkpoint(checkpoint, "checkpoint.json")
    assert check_folder(folder).uses["resuming"] == Use(True, "from checkpoint-10: --resume")
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"stat")
    verdict = check_folder(folder)
    assert "checkpoint-10/: optimizer.pt is damaged" in verdict.findings
    assert verdict.uses["resuming"] == Use(True, "from checkpoint-2: --resume")
    assert [item.name for item in verdict.entries if "checkpoint" in item.name] == ["checkpoint-2/", "checkpoint-10/"]
    manifest.write_manifest(folder / "checkpoint-2", "checkpoint.json")  # as one from another machine: without a mark
    use = check_folder(folder).uses["resuming"]
    assert not use.possible and use.needed and "not saved by you on this machine" in use.why
    signature._own_key.cache_clear()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_an_interrupted_run_has_no_broken_files_but_an_adapter_yet_to_come(folder, language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    for file in folder.iterdir():
        if file.name != "run_record.json":
            file.unlink()
    edit("run_record.json", status="interrupted")(folder)
    monkeypatch.chdir(folder.parent)
    verdict = check_folder(Path("out"))
    assert verdict.findings == [] and not verdict.uses["inference"].possible
    words = "\n".join(verdict_lines(verdict))
    assert ("训练还没完成，完成时才写适配器" if language == "zh" else "the adapter is written at its end") in words
    assert not any(word in words for word in ("已损坏", "缺少", "damaged", "missing", "adapter_model"))
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    manifest.write_manifest(checkpoint, "checkpoint.json")
    words = "\n".join(verdict_lines(check_folder(Path("out"))))
    assert "lora-practice chat out/checkpoint-2" in words  # whole, to be copied


def test_what_is_missing_and_what_is_damaged_are_told_apart_and_no_name_is_split(folder, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json", "adapter_config.json"):
        (folder / name).unlink()
    write("adapter_model.safetensors", b"")(folder)
    monkeypatch.chdir(folder.parent)
    shown = list(verdict_lines(check_folder(Path("out"))))
    assert all(columns(line) <= 80 for line in shown)
    start = next(i for i, line in enumerate(shown) if line.startswith("inference"))
    words = [line.strip() for line in shown[start : start + 2]]
    assert words[0].endswith("missing: tokenizer.json, tokenizer_config.json,")
    assert words[1] == "adapter_config.json; damaged: adapter_model.safetensors"


def test_the_default_folder_needs_no_flag_to_be_uploaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = json.loads((folder / "run_record.json").read_text("utf-8"))["model"]
    edit("run_record.json", model={**model, "hub_id": "ann/base"})(folder)
    assert check_folder(folder).uses["sharing"].why == f"lora-practice upload --local_dir {folder} --repo_id …"
    (tmp_path / DEFAULT_OUTPUT_DIR).parent.mkdir()
    folder.rename(tmp_path / DEFAULT_OUTPUT_DIR)
    assert check_folder(Path(DEFAULT_OUTPUT_DIR)).uses["sharing"].why == "lora-practice upload --repo_id …"


def test_a_folder_that_is_not_there_comes_with_a_remedy(tmp_path):
    with pytest.raises(
        UserError, match=f"no such folder -> check the path; by default a run is in {DEFAULT_OUTPUT_DIR}"
    ):
        check_folder(tmp_path / "nope")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_line_fits_eighty_columns_in_both_languages(folder, language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    monkeypatch.chdir(folder.parent)
    write("\x1b[31mnotes.txt", b"someone's")(folder)
    shown = [
        line for line in verdict_lines(check_folder(Path("out"))) if str(folder.parent.parent) not in line
    ]  # not a path
    assert all(columns(line) <= 80 for line in shown), [line for line in shown if columns(line) > 80]
    assert not any("\x1b" in line for line in shown)


def test_json_is_one_object_with_the_same_facts(folder):
    value = json.loads(verdict_as_json(check_folder(folder)))
    assert value["findings"] == [] and value["uses"]["inference"]["possible"] is True
    assert len(value["layers"]) == 14 and all(one["norm"] > 0 for one in value["layers"])
    weights = next(one for one in value["files"] if one["name"] == "adapter_model.safetensors")
    assert weights["needed_for"] == ["inference", "sharing", "resuming"] and weights["whole"]


def test_weights_that_are_no_numbers_are_null_in_json_and_never_the_layer_that_moved_most(folder):
    tensors(lambda t: {n: v * (float("nan") if "layers.0.mlp" in n else 1) for n, v in t.items()})(folder)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    verdict = check_folder(folder)
    layers = json.loads(verdict_as_json(verdict), parse_constant=refuse)["layers"]
    broken = [one for one in layers if one["norm"] is None]
    assert broken and all(one["rms"] is None and one["largest_singular_value"] is None for one in broken)
    assert {one["module"].split("layers.")[1][:5] for one in broken} == {"0.mlp"}
    most = max((one for one in layers if one["norm"] is not None), key=lambda one: one["rms"])
    assert any(line.startswith(f"moved most: {most['module']} ") for line in verdict_lines(verdict))
    tensors(lambda t: {n: v * float("nan") for n, v in t.items()})(folder)
    assert not any(line.startswith("moved most") for line in verdict_lines(check_folder(folder)))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            check_folder(place)


def test_no_torch_is_loaded(folder):
    from fresh_process import in_a_process

    code = "import sys; from pathlib import Path; from lora_practice.report import checks, folder_text\n"
    code += f"print(len(list(folder_text.verdict_lines(checks.check_folder(Path({str(folder)!r}))))))\n"
    assert int(in_a_process(code + "assert 'torch' not in sys.modules", folder.parent).stdout) > 20


def test_every_file_that_the_readme_lists_is_explained():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    table = readme.split("## 输出的文件")[1].split("## ")[0]
    named = [cell for line in table.splitlines() if line.startswith("| `") for cell in line.split("|")[1].split()]
    assert len(named) > 10
    assert [name for name in named if file_kind(name.strip("`").replace("-N/", "-7/")) is None] == []


def test_of_dora_it_says_that_lengths_are_not_counted(folder):
    edit("adapter_config.json", use_dora=True)(folder)
    verdict = check_folder(folder)
    assert any("DoRA: what follows counts the update of directions" in line for line in verdict_lines(verdict))
    assert json.loads(verdict_as_json(verdict))["dora"] is True


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_change_is_told_in_percent_of_the_base_that_is_read_without_torch(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file as save_torch

    weight = torch.randn(700, 30, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    weights = {"h.0.attn.weight": weight, "h.0.norm.weight": weight[0].clone(), "n.weight": 0 * weight}
    save_torch(weights, tmp_path / "m.safetensors")
    changes = {"transformer.h.0.attn": 0.02, "n": 0.1, "not.there": 0.1}
    found = relative_changes(changes, tmp_path)
    assert set(found) == {"transformer.h.0.attn"}
    assert found["transformer.h.0.attn"] == pytest.approx(
        100 * 0.02 / float(weight.float().square().mean().sqrt()), rel=0.03
    )
    assert relative_changes(changes, None) == {}


def test_an_adapter_of_a_base_whose_tensors_lack_its_prefix_is_no_strangers(folder):
    """GPT-2's own files name "h.0.attn", PEFT "transformer.h.0.attn"."""
    from safetensors.numpy import load_file

    place = Path(json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    base = Path(shutil.copytree(place, folder.parent / "base"))
    weights = load_file(base / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, base / "model.safetensors")
    edit("adapter_config.json", base_model_name_or_path=str(base))(folder)
    edit("run_record.json", model={"kind": "folder", "name": str(base), "path": str(base), "hub_id": None})(folder)
    assert check_folder(folder).findings == []
