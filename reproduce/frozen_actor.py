"""Naive multi-task PBRL as the published code arranges it; this runs mop_pbrl_teacher.py, with its flags.

There every actor is replaced by a deep copy in each step, while its optimiser keeps the parameters of the first one: an
actor moves in the first update and never again. So here the actor's Adam, the first that the script makes, steps once.
"""

import runpy
from pathlib import Path

import torch

made, Adam = [], torch.optim.Adam


def adam(*args, **kwargs):
    made.append(optimizer := Adam(*args, **kwargs))
    if len(made) == 1:
        step = optimizer.step
        optimizer.step = lambda: None if optimizer.state else step()  # a resumed one has its state, too
    return optimizer


torch.optim.Adam = adam
runpy.run_path(str(Path(__file__).resolve().parent.parent / "mop_pbrl_teacher.py"), run_name="__main__")
