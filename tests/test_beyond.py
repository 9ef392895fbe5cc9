"""reproduce/beyond_figures.py: its tables against numbers computed by hand."""

import csv
import importlib
import sys

import numpy as np
import pytest
from scipy import stats

from conftest import ROOT

pytest.importorskip("yaml")  # which snakemake brings
sys.path.append(str(ROOT / "reproduce"))
figures = importlib.import_module("beyond_figures")

MOST = max(figures.AMOUNTS)
COLUMNS = ["policy", "task", "evaluation", "step", "episode", "return"]
PAGE = """# Page
<!-- table domains -->
old
<!-- end -->
<!-- table three_tasks -->
<!-- end -->
<!-- table sharing -->
<!-- end -->
<!-- table amount -->
<!-- end -->
The end.
"""


def write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_returns(path, **returns):
    """A run with two episodes at its end, whose mean is the return, and one evaluation before."""
    rows = []
    for task, value in returns.items():
        task = task.replace("__", "-")
        rows.append(["policy", task, "training", 10, "mean", 1])
        rows.append(["policy", task, "final", 20, 0, value - 5])
        rows.append(["policy", task, "final", 20, 1, value + 5])
    write(path, COLUMNS, rows)


@pytest.fixture
def lines(tmp_path, monkeypatch) -> list[str]:
    """The page's lines after one run on some results."""
    results = tmp_path / "results/beyond"
    write_returns(results / "behavior/hopper-stand-expert.csv", **{"hopper__stand": 800})
    write_returns(results / "behavior/walker-walk-medium.csv", **{"walker__walk": 500})
    student = {"hopper__stand": 0, "hopper__hop": 50}
    measures = []
    for seed, value in ((1, 760), (2, 740), (3, 780)):
        folder = results / f"teacher/hopper-stand-expert-{MOST}"
        write_returns(folder / f"seed{seed}.csv", **{"hopper__stand": value})
        student["hopper__stand"] = value - 76
        folder = results / f"student/hopper-expert-{MOST}-number"
        write_returns(folder / f"seed{seed}.csv", **student)
        measures = [("per-state tau-a", layer, 0.1 * (seed + layer), "") for layer in (1, 2)]
        folder = results / f"measure/student/hopper-expert-{MOST}-number"
        write(folder / f"seed{seed}.csv", ["measure", "layer", "value", "std"], measures)
    write_returns(results / "teacher/walker-walk-medium-30000/seed1.csv", **{"walker__walk": 300})
    (tmp_path / "beyond.md").write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["beyond_figures.py", "--docs", str(tmp_path)])
    figures.main()
    return (tmp_path / "beyond.md").read_text().splitlines()


def half_interval(values) -> float:
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5


def test_domains(lines, tmp_path):
    half = half_interval([760, 740, 780])
    share = half_interval([100 * 684 / 760, 100 * 664 / 760, 100 * 704 / 760])
    expected = f"| hopper-stand | 800.0 | 760.0 ± {half:.1f} (3) | 684.0 ± {half:.1f} (3) |"
    assert f"{expected} 90.0 ± {share:.1f} (3) |" in lines
    assert not any("hopper-hop |" in line for line in lines)  # its behaviour has not been made
    assert "old" not in lines
    assert lines[-1] == "The end."
    assert (tmp_path / "domains.png").stat().st_size > 5000


def test_what_the_tasks_share(lines):
    half = half_interval([0.25, 0.35, 0.45])
    assert f"| hopper-stand, hop | number | 0.350 ± {half:.3f} (3) |  |  |" in lines


def test_amount_of_data(lines, tmp_path):
    assert "| 30,000 | walker-walk | medium | 60.0 (1) |  |" in lines
    assert (tmp_path / "amount.png").stat().st_size > 5000
    assert "| walker-walk | 500.0 |  |  |  |" in lines  # of three tasks
