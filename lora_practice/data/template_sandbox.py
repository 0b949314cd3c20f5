"""A jinja2 sandbox that bounds the time and the memory of a chat template.

A chat template is a program, often from a stranger. transformers renders it in jinja2's sandbox, which keeps it away
from our files but bounds neither its time nor its memory: `{{ 'a' * 10**9 }}`, nested loops, a text doubled in a loop.
`BoundedSandbox` adds a budget to that sandbox. It works alike on every system, without threads, signals or processes:

- The result of an operation is estimated from the sizes of its inputs beforehand, and refused when it is too large.
- The sizes of all results and of the output are added up, to SIZE_LIMIT at most plus SIZE_PER_CHARACTER for each
  character of the chat.
- Each pass of a loop, each call, filter and test checks the time: SECONDS for one rendering.

Limits: a single operation, on values that SIZE_LIMIT bounds, runs to its end before the time is checked; sizes count
characters and items, not bytes. What cannot be foreseen is slow for a moment, not endless.

In the order of this file: the budget, the sizes it counts, the marks put into a template, the sandbox.
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

SIZE_LIMIT, SIZE_PER_CHARACTER = 30_000_000, 50  # characters and items that one rendering may produce
SECONDS = 10.0  # for one rendering; a chat takes less than a thousandth of it
LARGEST_TEMPLATE = 500_000  # characters; the largest in use have some 50,000
LARGEST_NUMBER = 10_000  # bits of an integer
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
WIDE_FIELD = re.compile(r"\d{5}|%[^%a-zA-Z]*\*")  # "%99999d", "{:>99999}", "%*d": few characters that produce many
FORMATTING_METHODS = ("format", "format_map", "strftime_now")
# filters that no chat template needs, and whose cost is hard to foresee
REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# names of our own filters; the space keeps them out of reach of a template's own words
CHARGE_PASS, CHARGE_VALUE = " charge_pass", " charge_value"


class TemplateTooCostly(jinja2.TemplateError):
    """The template needs more time or memory than a chat can need."""


class RenderBudget:
    """Size and time that are left to one rendering."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, characters: int) -> None:
        """Reset for the rendering of a chat of so many characters."""
        self.limit = self.left = SIZE_LIMIT + SIZE_PER_CHARACTER * characters
        self.deadline = time.monotonic() + SECONDS

    def charge(self, size: int) -> None:
        """Subtract the size of a value that was produced or is about to be; check the time."""
        self.left -= abs(size)
        if self.left < 0:
            raise too_large()
        if time.monotonic() > self.deadline:
            raise TemplateTooCostly(text("聊天模板运行太久", "the chat template runs too long"))

    def check_operation(self, *values: Any) -> None:
        """Check the time, and the most that one operation on these values can produce: the product of two sizes."""
        self.charge(1)
        sizes = sorted(abs(one) if isinstance(one, int) else size_of(one, self.limit) for one in values)
        if len(sizes) > 1 and sizes[-1] * sizes[-2] > 8 * self.limit:
            raise too_large()


def too_large() -> TemplateTooCostly:
    """The error for a result above the limit."""
    return TemplateTooCostly(text("聊天模板要生成的内容太大", "the chat template makes too much"))


def size_of(value: Any, limit: float = float("inf")) -> int:
    """Characters and items in a value, nested ones included; stops counting above `limit`.

    Raises:
        TemplateTooCostly: a namespace, which may contain itself; it is for remembering, not for writing.
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
            zh, en = "聊天模板把 namespace 当成文字或列表项", "the chat template writes out a namespace"
            raise TemplateTooCostly(text(zh, en))
    return size


def refuse_wide_fields(*values: Any) -> None:
    """TemplateTooCostly for a format string such as "%99999d"."""
    if any(isinstance(one, str) and WIDE_FIELD.search(one) for one in values):
        raise too_large()


def refuse_large_number(bits: int) -> None:
    """TemplateTooCostly for an integer of more than LARGEST_NUMBER bits."""
    if bits > LARGEST_NUMBER:
        raise TemplateTooCostly(text("聊天模板算的数太大", "the chat template computes too large a number"))


class _ChargeMarks(NodeTransformer):
    """Adds charges to a template's syntax tree where jinja2 offers no hook.

    That is: at each pass of a loop, around lists and dicts in braces, and around `~` (concatenation).
    """

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        written = sum(len(one.data) for one in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(1 + written), CHARGE_PASS)))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(1), CHARGE_PASS), node.test)
        return node

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"  # for (a, b) in ...
        constant = node.find((nodes.Name, nodes.Filter, nodes.Call, nodes.BinExpr)) is None  # type: ignore[arg-type]
        return node if is_target or constant else _filter(node, CHARGE_VALUE)

    visit_Dict = visit_Tuple = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "join")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _BoundedTemplate(jinja2.Template):
    """A template that resets its sandbox's budget at the start of each rendering."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.budget.start(size_of(kwargs))  # type: ignore[attr-defined]
        return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        self.environment.budget.start(size_of(kwargs))  # type: ignore[attr-defined]
        return super().generate(*args, **kwargs)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """transformers' sandbox with a budget; see the top of this file."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    template_class = _BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = RenderBudget()
        self.finalize = self._charge_value
        self.filters = _ChargedFilters(
            self, {name: one for name, one in self.filters.items() if name not in REMOVED_FILTERS}
        )
        self.tests = {name: self._charged_test(one) for name, one in self.tests.items()}  # type: ignore[arg-type]
        dict.update(self.filters, {CHARGE_PASS: self._charge_pass_filter, CHARGE_VALUE: self._charge_value_filter})
        del self.globals["lipsum"]

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        self.budget.start(0)
        if len(source) > LARGEST_TEMPLATE:
            raise TemplateTooCostly(text("聊天模板太长", "the chat template is too long"))
        tree = _ChargeMarks().visit(super()._parse(source, name, filename))
        for node in tree.find_all(nodes.Node):
            node.lineno = node.lineno or 1
        return tree.set_environment(self)

    def call(__self, __context: Any, __called: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template; a macro's output is charged while the macro produces it."""
        owner = getattr(getattr(__called, "__wrapped__", __called), "__self__", None)
        if isinstance(__called, Macro):
            __self.budget.charge(1)
        else:
            __self.budget.check_operation(owner, *args, *kwargs.values())
        if getattr(__called, "__name__", "") in FORMATTING_METHODS:
            refuse_wide_fields(owner, *args)
        return __self.charged(super().call(__context, __called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A binary operator in a template."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            refuse_large_number(left.bit_length() * right)
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            self.budget.charge(1)
            factors = [abs(one) if isinstance(one, int) else size_of(one, self.budget.limit) for one in (left, right)]
            self.budget.charge(factors[0] * factors[1])
        else:
            self.budget.charge(1)
        if operator == "%":
            refuse_wide_fields(left)
            self.budget.check_operation(left if isinstance(left, str) else 1, right if isinstance(left, str) else 1)
        return self.charged(super().call_binop(context, operator, left, right))

    def charged(self, result: Any) -> Any:
        """The same result with its size charged; the items of a generator as they are drawn from it."""
        if isinstance(result, types.GeneratorType):
            return self._charged_items(result)
        if isinstance(result, int):
            refuse_large_number(result.bit_length())
        if not isinstance(result, Namespace):
            self.budget.charge(size_of(result, self.budget.left))
        return result

    def _charged_items(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.charge(size_of(item, self.budget.left))
            yield item

    def _charge_value(self, value: Any) -> Any:
        self.budget.charge(size_of(value, self.budget.left))
        return value

    # both filters take the context only to keep jinja2 from computing them once, while it compiles the template
    @jinja2.pass_context
    def _charge_pass_filter(self, context: Any, size: Any) -> bool:
        self.budget.charge(size if isinstance(size, int) else 1)
        return True

    @jinja2.pass_context
    def _charge_value_filter(self, context: Any, value: Any) -> Any:
        return self._charge_value(value)

    def _charged_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def charged_test(*args: Any, **kwargs: Any) -> Any:
            self.budget.charge(1)
            return test(*args, **kwargs)

        return charged_test


class _ChargedFilters(dict):
    """A sandbox's filters, later additions included: inputs are checked before each one, its result charged after."""

    def __init__(self, sandbox: BoundedSandbox, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.sandbox = sandbox
        for name, one in filters.items():
            self[name] = one

    def __setitem__(self, name: str, one: Callable[..., Any]) -> None:
        hidden = 1 if getattr(one, "jinja_pass_arg", None) else 0  # the context precedes the template's own arguments

        @functools.wraps(one)
        def charged_filter(*args: Any, **kwargs: Any) -> Any:
            self.sandbox.budget.check_operation(*args[hidden:], *kwargs.values())
            if name == "format":
                refuse_wide_fields(*args[hidden:])
            return self.sandbox.charged(one(*args, **kwargs))

        super().__setitem__(name, charged_filter)


def install_sandbox() -> None:
    """Make transformers render every chat template of this process in `BoundedSandbox`."""
    from transformers.utils import chat_template_utils as rendering

    if rendering.ImmutableSandboxedEnvironment is not BoundedSandbox:
        rendering.ImmutableSandboxedEnvironment = BoundedSandbox  # type: ignore[misc]  # its compiler looks it up
        rendering._compile_jinja_template.cache_clear()
