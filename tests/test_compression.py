"""reproduce/compression.py: the table of docs/beyond.md is of the committed CSVs."""

import csv
import shutil
import sys

import numpy as np
from scipy.stats import t

from conftest import ROOT

sys.path.insert(0, str(ROOT / "reproduce"))
import compression

from mop_distill import Actor


def returns(folder, path, policy) -> list[float]:
    """Of the final episodes in walker-walk."""
    with open(ROOT / "docs/results" / folder / path) as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        if (row["policy"], row["task"], row["evaluation"]) == (policy, "walker-walk", "final"):
            found.append(float(row["return"]))
    assert len(found) == 100
    return found


def test_the_page_is_of_the_csvs(tmp_path, monkeypatch):
    shutil.copy(ROOT / "docs/beyond.md", tmp_path)
    (tmp_path / "curves").symlink_to(ROOT / "docs/curves")
    (tmp_path / "results").symlink_to(ROOT / "docs/results")
    monkeypatch.setattr(sys, "argv", ["compression.py", "--docs", str(tmp_path)])
    compression.main()
    page = (tmp_path / "beyond.md").read_text()
    assert page == (ROOT / "docs/beyond.md").read_text()
    assert (tmp_path / "compression.png").stat().st_size > 10_000
    # one cell by hand
    folder = "laptop-alike" if "Cloning of the teachers: alike." in page else "laptop"
    teacher = np.mean(returns(folder, "teacher/walker-walk-medium/seed1.csv", "teacher"))
    shares = []
    for seed in (1, 2, 3):
        path = f"student/mse-none-128-offline-medium-medium/seed{seed}.csv"
        shares.append(100 * np.mean(returns(folder, path, "student")) / teacher)
    half = t.ppf(0.975, 2) * np.std(shares, ddof=1) / np.sqrt(3)
    (row,) = [line for line in page.splitlines() if line.startswith("| 128 |")]
    cells = row.strip("| ").split(" | ")
    assert cells[-1] == f"{np.mean(shares):.1f}% ± {half:.1f} (3)"
    assert cells[1] == "20,614" and cells[2] == "14%"
    assert sum(weight.numel() for weight in Actor(25, 6, 128).parameters()) == 20_614


def test_times_are_measured(tmp_path, monkeypatch):
    """A row per width, in microseconds: more for the widest, by its products alone."""
    monkeypatch.setattr(compression, "WIDTHS", (16, 1024))
    path = tmp_path / "times.csv"
    compression.measure_times(path)
    with open(path) as file:
        rows = [(int(row["width"]), float(row["microseconds"])) for row in csv.DictReader(file)]
    (narrow, narrow_time), (wide, wide_time) = rows
    assert (narrow, wide) == (16, 1024)
    assert 1 < narrow_time < wide_time < 1e5
