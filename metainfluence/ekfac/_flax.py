"""Layers of Flax models, marked during a capture without a change to the model.

Flax is not imported here: a model that uses it has imported it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from metainfluence.ekfac._layers import Conv, Dense, Layer, capturing, mark

# Captures in several threads would otherwise restore nnx's methods in the wrong order.
_replacing = threading.RLock()


@contextlib.contextmanager
def intercepted() -> Iterator[None]:
    """Marks linen's `Dense` and `Conv` and nnx's `Linear` and `Conv` while the context is active."""
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    with contextlib.ExitStack() as stack:
        if linen is not None:
            stack.enter_context(linen.intercept_methods(_linen_interceptor(linen)))
        if nnx is not None:
            stack.enter_context(_replacing)
            for kind, make in ((nnx.Linear, _dense), (nnx.Conv, _conv)):
                stack.enter_context(_replaced(kind, make))
        yield


def _linen_interceptor(linen: Any) -> Callable[..., Any]:
    def interceptor(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = function(*args, **kwargs)
        module = context.module
        make = {linen.Dense: _dense, linen.Conv: _conv}.get(type(module))
        if make is None or context.method_name != "__call__" or module.is_initializing():
            return outputs

        def parameter(name: str) -> Any:
            return linen.unbox(module.get_variable("params", name))

        inputs = args[0] if args else kwargs["inputs"]
        bias = parameter("bias") if module.use_bias else None
        return mark(make(module, "/".join(module.path)), outputs, inputs, parameter("kernel"), bias)

    return interceptor


@contextlib.contextmanager
def _replaced(kind: Any, make: Callable[[Any, str], Layer]) -> Iterator[None]:
    # nnx has no interceptors.
    original = kind.__call__

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, inputs, *args, **kwargs)
        if not capturing.value:
            return outputs
        bias = None if self.bias is None else self.bias[...]
        return mark(make(self, kind.__name__), outputs, inputs, self.kernel[...], bias)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = original


def _names(module: Any, path: str) -> tuple[str, str | None]:
    return f"{path}/kernel".lstrip("/"), f"{path}/bias".lstrip("/") if module.use_bias else None


def _dense(module: Any, path: str) -> Layer:
    custom = getattr(module, "dot_general_cls", None) or module.dot_general
    unsupported = None
    if custom is not None and getattr(custom, "__module__", "").partition(".")[0] != "jax":
        unsupported = "EK-FAC does not support another dot_general"
    return Dense(*_names(module, path), unsupported=unsupported)


def _conv(module: Any, path: str) -> Layer:
    padding = module.padding
    if not isinstance(padding, (str, int)):
        padding = tuple(width if isinstance(width, int) else tuple(width) for width in padding)
    problems = {
        "a mask": module.mask is not None,
        "input_dilation": any(value != 1 for value in _integers(module.input_dilation)),
        "feature_group_count": module.feature_group_count != 1,
        f"padding {padding!r}": padding in ("CIRCULAR", "REFLECT", "CAUSAL"),
    }
    found = [problem for problem, present in problems.items() if present]
    return Conv(
        *_names(module, path),
        strides=_hashable(module.strides),
        padding=padding,
        kernel_dilation=_hashable(module.kernel_dilation),
        unsupported=f"EK-FAC does not support {' and '.join(found)}" if found else None,
    )


def _hashable(value: Any) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else _integers(value)


def _integers(value: Any) -> tuple[int, ...]:
    if value is None:
        return (1,)
    return (value,) if isinstance(value, int) else tuple(value)
