"""Functions that Dynamo counts on their own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def with_own_code(function: Callable[P, T]) -> Callable[P, T]:
    """A copy of a Python function with a code object of its own.

    Dynamo counts recompiles per code object and gives up after eight: functions that are compiled once each, for other
    shapes or other captured objects, must not share one.
    """
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
