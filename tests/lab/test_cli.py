import importlib
import tomllib
from pathlib import Path

import pytest

from metainfluence.lab.commands import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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


ORDER = ["demo", "train", "score", "edit", "evaluate", "reproduce", "bench", "report"]


def test_help_teaches_the_commands_in_the_order_of_use(capsys):
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()[0] in ORDER]
    assert listed == ORDER
    assert list(cli.COMMANDS) == ORDER
    for option in ("--config", "--dry-run", "--traceback", "130"):
        assert option in text


@pytest.mark.parametrize("name", [name for name in ORDER if name != "reproduce"])
def test_help_of_a_command_has_an_example(name, capsys):
    assert exit_code([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:" in text
    assert cli.COMMANDS[name].example.splitlines()[0] in text
    assert "--config" in text


@pytest.mark.parametrize("name", ["train", "score", "edit", "evaluate"])
def test_there_is_a_configuration_of_each_step(name):
    path = CONFIGS / f"{name}.toml"
    _, config = cli.parse(name, ["--config", str(path)])
    assert config != type(config)()
    # And what it says of itself is how it is called.
    assert path.read_text().startswith(f"# metainfluence {name} --config configs/{name}.toml: ")


def test_the_command_line_overrides_the_file():
    _, config = cli.parse("score", ["elsewhere", "--config", str(CONFIGS / "score.toml"), "--damping", "0.5"])
    assert (str(config.run), config.damping) == ("elsewhere", 0.5)


def test_a_dry_run_of_any_command_shows_its_options(tmp_path, capsys):
    cli.main(["demo", "--num-tasks", "41", "--out", str(tmp_path / "new"), "--dry-run"])
    shown = tomllib.loads(capsys.readouterr().out)
    assert shown["num_tasks"] == 41
    assert shown["widths"] == [32, 16]
    assert "damping" not in shown
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["score", "run x", "--no-resume"], "metainfluence score: stopped; go on with: metainfluence score 'run x'\n"),
        (["demo"], "metainfluence: stopped\n"),
    ],
)
def test_ctrl_c_says_how_to_go_on(args, expected, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    for where, _ in cli.COMMANDS[args[0]].suites.values():
        monkeypatch.setattr(importlib.import_module(where), "run", stop)
    with pytest.raises(SystemExit) as caught:
        cli.entry(args)
    assert caught.value.code == 130
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("args", [["demo", "--num-taks", "5"], ["demo", "--num-tasks", "many"], ["dmo"], []])
def test_what_makes_no_sense_exits_with_2(args, capsys):
    assert exit_code(args) == 2
    assert capsys.readouterr().err


def test_an_unknown_option_is_named(capsys):
    exit_code(["demo", "--num-taks", "5"])
    assert "--num-taks" in capsys.readouterr().err
