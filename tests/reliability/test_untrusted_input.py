"""Files from elsewhere: score files, configurations, image folders, checkpoints. They hold data, and never code."""

import ast
import dataclasses
import functools
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from PIL import Image

import metainfluence as mi
from metainfluence.lab.commands.config_files import ConfigError, as_arguments, read_config
from metainfluence.lab.data._images import decode_file, image_files

PACKAGE = Path(mi.__file__).parent
QUICK = settings(derandomize=True, max_examples=150, deadline=None, database=None)
LONG = settings(QUICK, max_examples=10_000)

# Modules that run what they read, and functions that do.
CODE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CODE_FUNCTIONS = {"eval", "exec", "compile", "__import__"}


def code_runs(source):
    """Lines of a module by which a file's content could be run as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names} & CODE_MODULES
        elif isinstance(node, ast.ImportFrom):
            found = {(node.module or "").split(".")[0]} & CODE_MODULES
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            found = {name} & CODE_FUNCTIONS
            allowed = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            if any(not (isinstance(value, ast.Constant) and value.value is False) for value in allowed):
                found = {"allow_pickle"}
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "np.load" and not allowed:
                found = {"np.load"}
        else:
            continue
        if found:
            yield node.lineno


def test_the_package_runs_nothing_that_it_reads():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {f"{file.relative_to(PACKAGE)}:{line}" for file in files for line in code_runs(file.read_text())}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "eval('1')",
        "exec(text)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.savez(file, allow_pickle=flag)",
        "import yaml",
    ],
)
def test_the_look_for_code_finds_it(source):
    assert list(code_runs(source)) == [1]


class Damage(NamedTuple):
    """Changes of a file's bytes: (place, what to put there, how many bytes of the old go), places modulo its length."""

    changes: list[tuple[int, bytes, int]]

    def of(self, content):
        content = bytearray(content)
        for place, new, gone in self.changes:
            start = place % (len(content) + 1)
            content[start : start + gone] = new
        return bytes(content)


DAMAGE = st.builds(
    Damage,
    st.lists(
        st.tuples(st.integers(0, 5000), st.binary(max_size=6), st.sampled_from([0, 1, 1, 1, 4, 5000])), max_size=4
    ),
)


def _named_or_read(path, kind, read):
    """What is read, or None, and why it is refused: by an error of this kind, which must name the file."""
    try:
        return read(), "read"
    except kind as error:
        message = str(error)
    assert str(path) in message
    return None, message.replace(str(path), "")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A place for damaged files."""
    return tmp_path_factory.mktemp("damaged")


@functools.cache
def score_file():
    """A small valid score file."""
    rng = np.random.default_rng(0)
    ones = jnp.ones((2, 3, 1))
    info = mi.SolveInfo(*(np.asarray(value) for value in (0, 3, 1e-9, 0.5)))
    scores = mi.Scores(rng.normal(size=2), rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), info)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "scores.parquet"
        mi.scoring.write_scores(path, scores, mi.Task(ones, ones))
        return path.read_bytes()


def read_score_file(folder, content):
    """How it ends; `fuzz.py` asks, as of the other readers."""
    path = folder / "damaged.parquet"
    path.write_bytes(content)
    table, outcome = _named_or_read(path, ValueError, lambda: mi.read_scores(path))
    if table is None:
        return outcome
    assert len(table.task) == len(table.role) == len(table.example) == len(table.score)
    assert np.issubdtype(table.score.dtype, np.floating)
    assert isinstance(table.metadata, dict)
    return outcome


@QUICK
# Cut off in its footer; a footer of another length; nothing; a byte within a page's header, and within its data.
@example(damage=Damage([(1900, b"", 5000)]))
@example(damage=Damage([(-8 % 1991, b"\xff\xff\xff\x7f", 4)]))
@example(damage=Damage([(0, b"", 5000)]))
@example(damage=Damage([(4, b"\xff", 1)]))
@example(damage=Damage([(40, b"\xff", 1)]))
@given(damage=DAMAGE)
def test_a_damaged_score_file_is_named_or_read(folder, damage):
    read_score_file(folder, damage.of(score_file()))


@pytest.mark.slow
@LONG
@given(damage=DAMAGE)
def test_a_damaged_score_file_is_named_or_read_at_length(folder, damage):
    read_score_file(folder, damage.of(score_file()))


def _table(**changes):
    columns = {"task": [0, 0], "role": ["task", "query"], "example": [None, 0], "score": [0.5, 0.25], **changes}
    return pa.table({name: value for name, value in columns.items() if value is not None})


@pytest.mark.parametrize(
    ("table", "metadata"),
    [
        (_table(), None),
        (_table(), b"[1]"),
        (_table(), b"{"),
        (_table(), b"\xff"),
        (_table(), b"[" * 100_000),
        (_table(score=None), b"{}"),
        (_table(score=["a", "b"]), b"{}"),
    ],
)
def test_a_parquet_file_that_holds_no_scores_is_refused(tmp_path, table, metadata):
    path = tmp_path / "other.parquet"
    pq.write_table(table.replace_schema_metadata(None if metadata is None else {b"metainfluence": metadata}), path)
    with pytest.raises(ValueError, match=r"path: expected a score file of metainfluence, got .*other\.parquet"):
        mi.read_scores(path)


def test_a_score_file_of_more_rows_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A million equal rows take a few thousand bytes in a file."""
    path = tmp_path / "bomb.parquet"
    rows = 1_000_000
    table = pa.table(
        {name: pa.array(np.zeros(rows, kind)) for name, kind in [("task", int), ("example", int), ("score", float)]}
        | {"role": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), ["task"])}
    )
    pq.write_table(table.replace_schema_metadata({b"metainfluence": json.dumps({})}), path)
    assert path.stat().st_size < 20_000
    assert len(mi.read_scores(path).task) == rows
    monkeypatch.setattr("metainfluence.scoring._table._physical_memory", lambda: 10**7)
    monkeypatch.setattr(pq, "read_table", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"bomb\.parquet: 1000000 rows of 4 columns take 32000000 bytes"):
        mi.read_scores(path)


def test_a_score_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        mi.read_scores(tmp_path / "none.parquet")


CONFIG = b'suite = "costs"\nseed = 3\nname = "x"\nsizes = [1, 2]\n[inner]\nrate = 0.5\nresume = true\n'


def read_configuration(folder, content):
    """How it ends."""
    path = folder / "config.toml"
    path.write_bytes(content)

    def read():
        _, values = read_config(path, ["costs", "solvers"])
        return as_arguments(values, _configuration(), path)

    arguments, outcome = _named_or_read(path, ConfigError, read)
    if arguments is None:
        return outcome
    # A value never turns into an option of its own.
    options = {"--seed", "--name", "--sizes", "--inner.rate", "--inner.resume", "--inner.no-resume"}
    strings = [argument for argument in arguments if argument.startswith("-") and argument not in options]
    assert all(_is_number(string) for string in strings)
    return outcome


def _is_number(text):
    try:
        return bool(np.isfinite(float(text))) or True
    except ValueError:
        return False


def _configuration():
    inner = dataclasses.make_dataclass("Inner", [("rate", float, 0.1), ("resume", bool, False)])
    fields = [("seed", int, 0), ("name", str, ""), ("sizes", list, None), ("inner", inner, None)]
    return dataclasses.make_dataclass("Config", fields)


TEXT = st.one_of(
    st.builds(lambda damage: damage.of(CONFIG), DAMAGE),
    st.binary(max_size=60),
    st.text("[]{}=.,\"'#-\n0e 1xseedname", max_size=80).map(str.encode),
)


@QUICK
# An option smuggled in as a value; values nested too deeply; no UTF-8; a suite that is no name.
@example(content=b'name = "--resume"')
@example(content=b'sizes = ["1", "--inner.resume"]')
@example(content=b"seed = " + b"[" * 20_000)
@example(content=b"\xff\xfe")
@example(content=b"suite = [1]")
@example(content=b"suite = {a = 1}")
@example(content=b"seed = -1e400")
@example(content=b"seed = 1979-05-27")
@example(content=b"[[inner]]\nrate = 1")
@given(content=TEXT)
def test_a_configuration_is_named_or_read(folder, content):
    read_configuration(folder, content)


@pytest.mark.slow
@LONG
@given(content=TEXT)
def test_a_configuration_is_named_or_read_at_length(folder, content):
    read_configuration(folder, content)


def test_a_configuration_that_is_too_large_or_would_smuggle_an_option_in_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ConfigError, match=r"config\.toml: expected a configuration of at most 1048576 bytes"):
        read_config(path, ["costs"])
    with pytest.raises(ConfigError, match=r"config\.toml: name: expected no string that starts with '-', got '--x'"):
        as_arguments({"name": "--x"}, _configuration(), path)
    assert as_arguments({"seed": -3}, _configuration(), path) == ["--seed", "-3"]


def _encoded(kind, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


IMAGES = [_encoded(*form) for form in [("PNG", "RGB"), ("PNG", "P"), ("PNG", "1"), ("PNG", "LA"), ("JPEG", "RGB")]]


def _chunk(name, content):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _png(width, height, data=b"", *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(data)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read_image(folder, content):
    """How it ends."""
    path = folder / "picture.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        # Pillow warns of what it can do without, as an animation.
        warnings.simplefilter("ignore", UserWarning)
        pixels, outcome = _named_or_read(path, ValueError, lambda: decode_file(path, size=4, mode="L"))
    if pixels is None:
        return outcome
    assert pixels.shape == (4, 4)
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    return outcome


@QUICK
# A header that is cut short; a bad animation; a picture without data; text that would be large.
@example(which=0, damage=Damage([(19, b"", 5)]))
@example(which=0, damage=Damage([(33, _chunk(b"acTL", b"\0\0\0"), 0)]))
@example(which=0, damage=Damage([(33, _chunk(b"fcTL", b""), 0)]))
@example(which=0, damage=Damage([(33, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), 0)]))
@example(which=1, damage=Damage([(41, b"", 5000)]))
@given(which=st.integers(0, len(IMAGES) - 1), damage=DAMAGE)
def test_a_damaged_image_is_named_or_read(folder, which, damage):
    read_image(folder, damage.of(IMAGES[which]))


@pytest.mark.slow
@LONG
@given(which=st.integers(0, len(IMAGES) - 1), damage=DAMAGE)
def test_a_damaged_image_is_named_or_read_at_length(folder, which, damage):
    read_image(folder, damage.of(IMAGES[which]))


CORPUS = Path(__file__).parent / "corpus"
READERS = {"scores": read_score_file, "configurations": read_configuration, "images": read_image}


@pytest.mark.parametrize("reader", READERS)
def test_what_fuzzing_has_kept_is_named_or_read(folder, reader):
    """One file of each outcome that `fuzz.py` has met."""
    kept = sorted((CORPUS / reader).iterdir())
    assert len(kept) > 5
    for file in kept:
        READERS[reader](folder, file.read_bytes())


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 10_000), (0, 5)])
def test_an_image_that_claims_too_many_pixels_is_refused_by_name(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(*size))
    with pytest.raises(ValueError, match=r"bomb\.png: expected a"):
        decode_file(path, size=4, mode="L")


def test_an_image_cut_short_or_too_large_a_file_is_refused_by_name(tmp_path):
    path = tmp_path / "short.jpg"
    path.write_bytes(IMAGES[-1][: len(IMAGES[-1]) // 2])
    with pytest.raises(ValueError, match=r"short\.jpg: expected a readable JPEG or PNG"):
        decode_file(path, size=4, mode="RGB")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(ValueError, match=r"large\.png: expected an image of at most 268435456 bytes"):
        decode_file(large, size=4, mode="RGB")


@pytest.mark.parametrize("level", ["split", "class", "image", "circle", "broken", "pipe"])
def test_what_leads_out_of_an_image_folder_is_refused(tmp_path, level):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for base in (root / "train" / "cat", outside / "cat"):
        base.mkdir(parents=True)
        (base / "0.png").write_bytes(IMAGES[0])
    assert len(image_files(root)[0]) == 1
    bad = {
        "split": (root / "val", outside),
        "class": (root / "train" / "dog", outside / "cat"),
        "image": (root / "train" / "cat" / "1.png", outside / "cat" / "0.png"),
        "circle": (root / "train" / "cat" / "1.png", root / "train" / "cat" / "1.png"),
        "broken": (root / "train" / "cat" / "1.png", root / "train" / "cat" / "none.png"),
    }
    if level == "pipe":
        link = root / "train" / "cat" / "1.png"
        os.mkfifo(link)
    else:
        link, aim = bad[level]
        link.symlink_to(aim)
    with pytest.raises(ValueError, match=rf"{link.name}: expected") as caught:
        image_files(root)
    assert str(link) in str(caught.value)


# In a process of its own, since orbax leaves reads that failed to end after their event loop is closed.
DAMAGED_CHECKPOINTS = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from metainfluence.lab.learn.checkpoints import Checkpoints

folder = Path(sys.argv[1])
state, losses = {"w": jnp.arange(4.0)}, np.arange(3.0)

def restored():
    with Checkpoints(folder, "run") as checkpoints:
        return checkpoints.restore(jax.tree.map(jnp.zeros_like, state), np.zeros(3))

with Checkpoints(folder, "run") as checkpoints:
    checkpoints.save(5, state, losses)
assert restored()[0] == 5
files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
assert not [file for file in files if file.suffix in (".pkl", ".pickle")]
refused = 0
for file in files:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    try:
        step, found, kept = restored()
    except Exception:
        refused += 1
    else:
        assert step == 5, file
        np.testing.assert_array_equal(found["w"], state["w"], str(file))
        np.testing.assert_array_equal(kept, losses, str(file))
    file.write_bytes(content)
print("refused", refused)
"""


def test_a_damaged_checkpoint_is_no_silent_start(tmp_path):
    """Its files are cut one by one; what is restored is what was saved, or there is an error."""
    run = [sys.executable, "-c", DAMAGED_CHECKPOINTS, str(tmp_path)]
    done = subprocess.run(
        run, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused = int(done.stdout.split()[-1])
    assert refused > 0
