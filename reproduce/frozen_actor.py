"""Naive multi-task PBRL as the published code arranges it.

This is examples/naive_multitask_pbrl.py, with its flags, but for the actor's optimiser. In the
published code every actor is replaced by a deep copy in each step, while its optimiser keeps the
parameters of the first one: an actor moves in the first update and never again.
"""

import os
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import naive_multitask_pbrl as naive


class Adam(torch.optim.Adam):
    """Adam, but the first one that is made, the actor's, makes one step only."""

    number_made = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.is_of_the_actor = Adam.number_made == 0
        Adam.number_made += 1

    def step(self):
        made_a_step = len(self.state) > 0  # also true of one that was read from a resume point
        if not (self.is_of_the_actor and made_a_step):
            super().step()


naive.Adam = Adam
if __name__ == "__main__":
    naive.main()
