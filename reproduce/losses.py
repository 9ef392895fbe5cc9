"""The mse loss of a student on the states that it learned from and on its teachers' own episodes.

  python reproduce/losses.py OUT.csv STUDENT.pt --teachers A.pt B.pt --data A.npz B.npz \
      --teacher-data A-online.npz B-online.npz

Where the first is small and the second is not, the student has fitted states that do not matter;
where the second grows with the width, it overfits. The columns are states,task,loss: the mean over
all states of || pi^T(s) - pi^S(s, i) ||^2, summed over the actions.
"""

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
os.environ["MUJOCO_GL"] = "disable"

import torch  # noqa: E402
import tyro  # noqa: E402

import mop_distill as distill  # noqa: E402

CHUNK = 100_000  # states at a time


@dataclass
class Args:
    output: tyro.conf.Positional[str]
    """CSV to write"""
    student: tyro.conf.Positional[str]
    """student.pt, distilled with the loss mse"""
    teachers: tuple[str, ...]
    """checkpoints, in the order of the student's tasks"""
    data: tuple[str, ...]
    """datasets that the student learned from"""
    teacher_data: tuple[str, ...]
    """datasets of the teachers' own episodes"""
    threads: int = 1
    """CPU threads"""


@torch.no_grad()
def mean_loss(student, teacher, obs: torch.Tensor, code: torch.Tensor) -> float:
    """Over all states, (N, obs)."""
    total = 0.0
    for part in obs.split(CHUNK):
        action = student(distill.add_code(part, code))
        total += distill.mse_loss(action, teacher(part)).double().sum().item()
    return total / len(obs)


def main():
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    checkpoint = distill.read_pt(args.student, "student")
    tasks = checkpoint["tasks"]
    levels = checkpoint["level"]
    sizes = checkpoint["sizes"]
    obs_dim = sizes["obs_dim"]
    student = distill.load_actor(checkpoint)
    if sizes["task_encoding"] == "onehot":
        codes = torch.eye(len(tasks))
    else:
        codes = torch.arange(len(tasks)).float()[:, None]
    rows = [["states", "task", "loss"]]
    for states, paths in (("training", args.data), ("teacher", args.teacher_data)):
        for i, task in enumerate(tasks):
            teacher = distill.load_teacher(args.teachers[i], task, obs_dim, sizes["action_dim"])
            obs = distill.load_observations(paths[i], task, levels[i], obs_dim)
            loss = mean_loss(student, distill.load_actor(teacher), obs, codes[i])
            rows.append([states, task, f"{loss:.6g}"])
            print(f"{states} states of {task}: {loss:.4g}")
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
