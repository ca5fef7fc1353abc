"""How the command line has programs compiled."""

import os
import subprocess
import sys

import jax
import pytest

from metainfluence.lab.commands import _compiling as compiling
from metainfluence.lab.commands import cli

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """A user who has said nothing, with a home of their own."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "metainfluence" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(unset):
    compiling.keep_programs()
    assert unset.is_dir()
    assert os.environ.pop(VARIABLE) == jax.config.values["jax_compilation_cache_dir"] == str(unset)


@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_where_the_user_says_counts(unset, monkeypatch, folder):
    monkeypatch.setenv(VARIABLE, folder)
    compiling.keep_programs()
    assert not unset.exists()
    assert os.environ[VARIABLE] == folder


def test_a_cache_that_cannot_be_made_is_done_without(unset):
    unset.parent.write_text("a file")
    compiling.keep_programs()
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("given", ["--xla_backend_extra_options=xla_cpu_x", "--xla_backend_optimization_level=3"])
def test_flags_of_the_user_count(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    compiling.compile_quickly()
    assert os.environ["XLA_FLAGS"] == given


def test_other_flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    compiling.compile_quickly()
    assert os.environ["XLA_FLAGS"].startswith("--xla_dump_to=x --xla_backend_extra_options=")


def test_an_option_turns_the_cache_off(unset, capsys):
    for option, kept in (("--no-cache", False), (None, True)):
        with pytest.raises(SystemExit):
            cli.entry(["--help"] + ([option] if option else []))
        assert unset.exists() == kept
    del os.environ[VARIABLE]
    assert "--no-cache" in capsys.readouterr().out


def test_a_second_process_finds_the_first_ones_programs(tmp_path):
    """Seen by what the second adds to the cache: nothing."""
    script = (
        "from metainfluence.lab.commands._compiling import keep_programs; keep_programs();"
        "import jax, jax.numpy as jnp; jax.jit(lambda x: jnp.linalg.eigh(x @ x.T)[0])(jnp.ones((9, 9)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    seen = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
        seen.append({file.name for file in tmp_path.rglob("*-cache")})
    assert seen[0]
    assert seen[1] == seen[0]
