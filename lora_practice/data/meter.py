"""What rendering a chat template may cost: sizes are estimated, what is made is added up, and there is a clock."""

from __future__ import annotations

import re
import time
from typing import Any

import jinja2
from jinja2.utils import Namespace

from lora_practice.errors import text

ROOM, PER_CHARACTER = 30_000_000, 50  # characters and items that one rendering may make
LARGEST_NUMBER = 10_000  # bits
SECONDS = 10.0  # a chat takes less than a thousandth of it
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
WIDE_FIELD = re.compile(r"\d{5}|%[^%a-zA-Z]*\*")  # "%99999d", "{:>99999}", "%*d": few letters that make many


class OverBound(jinja2.TemplateError):
    """The template wants more time or memory than a chat can need."""


def too_much() -> OverBound:
    """The error for what would be too large."""
    return OverBound(text("聊天模板要写出的东西太大", "the chat template makes too much"))


class Meter:
    """What one rendering may still make, and until when."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, characters: int) -> None:
        """A new rendering, of a chat of so many characters."""
        self.room = self.left = ROOM + PER_CHARACTER * characters
        self.deadline = time.monotonic() + SECONDS

    def charge(self, size: int) -> None:
        """Something of this size was made, or is about to be."""
        self.left -= abs(size)
        if self.left < 0:
            raise too_much()
        if time.monotonic() > self.deadline:
            raise OverBound(text("聊天模板运行太久", "the chat template runs too long"))

    def foresee(self, *values: Any) -> None:
        """Look at the clock, and at the most that one operation on these can make: a product of two of them."""
        self.charge(1)
        sizes = sorted(abs(one) if isinstance(one, int) else size_of(one, self.room) for one in values)
        if len(sizes) > 1 and sizes[-1] * sizes[-2] > 8 * self.room:
            raise too_much()


def size_of(value: Any, limit: float = float("inf")) -> int:
    """Characters and items in a value, those of its items too; stops counting above `limit`.

    Raises:
        OverBound: a namespace, which may hold itself: it is for remembering, not for writing.
    """
    size, waiting = 0, [value]
    while waiting and size <= limit:
        one = waiting.pop()
        size += 1
        if isinstance(one, (str, bytes, range)):
            size += len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 8
        elif isinstance(one, dict):
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, (list, tuple, set, frozenset, *VIEWS)):
            waiting.extend(one)  # type: ignore[arg-type]
        elif isinstance(one, Namespace):
            raise OverBound(text("聊天模板把 namespace 当成文字或列表项", "the chat template writes out a namespace"))
    return size


def refuse_wide_fields(*values: Any) -> None:
    """OverBound for a format text such as "%99999d"."""
    if any(isinstance(one, str) and WIDE_FIELD.search(one) for one in values):
        raise too_much()


def refuse_large_number(bits: int) -> None:
    """OverBound for an integer of so many bits."""
    if bits > LARGEST_NUMBER:
        raise OverBound(text("聊天模板算的数太大", "the chat template computes too large a number"))
