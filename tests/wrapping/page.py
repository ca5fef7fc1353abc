"""The page on wrapping as code that runs."""

import contextlib
import re
from pathlib import Path

import jax

import metainfluence as mi

PAGE = Path(mi.__file__).parent / "docs" / "wrapping.md"


def sections():
    """Title of each section that has code → its blocks."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
        if blocks:
            found[part.partition("\n")[0]] = blocks
    return found


SECTIONS = sections()


@contextlib.contextmanager
def as_a_reader(x64):
    """The settings of a fresh interpreter, whose promotion is not strict."""
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def execute(blocks, scope):
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    return scope


def quick_jit(fn):
    """Compiles in half the time, for functions of tiny arrays that run once."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
