"""The list of what is broken, and by which tests, speaks of files, lines and tests that are there."""

from reliability import mutants


def test_what_is_named_is_there():
    files = {file.name: file for file in mutants.core_files()}
    assert set(mutants.TESTS) - {"solvers"} <= set(files)
    for test in {test for tests in (*mutants.TESTS.values(), mutants.WIDER) for test in tests}:
        assert (mutants.ROOT / test).is_file(), test
    changed = {
        (name, mutant.source.splitlines()[mutant.line - 1].strip())
        for name in {name for name, _ in mutants.EQUIVALENT}
        for mutant in mutants.mutants_of(files[name])
    }
    assert set(mutants.EQUIVALENT) <= changed
