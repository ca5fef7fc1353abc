"""What is installed, what an import brings in, and that nothing of one machine is in the repository."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from metainfluence.lab.bench import import_time

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metainfluence"
NOT_CORE = {"lab", "__main__.py"}
CORE = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in NOT_CORE)
CORE_DEPENDENCIES = {"jax", "jaxtyping", "numpy", "optax"}
LAB_PACKAGES = {
    "array_record",
    "flax",
    "matplotlib",
    "orbax",
    "pandas",
    "PIL",
    "pyarrow",
    "rich",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "tyro",
}


def python(code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, where nothing has been imported yet."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=check, capture_output=True, text=True)


def imported(node: ast.AST, package: str) -> list[str]:
    """Full names of the modules that an import statement may load; none for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module but for the bodies of its functions, which run when they are called."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from run_on_import(node)


def repository_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]


def test_import_brings_in_nothing_of_the_lab():
    modules = python("import sys, metainfluence; print(*sys.modules)").stdout.split()
    packages = {name.partition(".")[0] for name in modules}
    assert "metainfluence" in packages
    assert not LAB_PACKAGES & packages


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_never_imports_the_lab(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [name for node in ast.walk(tree) for name in imported(node, package)]
    assert not [name for name in names if f"{name}.".startswith("metainfluence.lab.")]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_needs_only_its_dependencies(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {name.partition(".")[0] for node in run_on_import(tree) for name in imported(node, package)}
    assert names <= CORE_DEPENDENCIES | {"metainfluence"} | sys.stdlib_module_names


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import metainfluence.lab.learn.models", "metainfluence.lab.learn.models"),
        ("from metainfluence import lab", "metainfluence.lab"),
        ("from . import lab", "metainfluence.lab"),
        ("from ..lab.learn import models", "metainfluence.lab.learn.models"),
    ],
)
def test_every_way_to_import_is_seen(statement, expected):
    package = "metainfluence.solvers" if ".." in statement else "metainfluence"
    assert expected in imported(ast.parse(statement).body[0], package)


def test_core_only_install_names_the_extra():
    result = python(
        f"""
import sys
for name in {sorted(LAB_PACKAGES)}:
    sys.modules[name] = None
sys.argv = ["metainfluence", "demo"]
from metainfluence.__main__ import main
main()
""",
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "needs the lab extra: pip install 'metainfluence[lab]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_module_of_our_own_is_not_blamed_on_the_extra():
    result = python(
        """
import sys
sys.modules["metainfluence.lab.commands.cli"] = None
from metainfluence.__main__ import main
main()
""",
        check=False,
    )
    assert "Traceback" in result.stderr
    assert "needs the lab extra" not in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_wheel_holds_the_package_only(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"metainfluence"}
    assert "metainfluence/py.typed" in names
    others = {name for name in names if name.startswith("metainfluence/") and not name.endswith(".py")}
    page = {f"metainfluence/lab/show/page/page.{suffix}" for suffix in ("css", "html", "js")}
    assert others == page | {"metainfluence/py.typed"}


def test_sdist_holds_no_data(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sizes = {member.name.partition("/")[2]: member.size for member in archive.getmembers()}
    assert "LICENSE" in sizes
    data = re.compile(
        r"\.(npy|npz|parquet|pkl|tfrecord)$|\.array_record|(^|/)(\.data|demo-output|train-output|bench-output)/"
    )
    # A bank holds what retraining came to, and no data.
    assert not [name for name in sizes if data.search(name) and not name.endswith("/bank.parquet")]
    assert not {name: size for name, size in sizes.items() if size > 1_000_000}


def test_no_file_names_a_path_of_one_machine():
    here = re.escape(f"{ROOT.parent}/")
    # A path that starts in the middle of a word or after a variable belongs to an address or to a relative path.
    pattern = re.compile(rf"(?<![\w.~$}}\])-])(?:{here}|/(?:home|Users|root|mnt|tmp)/)\w")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:120]}"
        for path in repository_files()
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_constraints_are_exact_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    exact = re.compile(r'([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!+]*)(?:; python_version (<|>=) "(3\.\d+)")?')
    found = [exact.fullmatch(pin) for pin in pins]
    assert all(found)
    assert pins
    # One version of each for every Python.
    for minor in (11, 12, 13):
        holds = {None: True, "<": minor < 12, ">=": minor >= 12}
        names = [match[1] for match in found if match[4] in (None, "3.12") and holds[match[3]]]
        assert len(names) == len(set(names))
        assert set(names) == {match[1] for match in found}


@pytest.mark.slow
def test_import_time_is_measured():
    measured = import_time.measure(repeats=3)
    assert set(measured) == {"metainfluence", "dependencies", "ratio"}
    assert measured["ratio"] == measured["metainfluence"] / measured["dependencies"]
