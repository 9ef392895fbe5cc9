"""Pictures and tables of docs/beyond.md, from the results of beyond.smk.

  python reproduce/beyond_figures.py

Of a policy the mean return over its 100 last episodes; ± and bars: 95% intervals over seeds by the
t distribution, none for one seed. All students of a group have the teachers of seed 1.

In: docs/results/beyond, and docs/results/laptop for the wider students. Out: docs/domains.png and
docs/amount.png, and what stands between the markers of docs/beyond.md.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import tyro
import yaml
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "reproduce"))

from figures import COLOURS, fill, interval  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "reproduce/beyond.yaml").read_text())
AMOUNTS = CONFIG["transitions"]
MOST = max(AMOUNTS)
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SHIFTED = (("random99", "medium"), ("random90", "medium"), ("offline", "medium-replay"))


@dataclass
class Args:
    docs: str = str(ROOT / "docs")
    """folder of results, pages and pictures"""


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def final_return(path: Path, task: str) -> float | None:
    """Mean over the episodes of the last evaluation in this task; None where there is no file."""
    returns = []
    for row in read(path):
        if row["evaluation"] == "final" and row["task"] == task:
            returns.append(float(row["return"]))
    return float(np.mean(returns)) if returns else None


def over_seeds(folder: Path, task: str) -> list[float]:
    """The final return of each seed that has been run."""
    returns = []
    for path in sorted(folder.glob("seed*[0-9].csv")):  # and not seed1-tau.csv
        returns.append(final_return(path, task))
    return returns


def text(values: list[float], digits: int = 1) -> str:
    """Mean ± half the 95% interval (number of seeds)."""
    if not values:
        return ""
    mean, half = interval(values)
    plus_minus = "" if np.isnan(half) else f" ± {half:.{digits}f}"
    return f"{mean:.{digits}f}{plus_minus} ({len(values)})"


def share(values: list[float], reference: float | None) -> list[float]:
    """In percent of the reference."""
    if not reference:
        return []
    return [100 * value / reference for value in values]


def taus(folder: Path, name: str) -> list[float]:
    """A measure of each seed, the mean over both layers."""
    found = []
    for path in sorted(folder.glob("seed*.csv")):
        values = [float(row["value"]) for row in read(path) if row["measure"] == name]
        if values:
            found.append(float(np.mean(values)))
    return found


def markdown(lines: list[str]) -> str:
    """A table, its first two lines the header."""
    return "\n".join(lines) if len(lines) > 2 else "Not run yet."


def domains_table(results: Path) -> str:
    lines = ["| task | behaviour | teachers | student | student, % of its teacher |"]
    lines.append("|---|---|---|---|---|")
    for group, tasks in CONFIG["groups"].items():
        if group.startswith("walker"):
            continue
        name = f"{group}-expert-{MOST}-number"
        for task in tasks:
            behavior = final_return(results / f"behavior/{task}-expert.csv", task)
            if behavior is None:
                continue
            teacher_folder = results / f"teacher/{task}-expert-{MOST}"
            teacher = final_return(teacher_folder / "seed1.csv", task)
            student = over_seeds(results / "student" / name, task)
            cells = [
                task,
                f"{behavior:.1f}",
                text(over_seeds(teacher_folder, task)),
                text(student),
                text(share(student, teacher)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return markdown(lines)


def sharing_table(results: Path) -> str:
    lines = ["| group | ids | per-state tau-a | average tau-a | CKA |", "|---|---|---|---|---|"]
    for group, tasks in CONFIG["groups"].items():
        level = "medium" if group.startswith("walker") else "expert"
        for encoding in ("number", "onehot"):
            folder = results / f"measure/student/{group}-{level}-{MOST}-{encoding}"
            for i, j in combinations(range(len(tasks)), 2):
                pair = f" {i}-{j}" if len(tasks) > 2 else ""
                cells = [f"{tasks[i]}, {tasks[j].partition('-')[2]}", encoding]
                for measure in ("per-state tau-a", "average tau-a", "cka"):
                    cells.append(text(taus(folder, measure + pair), digits=3))
                if cells[2]:
                    lines.append(f"| {' | '.join(cells)} |")
    return markdown(lines)


def three_tasks_table(results: Path) -> str:
    lines = ["| task | behaviour | teachers | student, id as a number | one-hot |"]
    lines.append("|---|---|---|---|---|")
    for task in CONFIG["groups"]["walker3"]:
        behavior = final_return(results / f"behavior/{task}-medium.csv", task)
        teachers = over_seeds(results / f"teacher/{task}-medium-{MOST}", task)
        cells = [task, f"{behavior:.1f}" if behavior else "", text(teachers)]
        for encoding in ("number", "onehot"):
            name = f"walker3-medium-{MOST}-{encoding}"
            cells.append(text(over_seeds(results / "student" / name, task)))
        if any(cells[1:]):
            lines.append(f"| {' | '.join(cells)} |")
    return markdown(lines)


def amount_table(results: Path) -> str:
    lines = ["| transitions | task | level | teachers, % of the behaviour | student, % of it |"]
    lines.append("|---|---|---|---|---|")
    for level in ("medium", "expert"):
        for task in CONFIG["groups"]["walker"]:
            behavior = final_return(results / f"behavior/{task}-{level}.csv", task)
            for amount in AMOUNTS:
                teachers, students = amount_shares(results, task, level, amount, behavior)
                if teachers:
                    cells = [f"{amount:,}", task, level, text(teachers), text(students)]
                    lines.append(f"| {' | '.join(cells)} |")
    return markdown(lines)


def amount_shares(results, task, level, amount, behavior) -> tuple[list[float], list[float]]:
    """Returns of teachers and students in percent of the behaviour's."""
    teachers = over_seeds(results / f"teacher/{task}-{level}-{amount}", task)
    students = over_seeds(results / f"student/walker-{level}-{amount}-number", task)
    return share(teachers, behavior), share(students, behavior)


def wide_table(results: Path, laptop: Path) -> str:
    """Students by width; one that has no losses yet is left out, it may have older teachers."""
    columns = ["states", "width", "walker-stand", "walker-walk"]
    columns += ["loss on its states", "on the teachers' own"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for states in ("random90", "random99"):
        for width in WIDTHS:
            name = f"mse-none-{width}-{states}-medium-medium"
            losses = {"training": [], "teacher": []}  # a mean over tasks for each seed
            for path in sorted((results / f"losses/{name}").glob("seed*.csv")):
                rows = read(path)
                for kind, values in losses.items():
                    found = [float(row["loss"]) for row in rows if row["states"] == kind]
                    values.append(float(np.mean(found)))
            if not losses["training"]:
                continue
            cells = [states, f"{width}"]
            for task in ("walker-stand", "walker-walk"):
                cells.append(text(over_seeds(laptop / f"student/{name}", task)))
            for values in losses.values():
                cells.append(text(values, digits=4))
            lines.append(f"| {' | '.join(cells)} |")
    return markdown(lines)


def reweighting_table(results: Path, laptop: Path) -> str:
    """Small students by the weights of their states, and of the teachers' own states alone."""
    weights = ("value", "q-ratio", "density")
    columns = ["task", "data", "states", "width", "no weights", *weights, "the teachers' own"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for task in CONFIG["groups"]["walker"]:
        for states, level in SHIFTED:
            for width in WIDTHS[:3]:
                name = f"student/mse-none-{width}-{{}}-{level}-{level}"
                folders = [laptop / name.format(states)]
                for weight in weights:
                    folders.append(results / f"reweighted/{weight}-{width}-{states}-{level}")
                folders.append(laptop / name.format("online"))
                cells = [text(over_seeds(folder, task)) for folder in folders]
                if any(cells[1:-1]):
                    lines.append(f"| {task} | {level} | {states} | {width} | {' | '.join(cells)} |")
    return markdown(lines)


def draw_domains(results: Path, path: Path) -> None:
    """Per task the returns of behaviour, teachers and students side by side."""
    found = defaultdict(list)  # name of the bar -> (mean, half the interval) of each task
    names = []
    for group, tasks in CONFIG["groups"].items():
        if group.startswith("walker"):
            continue
        for task in tasks:
            behavior = final_return(results / f"behavior/{task}-expert.csv", task)
            teachers = over_seeds(results / f"teacher/{task}-expert-{MOST}", task)
            folder = results / f"student/{group}-expert-{MOST}-number"
            students = over_seeds(folder, task)
            if behavior is None or not students:
                continue
            names.append(task)
            found["behaviour"].append((behavior, np.nan))
            found["teachers"].append(interval(teachers))
            found["students"].append(interval(students))
    if not names:
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=130)
    ax = figure.subplots()
    for i, (label, values) in enumerate(found.items()):
        means, halves = np.array(values).T
        x = np.arange(len(names)) + 0.27 * (i - 1)
        ax.bar(x, means, 0.25, yerr=halves, label=label, color=COLOURS[i], capsize=2)
    ax.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names], fontsize=8)
    ax.set_ylabel("return")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def draw_amount(results: Path, path: Path) -> None:
    """Return in percent of the behaviour's over the number of transitions."""
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=130)
    panels = figure.subplots(1, 2, sharey=True)
    drawn = False
    for ax, level in zip(panels, ("medium", "expert"), strict=True):
        for i, task in enumerate(CONFIG["groups"]["walker"]):
            behavior = final_return(results / f"behavior/{task}-{level}.csv", task)
            lines = {"teachers": [], "students": []}
            for amount in AMOUNTS:
                shares = amount_shares(results, task, level, amount, behavior)
                for name, values in zip(lines, shares, strict=True):
                    if values:
                        lines[name].append((amount, *interval(values)))
            for name, points in lines.items():
                if points:
                    drawn = True
                    x, means, halves = np.array(points).T
                    style = "-" if name == "teachers" else "--"
                    label = f"{name}, {task}"
                    ax.errorbar(
                        x, means, halves, fmt=f"o{style}", color=COLOURS[i], label=label, capsize=2
                    )
        ax.set_xscale("log")
        ax.set_title(f"{level} data")
        ax.set_xlabel("transitions per task")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("return, % of the behaviour's")
    handles = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    if drawn:
        figure.savefig(path)


def main():
    args = tyro.cli(Args, description=__doc__)
    docs = Path(args.docs)
    results = docs / "results/beyond"
    tables = {
        "domains": domains_table(results),
        "three_tasks": three_tasks_table(results),
        "sharing": sharing_table(results),
        "amount": amount_table(results),
        "wide": wide_table(results, docs / "results/laptop"),
        "reweighting": reweighting_table(results, docs / "results/laptop"),
    }
    page = docs / "beyond.md"
    made = {f"table {name}": table for name, table in tables.items()}
    page.write_text(fill(page.read_text(), made))
    draw_domains(results, docs / "domains.png")
    draw_amount(results, docs / "amount.png")


if __name__ == "__main__":
    main()
