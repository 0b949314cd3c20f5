"""How each error of docs/errors.en.md is provoked, by its title there: what is prepared, and the command line."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from hub_server import FINE_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer
from tiny import MISTRAL

from bad_inputs.files import rows
from bad_inputs.folders import ADAPTER, CONFIG, RECORD, edit, grow_tokenizer, remove, swap_tokenizer, write
from bad_inputs.rows import A, U, chat, turn
from bad_inputs.runs import link, stop

GOOD = {"prompt": "Hi", "completion": "Hello!"}
TRAIN = ("train", "--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "new")
ASK = ("infer", "--model-dir", "out", "--prompt", "Hi")
UPLOAD = ("upload", "--local-dir", "out")


class Place(NamedTuple):
    """A folder with base/, a finished run in out/ and rows.jsonl; a Hub; and pytest's monkeypatch."""

    path: Path
    hub: HubServer
    patch: Any


Prepare = Callable[[Place], Any]


def out(*damages: Callable[[Path], Any]) -> Prepare:
    """Damage the run."""
    return lambda place: [damage(place.path / "out") for damage in damages]


def base(*damages: Callable[[Path], Any]) -> Prepare:
    """Damage the base."""
    return lambda place: [damage(place.path / "base") for damage in damages]


def put(name: str, content: bytes) -> Prepare:
    """Put a file in the folder."""
    return lambda place: (place.path / name).write_bytes(content)


def data(name: str, content: bytes, *more: str) -> tuple[Prepare, tuple[str, ...]]:
    """Train on such a file."""
    return put(name, content), (*TRAIN, "--dataset_path", name, *more)


def row(value: Any) -> tuple[Prepare, tuple[str, ...]]:
    """Train on such a row."""
    return data("rows.jsonl", rows(value))


def template(content: str, value: Any = GOOD) -> tuple[Prepare, tuple[str, ...]]:
    """Train such a row with such a template."""

    def prepare(place: Place) -> None:
        put("t.jinja", content.encode())(place)
        put("rows.jsonl", rows(value))(place)

    return prepare, (*TRAIN, "--chat_template_path", "t.jinja")


def variable(name: str, value: str, *words: str) -> tuple[Prepare, tuple[str, ...]]:
    """Upload with such a variable."""
    return lambda place: place.patch.setenv(name, value), (*UPLOAD, "--repo-id", "alice/x", *words)


def nothing(place: Place) -> None:
    """As it is."""


def held(place: Place) -> None:
    """The folder is locked as by another process, until the tests end."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such lock")
    fcntl.flock(os.open(place.path / "out", os.O_RDONLY), fcntl.LOCK_EX)


def full_disk(place: Place) -> None:
    """Ten bytes are left."""
    usage = shutil.disk_usage(place.path)
    place.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))


def closed(place: Place) -> None:
    """No folder may be written to, whoever runs this."""
    place.patch.setattr("lora_practice.run.folder.os.access", lambda path, mode: not mode & os.W_OK)


def old_card(place: Place) -> None:
    """A T4, as far as the choice of a precision can see."""
    import fine_tuning_practice
    from lora_practice.machine.facts import Facts

    card = {"gpu": "Tesla T4", "capability": (7, 5), "kernels": ("sm_75",), "gpu_memory": 16 << 30, "cuda_usable": True}
    facts = Facts(**card, torch="2.13.0", cuda="12.6", driver="550.54")
    place.patch.setattr(fine_tuning_practice, "read_facts", lambda **_: facts)


def offline(place: Place) -> None:
    """Nobody answers at the Hub's address."""
    place.patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def no_weights(place: Place) -> None:
    """A model on the Hub that has none."""
    folder = place.path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text("{}", "utf-8")
    place.hub.add_repo("models", "alice/bare", folder)


RESUME = ("train", "--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out", "--resume")
STOPPED = ("train", "--output_dir", "out")
TRUSTED = (*RESUME, "--trust_checkpoint")
DRIFTING = (
    "{% for m in messages %}{{ messages | length }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
BASE_BEFORE = {"files": {"model.safetensors": {"size": 9, "sha256": "another"}}}
DATA_BEFORE = {"fingerprint": "another", "rows_trained": 9, "tokens": 9}

PROVOKED: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "--lora_r needs a whole number, got …": (nothing, ("train", "--lora_r", "six")),
    "--max_length needs a value <= …, got …": (nothing, ("train", "--max_length", str(10**9))),
    "unknown flag --lora_rank": (nothing, ("train", "--lora_rank", "8")),
    "--learning_rate needs a value": (nothing, ("train", "--learning_rate")),
    "--overwrite and --resume contradict each other": (nothing, ("train", "--overwrite", "--resume")),
    "--embedded contradicts --model_name …": (nothing, (*TRAIN, "--embedded")),
    "… has no real bf16": (old_card, (*TRAIN, "--bf16")),
    "this model takes … tokens at most": (nothing, (*TRAIN, "--max_length", "99999")),
    "the model has no layer … for LoRA": (nothing, (*TRAIN, "--target_modules", "q_proj,query")),
    "… takes a rank of … at most: the smallest layer": (
        nothing,
        (*TRAIN, "--init_lora_weights", "pissa", "--lora_r", "1024"),
    ),
    "… with DoRA cannot be saved as a plain LoRA": (nothing, (*TRAIN, "--init_lora_weights", "olora", "--use_dora")),
    "one process trains, but … were started": (lambda place: place.patch.setenv("WORLD_SIZE", "2"), TRAIN),
    "this is a file, not a folder": (nothing, (*TRAIN, "--output_dir", "rows.jsonl")),
    "no permission to write": (closed, TRAIN),
    "this link leads nowhere": (lambda place: link("new", "gone")(place.path), TRAIN),
    "this folder holds other files; nothing is written to it": (nothing, (*TRAIN, "--output_dir", "base")),
    "a finished run is here": (nothing, (*TRAIN, "--output_dir", "out")),
    "it holds files that we did not write, which --overwrite does not delete": (
        out(write("notes.txt", b"mine")),
        (*TRAIN, "--output_dir", "out", "--overwrite"),
    ),
    "an unfinished run is here": (out(stop), (*TRAIN, "--output_dir", "out")),
    "another run is writing to this folder": (held, (*TRAIN, "--output_dir", "out")),
    "there is no run to resume here": (nothing, (*TRAIN, "--resume")),
    "not the same run any more": (
        out(stop, edit(RECORD, settings={"lora_r": 8})),
        (*RESUME, "--lora_r", "6"),
    ),
    "the base model is not what this run began with": (out(stop, edit(RECORD, model=BASE_BEFORE)), TRUSTED),
    "the data is not what this run began with": (out(stop, edit(RECORD, data=DATA_BEFORE)), TRUSTED),
    "not saved by you on this machine": (out(stop), RESUME),
    "not known to be written by you on this machine": (
        out(stop, edit(RECORD, settings={"dataset_path": "theirs.jsonl"})),
        (*STOPPED, "--resume"),
    ),
    "no whole checkpoint is left to resume from": (out(stop, remove(f"checkpoint-1/{ADAPTER}")), RESUME),
    "the record of the run cannot be read": (out(write(RECORD, b"{")), ASK),
    "not enough disk: about … MB needed, … MB free": (full_disk, ("merge", "out")),
    "no such data file": (nothing, (*TRAIN, "--dataset_path", "row.jsonl")),
    "the file is empty": data("rows.jsonl", b""),
    "the data set holds no rows": data("rows.jsonl", b"\n\n"),
    "unknown kind of file …": data("rows.xlsx", b"PK"),
    "this is a folder, not a data file": (nothing, (*TRAIN, "--dataset_path", "base")),
    "… bad rows among the … read": data("rows.jsonl", rows(GOOD, *[{"prompt": "Hi"}] * 2)),
    "broken JSON: column …": data("rows.jsonl", b'{"text": "a",}'),
    "broken JSON, nothing after it can be read": data("rows.json", b'[{"text": "a"},\n{"text" "b"}]'),
    "no known shape of row": row({"Text": "a"}),
    "byte … fits neither UTF-8 nor GB18030": data("rows.jsonl", b'{"text": "a"}\n\xff\xff'),
    "this looks like UTF-16 without a BOM, or is no text": data("rows.jsonl", '{"text": "a"}'.encode("utf-16-le")),
    "wrong number of fields": data("rows.csv", b"prompt,completion\na,b,c\n"),
    "CSV quotes do not match": data("rows.csv", b'prompt,completion\na,"b\n'),
    "the header names a column twice": data("rows.csv", b"text,text\na,b\n"),
    "unknown role": row(chat(turn("asistant"), A)),
    "the conversation does not begin with user": row(chat(A, U)),
    "two messages in a row with the same role": row(chat(U, U, A)),
    "nothing to learn from": row(chat(U)),
    "content is empty": row(chat(U, turn("assistant", " "))),
    "not a readable Parquet file": data("rows.parquet", b"PAR1"),
    "not one row has a token to train on": data(
        "rows.jsonl", rows({"prompt": "why? " * 99, "completion": "so"}), "--max_length", "8"
    ),
    "no row is left to train on": (nothing, (*TRAIN, "--eval_subset_size", "9")),
    "no such model folder": (nothing, (*TRAIN, "--model_name", "./basis")),
    "this folder is no model: … is missing": (base(remove("model.safetensors")), TRAIN),
    "the model cannot be loaded": (base(write("model.safetensors", b"<html>")), TRAIN),
    "the tokenizer is not this model's": (base(grow_tokenizer), TRAIN),
    "this model has no chat template": (
        base(remove("chat_template.jinja")),
        ("infer", "--model-dir", "base", "--prompt", "Hi"),
    ),
    "the chat template uses marks the tokenizer lacks": template(
        "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    ),
    "the chat template refuses this conversation": template(MISTRAL, chat(turn("system"), U, A)),
    "the chat template rewrites the prompt: no honest mask": template(DRIFTING),
    "… cannot be reached and nothing is cached": (offline, (*TRAIN, "--model_name", "me/mine")),
    "the Hub has no such name (or it is private)": (nothing, (*TRAIN, "--model_name", "alice/nothing")),
    "this model has no safetensors weights": (no_weights, (*TRAIN, "--model_name", "alice/bare")),
    "the Hub does not accept HF_TOKEN": (
        lambda place: place.patch.setenv("HF_TOKEN", "hf_" + "x" * 34),
        (*TRAIN, "--model_name", "alice/bare"),
    ),
    "no trained model here (no adapter_config.json)": (out(remove(CONFIG)), ASK),
    "no such folder": (nothing, ("infer", "--model-dir", "outputs/x", "--prompt", "Hi")),
    "adapter_model.safetensors is missing: the adapter is not whole": (out(remove(ADAPTER)), ASK),
    "the adapter is damaged or of another base": (out(write(ADAPTER, b"")), ASK),
    "it belongs to a base that was changed (…)": (out(edit(CONFIG, init_lora_weights="pissa")), ASK),
    "its base … is no name on the Hub: it is not read": (
        out(remove(RECORD), edit(CONFIG, base_model_name_or_path="/etc")),
        ASK,
    ),
    "the tokenizer is not the one that the base was trained with": (out(swap_tokenizer), ASK),
    "no adapter here": (nothing, ("merge", "base")),
    "already merged": (lambda place: (place.path / "out" / "merged").mkdir(), ("merge", "out")),
    "no --prompt, and no question on stdin": (
        lambda place: place.patch.setattr("sys.stdin", io.StringIO()),
        ("infer", "--model-dir", "out"),
    ),
    "the prompt is empty": (nothing, (*ASK[:3], "--prompt", " ")),
    "no repository to upload to": (nothing, UPLOAD),
    "HF_TOKEN is not set": (nothing, (*UPLOAD, "--repo-id", "alice/x")),
    "does not look like a token (too short, or odd characters)": variable("HF_TOKEN", "令牌"),
    "this token is read-only": variable("HF_TOKEN", READ_TOKEN),
    "the token is …'s and cannot write to …": variable("HF_TOKEN", WRITE_TOKEN, "--repo-id", "bob/x"),
    "HTTP 403: this token may not write to …": (
        lambda place: (place.patch.setenv("HF_TOKEN", FINE_TOKEN), place.hub.fail(403, "/repos/create", times=9)),
        (*UPLOAD, "--repo-id", "alice/x"),
    ),
    "looks like a secret (…): refused, nothing was sent": (out(write("LICENSE", b"hf_" + b"Ab1" * 12)), UPLOAD),
    "this link leads outside the folder, or to itself: refused": (
        out(link("notes", "../rows.jsonl")),
        (*UPLOAD, "--include", "notes"),
    ),
    "offline mode is on, so nothing can be uploaded": (
        lambda place: (place.patch.setenv("HF_HUB_OFFLINE", "1"), place.patch.setenv("HF_TOKEN", WRITE_TOKEN)),
        (*UPLOAD, "--repo-id", "alice/x"),
    ),
    ".env is not UTF-8": (put(".env", b"HF_TOKEN=\xff\xff"), TRAIN),
}
