"""reproduce/beyond_figures.py: its tables against numbers computed by hand."""

import csv
import importlib
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import mop_distill as distill
from conftest import ROOT, make_arrays, write_dataset, write_teacher

pytest.importorskip("yaml")  # which snakemake brings
sys.path.append(str(ROOT / "reproduce"))
figures = importlib.import_module("beyond_figures")
losses = importlib.import_module("losses")

AMOUNT = figures.MOST
COLUMNS = ["policy", "task", "evaluation", "step", "episode", "return"]
PAGE = """# Page
<!-- table domains -->
old
<!-- end -->
<!-- table three_tasks -->
old
<!-- end -->
<!-- table sharing -->
old
<!-- end -->
<!-- table amount -->
old
<!-- end -->
<!-- table wide -->
old
<!-- end -->
<!-- table reweighting -->
old
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
        folder = results / f"teacher/hopper-stand-expert-{AMOUNT}"
        write_returns(folder / f"seed{seed}.csv", **{"hopper__stand": value})
        student["hopper__stand"] = value - 76
        folder = results / f"student/hopper-expert-{AMOUNT}-number"
        write_returns(folder / f"seed{seed}.csv", **student)
        measures = [("per-state tau-a", layer, 0.1 * (seed + layer), "") for layer in (1, 2)]
        folder = results / f"measure/student/hopper-expert-{AMOUNT}-number"
        write(folder / f"seed{seed}.csv", ["measure", "layer", "value", "std"], measures)
    write_returns(results / "teacher/walker-walk-medium-30000/seed1.csv", **{"walker__walk": 300})
    (tmp_path / "beyond.md").write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["beyond_figures.py", "--docs", str(tmp_path)])
    figures.main()
    return (tmp_path / "beyond.md").read_text().splitlines()


def test_the_page_is_of_the_csvs(tmp_path, monkeypatch):
    shutil.copy(ROOT / "docs/beyond.md", tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "docs/results")
    monkeypatch.setattr(sys, "argv", ["beyond_figures.py", "--docs", str(tmp_path)])
    figures.main()
    assert (tmp_path / "beyond.md").read_text() == (ROOT / "docs/beyond.md").read_text()


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


def test_students_by_the_weights_of_their_states(tmp_path, monkeypatch):
    laptop = tmp_path / "results/laptop/student"
    for states, value in (("random90", 100), ("online", 300)):
        folder = laptop / f"mse-none-32-{states}-medium-medium"
        write_returns(folder / "seed1.csv", walker__stand=value, walker__walk=0)
    folder = tmp_path / "results/beyond/reweighted/q-ratio-32-random90-medium"
    write_returns(folder / "seed1.csv", walker__stand=50, walker__walk=0)
    write(folder / "seed1-weights.csv", ["task"], [["walker-stand"]])
    (tmp_path / "beyond.md").write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["beyond_figures.py", "--docs", str(tmp_path)])
    figures.main()
    lines = (tmp_path / "beyond.md").read_text().splitlines()
    cells = "100.0 (1) |  | 50.0 (1) |  | 300.0 (1)"
    assert f"| walker-stand | medium | random90 | 32 | {cells} |" in lines
    assert not any("| random99 |" in line for line in lines)


def test_losses_of_wide_students(tmp_path, monkeypatch):
    """Returns of the laptop's students beside the losses; a student without losses is left out."""
    returns = {"walker__stand": 400, "walker__walk": 300}
    for width in (64, 1024):
        folder = tmp_path / f"results/laptop/student/mse-none-{width}-random90-medium-medium"
        write_returns(folder / "seed1.csv", **returns)
        write(folder / "seed1-tau.csv", ["step"], [[1]])
    columns = ["states", "task", "loss"]
    rows = [["training", "walker-stand", 0.1], ["training", "walker-walk", 0.3]]
    rows += [["teacher", "walker-stand", 0.5], ["teacher", "walker-walk", 1.5]]
    name = "mse-none-1024-random90-medium-medium"
    write(tmp_path / f"results/beyond/losses/{name}/seed1.csv", columns, rows)
    (tmp_path / "beyond.md").write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["beyond_figures.py", "--docs", str(tmp_path)])
    figures.main()
    page = (tmp_path / "beyond.md").read_text()
    row = "| random90 | 1024 | 400.0 (1) | 300.0 (1) | 0.2000 (1) | 1.0000 (1) |"
    assert row in page
    assert "| random90 | 64 |" not in page


@pytest.mark.parametrize("encoding", ["number", "onehot"])
def test_losses_of_a_student(tmp_path, monkeypatch, encoding):
    """Against plain products of its weights, on two sets of states."""
    tasks = ["walker-stand", "walker-walk"]
    codes = np.eye(2) if encoding == "onehot" else np.array([[0.0], [1.0]])
    student = distill.Actor(24 + codes.shape[1], 6, 8)
    sizes = {"in_dim": 24 + codes.shape[1], "obs_dim": 24, "action_dim": 6, "hidden": 8}
    checkpoint = {
        "kind": "student",
        "tasks": tasks,
        "level": ["medium", "medium"],
        "sizes": sizes | {"log_std": None, "task_encoding": encoding},
        "actor": student.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "student.pt")
    monkeypatch.setattr(losses, "CHUNK", 150)  # 200 states
    monkeypatch.chdir(tmp_path)
    argv = ["losses.py", "out/losses.csv", "student.pt", "--teachers", "t0.pt", "t1.pt"]
    argv += ["--data", "training0.npz", "training1.npz"]
    argv += ["--teacher-data", "teacher0.npz", "teacher1.npz"]
    expected = []
    for s, states in enumerate(("training", "teacher")):
        for i, task in enumerate(tasks):
            arrays = make_arrays(seed=2 * s + i)
            write_dataset(tmp_path / f"{states}{i}.npz", task, arrays)
            write_teacher(tmp_path / f"t{i}.pt", task, seed=i)
            teacher = distill.load_actor(torch.load(tmp_path / f"t{i}.pt", weights_only=True))
            x = np.hstack([arrays["observations"], np.tile(codes[i], (200, 1))])
            for j in (0, 2, 4):
                layer = student.net[j]
                x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
                x = np.tanh(x) if j == 4 else np.maximum(x, 0)
            target = teacher(torch.from_numpy(arrays["observations"])).numpy()
            expected.append((states, task, np.square(x - target).sum(axis=1).mean()))
    monkeypatch.setattr(sys, "argv", argv)
    losses.main()
    with open("out/losses.csv", newline="") as file:
        found = [(row["states"], row["task"], float(row["loss"])) for row in csv.DictReader(file)]
    for row, (states, task, loss) in zip(found, expected, strict=True):
        assert row == (states, task, pytest.approx(loss, rel=1e-4))
