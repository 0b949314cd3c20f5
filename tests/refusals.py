"""What a refused call says."""

from __future__ import annotations

from typing import Any

import pytest

from lora_practice.console.errors import UserError


def refusal_of(call: Any, *args: Any, **options: Any) -> str:
    """The one line of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line
