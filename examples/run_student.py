"""Load a student, or another policy, and let it act for one episode.

  python examples/run_student.py --student runs/<name>/student.pt --task walker-walk

No module of this repository is imported, so this file and student.pt can be taken elsewhere. The
scripts evaluate from the same initial states: episode e of theirs has the seed 2^31 + e.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import tyro
from PIL import Image


@dataclass
class Args:
    student: str
    """student.pt, or the checkpoint of a teacher or a behaviour"""
    task: str = "walker-walk"
    """task to act in, for a student one of its own"""
    seed: int = 2**31
    """seed of the initial state"""
    gif: str | None = None
    """file for a film of the episode, in real time"""


def main(args: Args) -> float:
    # what renders is chosen before dm_control is imported; on a Mac set MUJOCO_GL=glfw yourself
    if args.gif is None:
        os.environ["MUJOCO_GL"] = "disable"
    else:
        os.environ.setdefault("MUJOCO_GL", "egl")  # or osmesa, which needs no graphics driver
    from dm_control import suite
    from dm_control.suite.wrappers import action_scale

    # policy
    checkpoint = torch.load(args.student, map_location="cpu", weights_only=True)
    sizes = checkpoint["sizes"]
    hidden = sizes["hidden"]
    action_dim = sizes["action_dim"]
    out_dim = action_dim
    if sizes.get("log_std"):  # a Gaussian policy: means, then log stds
        out_dim = 2 * action_dim
    first = [nn.LayerNorm(hidden), nn.Tanh()] if sizes["layer_norm"] else [nn.ReLU()]
    net = nn.Sequential(
        nn.Linear(sizes["in_dim"], hidden),
        *first,
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, out_dim),
        nn.Tanh(),
    )
    nn.ModuleDict({"net": net}).load_state_dict(checkpoint["actor"])  # names begin with "net."

    # the task's id, as a student reads it: a number, or a flag per task
    code = []
    if "task_encoding" in sizes:
        if args.task not in checkpoint["tasks"]:
            raise SystemExit(f"--task {args.task}: the student has {checkpoint['tasks']}")
        task_id = checkpoint["tasks"].index(args.task)
        code = [task_id]
    if sizes.get("task_encoding") == "onehot":
        code = np.eye(len(checkpoint["tasks"]))[task_id]

    # episode
    domain, _, name = args.task.partition("-")
    env = suite.load(
        domain,
        name,
        task_kwargs={"random": args.seed},
        environment_kwargs={"flat_observation": True},
    )
    bounds = env.action_spec()
    if np.any(bounds.minimum != -1) or np.any(bounds.maximum != 1):
        env = action_scale.Wrapper(env, minimum=-1, maximum=1)
    frames = []
    frame_every = max(1, round(0.1 / env.control_timestep()))  # ten pictures per second
    episode_return = 0.0
    step = 0
    time_step = env.reset()
    while not time_step.last():
        if args.gif is not None and step % frame_every == 0:
            frames.append(Image.fromarray(env.physics.render(240, 320, camera_id=0)))
        obs = time_step.observation["observations"]
        x = torch.tensor(np.append(obs, code), dtype=torch.float32)  # the id comes last
        with torch.no_grad():
            action = net(x[None])[0, :action_dim].numpy()
        time_step = env.step(action)
        episode_return += time_step.reward
        step += 1

    print(f"{args.task}: return {episode_return:.1f} in {step} steps")
    if args.gif is not None:
        duration = round(1000 * frame_every * env.control_timestep())
        frames[0].save(args.gif, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        print(f"wrote {args.gif}")
    return episode_return


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
