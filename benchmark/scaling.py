"""How the cost of a step grows with width, batch, critics, tasks and states: table, plot, JSON.

  python benchmark/scaling.py
  python benchmark/scaling.py --axes width critics   # some of it

Every point is a run of a script's own main() under the clock of benchmark/speed.py, beside the
floor of its matrix products. One value varies, the others stay at the scripts' defaults (PBRL and
TD3 batch 1024; distillation 2 tasks, width 256).

Out: benchmark/results/scaling-<device>-<threads>-threads.json and .png.
"""

import contextlib
import json
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import speed  # puts the scripts on the path
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import mop_distill
import mop_pbrl_teacher
import mop_td3_collect

VALUES = {
    "width": (64, 128, 256, 512, 1024),
    "batch": (256, 512, 1024, 2048, 4096),
    "critics": (2, 3, 5, 7, 10),
    "tasks": (2, 3, 4, 6, 8),
    "states": (100_000, 316_000, 1_000_000, 3_160_000, 10_000_000),
}
WORKS = {  # what is timed along an axis
    "width": ("pbrl", "td3", "distill"),
    "batch": ("pbrl", "td3", "distill"),
    "critics": ("pbrl",),
    "tasks": ("distill",),
    "states": ("distill", "load"),
}
NAMES = {
    "pbrl": "PBRL update",
    "td3": "TD3 step",
    "distill": "distillation step",
    "load": "loading, per dataset",
}
LABELS = {
    "width": "hidden units",
    "batch": "batch (per task)",
    "critics": "critics K",
    "tasks": "tasks m",
    "states": "states of both tasks N",
}


@dataclass
class Args:
    axes: tuple[Literal["width", "batch", "critics", "tasks", "states"], ...] = tuple(VALUES)
    """what to vary"""
    points: int = 5
    """values per axis, from the smallest"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the training loops run"""
    threads: int = torch.get_num_threads()
    """CPU threads"""
    rounds: int = 3
    """rounds per point, after one to warm up"""
    steps: int = 10
    """steps per round"""
    output: str | None = None
    """JSON to write, the plot beside it; default: in benchmark/results/"""


def measure(axis: str, value: int, work: str, folder: Path, args) -> dict:
    """Milliseconds and floor of one point."""
    sizes = {
        "width": 1024 if work == "td3" else 256,
        "batch": 1024,
        "critics": 5,
        "tasks": 2,
        "states": 200_000,
    }
    sizes[axis] = value
    batch = sizes["batch"]
    width = sizes["width"]
    tasks = speed.TASKS
    if axis == "tasks":  # more than the walker has
        tasks = [f"made-up{i}" for i in range(value)]
    num_rows = sizes["states"] // len(tasks) if axis == "states" else 100_000
    total = 1000 * args.steps * (args.rounds + 2)  # more steps than are made
    argv = ["--threads", args.threads, "--hidden", width, "--batch-size", batch]
    argv += ["--eval-every", total, "--run-dir", folder / "run"]
    data = []
    if work != "td3":
        argv += ["--gradient-steps", total]
        for task in tasks:
            data.append(speed.made_up_dataset(folder / f"{task}.npz", task, num_rows))
    if work == "load":
        sizes = (speed.OBS, speed.ACT)
        load = partial(mop_pbrl_teacher.load_dataset, data[0], tasks[0], "medium", *sizes)
        return {"ms": 1e3 * speed.median_time(load, 3)}
    if work == "pbrl":
        module = mop_pbrl_teacher
        products = speed.pbrl_products(batch, width, sizes["critics"])
        argv += ["--task", tasks[0], "--data", data[0], "--num-critics", sizes["critics"]]
    elif work == "distill":
        module = mop_distill
        products = speed.distill_products(batch, width, len(tasks))
        teachers = [speed.made_up_teacher(folder / f"{task}.pt", task) for task in tasks]
        argv += ["--tasks", *tasks, "--data", *data, "--teachers", *teachers]
    elif work == "td3":
        module = mop_td3_collect
        products = speed.td3_products(batch, width)
        argv += ["--task", tasks[1], "--learning-starts", 0]
        argv += ["--total-timesteps", total, "--medium-step", total]

    loop = []
    floors = []

    def on_round(seconds):
        loop.append(seconds)
        floors.append(speed.floor(products, args.device))
        if len(loop) == args.rounds + 1:
            raise speed.Enough

    with mock.patch.object(mop_distill, "task_sizes", lambda task: (speed.OBS, speed.ACT)):
        speed.run_loop(module, argv, on_round, args.steps, args.device)
    return {
        "ms": 1e3 * statistics.median(loop[1:]),
        "floor_ms": 1e3 * statistics.median(floors),
    }


def plot(points: list, path: Path) -> None:
    """A panel per axis, both scales logarithmic; dashed: the floor."""
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    columns = min(len(axes_names), 3)
    rows = -(-len(axes_names) // 3)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes_names, panels, strict=False):
        for i, work in enumerate(NAMES):
            line = [p for p in points if p["axis"] == axis and p["work"] == work]
            values = [p["value"] for p in line]
            if line:
                panel.plot(values, [p["ms"] for p in line], f"C{i}o-", label=NAMES[work])
            if line and "floor_ms" in line[0]:
                panel.plot(values, [p["floor_ms"] for p in line], f"C{i}--", lw=1)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="ms")
        ticks = VALUES[axis]
        panel.set_xticks(ticks, [f"{v:.0e}".replace("e+0", "e") if v > 9999 else v for v in ticks])
        short = np.ptp(np.log10(panel.get_ylim())) < 1.5
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in panels[len(axes_names) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)


def power_law(points: list) -> dict:
    """Exponents of time against value, over all values of an axis."""
    exponents = {}
    for axis, works in WORKS.items():
        for work in works:
            line = [p for p in points if p["axis"] == axis and p["work"] == work]
            if len(line) > 1:
                values = np.log([p["value"] for p in line])
                times = np.log([p["ms"] for p in line])
                exponents[f"{work} by {axis}"] = round(float(np.polyfit(values, times, 1)[0]), 2)
    return exponents


def main():
    args = tyro.cli(Args, description=__doc__)
    speed.set_up(args)
    points = []
    print(f"{'axis':10}{'value':>10} {'work':22}{'ms':>10}{'floor':>10}{'ratio':>8}")
    for axis in args.axes:
        for work in WORKS[axis]:
            for value in VALUES[axis][: args.points]:
                with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                    times = measure(axis, value, work, Path(folder), args)
                points.append({"axis": axis, "value": value, "work": work, **times})
                line = f"{axis:10}{value:10} {NAMES[work]:22}{times['ms']:10.3f}"
                if "floor_ms" in times:
                    line += f"{times['floor_ms']:10.3f}{times['ms'] / times['floor_ms']:8.2f}"
                print(line, flush=True)
    exponents = power_law(points)
    for name, exponent in exponents.items():
        print(f"{name}: grows with the power {exponent}, over all values")
    name = f"scaling-{args.device}-{torch.get_num_threads()}-threads.json"
    path = Path(args.output or speed.ROOT / "benchmark/results" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "hardware": speed.hardware(args.device),
        "versions": speed.versions(),
        "points": points,
        "args": vars(args) | {"output": None},
        "exponents": exponents,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(points, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
