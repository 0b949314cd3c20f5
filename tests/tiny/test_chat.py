"""The chat's commands, with a real (tiny) model: what is remembered, switched, kept, and what a mistake costs."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from bad_inputs.folders import make_base, make_output

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import StreamPrinter, columns
from lora_practice.inference import chat as chat_module
from lora_practice.inference import load as load_chat
from lora_practice.inference.chat import Chat, guide
from lora_practice.inference.chat_model import ChatModel
from lora_practice.machine.device import Facts, choose_device


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    place = tmp_path_factory.mktemp("chat")
    return load_chat.load_chat_model(
        str(make_output(place / "out", make_base(place / "base"))), choose_device(Facts()), keep_base=True
    )


@pytest.fixture
def chat(chat_model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(tmp_path)
    return Chat(chat_model, max_new_tokens=4)


def test_turns_are_remembered_until_reset(chat, capsys):
    assert chat.handle("hello") and chat.handle("again")
    assert [one["role"] for one in chat.messages] == ["user", "assistant"] * 2
    assert chat.handle("/reset") and chat.messages == []
    assert not chat.handle("/exit")


def test_an_answer_that_was_cut_says_so_and_not_in_its_own_words(chat, chat_model, capsys):
    assert chat.handle("hello") and chat_model.cut_at == 4
    shown = capsys.readouterr()
    assert "(cut at 4 tokens: --max_new_tokens N)" in shown.err and "cut at" not in shown.out
    assert "cut at" not in chat.messages[-1]["content"]
    (first,) = chat_model.generate_ids(chat_model._prompt_ids(chat.messages[:1]), 1)
    ending = ChatModel(chat_model.model, chat_model.tokenizer, [first], chat_model.decoder)
    Chat(ending, max_new_tokens=4).handle("hello")
    assert ending.cut_at == 0 and "cut at" not in capsys.readouterr().err


def test_a_pipe_asks_a_question_a_line_and_must_be_utf_8(chat_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/system Be brief.\nagain"))
    chat_module.chat_loop("out", chat_model, max_new_tokens=4)
    shown = capsys.readouterr()
    asked, answer, again, another = filter(None, shown.out.splitlines())
    assert (asked, again) == ("> hello", "> again") and not (answer + another).startswith(">")
    assert "system prompt: Be brief." in shown.err
    for errors in ("strict", "surrogateescape"):  # the second where the locale is C
        pipe = io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", pipe)
        with pytest.raises(UserError, match="the pipe: not UTF-8 -> convert it first: iconv"):
            chat_module.chat_loop("out", chat_model)


def test_a_system_prompt_starts_over_and_none_drops_it(chat):
    chat.handle("hello")
    chat.handle("/system Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.handle("/reset")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.handle("/system")
    assert chat.messages == []


def test_the_base_answers_while_the_adapter_is_off(chat, chat_model):
    asked = [{"role": "user", "content": "hello there"}]
    with_adapter = chat_model.answer(asked, max_new_tokens=8)
    chat.handle("/adapter off")
    base_answer = chat.active.answer(asked, max_new_tokens=8)
    with chat_model.model.disable_adapter():
        expected = ChatModel(chat_model.model, chat_model.tokenizer, chat_model.stop_ids).answer(
            asked, max_new_tokens=8
        )
    assert base_answer == expected
    chat.handle("/adapter on")
    assert chat.active is chat_model and chat_model.answer(asked, max_new_tokens=8) == with_adapter


def test_saved_conversations_are_training_data_a_row_each(chat, capsys, tmp_path):
    from lora_practice.data.conversations import read_file
    from lora_practice.data.good_rows import collect

    file = tmp_path / "talk.jsonl"
    chat.handle("/save talk.jsonl")
    assert not file.exists()  # there is no conversation yet
    chat.handle("hello")
    chat.messages[-1]["content"] = "fine"  # a random model may say nothing
    chat.handle("/save talk.jsonl")
    (row,), _ = collect(read_file(file), None, False)
    assert list(row.messages) == chat.messages
    first = file.read_bytes()
    chat.handle("/save talk.jsonl")
    assert "is saved already" in capsys.readouterr().err and file.read_bytes() == first
    chat.handle("/reset")
    chat.handle("你好")
    chat.messages[-1]["content"] = "你好！"
    file.write_bytes(first.rstrip(b"\n"))  # as some editors leave it
    chat.handle("/save talk.jsonl")
    assert "saved to talk.jsonl (row 2; it can serve as --dataset_path)" in capsys.readouterr().err
    rows, _ = collect(read_file(file), None, False)
    assert [row.messages[0]["content"] for row in rows] == ["hello", "你好"]
    assert file.read_bytes().startswith(first)


@pytest.mark.parametrize(
    ("words", "name"),
    [("", "chat.jsonl"), (" mine", "mine.jsonl"), (" a.txt", "a.txt.jsonl"), (" A.JSONL", "A.JSONL")],
)
def test_what_is_saved_has_a_name_that_the_training_takes(chat, capsys, tmp_path, words, name):
    from lora_practice.data.conversations import read_file

    chat.handle("hello")
    chat.messages[-1]["content"] = "fine"
    chat.handle(f"/save{words}")
    assert f"saved to {name} (row 1; it can serve as --dataset_path)" in capsys.readouterr().err
    (row,) = read_file(tmp_path / name)
    assert list(row.messages) == chat.messages


@pytest.mark.parametrize("content", ["my notes\n", '{"prompt": "a", "completion": "b"}\n', "[]\n", "\xff\n"])
def test_a_file_of_another_kind_is_not_saved_to(chat, capsys, tmp_path, content):
    file = tmp_path / "notes.jsonl"
    file.write_text(content, "latin-1")
    before = file.read_bytes()
    chat.handle("hello")
    chat.handle("/save notes.jsonl")
    assert "notes.jsonl: this file holds something else: nothing was written" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("/adapter", "/adapter off or /adapter on"),
        ("/save .", "Is a directory"),
        ("/save no/such/folder/x.jsonl", "No such file or directory"),
        ("/rset", "no such command: /rset"),
        ("long " * 3000, "tokens; the model takes"),
    ],
)
def test_a_mistake_costs_a_line_and_not_the_chat(chat, capsys, words, said):
    chat.handle("hello")
    before = list(chat.messages)
    assert chat.handle(words)
    assert said in capsys.readouterr().err
    assert chat.messages == before


def test_an_interrupted_answer_is_forgotten_and_the_chat_goes_on(chat, monkeypatch, capsys):
    def interrupted(typing: StreamPrinter, words: str) -> None:
        raise KeyboardInterrupt

    chat.handle("hello")
    before = list(chat.messages)
    monkeypatch.setattr(StreamPrinter, "add", interrupted)
    assert chat.handle("again")
    assert chat.messages == before and "does not count" in capsys.readouterr().err


def test_the_history_is_for_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_CACHE", str(tmp_path / "cache"))
    chat_module._history().append_string("a question")
    assert stat.S_IMODE((tmp_path / "cache" / "chat_history").stat().st_mode) == 0o600
    assert "a question" in (tmp_path / "cache" / "chat_history").read_text("utf-8")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_guide_fits_eighty_columns(language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    assert all(columns(line) <= 80 for line in guide().splitlines())
