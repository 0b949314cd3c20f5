"""The chat's commands, with a real (tiny) model: what is remembered, switched, kept, and what a mistake costs."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest
from bad_inputs.folders import make_base, make_output

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import StreamPrinter, columns
from lora_practice.inference import chat as chats
from lora_practice.inference import load as load_chat
from lora_practice.inference.chat import Chat, guide
from lora_practice.inference.chat_model import ChatModel
from lora_practice.machine.device import Facts, decide


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    place = tmp_path_factory.mktemp("chat")
    return load_chat.load_chat_model(
        str(make_output(place / "out", make_base(place / "base"))), decide(Facts()), keep_base=True
    )


@pytest.fixture
def talking(talker: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(tmp_path)
    return Chat(talker, max_new_tokens=4)


def test_turns_are_remembered_until_reset(talking, capsys):
    assert talking.say("hello") and talking.say("again")
    assert [one["role"] for one in talking.messages] == ["user", "assistant"] * 2
    assert talking.say("/reset") and talking.messages == []
    assert not talking.say("/exit")


def test_an_answer_that_was_cut_says_so_and_not_in_its_own_words(talking, talker, capsys):
    assert talking.say("hello") and talker.cut == 4
    shown = capsys.readouterr()
    assert "(cut at 4 tokens: --max_new_tokens N)" in shown.err and "cut at" not in shown.out
    assert "cut at" not in talking.messages[-1]["content"]
    (first,) = talker.write(talker._asked(talking.messages[:1]), 1)
    ending = ChatModel(talker.model, talker.tokenizer, [first], talker.decoder)
    Chat(ending, max_new_tokens=4).say("hello")
    assert ending.cut == 0 and "cut at" not in capsys.readouterr().err


def test_a_pipe_asks_a_question_a_line_and_must_be_utf_8(talker, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/system Be brief.\nagain"))
    chats.chat_loop("out", talker, max_new_tokens=4)
    shown = capsys.readouterr()
    assert len([*filter(None, shown.out.splitlines())]) == 2 and "system prompt: Be brief." in shown.err
    for errors in ("strict", "surrogateescape"):  # the second where the locale is C
        pipe = io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", pipe)
        with pytest.raises(UserError, match="the pipe: not UTF-8 -> convert it first: iconv"):
            chats.chat_loop("out", talker)


def test_a_system_prompt_begins_anew_and_none_drops_it(talking):
    talking.say("hello")
    talking.say("/system Be brief.")
    assert talking.messages == [{"role": "system", "content": "Be brief."}]
    talking.say("/reset")
    assert talking.messages == [{"role": "system", "content": "Be brief."}]
    talking.say("/system")
    assert talking.messages == []


def test_the_base_answers_while_the_adapter_is_off(talking, talker):
    asked = [{"role": "user", "content": "hello there"}]
    with_adapter = talker.answer(asked, max_new_tokens=8)
    talking.say("/adapter off")
    bare = talking.talker.answer(asked, max_new_tokens=8)
    with talker.model.disable_adapter():
        expected = ChatModel(talker.model, talker.tokenizer, talker.stop_ids).answer(asked, max_new_tokens=8)
    assert bare == expected
    talking.say("/adapter on")
    assert talking.talker is talker and talker.answer(asked, max_new_tokens=8) == with_adapter


def test_a_kept_conversation_is_training_data_and_never_replaces_a_file(talking, capsys, tmp_path):
    from lora_practice.data.conversations import read_file
    from lora_practice.data.good_rows import collect

    talking.say("/save talk.jsonl")
    assert not (tmp_path / "talk.jsonl").exists()  # nothing was said yet
    talking.say("hello")
    talking.messages[-1]["content"] = "fine"  # a random model may say nothing
    talking.say("/save talk.jsonl")
    (row,), _ = collect(read_file(tmp_path / "talk.jsonl"), None, False)
    assert list(row.messages) == talking.messages
    talking.say("again")
    talking.say("/save talk.jsonl")
    assert "nothing was written" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("/adapter", "/adapter off or /adapter on"),
        ("/save", "where to?"),
        ("/save no/such/folder/x.jsonl", "No such file or directory"),
        ("/rset", "no such command: /rset"),
        ("long " * 3000, "tokens; the model takes"),
    ],
)
def test_a_mistake_costs_a_line_and_not_the_chat(talking, capsys, words, said):
    talking.say("hello")
    before = list(talking.messages)
    assert talking.say(words)
    assert said in capsys.readouterr().err
    assert talking.messages == before


def test_an_interrupted_answer_is_forgotten_and_the_chat_goes_on(talking, monkeypatch, capsys):
    def interrupted(typing: StreamPrinter, words: str) -> None:
        raise KeyboardInterrupt

    talking.say("hello")
    before = list(talking.messages)
    monkeypatch.setattr(StreamPrinter, "add", interrupted)
    assert talking.say("again")
    assert talking.messages == before and "does not count" in capsys.readouterr().err


def test_the_history_is_for_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_CACHE", str(tmp_path / "cache"))
    chats._history().append_string("a question")
    assert stat.S_IMODE((tmp_path / "cache" / "chat_history").stat().st_mode) == 0o600
    assert "a question" in (tmp_path / "cache" / "chat_history").read_text("utf-8")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_guide_fits_eighty_columns(language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    assert all(columns(line) <= 80 for line in guide().splitlines())
