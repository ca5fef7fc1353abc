"""The GPU's script at toy size, on whatever device there is."""

import json

import pytest

from metainfluence.lab.bench import accelerator
from metainfluence.lab.bench.accelerator import AcceleratorBenchConfig
from metainfluence.lab.experiments.named import ConfigError

TOY = {"size": 4, "width": 2, "depth": 1, "ways": 2, "queries": 1, "inner_steps": 1, "at_once": 2, "repeats": 1}


def test_a_part_that_is_cut_keeps_what_it_has_and_the_next_one_runs(tmp_path, monkeypatch):
    """The first ends by itself; the second has no time to begin."""
    monkeypatch.setattr(accelerator, "SHARES", {"convolution": 1.0, "cold 64": 0.001})
    config = AcceleratorBenchConfig(**TOY, parts=("convolution", "cold 64"), seconds=250.0, out=tmp_path)
    accelerator.run(config)
    record = json.loads((tmp_path / "accelerator.json").read_text())
    assert [row["what"] for row in record["rows"]] == ["windows", "shifted", "lax"]
    assert all(row["seconds"] > 0 and row["tflops"] > 0 for row in record["rows"])
    ends = {part: row["end"] for part, row in record["parts"].items()}
    assert ends == {"convolution": "done", "cold 64": "stopped at its limit"}
    assert record["device"]["jax"]
    assert "| convolution | lax | 2 |" in (tmp_path / "accelerator.md").read_text()


def test_shares_are_of_the_whole():
    assert sum(accelerator.SHARES.values()) == pytest.approx(1)
    from metainfluence.lab.bench import _accelerator_parts

    assert set(_accelerator_parts.parts()) == set(accelerator.SHARES)


def test_half_a_line_is_left_for_later(tmp_path):
    config = AcceleratorBenchConfig(out=tmp_path)
    record, lines = {"device": {}, "rows": [], "parts": {}}, tmp_path / "x.jsonl"
    lines.write_text('{"part": "maml", "what": "product", "seconds": 0.5}\n{"part": "ma')
    accelerator._take(config, record, [], lines)
    assert [row["what"] for row in record["rows"]] == ["product"]
    assert "| maml | product |  |  | 0.5 |" in (tmp_path / "accelerator.md").read_text()


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"parts: expected some of precision, .*, got 'all'"):
        accelerator.run(AcceleratorBenchConfig(parts=("all",), out=tmp_path))


@pytest.mark.slow
def test_all_parts_at_toy_size(tmp_path):
    config = AcceleratorBenchConfig(
        **TOY, num_tasks=(3,), cold=(3, 5), train_steps=3, seconds=3000.0, out=tmp_path / "new"
    )
    accelerator.run(config)
    record = json.loads((tmp_path / "new" / "accelerator.json").read_text())
    assert {row["end"] for row in record["parts"].values()} == {"done"}
    errors = {row["what"]: row.get("error") for row in record["rows"] if row["part"] == "precision"}
    assert errors["float64"] == 0 < errors["highest"] < 1e-4
    assert any(what.startswith("scores in bfloat16: ") for what in errors)
