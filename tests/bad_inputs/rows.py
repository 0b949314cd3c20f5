"""Rows that cannot be trained on: one line of JSONL, and a part of the English complaint."""

from __future__ import annotations

import json

U, A, S = ({"role": role, "content": "你好 👋"} for role in ("user", "assistant", "system"))


def turn(role: object, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


def chat(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


DEEP = "[" * 100_000
BAD_LINES = [  # (one line of JSONL, a part of the English complaint)
    ('{"messages": [', "broken JSON"),
    ('{"messages": [{"role": "user", "content": "x}]}', "breaks off"),
    ('{"messages": []} {"messages": []}', "one object per line"),
    ('{"text": "a",}', "comma after the last"),
    ('{"messages": ["a",]}', "comma after the last"),
    ("{'text': 'a'}", "double quotes"),
    ("{“text”: “a”}", "full-width"),
    ('{"text"：“a”}', "full-width"),
    ('{"text": None}', "null, true, false"),
    ('{"text": True}', "null, true, false"),
    ('{"text": "C:\\dir"}', "backslash"),
    ('{"text": "say "hi" now"}', '\\"'),
    ('{"text" "a"}', "column 9"),
    ('{"text": }', "column 10"),
    ("{text: 1}", "broken JSON"),
    ("hello", "broken JSON"),
    ("instruction,output", "broken JSON"),
    ("\x00", "broken JSON"),
    (DEEP, "nested too deep"),
    ('{"messages": ' + DEEP, "nested too deep"),
    ('{"text": "' + "a" * 8_100_000 + '"}', "more than 8,000,000"),
    ("[1, 2]", "not an object: a list"),
    ('"text"', "not an object: text"),
    ("7", "not an object: a number"),
    ("true", "not an object: true/false"),
    ("null", "not an object: null"),
    ("NaN", "not an object: a number"),
    ("1" * 5000, "not an object: a number"),
    ("{}", "its keys are (none)"),
    ('{"foo": 1, "bar": 2}', "'foo', 'bar'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "no known shape"),
    ('{"instruction": "a"}', "no known shape"),
    ('{"instruction": "a", "ouput": "b"}', "did you mean 'output' by 'ouput'?"),
    ('{"Question": "a", "Answer": "b"}', "did you mean 'question' by 'Question'?"),
    ('{"mesages": []}', "did you mean 'messages' by 'mesages'?"),
    ('{"output": "a"}', "no known shape"),
    ('{"Text": "a"}', "'Text'"),
]
BAD_ROWS = [  # (row, a part of the English complaint)
    ({"text": ""}, "empty"),
    ({"text": " \n\t　"}, "empty"),
    ({"text": None}, "text: null"),
    ({"text": 3}, "text: a number"),
    ({"text": "a\0b"}, "broken character"),
    ({"text": "a\ud83d"}, "broken character"),
    ({"messages": None}, "messages: null"),
    ({"messages": {"role": ["user"]}}, "an object"),
    ({"messages": "[{'role': 'user'}]"}, "broken JSON inside a column"),
    ({"messages": '"abc"'}, "not a list"),
    ({"messages": "[" * 100_000}, "not a list"),
    (chat(), "nothing to learn"),
    (chat(U), "nothing to learn from: 1 message ->"),
    (chat(S), "nothing to learn"),
    (chat(S, U), "nothing to learn"),
    (chat(A), "does not begin with user"),
    (chat(A, U, A), "does not begin with user"),
    (chat(S, A, U), "does not begin with user"),
    (chat(U, U, A), "1 and 2 are user"),
    (chat(U, A, A), "2 and 3 are assistant"),
    (chat(S, S, U, A), "message 2"),
    (chat(U, A, S), "message 3"),
    ({**chat(S, U, A), "system": "another"}, "system is not the first"),
    ({**chat(U, A), "system": 5}, "system: a number"),
    (chat("hello", "hi"), "messages 1: text"),
    (chat(U, ["a"]), "messages 2: a list"),
    (chat({"content": "x"}, A), "no role"),
    (chat({"user": "x"}), "no role: messages 1: 'user'"),
    (chat(turn("asistant"), A), "write assistant"),
    (chat(turn("usr"), A), "write user"),
    (chat(U, A, turn("tool")), "messages 3: 'tool'"),
    (chat(U, A, turn("function")), "leave rows with tool"),
    (chat(turn(1), A), "'1"),
    (chat(turn(""), A), "unknown role"),
    (chat(turn(["user"]), A), "unknown role"),
    (chat(turn("z" * 100_000), A), "unknown role"),
    (chat(U, {"role": "assistant"}), "messages 2: null"),
    (chat(U, turn("assistant", 42)), "messages 2: a number"),
    (chat(U, turn("assistant", True)), "true/false"),
    (chat(U, turn("assistant", {"a": 1})), "an object"),
    (chat(U, turn("assistant", "")), "content is empty: messages 2"),
    (chat(U, turn("assistant", [])), "a list"),
    (chat(U, turn("assistant", [{"type": "image_url"}])), "not text"),
    (chat(U, turn("assistant", ["a"])), "not text"),
    (chat(U, {**A, "tool_calls": [{"name": "f"}]}), "calls a tool"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]},
        "conversations 2: null",
    ),
    ({"instruction": "", "output": "a"}, "empty: instruction"),
    ({"instruction": "q", "output": " "}, "empty: output"),
    ({"instruction": "q", "input": 3, "output": "a"}, "input: a number"),
    ({"instruction": "q", "output": "a", "history": [["q"]]}, "history 1"),
    ({"instruction": "q", "output": "a", "history": [["q", ""]]}, "empty: history 1"),
    ({"instruction": "q", "output": "a", "history": 3}, "not a list"),
    ({"prompt": "q", "completion": None}, "completion: null"),
    ({"prompt": [U], "completion": []}, "nothing to learn"),
    ({"question": "6 x 7", "answer": 42}, "answer: a number"),
]
TABLE = [*BAD_LINES, *((json.dumps(row), part) for row, part in BAD_ROWS)]
