"""The small CSV of a run, from its run folder and checkpoints.

    python reproduce/record.py OUT.csv RUN/returns.csv FILE.pt ..    policy,task,evaluation,step,episode,return
    python reproduce/record.py OUT.csv RUN/measure.json              measure,layer,value,std
    python reproduce/record.py OUT-activations.csv RUN/measure.json  task,layer,neuron,mean
    python reproduce/record.py OUT.csv RUN/measure.json              teacher,task,episode,return (if of --teachers)
    python reproduce/record.py OUT.csv RUN/measure.json              measure,value,error (if of --shift)

Of an evaluation during training the mean over its episodes; of the final one, in the checkpoint, every episode.
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch


def returns(curves: list[str], checkpoints: list[str]) -> list[tuple]:
    found, final = {}, []
    for path in checkpoints:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        sources = checkpoint.get("data_tasks", ())
        policy = f"from {sources[0]}" if len(sources) == 1 else checkpoint["kind"]
        for task, values in checkpoint["returns"].items():
            final += [(policy, task, "final", checkpoint["step"], e, f"{value:.2f}") for e, value in enumerate(values)]
    for path in curves:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                task, _, label = row["task"].partition(" ")  # label: of a teacher trained beside a student
                key = label or policy, task, "training", row["step"]
                found.setdefault(key, []).append(float(row["return"]))
    training = [(*key, "mean", f"{np.mean(values):.2f}") for key, values in found.items()]
    return [("policy", "task", "evaluation", "step", "episode", "return"), *training, *final]


def measures(report: dict) -> list[tuple]:
    rows = [("measure", "layer", "value", "std")]
    for row in report["shared_computation"]:
        for tau in ("tau_a", "tau_b"):
            name, found = tau.replace("_", "-"), row["per_state"][tau]
            rows.append((f"per-state {name}", row["layer"], found["mean"], found["std"]))
            rows.append((f"average {name}", row["layer"], row["average"][tau], ""))
        rows.append(("cka", row["layer"], row["cka"], ""))
    return [row for row in rows if row[2] is not None]


def activations(report: dict) -> list[tuple]:
    return [("task", "layer", "neuron", "mean")] + [
        (task, layer, neuron, mean)
        for task, layers in report["mean_activations"].items()
        for layer, means in enumerate(layers, start=1)
        for neuron, mean in enumerate(means)
    ]


def cross(report: dict) -> list[tuple]:
    return [("teacher", "task", "episode", "return")] + [
        (row["task"], task, e, f"{value:.2f}")
        for row in report["cross_task"]
        for task, found in row["returns"].items()
        for e, value in enumerate(found["values"])
    ]


def shift(report: dict) -> list[tuple]:
    found = report["shift"]
    divergences = [(name, found[name]["value"], found[name]["error"]) for name in ("js_bits", "kl_ab", "kl_ba")]
    return [("measure", "value", "error"), *divergences, *((name, found[name], "") for name in ("auc", "accuracy"))]


def main():
    out, *paths = sys.argv[1:] or [""]
    of = {suffix: [path for path in paths if path.endswith(suffix)] for suffix in (".csv", ".pt", ".json")}
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not out.endswith(".csv") or not (of[".pt"] or len(of[".json"]) == 1):
        raise SystemExit(f"record.py: expected OUT.csv, then checkpoints or a measure.json; not found: {missing}")
    if of[".pt"]:
        rows = returns(of[".csv"], of[".pt"])
    else:
        report = json.loads(Path(of[".json"][0]).read_text())
        made = {"cross_task": cross, "shift": shift, "shared_computation": measures}
        kind = next(kind for part, kind in made.items() if part in report)
        rows = (activations if out.endswith("-activations.csv") else kind)(report)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.tmp", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(f"{out}.tmp", out)  # the CSV says that all is done


if __name__ == "__main__":
    main()
