"""The figures and tables of docs/results.md and docs/results/*.md, from docs/results/<scale>/*.csv.

    python reproduce/figures.py --scale laptop

Out: docs/results/<scale>/<name>.png, and on the pages what stands between a marker and
`<!-- end -->`. Markers: `<!-- glance -->` and `<!-- picture <name> -->` in docs/results.md,
`<!-- table <name> -->` in docs/results/<name>.md. What the thesis's text says, and of which
quantities, stands in findings.csv beside this file.

A quantity is FOLDER?COLUMN=VALUE&..: per seed the mean over these rows of FOLDER/seed<s>.csv, at
its last step (FOLDER/tau: of seed<s>-tau.csv). With #1 it is seed 1's alone, a constant. A | B is
the higher of A, a constant, and B.

The laptop's teachers clone their data in one of two ways: weighted by the return of the episode, or
all of it alike. Results of the latter, the older ones, are in docs/results/laptop-alike/. No
comparison and no picture has runs of both.
"""

import csv
import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy import stats

TASKS, LEVELS = ("walker-stand", "walker-walk"), ("medium", "expert", "medium-replay")
WIDTHS, STATES = (16, 32, 64, 128, 256, 512), ("online", "noise", "random90", "random99")
RANKINGS, REPLAY = ("none", "ndcg", "pairwise", "listwise"), ("medium-replay", "medium-replay")
KINDS = {  # the columns, and the one that is the value
    "tau": ("step,task,other_task,layer,tau_a_mean,tau_a_std", "tau_a_mean"),
    "activations": ("task,layer,neuron,mean", "mean"),
    "measure": ("measure,layer,value,std", "value"),
    "cross": ("teacher,task,episode,return", "return"),
    "shift": ("measure,value,error", "value"),
    "returns": ("policy,task,evaluation,step,episode,return", "return"),
}
OLD_TAU = "step,task,layer,tau_a_mean,tau_a_std,tau_b_mean"  # columns of files made before
CLAIMS = {  # a CLAIM b holds if sign * (a - b - margin * |b|) > 0
    "above": (1, 0),
    "below": (-1, 0),
    "matches": (1, -0.05),
    "falls short": (-1, -0.05),
    "not above": (-1, 0.05),
}
WITHIN = {"within 5%": (0, 0.05), "within 0.1": (0.1, 0)}  # |a - b| < first + second * |b|
VERDICTS = ["as the thesis", "against the thesis", "open"]
VERDICTS += ["as the thesis (one seed)", "against the thesis (one seed)", "not run"]
HEADER = ("a against b", "thesis: a .. b", "ours: a", "ours: b", "a - b", "verdict")
WITHOUT_CLONING = "behavior", "teacher-plain", "naive-plain", "frozen-plain"
SCALES = "laptop", "thesis"
TITLES = {  # of the pages in docs/results/, in the thesis's order
    "fig51": "Fig. 5.1",
    "fig53": "Fig. 5.3",
    "fig54": "Fig. 5.4",
    "fig55": "Fig. 5.5",
    "fig57": "Fig. 5.7",
    "section52": "Section 5.2",
    "fig58": "Fig. 5.8",
    "table61": "Table 6.1",
    "fig63": "Fig. 6.3",
    "fig64": "Fig. 6.4",
    "fig65": "Fig. 6.5",
    "fig69": "Fig. 6.9",
    "table62": "Table 6.2",
    "table63": "Table 6.3",
    "appendixE": "Appendix E",
}
BEHAVIORS = {
    "medium": ("463", "691"),
    "expert": ("979", "907"),
    "medium-replay": ("463", "691"),
}  # Table 4.1
COLOURS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#000000"  # of Okabe and Ito
MARKERS, DASHES = "osD^vX", ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (8, 2)))
RETURN, NOTE = (
    "return (0 to 1000)",
    "mean over seeds; {}: its 95% interval by the t distribution, none for one seed",
)


def load(folder: Path) -> dict[str, dict[int, list[dict]]]:
    """FOLDER, FOLDER/tau, FOLDER/activations -> seed -> rows, with "y", the value."""
    data = defaultdict(dict)
    for path in sorted(folder.rglob("[!.]*.csv")):
        key = list(path.parent.relative_to(folder).parts)
        name = re.fullmatch(r"seed(\d+)(?:-(tau|activations))?", path.stem)
        kind = "returns"
        if name and name[2]:
            kind = name[2]
        elif key and key[0] in ("measure", "cross", "shift"):
            kind = key[0]
        columns, value = KINDS[kind]
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        header = ",".join(reader.fieldnames or [])
        known = header == columns or (kind == "tau" and header == OLD_TAU)
        if not (name and known and rows):
            expected = f"expected the name seed<s>[-tau].csv, the columns {columns}, and rows"
            raise SystemExit(f"{path}: {expected}")
        for i, row in enumerate(rows, start=2):
            try:
                row["y"] = float(row[value])
                row["step"] = float(row.get("step", 0))
            except (TypeError, ValueError):
                raise SystemExit(f"{path}, line {i}: expected numbers, found {row}") from None
        if name[2]:
            key.append(name[2])
        data["/".join(key)][int(name[1])] = rows
    return data


def load_recipes(folder: Path) -> dict[str, dict]:
    """How the teachers clone their data -> what `load` gives; "": of runs that have no cloning.

    These belong to both recipes, unless an old one is there. Without old results "" has all.
    """
    runs = load(folder)
    old = folder.with_name(f"{folder.name}-alike")
    if not old.is_dir():
        return {"": runs}
    plain = {key: seeds for key, seeds in runs.items() if key.split("/")[0] in WITHOUT_CLONING}
    return {"": plain, "weighted": runs, "alike": plain | load(old)}


def curve(data, quantity: str, evaluation="training") -> dict[int, dict[float, float]]:
    """seed -> step -> mean over the rows."""
    key, _, conditions = quantity.partition("?")
    where = {
        "evaluation": evaluation,
        **dict(c.split("=") for c in filter(None, conditions.split("&"))),
    }
    found = defaultdict(lambda: defaultdict(list))
    for seed, rows in sorted(data.get(key, {}).items()):
        for row in rows:
            if all(row.get(column, value) == value for column, value in where.items()):
                found[seed][row["step"]].append(row["y"])
    return {
        seed: {step: float(np.mean(ys)) for step, ys in steps.items()}
        for seed, steps in found.items()
    }


def final(data, quantity: str) -> dict[int, float] | float | None:
    """seed -> value; a number if the quantity is a constant; None or {} if it was not run."""
    if " | " in quantity:
        constant, sample = (final(data, part) for part in quantity.split(" | "))
        if constant is None or not sample:
            return None
        best = {seed: max(constant, y) for seed, y in sample.items()}
        return constant if set(best.values()) == {constant} else best
    if re.fullmatch(r"[\d.]+", quantity):
        return float(quantity)
    quantity, _, seed = quantity.partition("#")
    values = {s: steps[max(steps)] for s, steps in curve(data, quantity, "final").items()}
    return values.get(int(seed)) if seed else values


def interval(a, b=0.0) -> tuple[float, float]:
    """Mean of a less that of b, and half its 95% interval.

    Student's t over seeds, Welch's if b is a sample; nan if a sample has one seed.
    """
    samples = [np.array([*x]) for x in (a, b) if not np.isscalar(x)]
    difference = float(samples[0].mean() - (b if np.isscalar(b) else samples[1].mean()))
    if min(map(len, samples)) < 2:
        return difference, np.nan
    squares, freedoms = np.array([(x.var(ddof=1) / len(x), len(x) - 1) for x in samples]).T
    if not squares.any():
        return difference, 0.0
    freedom = squares.sum() ** 2 / (squares**2 / freedoms).sum()
    return difference, float(stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum()))


def text(mean, half, size, sign="") -> str:
    digits = 1 if abs(size) > 2 else 3  # a return, a tau
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def describe(x) -> str:
    if np.isscalar(x) or not x:
        return text(x, np.nan, x) if x else ""
    mean, half = interval(x.values())
    return f"{text(mean, half, mean)} ({len(x)} seed{'s' * (len(x) > 1)})"


def verdict_of(surplus: float, half: float) -> str:
    """Of a claim that holds if the surplus is positive; half its interval, nan of one seed."""
    if abs(surplus) <= half:
        return "open"
    verdict = "as the thesis" if surplus > 0 else "against the thesis"
    return f"{verdict} (one seed)" if np.isnan(half) else verdict


def finding(data, what, quantity_a, claim, quantity_b) -> list[str]:
    """A row of a table: a, b, their difference, and whether the thesis's claim holds."""
    a, b = final(data, quantity_a), final(data, quantity_b)
    row = [
        what,
        claim,
        describe(a),
        describe(b) + " (seed 1)" * ("#1" in quantity_b and np.isscalar(b)),
    ]
    if not a or not b:
        return [*row, "", "not run"]
    size = b if np.isscalar(b) else float(np.mean([*b.values()]))
    runs = [re.split(r"[?#]", q)[0] for q in (quantity_a, *quantity_b.split(" | "))]
    if not np.isscalar(b) and runs[0] in runs[1:]:  # of the same runs: by pairs
        difference, half = interval([a[seed] - b[seed] for seed in a if seed in b])
    else:
        difference, half = interval(a.values(), b if np.isscalar(b) else b.values())
    verdict = "-"
    if claim in CLAIMS:
        sign, margin = CLAIMS[claim]
        verdict = verdict_of(sign * (difference - margin * abs(size)), half)
    if claim in WITHIN:
        absolute, relative = WITHIN[claim]
        verdict = verdict_of(absolute + relative * abs(size) - abs(difference), half)
    return [*row, text(difference, half, size, "+"), verdict]


@dataclass
class Finding:
    says: str  # the thesis's claim in words; "" if its text makes none
    is_example: bool  # the row that docs/results.md shows of this claim
    recipe: str
    cells: list[str]  # as in HEADER

    @property
    def verdict(self) -> str:
        return self.cells[-1]


def lines_of(name: str) -> list[dict]:
    """The lines of findings.csv; {level}, {task}, {layer} stand for each of them."""
    with Path(__file__).with_name("findings.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["part"] == name]
    choices = {"level": LEVELS, "task": TASKS, "layer": ("1", "2")}
    filled = []
    for line in lines:
        names = [n for n in choices if f"{{{n}}}" in line["a against b"]]
        for values in itertools.product(*(choices[n] for n in names)):
            chosen = dict(zip(names, values, strict=True))
            filled.append({column: cell.format(**chosen) for column, cell in line.items()})
    return filled


def num_runs(data, line: dict) -> int:
    """How many runs stand behind the two quantities of a line; 0 if one of them was not run."""
    number = 0
    for column in ("a", "b"):
        value = final(data, line[column])
        if not value:
            return 0
        number += 1 if np.isscalar(value) else len(value)
    return number


def findings(recipes, name: str) -> list[Finding]:
    """The rows of a table, each of the recipe that has more runs of it, or of weighted."""
    rows = []
    for line in lines_of(name):
        recipe = max(recipes, key=lambda recipe: num_runs(recipes[recipe], line))
        quantities = [line[column] for column in ("a against b", "a", "claim", "b")]
        cells = finding(recipes[recipe], *quantities)
        is_example = line["example"] == line["a against b"]
        rows.append(Finding(line["the thesis says"], is_example, recipe, cells))
    return rows


def main_recipe(recipes, name: str) -> str:
    """Of a picture: the recipe that has the most runs of it, or weighted."""
    folders = set()
    for line in lines_of(name):
        for quantity in (line["a"], *line["b"].split(" | ")):
            folders.add(re.split(r"[?#]", quantity)[0])
    states = {"fig58": STATES, "fig64": ("offline",)}  # they draw more widths than the table has
    for width, state in itertools.product(WIDTHS, states.get(name, ())):
        folders.add(student(width, state))
    numbers = {}
    for recipe, runs in recipes.items():
        numbers[recipe] = sum(len(runs.get(folder, ())) for folder in folders)
    return max(numbers, key=numbers.get)


def was_run(rows: list[Finding]) -> bool:
    return any(row.verdict != "not run" for row in rows)


def grid(columns, titles, xlabel, ylabels):
    """Panels row by row; one label of the y axis per row."""
    rows = len(titles) // columns
    figure = Figure(figsize=(1 + 3.4 * columns, 1.3 + 2.3 * rows), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    for i, (ax, title) in enumerate(zip(axes.flat, titles, strict=True)):
        ax.set_title(title, fontsize=10)
        ax.set_axisbelow(True)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel(xlabel if i >= len(titles) - columns else "")
        ax.set_ylabel(ylabels[i // columns] if i % columns == 0 else "")
        if ylabels[i // columns] == RETURN:
            ax.set_ylim(0, 1000)
    return figure, axes.flat


def draw(ax, points: dict, label, i):
    """A line through the means over seeds, with the 95% interval; points: x -> seeds' values."""
    points = {x: [*values] for x, values in points.items() if values}
    mean, half = np.array([interval(values) for values in points.values()]).reshape(-1, 2).T
    style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 4}
    (line,) = ax.plot([*points], mean, label=label, markevery=max(1, len(points) // 8), **style)
    line.seeds = {len(values) for values in points.values()} or {0}
    ax.fill_between([*points], mean - half, mean + half, color=COLOURS[i], alpha=0.18, linewidth=0)


def horizontal(ax, value, label, i=0):
    if value is not None:
        linestyle = ((0, (1, 1.5)), "-.", "--")[i]
        ax.axhline(
            value, color=("0", "0.5", "0.7")[i], linestyle=linestyle, linewidth=1.3, label=label
        )


def finish(figure, note):
    """A legend below the panels with the numbers of seeds; None if nothing was drawn."""
    handles, seeds = {}, defaultdict(set)
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
            seeds[label] |= getattr(handle, "seeds", set())
        if not any(any(getattr(drawn, "seeds", ())) for drawn in [*ax.lines, *ax.containers]):
            ax.text(0.5, 0.15, "not run", transform=ax.transAxes, ha="center", color="0.4")
    counts = {
        label: " to ".join(map(str, sorted({min(n), max(n)}))) for label, n in seeds.items() if n
    }
    labels = [
        f"{k} ({counts[k]} seed{'s' * (counts[k] != '1')})" if k in counts else k for k in handles
    ]
    legend = figure.legend(
        handles.values(), labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    legend.set_title(note, {"size": 8})
    return figure if any(map(any, seeds.values())) else None


def learning_curves(data, columns, panels):
    """panels: (title, {label: quantity}, {label of a horizontal line: quantity})."""
    ylabels = [
        "per-state tau-a" if "/tau?" in str(lines) else RETURN for _, lines, _ in panels[::columns]
    ]
    figure, axes = grid(
        columns, [title for title, *_ in panels], "gradient steps (thousands)", ylabels
    )
    for ax, (_, lines, levels) in zip(axes, panels, strict=True):
        for i, (label, quantity) in enumerate(lines.items()):
            # the final evaluation is the curve's end, unless a training's evaluation is there, too
            training = curve(data, quantity)
            seeds = []
            for seed, steps in curve(data, quantity, "final").items():
                seeds.append(steps | training.get(seed, {}))
            steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
            draw(ax, {step / 1000: [seed[step] for seed in seeds] for step in steps}, label, i)
        for i, (label, quantity) in enumerate(levels.items()):
            horizontal(ax, final(data, quantity), label, i)
    return finish(figure, NOTE.format("shaded"))


def student(
    hidden=256, states="offline", loss="mse", regularizer="none", levels=("medium", "medium")
) -> str:
    return f"student/{loss}-{regularizer}-{hidden}-{states}-{levels[0]}-{levels[1]}"


def by_level(data, lines):
    panels = [
        (f"{t}, {level}", {k: v.format(task=t, level=level) for k, v in lines.items()},
         {"behaviour": f"behavior/{t}-{level}#1", "behaviour of the thesis": BEHAVIORS[level][i]})
        for level in LEVELS for i, t in enumerate(TASKS)
    ]  # fmt: skip
    return learning_curves(data, 2, panels)


def by_task(data, lines, level="medium", teachers=None, tau=False):
    teachers = teachers or {"teacher": "teacher"}
    panels = [
        (
            f"{t}, {level}",
            {k: f"{v}?task={t}" for k, v in lines.items()},
            {k: f"{v}/{t}-{level}#1" for k, v in teachers.items()},
        )
        for t in TASKS
    ]
    panels += [
        (f"{t}, layer {j}", {k: f"{v}/tau?task={t}&layer={j}" for k, v in lines.items()}, {})
        for j, t in itertools.product((1, 2), TASKS * tau)
    ]
    return learning_curves(data, 2, panels)


def fig51(data):
    return by_level(data, {"teacher": "teacher/{task}-{level}"})


def fig53(data):
    lines = {
        "one teacher per task": "teacher/{task}-{level}",
        "naive multi-task": "naive/{level}?task={task}",
    }
    lines["naive as published"] = "frozen/{level}?task={task}"
    plain = {f"{k}, plain PBRL": v.replace("/", "-plain/", 1) for k, v in lines.items()}
    return by_level(data, lines | plain)


def fig54(data):
    lines = {loss: student(loss=loss) for loss in ("mse", "q", "kl")}
    lines["kl, std bounded as published"] = student(loss="kl", states="offline_tanh")
    teachers = {"teacher of mse and q": "teacher", "Gaussian teacher, of kl": "gaussian"}
    return by_task(
        data, lines, teachers=teachers | {"Gaussian teacher, std bounded": "gaussian-tanh"}
    )


def fig55(data):
    return by_task(data, {"student": student(levels=REPLAY)}, REPLAY[0])


def fig57(data):
    return by_task(
        data,
        {f"{s} states": student(states=s, levels=REPLAY) for s in ("offline", "online")},
        REPLAY[0],
    )


def fig58(data):
    figure, axes = grid(2, TASKS, "neurons per hidden layer of the student", [RETURN])
    for ax, task in zip(axes, TASKS, strict=True):
        for i, states in enumerate(STATES):
            points = {
                width: final(data, f"{student(width, states)}?task={task}").values()
                for width in WIDTHS
            }
            draw(ax, points, states, i)
        horizontal(ax, final(data, f"teacher/{task}-medium#1"), "teacher")
        ax.set_xscale("log")
        ax.set_xticks(WIDTHS, WIDTHS)
        ax.minorticks_off()
    return finish(figure, NOTE.format("shaded"))


def fig63(data):
    """And Appendix F: the levels that were measured."""
    found = {
        level: data.get(f"measure/{student(levels=(level, level))}/activations") for level in LEVELS
    }
    panels = [
        *itertools.product(filter(found.get, LEVELS), "12", ("as they are", "sorted by stand"))
    ]
    if not panels:
        return None
    titles, ylabels = (
        [f"{level}, layer {layer}, {order}" for level, layer, order in panels],
        ["mean activation"],
    )
    figure, axes = grid(2, titles, "neuron", ylabels * (len(panels) // 2))
    for ax, (level, layer, order) in zip(axes, panels, strict=True):
        rows = found[level][min(found[level])]
        means = []
        for task in TASKS:
            of_task = [row["y"] for row in rows if (row["task"], row["layer"]) == (task, layer)]
            means.append(np.array(of_task))
        neurons = np.arange(len(means[0]))
        if order == "sorted by stand":
            neurons = np.argsort(means[0], kind="stable")
        for i, mean in enumerate(means):
            (line,) = ax.plot(
                mean[neurons], "+."[i], color=COLOURS[i], markersize=(5, 3)[i], label=TASKS[i]
            )
            line.seeds = {1}
    return finish(figure, "means over the states that the student visits in the task")


def fig64(data):
    return by_task(data, {f"width {width}": student(width) for width in WIDTHS}, tau=True)


def fig65(data):
    return by_task(data, {ranking: student(regularizer=ranking) for ranking in RANKINGS}, tau=True)


def fig69(data):
    panels = [*itertools.product(LEVELS[:2], TASKS)]
    figure, axes = grid(2, [f"{task}, {level}" for level, task in panels], "", [RETURN] * 2)
    labels = "teacher", "teacher from the other task's data", "student"
    for ax, (level, task) in zip(axes, panels, strict=True):
        teacher, ds, oqs = (
            f"teacher/{task}-{level}",
            f"ds/{level}?task={task}",
            f"oqs/{level}?task={task}",
        )
        for x, i, quantity in (
            (0, 0, teacher), (1, 2, f"{student(levels=(level, level))}?task={task}"),
            (3, 0, f"{ds}&policy=teacher"), (4, 2, f"{ds}&policy=student"),
            (6, 0, teacher), (7, 1, f"{oqs}&policy=from {TASKS[task == TASKS[0]]}"),
            (8, 2, f"{oqs}&policy=student"),
        ):  # fmt: skip
            values = [*final(data, quantity).values()]
            mean, half = interval(values) if values else (np.nan, np.nan)
            style = {
                "color": COLOURS[i],
                "hatch": ("//", "..", "")[i],
                "edgecolor": "white",
                "capsize": 4,
            }
            bar = ax.bar(
                x, mean, 0.9, yerr=None if np.isnan(half) else half, label=labels[i], **style
            )
            bar.seeds = {len(values)}
            ax.plot([x + 0.2] * len(values), values, "ko", markersize=3, markerfacecolor="w")
        ax.set_xlim(-0.7, 8.7)
        ax.set_xticks([0.5, 3.5, 7], ["MOP", "DS", "OQS"])
    return finish(figure, "circles: seeds; bars: " + NOTE.format("lines"))


def appendixE(data):
    panels = []
    for stand, walk in itertools.product(LEVELS, LEVELS):
        name = student(levels=(stand, walk))
        lines = {f"student at {t.removeprefix('walker-')}": f"{name}?task={t}" for t in TASKS}
        teachers = {
            "teacher of stand": f"teacher/walker-stand-{stand}#1",
            "teacher of walk": f"teacher/walker-walk-{walk}#1",
        }
        panels.append((f"stand {stand}, walk {walk}", lines, teachers))
    return learning_curves(data, 3, panels)


FIGURES = {
    f.__name__: f
    for f in (fig51, fig53, fig54, fig55, fig57, fig58, fig63, fig64, fig65, fig69, appendixE)
}


def by_width(data) -> list[str]:
    """A table of Fig. 5.8's returns, and of each seed's mean over all widths."""
    cells = [["task", "width", *STATES], ["---"] * (2 + len(STATES))]
    for task in TASKS:
        columns = [
            [final(data, f"{student(width, s)}?task={task}") for width in WIDTHS] for s in STATES
        ]
        for column in columns:
            seeds = set.intersection(*map(set, column))
            column.append(
                {
                    seed: float(np.mean([returns[seed] for returns in column]))
                    for seed in sorted(seeds)
                }
            )
        for width, *row in zip((*WIDTHS, "mean"), *columns, strict=True):
            cells.append([task, str(width), *map(describe, row)])
    return [f"| {' | '.join(row)} |" for row in cells]


def markdown_table(header, rows) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines)


def table(scale: str, name: str, recipes, rows: list[Finding], docs: Path) -> str:
    """What a page of docs/results/ has of one scale: the picture, if there is one, and the rows."""
    parts = [f"### {scale.capitalize()} scale"]
    if (docs / f"results/{scale}/{name}.png").is_file():
        parts.append(picture(f"{scale}/{name}.png", scale, name, recipes))
    header = list(HEADER)
    cells = [row.cells for row in rows]
    if any(row.recipe for row in rows):
        header.append("cloning")
        cells = [[*row.cells, row.recipe] for row in rows]
    parts.append(markdown_table(header, cells))
    if name == "fig58":
        recipe = main_recipe(recipes, name)
        parts.append("Returns by width" + (f", cloning {recipe}:" if recipe else ":"))
        parts.append("\n".join(by_width(recipes[recipe])))
    return "\n\n".join(parts)


def picture(path: str, scale: str, name: str, recipes) -> str:
    recipe = main_recipe(recipes, name)
    text = f"![{TITLES[name]} at {scale} scale]({path})"
    if recipe:
        text += f"\n\nCloning of the teachers in the picture: {recipe}."
    return text


def count(rows: list[Finding]) -> str:
    """3 as the thesis; 1 open."""
    counts = Counter(row.verdict for row in rows if row.verdict != "-")
    return "; ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def glance(scale: str, rows: dict[str, list[Finding]]) -> str:
    """A line per claim of the thesis: verdict, the example's difference, the page."""
    claims = defaultdict(list)
    for name in rows:
        for row in rows[name]:
            if row.says:
                claims[name, row.says].append(row)
    header = ["the thesis says", "our runs", "for example", "more"]
    has_recipes = any(row.recipe for name in rows for row in rows[name])
    if has_recipes:
        header.append("cloning")
    lines = []
    for (name, says), found in claims.items():
        (example,) = (row for row in found if row.is_example)
        what, _, a, b, difference, _ = example.cells
        shown = what
        if difference:
            shown += f": {a.split()[0]} for {b.split()[0]}, {difference}"
        line = [says, count(found), shown, f"[{TITLES[name]}](results/{name}.md)"]
        if has_recipes:
            line.append(", ".join(sorted({row.recipe for row in found if row.recipe})))
        lines.append(line)
    tested = {tuple(row.cells): row for found in claims.values() for row in found}  # each once
    total = f"{len(tested)} comparisons at {scale} scale: {count(tested.values())}."
    return f"{markdown_table(header, lines)}\n\n{total}"


def fill(page: str, made: dict[str, str]) -> str:
    """The page with what stands between the markers replaced."""
    for marker, markdown in made.items():
        start = f"<!-- {marker} -->\n"
        end = "\n<!-- end -->"
        before, found, after = page.partition(start)
        if not found or end not in after:
            raise SystemExit(f"expected {start.strip()}, a line, {end.strip()} in the page")
        page = f"{before}{start}{markdown.strip()}{end}{after.partition(end)[2]}"
    return page


def blocks(docs: Path) -> dict[str, dict[str, str]]:
    """Page -> marker -> Markdown, of all scales that have results."""
    made = {"results.md": {"glance": ""}}
    for name in TITLES:
        made[f"results/{name}.md"] = {f"table {name}": ""}
        if name in FIGURES:
            made["results.md"][f"picture {name}"] = ""
    for scale in SCALES:
        recipes = load_recipes(docs / "results" / scale)
        rows = {name: findings(recipes, name) for name in TITLES}
        if any(was_run(rows[name]) for name in TITLES):
            made["results.md"]["glance"] += glance(scale, rows) + "\n\n"
        for name in TITLES:
            if was_run(rows[name]):
                text = table(scale, name, recipes, rows[name], docs)
                made[f"results/{name}.md"][f"table {name}"] += text + "\n\n"
            path = f"results/{scale}/{name}.png"
            if (docs / path).is_file():
                text = picture(path, scale, name, recipes)
                made["results.md"][f"picture {name}"] += text + "\n\n"
    return made


@dataclass
class Args:
    scale: Literal["laptop", "thesis"] = "laptop"
    """whose figures are drawn; the pages have what is there of both"""
    docs: Path = Path(__file__).resolve().parent.parent / "docs"
    """folder of results.md and results/"""


def main():
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    pages = [args.docs / "results.md"]
    pages += [args.docs / "results" / f"{name}.md" for name in TITLES]
    for page in pages:
        if not page.is_file():
            raise SystemExit(f"expected the page {page}")
    folder = args.docs / "results" / args.scale
    recipes = load_recipes(folder)
    for name, figure_of in FIGURES.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        figure = figure_of(recipes[main_recipe(recipes, name)])
        if figure is not None and was_run(findings(recipes, name)):
            figure.savefig(path)
    for name, made in blocks(args.docs).items():
        page = args.docs / name
        page.write_text(fill(page.read_text(), made))
    print(f"{len(pages)} pages, {len([*folder.glob('*.png')])} figures in {folder}")


if __name__ == "__main__":
    main()
