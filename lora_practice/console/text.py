"""Messages in two languages: which language, the text in it, and printing it to stderr."""

from __future__ import annotations

import locale
import os
import re
import sys
from typing import Any

from lora_practice.console.terminal import fit_to_terminal

# control characters, which in a file's name or in data could steer the terminal or hide a part of a line, and what
# nobody sees: zero-width spaces, tags (the joiners, which emoji and scripts need, stay)
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    r"\u00ad\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f]"
)
# A Hub token does not begin inside a word; the last letter of an escape (\\n, \\u003d, %3D, %253D, =3D) is no word
TOKEN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=\\[abefnrtv0])|(?<=\\[0-7]{3})|(?<=\\x[0-9a-fA-F]{2})|(?<=\\u[0-9a-fA-F]{4})"
    r"|(?<=\\U[0-9a-fA-F]{8})|(?<=%[0-9a-fA-F]{2})|(?<=%25[0-9a-fA-F]{2})|(?<==[0-9A-F]{2}))"
    r"(?:hf_(?:[a-z]{3,6}_)?|api_org_)[A-Za-z0-9]{20,}"
)

_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")  # of an address: https://name:password@host


def language() -> str:
    """The user's language, "zh" or "en": from LORA_PRACTICE_LANG, the locale variables, or the system's locale."""
    for name in ("LORA_PRACTICE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name)
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    system = locale.getlocale()[0] or ""
    return "zh" if system.lower().startswith(("zh", "chinese")) else "en"


def text(zh: str, en: str) -> str:
    """The Chinese or the English text, by the user's language."""
    return zh if language() == "zh" else en


def counted(number: int, noun: str) -> str:
    """A number with an English noun that takes an s in the plural: "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def visible(words: str) -> str:
    """The words with control characters escaped, such as "\\x1b" for ESC; line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), words)


def without_tokens(words: str) -> str:
    """The words with HF_TOKEN, anything that looks like a Hub token, and passwords in addresses replaced by "***"."""
    own = os.environ.get("HF_TOKEN", "").strip()
    return _PASSWORD.sub("***", TOKEN.sub("***", words.replace(own, "***") if len(own) >= 8 else words))


def masked(value: Any) -> Any:
    """A value for JSON whose texts, at every depth, are without tokens: before an escape of JSON can hide one."""
    if isinstance(value, str):
        return without_tokens(value)
    if isinstance(value, dict):
        return {masked(key): masked(one) for key, one in value.items()}
    return [masked(one) for one in value] if isinstance(value, (list, tuple)) else value


def tell(line: str) -> None:
    """Print one line to stderr, so that stdout has answers only."""
    print(fit_to_terminal(visible(without_tokens(line)), sys.stderr), file=sys.stderr, flush=True)
