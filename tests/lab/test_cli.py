import pytest

from metainfluence.lab import cli


def exit_code(args):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    return caught.value.code


def test_help_lists_the_options_with_their_defaults(capsys):
    assert exit_code(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--num-tasks" in text
    assert "(default: 200)" in text
    assert "--damping" in text


def test_help_lists_the_subcommands(capsys):
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "bench" in text


@pytest.mark.parametrize("args", [["demo", "--num-taks", "5"], ["demo", "--num-tasks", "many"], ["dmo"], []])
def test_what_makes_no_sense_exits_with_2(args, capsys):
    assert exit_code(args) == 2
    assert capsys.readouterr().err


def test_an_unknown_option_is_named(capsys):
    exit_code(["demo", "--num-taks", "5"])
    assert "--num-taks" in capsys.readouterr().err
