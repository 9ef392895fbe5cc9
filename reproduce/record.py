"""The small CSV of a run, from its run folder and checkpoint, or of several runs.

  python reproduce/record.py OUT.csv [RUN/returns.csv] FILE.pt ..
  python reproduce/record.py OUT.csv RUN/measure.json
  python reproduce/record.py OUT-activations.csv RUN/measure.json

The columns are policy,task,evaluation,step,episode,return; of a measure.json
measure,layer,value,std ("tau-a 0-2" is that of the pair of ids 0 and 2, where there are more than
two) or, if it is of --teachers, teacher,task,episode,return or, of --shift, measure,value,error; of
activations task,layer,neuron,mean.

Of an evaluation during training the mean over its episodes; of the final one, which the checkpoint
holds, every episode. The last step's rows of returns.csv are the final evaluation, but not of a
behaviour: its checkpoints are evaluated after training.
"""

import csv
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch


def returns(inputs: list[str]) -> list[tuple]:
    training = []
    final = []
    curve = None
    for path in inputs:
        if path.endswith(".csv"):
            curve = path  # of the checkpoint that follows
            continue
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        policy = checkpoint["kind"]
        data_tasks = checkpoint.get("data_tasks", checkpoint["tasks"])
        if len(data_tasks) == 1 and data_tasks != checkpoint["tasks"]:
            policy = f"from {data_tasks[0]}"
        for task, values in checkpoint["returns"].items():
            for e, value in enumerate(values):
                final.append((policy, task, "final", checkpoint["step"], e, f"{value:.2f}"))
        if curve is None:
            continue
        episodes = defaultdict(list)  # task, step -> returns
        last_step = 0
        with open(curve, newline="") as file:
            for row in csv.DictReader(file):
                last_step = int(row["step"])
                episodes[row["task"], last_step].append(float(row["return"]))
        for (task, step), values in episodes.items():
            if step < last_step or policy == "behavior":
                training.append((policy, task, "training", step, "mean", f"{np.mean(values):.2f}"))
        curve = None
    header = ("policy", "task", "evaluation", "step", "episode", "return")
    return [header, *training, *final]


def measures(report: dict) -> list[tuple]:
    rows = [("measure", "layer", "value", "std")]
    for row in report["shared_computation"]:
        layer = row["layer"]
        pair = ""
        if len(report["student"]["tasks"]) > 2:
            pair = " {}-{}".format(*row["ids"])
        for tau in ("tau_a", "tau_b"):
            name = tau.replace("_", "-") + pair
            per_state = row["per_state"][tau]
            rows.append((f"per-state {name}", layer, per_state["mean"], per_state["std"]))
            rows.append((f"average {name}", layer, row["average"][tau], ""))
        rows.append((f"cka{pair}", layer, row["cka"], ""))
    return [row for row in rows if row[2] is not None]


def activations(report: dict) -> list[tuple]:
    rows = [("task", "layer", "neuron", "mean")]
    for task, layers in report["mean_activations"].items():
        for layer, means in enumerate(layers, start=1):
            for neuron, mean in enumerate(means):
                rows.append((task, layer, neuron, mean))
    return rows


def cross(report: dict) -> list[tuple]:
    rows = [("teacher", "task", "episode", "return")]
    for row in report["cross_task"]:
        for task, statistics in row["returns"].items():
            for e, value in enumerate(statistics["values"]):
                rows.append((row["task"], task, e, f"{value:.2f}"))
    return rows


def shift(report: dict) -> list[tuple]:
    rows = [("measure", "value", "error")]
    for name in ("js_bits", "kl_ab", "kl_ba"):
        divergence = report["shift"][name]
        rows.append((name, divergence["value"], divergence["error"]))
    rows.append(("accuracy", report["shift"]["accuracy"], ""))
    return rows


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    inputs = sys.argv[2:]
    checkpoints = [path for path in inputs if path.endswith(".pt")]
    reports = [path for path in inputs if path.endswith(".json")]
    missing = [path for path in inputs if not Path(path).is_file()]
    if missing or out.suffix != ".csv" or not (checkpoints or len(reports) == 1):
        expected = "expected OUT.csv, then checkpoints or a measure.json"
        raise SystemExit(f"record.py: {expected}; not found: {missing}")
    if checkpoints:
        rows = returns(inputs)
    else:
        report = json.loads(Path(reports[0]).read_text())
        if out.stem.endswith("-activations"):
            rows = activations(report)
        elif "cross_task" in report:
            rows = cross(report)
        elif "shift" in report:
            rows = shift(report)
        else:
            rows = measures(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(temporary, out)  # the CSV says that all is done


if __name__ == "__main__":
    main()
