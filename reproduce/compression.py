"""What a student costs and what it earns: the picture and the table of docs/beyond.md.

  python reproduce/compression.py
  python reproduce/compression.py --time    # measures the time per action here, first

Returns are those of the students in docs/results/laptop; of two recipes of teachers those are taken
that have more of the runs (figures.py). A time is that of one state on one CPU thread.

In and out: docs/curves/time-per-action.csv. Out: docs/compression.png, and the table between the
markers of docs/beyond.md.
"""

import csv
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "reproduce")]
os.environ["MUJOCO_GL"] = "disable"

import torch  # noqa: E402
import tyro  # noqa: E402
from figures import (  # noqa: E402
    COLOURS,
    TASKS,
    fill,
    final,
    interval,
    load_recipes,
    main_recipe,
)
from matplotlib.figure import Figure  # noqa: E402

from mop_distill import Actor  # noqa: E402

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
OBS = 24  # of the walker
ACT = 6
TEACHER_HIDDEN = 256
HEADER = """| width | parameters | of both teachers' | µs per action | walker-stand | walker-walk |
|---|---|---|---|---|---|"""


@dataclass
class Args:
    time: bool = False
    """measure the time per action on this machine and write it to the CSV"""
    docs: str = str(ROOT / "docs")
    """folder of results, pages and pictures"""


def num_parameters(network) -> int:
    return sum(weight.numel() for weight in network.parameters())


def measure_times(path: Path) -> None:
    """Median over 15 rounds of 1000 actions; the widths in turn, since machines are noisy."""
    torch.set_num_threads(1)
    students = {width: Actor(OBS + 1, ACT, width) for width in WIDTHS}
    obs = torch.randn(1, OBS + 1)
    rounds = {width: [] for width in WIDTHS}
    with torch.no_grad():
        for _ in range(16):
            for width, student in students.items():
                start = time.perf_counter()
                for _ in range(1000):
                    student(obs)
                rounds[width].append(1e3 * (time.perf_counter() - start))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["width", "microseconds"])
        for width, values in rounds.items():
            writer.writerow([width, f"{statistics.median(values[1:]):.1f}"])  # the first warms up


def shares_of_teacher(data, width: int, task: str) -> list[float]:
    """The return of each seed's student over that of its teacher, which is of seed 1."""
    student = f"student/mse-none-{width}-offline-medium-medium"
    returns = final(data, f"{student}?task={task}")
    teacher = final(data, f"teacher/{task}-medium#1")
    return [value / teacher for value in returns.values()]


def describe(shares: list[float]) -> str:
    if not shares:
        return ""
    mean, half = interval(shares)
    text = f"{100 * mean:.1f}%"
    if len(shares) > 1:
        text += f" ± {100 * half:.1f}"
    return f"{text} ({len(shares)})"


def main():
    args = tyro.cli(Args, description=__doc__)
    docs = Path(args.docs)
    times_path = docs / "curves/time-per-action.csv"
    if args.time:
        measure_times(times_path)
    with open(times_path) as file:
        times = {int(row["width"]): float(row["microseconds"]) for row in csv.DictReader(file)}
    recipes = load_recipes(docs / "results/laptop")
    recipe = main_recipe(recipes, "fig64")
    data = recipes[recipe]
    both_teachers = 2 * num_parameters(Actor(OBS, ACT, TEACHER_HIDDEN))

    # table
    lines = [HEADER]
    parameters = {}
    for width in WIDTHS:
        parameters[width] = num_parameters(Actor(OBS + 1, ACT, width))
        cells = [
            f"{width}",
            f"{parameters[width]:,}",
            f"{100 * parameters[width] / both_teachers:.0f}%",
            f"{times[width]:.0f}",
        ]
        cells += [describe(shares_of_teacher(data, width, task)) for task in TASKS]
        lines.append(f"| {' | '.join(cells)} |")
    if recipe:
        lines.append(f"\nCloning of the teachers: {recipe}.")
    page = docs / "beyond.md"
    page.write_text(fill(page.read_text(), {"table compression": "\n".join(lines)}))

    # picture
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=130)
    panels = figure.subplots(1, 2, sharey=True)
    labels = ("parameters of the student", "microseconds per action")
    for ax, label, costs in zip(panels, labels, (parameters, times), strict=True):
        for i, task in enumerate(TASKS):
            x = []
            means = []
            halves = []
            for width in WIDTHS:
                shares = shares_of_teacher(data, width, task)
                if shares:
                    mean, half = interval(shares)
                    x.append(costs[width])
                    means.append(100 * mean)
                    halves.append(100 * half)
            style = {"color": COLOURS[i], "marker": "os"[i], "markersize": 4, "capsize": 2}
            if costs is times:
                style["linestyle"] = "none"  # wider is not always slower
            ax.errorbar(x, means, halves, label=task, **style)
        ax.axhline(95, color="0.6", linestyle=":", label="95% of the teacher")
        ax.set_xlabel(label)
        if costs is times:
            ax.set_xlim(0, 1.1 * max(x))
        else:
            ax.set_xscale("log")
            for width in WIDTHS:
                ax.text(parameters[width], 3, width, ha="center", fontsize=8, clip_on=True)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(both_teachers, color="0", linestyle="--", label="both teachers")
    panels[0].set_ylabel("return, % of the teacher's")
    panels[0].set_ylim(0, 115)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(docs / "compression.png")


if __name__ == "__main__":
    main()
