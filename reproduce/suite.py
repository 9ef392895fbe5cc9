"""Which tasks of the dm_control suite the scripts work on: the table of docs/tasks.md.

  python reproduce/suite.py
  python reproduce/suite.py --tasks fish-swim lqr-lqr_2_1    # printed only

For every task a behaviour, its dataset, a teacher and a student are made by the scripts' own main()
with tiny budgets, which say whether they run, not how well they learn; and the rewards of the
dataset are computed again from its physics states, as mop_ds.py needs it.

Out: the table between the markers of docs/tasks.md, unless --tasks names some.
"""

import contextlib
import io
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MUJOCO_GL"] = "disable"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from dm_control import suite  # noqa: E402

import mop_distill  # noqa: E402
import mop_ds  # noqa: E402
import mop_pbrl_teacher  # noqa: E402
import mop_td3_collect  # noqa: E402

EVALUATION = "--eval-episodes 1 --final-eval-episodes 1 --threads 1 --overwrite"
TINY = "--gradient-steps 2 --batch-size 16 --hidden 8"
HEADER = """| task | obs | actions | steps | steps per second | chain | rewards from physics |
|---|---|---|---|---|---|---|"""


@dataclass
class Args:
    tasks: tuple[str, ...] = ()
    """DOMAIN-TASK; default: all"""


def run(script, command: str) -> None:
    """The script's main() with this command line, silent."""
    argv = [f"{script.__name__}.py", *command.split()]
    silent = io.StringIO()
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        script.main()


def outcome(function, *arguments) -> str:
    """The word yes, or the error in a line."""
    try:
        function(*arguments)
    except SystemExit as error:
        message = re.sub(r"^.*?error: ", "", str(error))
        message = re.sub(r"^task .*?: its", "no: its", message)
        return re.sub(r"^.*?found rewards", "no: its physics states give rewards", message)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return "yes"


def chain(task: str, length: int) -> None:
    """Behaviour, dataset, teacher and student of one task."""
    steps = f"--total-timesteps {length} --medium-step {length} --eval-every {length}"
    td3 = f"--learning-starts {length - 2} --batch-size 16 --hidden 8 --num-transitions {length}"
    run(mop_td3_collect, f"--task {task} {steps} {td3} --datasets medium {EVALUATION}")
    run(mop_pbrl_teacher, f"--task {task} {TINY} {EVALUATION}")
    run(mop_distill, f"--tasks {task} {TINY} {EVALUATION}")


def recomputed_rewards(task: str, obs_dim: int, action_dim: int) -> None:
    data = mop_ds.load_dataset(f"data/{task}-medium.npz", task, "medium", obs_dim, action_dim)
    mop_ds.check_physics("its data", data, task)
    mop_ds.compute_rewards(task, data["physics"], data["actions"])


def steps_per_second(task: str) -> float:
    """Of the environment alone, actions 0, the fastest of five times a hundred steps."""
    env = mop_td3_collect.make_env(task)
    action = np.zeros(env.action_spec().shape)
    env.reset()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(100):
            env.step(action)
        seconds.append(time.perf_counter() - start)
    return 100 / min(seconds)


def table_row(task: str, speed: float) -> str:
    env = mop_td3_collect.make_env(task)
    (obs_dim,) = env.observation_spec()["observations"].shape
    (action_dim,) = env.action_spec().shape
    length = math.ceil(env._step_limit)
    runs = outcome(chain, task, length)
    rewards = outcome(recomputed_rewards, task, obs_dim, action_dim) if runs == "yes" else ""
    return f"| {task} | {obs_dim} | {action_dim} | {length} | {speed:.0f} | {runs} | {rewards} |"


def main():
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    tasks = args.tasks or [f"{domain}-{name}" for domain, name in suite.ALL_TASKS]
    rows = {}
    speeds = {}
    for task in tasks:
        try:
            speeds[task] = steps_per_second(task)
        except (Exception, SystemExit) as error:
            rows[task] = f"| {task} | | | | | {type(error).__name__}: {error} | |"
    print("steps per second are measured")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for task in tasks:
            if task in speeds:
                rows[task] = table_row(task, speeds[task])
            print(rows[task], flush=True)
    if not args.tasks:
        page = ROOT / "docs" / "tasks.md"
        markers = re.compile(r"(<!-- table suite -->\n).*?(<!-- end -->)", re.DOTALL)
        table = "\n".join([HEADER, *rows.values()]) + "\n"
        page.write_text(markers.sub(lambda match: match[1] + table + match[2], page.read_text()))


if __name__ == "__main__":
    main()
