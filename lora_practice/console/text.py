"""Messages for a person: the language, two spellings of a sentence, and one line on stderr."""

from __future__ import annotations

import locale
import os
import re
import sys

from lora_practice.console.terminal import fit_to_terminal

# what would steer a terminal or hide a part of a line, when it stands in the name of a file or in someone's data
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf_([a-z]{3,6}_)?|api_org_)[A-Za-z0-9]{20,}")


def language() -> str:
    """'zh' or 'en': LORA_PRACTICE_LANG first, then the locale variables, then the system's locale."""
    for name in ("LORA_PRACTICE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name)
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    system = locale.getlocale()[0] or ""
    return "zh" if system.lower().startswith(("zh", "chinese")) else "en"


def text(zh: str, en: str) -> str:
    """The one of two spellings that this user reads."""
    return zh if language() == "zh" else en


def counted(number: int, noun: str) -> str:
    """The number before an English noun that takes an s: "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def visible(words: str) -> str:
    """The same words with control characters spelt out, "\\x1b" for ESC; line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), words)


def without_tokens(words: str) -> str:
    """The same words with HF_TOKEN, and whatever looks like a token of the Hub, as "***"."""
    own = os.environ.get("HF_TOKEN", "").strip()
    return TOKEN.sub("***", words.replace(own, "***") if len(own) >= 8 else words)


def tell(line: str) -> None:
    """Print one line for the person at the terminal (stderr, so that answers on stdout stay clean)."""
    print(fit_to_terminal(visible(without_tokens(line)), sys.stderr), file=sys.stderr, flush=True)
