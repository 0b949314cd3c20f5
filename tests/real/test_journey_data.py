"""Local data: every shape and format ends in examples that the real model has a finite loss on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from journey_harness import refused, succeeded, train

ASK, ANSWER = "今天天气怎么样？", "今天是晴天，适合出门。"
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
ROWS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": {"instruction": ASK, "input": "", "output": ANSWER},
    "prompt": {"prompt": ASK, "completion": ANSWER},
    "text": {"text": ANSWER},
}
TABLES = ("alpaca", "prompt", "text")
TRAINED = f"〔{ANSWER}<|im_end|>〕"
FEW = ("--embedded", "--max_steps", "1", "--gradient_accumulation_steps", "2", "--output_dir", "out")


def write(folder: Path, shape: str, kind: str) -> Path:
    """Two rows of one shape; `kind` is a suffix, with an encoding where it is not UTF-8."""
    suffix, _, encoding = kind.partition(":")
    path, row = folder / f"rows.{suffix}", ROWS[shape]
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        return path
    if suffix == "csv":
        words = ",".join(row) + "\n" + (",".join(row.values()) + "\n") * 2
    elif suffix == "json":
        words = json.dumps([row, row], ensure_ascii=False, indent=1)
    else:
        words = (json.dumps(row, ensure_ascii=False) + "\n") * 2
    path.write_text(words, encoding or "utf-8")
    return path


CASES = [(shape, kind) for shape in ROWS for kind in ("jsonl", "json", "parquet", "jsonl:gbk", "json:utf-8-sig")]
CASES += [(shape, kind) for shape in TABLES for kind in ("csv", "csv:utf-8-sig", "csv:gbk", "csv:utf-16")]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_every_shape_and_format_gives_the_same_trained_words(tmp_path, tokenizer, shape, kind):
    from fine_tuning_practice import TrainSettings
    from lora_practice.data.prepare import prepare
    from lora_practice.sources.find import find_dataset

    source = find_dataset(str(write(tmp_path, shape, kind)), is_default=False)
    rows = prepare(source, None, tokenizer, dataclasses.replace(TrainSettings(), train_subset_size=2))
    assert len(rows.train) == 2
    words = TRAINED if shape != "text" else ANSWER + tokenizer.eos_token
    assert words in rows.facts["first_row"] and "\ufffd" not in rows.facts["first_row"]
    assert ASK not in words


def test_the_real_model_has_a_finite_loss_on_each_shape(tmp_path, tokenizer, embedded_model):
    import torch

    from fine_tuning_practice import TrainSettings
    from lora_practice.data.collator import Collator
    from lora_practice.data.prepare import prepare
    from lora_practice.model.load import load_base
    from lora_practice.sources.find import Source, find_dataset

    model = load_base(Source("folder", str(embedded_model), embedded_model), "fp32").eval()
    for shape in ROWS:
        source = find_dataset(str(write(tmp_path, shape, "jsonl")), is_default=False)
        one = prepare(source, None, tokenizer, TrainSettings()).train[0]
        batch = Collator(0)([{"input_ids": one.input_ids, "labels": one.labels, "lengths": []}])
        with torch.no_grad():
            assert math.isfinite(float(model(**batch).loss)), shape


def test_a_gbk_csv_trains_through_the_entry_point_and_its_encoding_is_said(tmp_path):
    write(tmp_path, "alpaca", "csv:gbk")
    done = succeeded(train(tmp_path, *FEW, "--dataset_path", "rows.csv"))
    assert "rows.csv is encoded in GBK (gb18030)" in done.stderr
    record = json.loads((tmp_path / "out" / "run_record.json").read_text("utf-8"))
    assert record["data"]["kind"] == "file" and TRAINED in record["data"]["first_row"]
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "datasets:" not in card and "`rows.csv`" in card  # no Hub name is invented for a local file


def test_a_bad_row_stops_before_anything_is_written_and_names_file_and_line(tmp_path):
    good = json.dumps(ROWS["messages"], ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f'{good}\n{{"messages": [}}\n{good}\n', "utf-8")
    refused(train(tmp_path, *FEW, "--dataset_path", "rows.jsonl"), "rows.jsonl:2", "--skip_bad_rows")
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_left_out_and_are_counted_on_screen_and_in_the_record(tmp_path, tokenizer, capsys):
    from fine_tuning_practice import TrainSettings
    from lora_practice.data.prepare import prepare
    from lora_practice.sources.find import find_dataset

    good = json.dumps(ROWS["messages"], ensure_ascii=False)
    long = json.dumps({"prompt": ASK, "completion": ANSWER * 99}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{good}\n[1]\n{long}\n", "utf-8")
    settings = dataclasses.replace(TrainSettings(), skip_bad_rows=True, max_length=128)
    rows = prepare(find_dataset(str(tmp_path / "rows.jsonl"), False), None, tokenizer, settings)
    told = capsys.readouterr().err
    assert "1 bad row left out" in told and "rows.jsonl:2" in told
    assert "1 row cut at max_length=128" in told and "rows.jsonl:3" in told
    assert rows.facts["rows_lost"] == {"cut": 1} and sum(rows.facts["bad_rows_skipped"].values()) == 1
