"""How the cost of a step grows with width, batch, critics, tasks and states: a table, a plot, and JSON.

  python benchmark/scaling.py                  # benchmark/results/scaling-<device>-<threads>-threads.json and .png
  python benchmark/scaling.py --axes width k   # some of it

Every point is a run of a script's own main() under benchmark/speed.py's clock, beside the floor of its matrix products.
One value varies, the others stay at the scripts' defaults (PBRL and TD3 batch 1024; distillation 2 tasks, width 256).
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
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
WORKS = {"width": ("pbrl", "td3", "distill"), "batch": ("pbrl", "td3", "distill"), "critics": ("pbrl",)}
WORKS |= {"tasks": ("distill",), "states": ("distill", "load")}
NAMES = {"pbrl": "PBRL update", "td3": "TD3 step", "distill": "distillation step", "load": "loading, per dataset"}
LABELS = {"width": "hidden units", "batch": "batch (per task)", "critics": "critics K", "tasks": "tasks m"}
LABELS |= {"states": "states of both tasks N"}


@dataclass
class Args:
    axes: tuple[Literal["width", "batch", "critics", "tasks", "states"], ...] = tuple(VALUES)
    """what to vary"""
    points: int = 5
    """values per axis, from the smallest"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the training loops run"""
    threads: int = 0
    """CPU threads; 0: all cores"""
    rounds: int = 3
    """rounds per point, after one to warm up"""
    steps: int = 10
    """steps per round"""
    output: str | None = None
    """JSON to write, the plot beside it; default: benchmark/results/scaling-<device>-<threads>-threads.json"""


class MadeUpEnv:
    """In place of an environment: the walker's sizes under any task name, never stepped (the walker has 3 tasks)."""

    def observation_spec(self):
        return {"observations": np.empty(speed.OBS)}

    def action_spec(self):
        return np.empty(speed.ACT)


def measure(axis: str, value: int, work: str, folder: Path, args) -> dict:
    """Milliseconds and floor of one point."""
    sizes = {"width": 256, "batch": 1024, "critics": 5, "tasks": 2, "states": 200_000}
    sizes |= {"width": 1024} if work == "td3" else {}
    sizes[axis] = value
    tasks = [f"made-up{i}" for i in range(sizes["tasks"])] if axis == "tasks" else ["walker-stand", "walker-walk"]
    total = 1000 * args.steps * (args.rounds + 2)
    argv = ["--device", args.device, "--threads", args.threads, "--hidden", sizes["width"], "--eval-every", total]
    argv += ["--batch-size", sizes["batch"], "--eval-episodes", 1, "--final-eval-episodes", 1]
    argv += ["--run-dir", folder / f"{axis}-{value}-{work}"]
    if work == "td3":
        module, products = mop_td3_collect, speed.td3_products(sizes["batch"], sizes["width"])
        argv += ["--task", tasks[1], "--learning-starts", 0, "--datasets", "expert", "--total-timesteps", total]
    else:
        rows = sizes["states"] // len(tasks) if axis == "states" else 100_000
        files = [folder / f"{task}-{rows}.npz" for task in tasks]
        for file, task in zip(files, tasks, strict=True):
            if not file.exists():
                speed.made_up_dataset(file, task, rows)
        if work == "load":
            return {"ms": 1e3 * speed.median_time(lambda: mop_distill.load_dataset(files[0], tasks[0], (24, 6)), 3)}
        if work == "pbrl":
            module, products = mop_pbrl_teacher, speed.pbrl_products(sizes["batch"], sizes["width"], sizes["critics"])
            argv += ["--task", tasks[0], "--data", files[0], "--num-critics", sizes["critics"]]
        else:
            module, products = mop_distill, speed.distill_products(sizes["batch"], sizes["width"], len(tasks))
            argv += ["--tasks", *tasks, "--data", *files, "--teachers", *teachers(tasks, folder)]
        argv += ["--gradient-steps", total]
    loop, floors = [], []

    def on_round(seconds):
        loop.append(seconds)
        floors.append(speed.floor(products, args.device))
        if len(loop) == args.rounds + 1:
            raise speed.Enough

    original = module.make_envs
    module.make_envs = (lambda task, n: [MadeUpEnv()] * n) if axis == "tasks" else original
    try:
        speed.run_loop(module, argv, on_round, args.steps, args.device)
    finally:
        module.make_envs = original
    return {"ms": 1e3 * statistics.median(loop[1:]), "floor_ms": 1e3 * statistics.median(floors)}


def teachers(tasks: list, folder: Path) -> list[Path]:
    """Checkpoints of untrained teachers, in the scripts' format."""
    paths = [folder / f"{task}.pt" for task in tasks]
    sizes = {"in_dim": speed.OBS, "obs_dim": speed.OBS, "action_dim": speed.ACT, "hidden": 256}
    for task, path in zip(tasks, paths, strict=True):
        actor = mop_distill.Actor(speed.OBS, speed.ACT, 256)
        checkpoint = {"schema_version": 1, "kind": "teacher", "tasks": [task], "level": "medium", "args": {}, "step": 1}
        checkpoint |= {"sizes": {**sizes, "layer_norm": False}, "actor": actor.state_dict(), "returns": {task: [0.0]}}
        torch.save(checkpoint, path)
    return paths


def plot(points: list, path: Path) -> None:
    """A panel per axis, both scales logarithmic; dashed: the floor."""
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(4 * min(len(axes_names), 3), 3.4 * -(-len(axes_names) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(axes_names) // 3), min(len(axes_names), 3), squeeze=False).flat
    for axis, panel in zip(axes_names, panels, strict=False):
        for i, work in enumerate(NAMES):
            mine = [point for point in points if point["axis"] == axis and point["work"] == work]
            values, times = [point["value"] for point in mine], [point["ms"] for point in mine]
            if mine:
                panel.plot(values, times, f"C{i}o-", label=NAMES[work])
            if mine and "floor_ms" in mine[0]:
                panel.plot(values, [point["floor_ms"] for point in mine], f"C{i}--", lw=1)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="ms")
        panel.set_xticks(VALUES[axis], [f"{v:.0e}".replace("e+0", "e") if v > 9999 else str(v) for v in VALUES[axis]])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if np.ptp(np.log10(panel.get_ylim())) < 1.5 else (1,)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in panels:  # the empty ones
        panel.set_axis_off()
    mop_distill.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    args = tyro.cli(Args, description=__doc__)
    with mock.patch.object(sys, "argv", ["mop_distill.py", "--device", args.device, "--threads", str(args.threads)]):
        mop_distill.parse_args(mop_distill.Args, mop_distill.LAPTOP)  # torch's settings, as in the scripts
    points, clock = [], time.time()
    print(f"{'axis':10}{'value':>10} {'work':22}{'ms':>10}{'floor':>10}{'ratio':>8}")
    for axis in args.axes:
        for work in WORKS[axis]:
            for value in VALUES[axis][: args.points]:
                with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                    found = measure(axis, value, work, Path(folder), args)
                points.append({"axis": axis, "value": value, "work": work, **found})
                text = f"{axis:10}{value:10} {NAMES[work]:22}{found['ms']:10.3f}"
                if "floor_ms" in found:
                    text += f"{found['floor_ms']:10.3f}{found['ms'] / found['floor_ms']:8.2f}"
                print(text, flush=True)
    growth = {}
    for axis, work in dict.fromkeys((point["axis"], point["work"]) for point in points):
        mine = [(point["value"], point["ms"]) for point in points if (point["axis"], point["work"]) == (axis, work)]
        if len(mine) > 1:
            growth[f"{work} by {axis}"] = round(float(np.polyfit(*np.log(np.array(mine)).T, 1)[0]), 2)
    print("exponents of a power law over all values:", ", ".join(f"{k} {v}" for k, v in growth.items()))
    name = f"scaling-{args.device}-{torch.get_num_threads()}-threads.json"
    path = Path(args.output or speed.ROOT / "benchmark/results" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"hardware": speed.hardware(args.device), "versions": speed.versions(), "points": points}
    report |= {"args": {**vars(args), "output": None}, "exponents": growth}
    mop_distill.write_atomic(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    plot(points, path.with_suffix(".png"))
    result = {"files": [str(path), str(path.with_suffix(".png"))], "exponents": growth}
    print("RESULT", json.dumps({**result, "seconds": round(time.time() - clock)}))


if __name__ == "__main__":
    main()
