"""A chat template is a program, often a stranger's: here it gets a sandbox with an end.

transformers renders in jinja2's sandbox, which keeps a template from our files but bounds neither its time nor its
memory: `{{ 'a' * 10**9 }}`, loops in loops, texts doubled in a loop. `Bounded` is that sandbox with a meter, the same
on every system, without threads, signals or a second process:

- before an operation its result is estimated from the sizes of what goes in, and refused when it is too large;
- what operations and output make is added up and may reach ROOM, plus PER_CHARACTER for each character of the chat;
- each pass of a loop, call, filter and test looks at the clock: SECONDS for one rendering.

Its limits: between two looks at the clock one operation runs to its end (on values that ROOM bounds), and sizes are
counted in characters and items, not bytes. What it cannot foresee is slow for a moment, not endless.
"""

from __future__ import annotations

import functools
import re
import time
import types
from collections.abc import Iterator
from typing import Any, Callable

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lora_practice.console.text import text

ROOM, PER_CHARACTER = 30_000_000, 50  # characters and items that one rendering may make


LARGEST_NUMBER = 10_000  # bits


SECONDS = 10.0  # a chat takes less than a thousandth of it


VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


WIDE_FIELD = re.compile(r"\d{5}|%[^%a-zA-Z]*\*")  # "%99999d", "{:>99999}", "%*d": few letters that make many


class TemplateTooCostly(jinja2.TemplateError):
    """The template wants more time or memory than a chat can need."""


def too_large() -> TemplateTooCostly:
    """The error for what would be too large."""
    return TemplateTooCostly(text("聊天模板要写出的东西太大", "the chat template makes too much"))


class RenderBudget:
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
            raise too_large()
        if time.monotonic() > self.deadline:
            raise TemplateTooCostly(text("聊天模板运行太久", "the chat template runs too long"))

    def foresee(self, *values: Any) -> None:
        """Look at the clock, and at the most that one operation on these can make: a product of two of them."""
        self.charge(1)
        sizes = sorted(abs(one) if isinstance(one, int) else size_of(one, self.room) for one in values)
        if len(sizes) > 1 and sizes[-1] * sizes[-2] > 8 * self.room:
            raise too_large()


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
            raise TemplateTooCostly(
                text("聊天模板把 namespace 当成文字或列表项", "the chat template writes out a namespace")
            )
    return size


def refuse_wide_fields(*values: Any) -> None:
    """OverBound for a format text such as "%99999d"."""
    if any(isinstance(one, str) and WIDE_FIELD.search(one) for one in values):
        raise too_large()


def refuse_large_number(bits: int) -> None:
    """OverBound for an integer of so many bits."""
    if bits > LARGEST_NUMBER:
        raise TemplateTooCostly(text("聊天模板算的数太大", "the chat template computes too large a number"))


LARGEST_TEMPLATE = 500_000  # characters; the largest in use have some 50,000
# no chat template has a use for them, and what they cost is hard to foresee
NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
TICK, KEEP = " tick", " keep"  # the blank keeps these filters' names out of a template's own words
FORMATS = ("format", "format_map", "strftime_now")


class _Marked(NodeTransformer):
    """Puts the meter where jinja2 offers no hook: passes of loops, lists and dicts in braces, and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        written = sum(len(one.data) for one in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(1 + written), TICK)))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(1), TICK), node.test)
        return node

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"  # for (a, b) in ...
        constant = node.find((nodes.Name, nodes.Filter, nodes.Call, nodes.BinExpr)) is None  # type: ignore[arg-type]
        return node if is_target or constant else _filter(node, KEEP)

    visit_Dict = visit_Tuple = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "join")


class _Template(jinja2.Template):
    """A template whose meter starts anew with each rendering."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.meter.start(size_of(kwargs))  # type: ignore[attr-defined]
        return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        self.environment.meter.start(size_of(kwargs))  # type: ignore[attr-defined]
        return super().generate(*args, **kwargs)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox with a meter; see the top of this file."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    template_class = _Template

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = RenderBudget()
        self.finalize = self._written
        self.filters = _Metered(self, {name: one for name, one in self.filters.items() if name not in NO_FILTERS})
        self.tests = {name: self._watched(one) for name, one in self.tests.items()}  # type: ignore[arg-type]
        dict.update(self.filters, {TICK: self._tick, KEEP: self._keep})
        del self.globals["lipsum"]

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        self.meter.start(0)
        if len(source) > LARGEST_TEMPLATE:
            raise TemplateTooCostly(text("聊天模板太长", "the chat template is too long"))
        tree = _Marked().visit(super()._parse(source, name, filename))
        for node in tree.find_all(nodes.Node):
            node.lineno = node.lineno or 1
        return tree.set_environment(self)

    def call(__self, __context: Any, __called: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template. What a macro makes is counted as it makes it."""
        whose = getattr(getattr(__called, "__wrapped__", __called), "__self__", None)
        if isinstance(__called, Macro):
            __self.meter.charge(1)
        else:
            __self.meter.foresee(whose, *args, *kwargs.values())
        if getattr(__called, "__name__", "") in FORMATS:
            refuse_wide_fields(whose, *args)
        return __self.made(super().call(__context, __called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            refuse_large_number(left.bit_length() * right)
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            self.meter.charge(1)
            factors = [abs(one) if isinstance(one, int) else size_of(one, self.meter.room) for one in (left, right)]
            self.meter.charge(factors[0] * factors[1])
        else:
            self.meter.charge(1)
        if operator == "%":
            refuse_wide_fields(left)
            self.meter.foresee(left if isinstance(left, str) else 1, right if isinstance(left, str) else 1)
        return self.made(super().call_binop(context, operator, left, right))

    def made(self, result: Any) -> Any:
        """The same, counted; of a generator each item when it comes."""
        if isinstance(result, types.GeneratorType):
            return self._counted(result)
        if isinstance(result, int):
            refuse_large_number(result.bit_length())
        if not isinstance(result, Namespace):
            self.meter.charge(size_of(result, self.meter.left))
        return result

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.meter.charge(size_of(item, self.meter.left))
            yield item

    def _written(self, value: Any) -> Any:
        self.meter.charge(size_of(value, self.meter.left))
        return value

    # both take the context only so that jinja2 does not compute them once, when it compiles the template
    @jinja2.pass_context
    def _tick(self, context: Any, size: Any) -> bool:
        self.meter.charge(size if isinstance(size, int) else 1)
        return True

    @jinja2.pass_context
    def _keep(self, context: Any, value: Any) -> Any:
        return self._written(value)

    def _watched(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.meter.charge(1)
            return test(*args, **kwargs)

        return watched


class _Metered(dict):
    """An environment's filters, also those added later, each with the meter before and after it."""

    def __init__(self, environment: BoundedSandbox, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.environment = environment
        for name, one in filters.items():
            self[name] = one

    def __setitem__(self, name: str, one: Callable[..., Any]) -> None:
        hidden = 1 if getattr(one, "jinja_pass_arg", None) else 0  # the context stands before what a template gives

        @functools.wraps(one)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.environment.meter.foresee(*args[hidden:], *kwargs.values())
            if name == "format":
                refuse_wide_fields(*args[hidden:])
            return self.environment.made(one(*args, **kwargs))

        super().__setitem__(name, metered)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def install_sandbox() -> None:
    """From now on transformers renders every chat template of this process in `Bounded`."""
    from transformers.utils import chat_template_utils as rendering

    if rendering.ImmutableSandboxedEnvironment is not BoundedSandbox:
        rendering.ImmutableSandboxedEnvironment = BoundedSandbox  # type: ignore[misc]  # its compiler looks this name up
        rendering._compile_jinja_template.cache_clear()
