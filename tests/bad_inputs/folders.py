"""A small whole output folder, and everything that can be wrong with such a folder, made by code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any, Callable

from tiny import make_model, make_tokenizer

ADAPTER, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "run_record.json"
MARKER = "pickle-was-run"


def make_base(folder: Path, vocab_size: int = 320, **changed: Any) -> Path:
    """A model folder: config, safetensors, tokenizer with a chat template."""
    make_model(vocab_size, **changed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_output(folder: Path, base: Path) -> Path:
    """A finished run on `base`, as training leaves it, with an adapter that is not zero."""
    import torch

    from fine_tuning_practice import TrainSettings
    from lora_practice.model import adapter_files
    from lora_practice.model.load import load_base, load_tokenizer
    from lora_practice.model.lora import add_lora
    from lora_practice.sources.find import Source

    source = Source("folder", str(base), base)
    model = add_lora(load_base(source, "fp32"), TrainSettings(), source)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapter_files.save(model, load_tokenizer(source), {}, folder)
    record = {"status": "finished", "steps": 1, "model": source.record(), "settings": {}, "data": {}}
    (folder / RECORD).write_text(json.dumps(record), "utf-8")
    return folder


def edit(name: str, **changed: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**value, **changed}), "utf-8")

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Put other bytes in a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Keep the first bytes of a file."""

    def damage(folder: Path) -> None:
        os.truncate(folder / name, size)

    return damage


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]], name: str = ADAPTER) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = {key: value.clone() for key, value in load_file(folder / name).items()}
        save_file(change(found), folder / name, metadata={"format": "pt"})

    return damage


def swap_tokenizer(folder: Path) -> None:
    """The same tokens under other ids."""
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text("utf-8"))
    vocab = whole["model"]["vocab"]
    one, other = list(vocab)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(whole), "utf-8")


def grow_tokenizer(folder: Path) -> None:
    """More tokens than the model has rows for."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new {number}>" for number in range(400)])
    tokenizer.save_pretrained(folder)


def tokenizer_with(**parts: Any) -> Callable[[Path], None]:
    """Other parts in tokenizer.json."""
    return edit("tokenizer.json", **parts)


class Evil:
    """Unpickling this leaves a mark beside the working folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def only_a_pickle(name: str, safe: str) -> Callable[[Path], None]:
    """The weights are there as a pickle only."""

    def damage(folder: Path) -> None:
        (folder / safe).unlink()
        (folder / name).write_bytes(pickle.dumps(Evil(folder.parent / MARKER)))

    return damage


def custom_code(folder: Path) -> None:
    """A model that wants its own Python to be run."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder.parent / MARKER)!r})\n", "utf-8")
    edit("config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})(folder)
    edit("config.json", model_type="evil")(folder)


def link_loop(name: str) -> Callable[[Path], None]:
    """A file that is a link to itself."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    """Take files away."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def nothing(folder: Path) -> None:
    """As it is."""


DEEP = b"[" * 100_000
BAD_TEMPLATES = ["{% for %}", "{{ 1 / 0 }}", "{% for i in range(10 ** 12) %}{% endfor %}", "{{ messages.x.y }}"]
BAD_TEMPLATES += ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ messages[99].content }}"]
# (what is done to a finished run's folder, a part of the English complaint of inference)
BAD_ADAPTERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("config is no JSON", write(CONFIG, b"{"), "adapter_config.json cannot be read"),
    ("config is empty", write(CONFIG, b""), "adapter_config.json cannot be read"),
    ("config is a list", write(CONFIG, b"[1]"), "adapter_config.json cannot be read"),
    ("config nests deep", write(CONFIG, DEEP), "adapter_config.json cannot be read"),
    ("config is GBK", write(CONFIG, '{"底座": 1}'.encode("gbk")), "adapter_config.json cannot be read"),
    ("config is a link to itself", link_loop(CONFIG), "no trained model here"),
    ("no base", edit(CONFIG, base_model_name_or_path=None), "names no base"),
    ("base is a number", edit(CONFIG, base_model_name_or_path=7), "names no base"),
    ("base is empty", edit(CONFIG, base_model_name_or_path=""), "names no base"),
    ("base climbs out", edit(CONFIG, base_model_name_or_path="../../etc"), "'../../etc'"),
    ("base is elsewhere", edit(CONFIG, base_model_name_or_path="/etc"), "'/etc'"),
    ("base is at home", edit(CONFIG, base_model_name_or_path="~/.ssh"), "'~/.ssh'"),
    ("base is on Windows", edit(CONFIG, base_model_name_or_path="C:\\Users\\me"), "'C:\\\\Users\\\\me'"),
    ("base is a share", edit(CONFIG, base_model_name_or_path="\\\\host\\share"), "--base_model"),
    ("base is an address", edit(CONFIG, base_model_name_or_path="https://example.com/m"), "'https://example.com/m'"),
    ("base is a file address", edit(CONFIG, base_model_name_or_path="file:///etc"), "'file:///etc'"),
    ("base holds lines", edit(CONFIG, base_model_name_or_path="a/b\nError: all is well"), "a/b\\nError"),
    ("base holds controls", edit(CONFIG, base_model_name_or_path="a/\x1b[2J\x07b"), "a/\\x1b[2J\\x07b"),
    ("base holds a NUL", edit(CONFIG, base_model_name_or_path="a/b\0c"), "a/b\\x00c"),
    ("base is very long", edit(CONFIG, base_model_name_or_path="a/" + "b" * 99_999), "--base_model"),
    ("record names another base", edit(RECORD, model={"kind": "hub", "name": "me/one", "hub_id": "me/one"}), "me/one"),
    ("another kind of adapter", edit(CONFIG, peft_type="PREFIX_TUNING"), "PREFIX_TUNING"),
    ("unknown kind of adapter", edit(CONFIG, peft_type="\x1b[31mEVIL"), "\\x1b[31mEVIL"),
    ("no kind of adapter", edit(CONFIG, peft_type=None), "LoRA"),
    ("own classes", edit(CONFIG, auto_mapping={"base_model_class": "x", "parent_library": "os"}), "auto_mapping"),
    ("own library", edit(CONFIG, megatron_config={"a": 1}, megatron_core="os"), "megatron_config"),
    ("odd modules to save", edit(CONFIG, modules_to_save=["../../etc", "no.such"]), "modules_to_save"),
    ("modules to save are numbers", edit(CONFIG, modules_to_save=[1]), "modules_to_save"),
    ("rank is text", edit(CONFIG, r="six"), "out"),
    ("rank is zero", edit(CONFIG, r=0), "out"),
    ("rank is huge", edit(CONFIG, r=10**9), "out"),
    ("alpha is text", edit(CONFIG, lora_alpha="x"), "no lora_alpha: 'x'"),
    ("targets are nowhere", edit(CONFIG, target_modules=["no_such_layer"]), "out"),
    ("targets are numbers", edit(CONFIG, target_modules=[3]), "out"),
    ("fewer targets than weights", edit(CONFIG, target_modules=["q_proj"]), "damaged or of another base"),
    ("weights missing", remove(ADAPTER), f"{ADAPTER} is missing"),
    ("weights are a pickle", only_a_pickle("adapter_model.bin", ADAPTER), f"{ADAPTER} is missing"),
    ("weights empty", write(ADAPTER, b""), "damaged"),
    ("weights cut in the header", cut(ADAPTER, 40), "damaged"),
    ("weights cut in a tensor", cut(ADAPTER, 9_000), "damaged"),
    ("weights are noise", write(ADAPTER, bytes(range(256)) * 40), "damaged"),
    ("weights with a header of exabytes", write(ADAPTER, b"\xff" * 64), "damaged"),
    ("weights are a page", write(ADAPTER, b"<html>not found</html>"), "damaged"),
    ("weights are a Git LFS pointer", write(ADAPTER, b"version https://git-lfs.github.com/spec/v1\n"), "damaged"),
    ("half of the tensors", tensors(lambda t: dict(list(t.items())[::2])), "damaged or of another base"),
    (
        "tensors of no layer",
        tensors(lambda t: {**t, "base_model.model.x.lora_A.weight": t[next(iter(t))].clone()}),
        "x",
    ),
    ("no tensors", tensors(lambda t: {}), "damaged or of another base"),
    ("tensors are not numbers", tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), "not finite"),
    ("other shapes", tensors(lambda t: {k: v.repeat(2, 2) for k, v in t.items()}), "damaged or of another base"),
    ("tokenizer with other ids", swap_tokenizer, "tokenizer"),
    ("tokenizer too large", grow_tokenizer, "tokenizer"),
    ("tokenizer is no JSON", write("tokenizer.json", b"{"), "tokenizer"),
    ("tokenizer is another JSON", write("tokenizer.json", b'{"model": {"type": "X"}}'), "tokenizer"),
    ("tokenizer is a list", write("tokenizer.json", b"[]"), "tokenizer"),
    ("tokenizer's config is a list", write("tokenizer_config.json", b"[]"), "tokenizer"),
    ("tokenizer's config is no JSON", write("tokenizer_config.json", b"nope"), "tokenizer"),
    *[(f"template {t}", write("chat_template.jinja", t.encode()), "chat template") for t in BAD_TEMPLATES],
    ("template is GBK", write("chat_template.jinja", "{# 模板 #}".encode("gbk")), "tokenizer"),
    ("template is blank", write("chat_template.jinja", b""), "template"),
]
# (what is done to a base model's folder, a part of the English complaint of inference on the folder itself)
MODEL, SETTINGS = "model.safetensors", "config.json"
NO_MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
ON_NOTHING = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000}
NO_WORDS = {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": True}
BAD_MODELS: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", remove(SETTINGS), "no trained model here"),
    ("config is no JSON", write(SETTINGS, b"{"), "cannot be loaded"),
    ("config is a list", write(SETTINGS, b"[1]"), "cannot be loaded"),
    ("config nests deep", write(SETTINGS, DEEP), "cannot be loaded"),
    ("unknown architecture", edit(SETTINGS, model_type="\x1b[2Jxyz"), "cannot be loaded"),
    ("sizes are text", edit(SETTINGS, hidden_size="big"), "cannot be loaded"),
    ("sizes are negative", edit(SETTINGS, num_hidden_layers=-3, hidden_size=-16), "cannot be loaded"),
    ("other sizes", edit(SETTINGS, hidden_size=32), "cannot be loaded"),
    ("more layers than weights", edit(SETTINGS, num_hidden_layers=3), "cannot be loaded"),
    ("no weights", remove(MODEL), "cannot be loaded"),
    ("weights are a pickle", only_a_pickle("pytorch_model.bin", MODEL), "cannot be loaded"),
    ("weights cut", cut(MODEL, 5_000), "cannot be loaded"),
    ("weights cut in the header", cut(MODEL, 5), "cannot be loaded"),
    ("weights are noise", write(MODEL, b"\xff" * 999), "cannot be loaded"),
    ("weights lack a tensor", tensors(lambda t: dict(list(t.items())[1:]), MODEL), "cannot be loaded"),
    ("weights are a link to themselves", link_loop(MODEL), "cannot be loaded"),
    ("own code", custom_code, "cannot be loaded"),
    ("tokenizer too large", grow_tokenizer, "tokenizer"),
    ("tokenizer's library panics on it", tokenizer_with(normalizer=NO_MAP), "the tokenizer cannot be loaded"),
    ("tokenizer's library panics on a text", tokenizer_with(normalizer=ON_NOTHING), "cannot split this text"),
    ("tokenizer has no word for a text", tokenizer_with(model=NO_WORDS), "cannot split this text"),
    ("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
]
