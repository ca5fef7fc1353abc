"""The command line, called in this process."""

import contextlib
import io

from metainfluence.lab.commands import cli

TRAIN = [
    *("--data.num-tasks", "12", "--data.num-held-out", "6", "--data.num-test", "5", "--data.ways", "3"),
    *("--data.shots", "2", "--data.queries", "4", "--harm.flipped", "0.25", "--harm.flip-share", "1.0"),
    *("--learner.kind", "protonet", "--learner.widths", "6", "--learner.meta-l2", "0.05"),
    *("--training.num-steps", "30", "--training.learning-rate", "0.1"),
]


def called(*args):
    """The exit status, and what was printed on both streams."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.entry([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def done(*args):
    status, out, err = called(*args)
    assert status == 0, err
    return out
