"""TD3 behaviour policies and offline datasets: stage 1 of MOP.

  python mop_td3_collect.py --task walker-walk
  python mop_td3_collect.py --policy checkpoints/walker-walk-medium-behavior.pt --mix noise

The first command trains: TD3 learns a task, is the medium behaviour at --medium-step and the expert
one at the end, and each of them makes a dataset; medium-replay is all that training saw up to the
medium step. The second command only collects, from any behaviour or teacher.

With - for target networks, critic k = 1, 2 minimises (Q_k(s, a) - y)^2 with

  y = r + gamma min_k Q-_k(s', clip(pi-(s') + clip(noise)))

and every second step the actor maximises Q_1(s, pi(s)) and all targets move.

Source: Fujimoto et al. 2018 (arXiv 1802.09477); van Lith 2024, sections 4.4.3 and 5.2.4.

In: nothing, or a checkpoint.

Out: checkpoints/<task>-<level>-behavior.pt, data/<task>-<level>.npz, and in the run's folder under
runs/ returns.csv, losses.csv, resume.pt and TensorBoard logs.
"""

import csv
import json
import math
import os
import pickle
import signal
import sys
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if __name__ == "__main__":
    os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
import mujoco
from dm_control import suite
from dm_control.rl.control import PhysicsError
from dm_control.suite.wrappers import action_scale

SCHEMA_VERSION = 1  # of datasets and checkpoints
VERSIONS = {
    "torch": str(torch.__version__),
    "numpy": np.__version__,
    "mujoco": mujoco.__version__,
}
DATASET = {  # arrays of a dataset and their types
    "observations": "float32",
    "actions": "float32",
    "rewards": "float32",
    "next_observations": "float32",
    "terminals": "bool",
    "timeouts": "bool",
    "physics": "float64",
}
EVAL_SEEDS = range(2**31, 2**32)  # of the evaluation's episodes; all others' seeds are lower
PLAIN_ONE_IN = {"online": 1, "noise": 10, "random90": 10, "random99": 100}  # one episode in so many
LAPTOP = {  # defaults with --scale laptop
    "hidden": 256,
    "batch_size": 128,
    "learning_rate": 3e-4,
    "total_timesteps": 240_000,
    "medium_step": 120_000,
}


@dataclass
class Args:
    # experiment
    task: str = "walker-walk"
    """task of the dm_control suite, DOMAIN-TASK"""
    seed: int = 1
    """seed of the weights, the batches, the noise and the initial states"""
    scale: Literal["thesis", "laptop"] = "thesis"
    """the defaults of the other flags: the thesis's, as below, or for one CPU core (LAPTOP)"""
    run_dir: str | None = None
    """folder of logs, curves and the resume point; default: runs/<script, settings, time>"""
    resume: str | None = None
    """run folder to continue with its arguments; flags given beside it win"""
    eval_every: int = 10_000
    """steps between evaluations and resume points, a multiple of the episode length"""
    eval_episodes: int = 10
    """episodes per evaluation and task, always from the same initial states"""
    final_eval_episodes: int = 100
    """episodes of the evaluation that a checkpoint holds"""
    overwrite: bool = False
    """replace files of an earlier run"""

    # data
    policy: str | None = None
    """behaviour or teacher checkpoint: no training, this policy makes a dataset"""
    mix: Literal["online", "noise", "random90", "random99"] = "online"
    """with --policy. online: all episodes are by it; noise: 10%, and 90% have N(0, 1) noise added
    to its actions; random90 and random99: 10% and 1%, and the rest have uniform actions"""
    output: str | None = None
    """with --policy: dataset to write; default: data/<name of the checkpoint>[-<mix>].npz"""
    datasets: tuple[Literal["medium", "expert", "medium-replay"], ...] = (
        "medium",
        "expert",
        "medium-replay",
    )
    """without --policy: datasets to write after training"""
    num_transitions: int = 1_000_000
    """transitions of a dataset (medium-replay: all that training saw up to the medium step)"""
    medium_step: int = 1_000_000
    """step at which the policy is the medium one, a multiple of --eval-every"""
    medium_return: float | None = None
    """instead: medium is the policy of the first evaluation with this mean return or more"""

    # algorithm
    total_timesteps: int = 2_000_000
    """environment steps, each with one update of the critics after --learning-starts"""
    learning_rate: float = 1e-4
    """learning rate of Adam, for actor and critics"""
    batch_size: int = 1024
    """transitions per update"""
    hidden: int = 1024
    """width of both hidden layers"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.01
    """target smoothing rate of actor and critics"""
    policy_noise: float = 0.3
    """std of the target policy's noise (0.2 in the thesis author's code)"""
    noise_clip: float = 0.3
    """bound of the target policy's noise"""
    exploration_noise: float = 0.2
    """std of the acting policy's noise"""
    policy_frequency: int = 2
    """critic updates per actor update"""
    learning_starts: int = 4_000
    """steps of uniform random actions before the first update"""

    # system
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """of the networks; episodes run on the CPU"""
    threads: int = torch.get_num_threads()
    """CPU threads, and processes that run episodes"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """precision of float32 matrix products (torch.set_float32_matmul_precision)"""
    cuda_graph: bool = False
    """on CUDA: replay the updates as CUDA graphs"""


# ------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Policy, (B, in_dim) -> (B, out_dim) in [-1, 1]; only a behaviour has a LayerNorm."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int, layer_norm: bool):
        super().__init__()
        first = [nn.LayerNorm(hidden), nn.Tanh()] if layer_norm else [nn.ReLU()]
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            *first,
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_dim),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Critics(nn.Module):
    """Two independent Q-networks, (B, obs), (B, act) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.nets = nn.ModuleList()
        for _ in range(2):
            net = nn.Sequential(
                nn.Linear(obs_dim + action_dim, hidden),
                nn.LayerNorm(hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 1),
            )
            self.nets.append(net)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)
        return torch.stack([net(x).squeeze(1) for net in self.nets])


# --------------------------------------------------------------------------------------- losses
def clipped_noise(like: Tensor, std: float, bound: float) -> Tensor:
    """N(0, std^2) noise within [-bound, bound], in the shape of `like`."""
    return (std * torch.randn_like(like)).clamp(-bound, bound)


def td3_critic_loss(critics, target_critics, target_actor, batch, args) -> Tensor:
    """TD3's loss, summed over both critics (arXiv 1802.09477, algorithm 1) -> ().

    batch: obs (B, obs), action (B, act), reward (B,), next_obs (B, obs). Episodes end by timeout
    only, so every target is bootstrapped.
    """
    obs, action, reward, next_obs = batch
    with torch.no_grad():
        noise = clipped_noise(action, args.policy_noise, args.noise_clip)
        next_action = (target_actor(next_obs) + noise).clamp(-1, 1)
        next_value = target_critics(next_obs, next_action).min(dim=0).values  # (B,)
        target = reward + args.gamma * next_value
    return (critics(obs, action) - target).square().mean(dim=1).sum()


def td3_actor_loss(actor, critics, obs) -> Tensor:
    """- mean Q_1(s, pi(s)), the deterministic policy gradient of the first critic -> ()."""
    return -critics(obs, actor(obs))[0].mean()


@torch.no_grad()
def move_target(target: nn.Module, network: nn.Module, rate: float) -> None:
    """Polyak averaging: target <- (1 - rate) * target + rate * network."""
    for old, new in zip(target.parameters(), network.parameters(), strict=True):
        old.lerp_(new, rate)


# ------------------------------------------------------------------------------------- training
def train(args, resume_point) -> None:
    """TD3 on one task, then checkpoints of the medium and the expert behaviour, and datasets."""
    obs_dim, action_dim = task_sizes(args.task)
    env = make_env(args.task)
    length = math.ceil(env._step_limit)
    # evaluation may use the same environment, so it has to fall between two episodes
    fits = args.eval_every % length == 0 and args.total_timesteps % length == 0
    check(fits, f"--eval-every, --total-timesteps: expected multiples of the episode's {length}")
    if args.medium_return is None:
        fits = args.medium_step in range(args.eval_every, args.total_timesteps + 1, args.eval_every)
        text = f"a multiple of {args.eval_every} up to {args.total_timesteps}, or a --medium-return"
        check(fits, f"--medium-step: expected {text}")
    checkpoint_paths = {}
    for level in ("medium", "expert"):
        checkpoint_paths[level] = Path(f"checkpoints/{args.task}-{level}-behavior.pt")
    data_paths = {}
    for level in args.datasets:
        data_paths[level] = Path(f"data/{args.task}-{level}.npz")
    outputs = [*checkpoint_paths.values(), *data_paths.values()]
    for path in outputs:
        check_output(path, args)
    run_dir = make_run_dir(args, args.task)

    # networks
    torch.manual_seed(zlib.crc32(f"{args.seed} behavior {args.task}".encode()))
    actor = Actor(obs_dim, action_dim, args.hidden, layer_norm=True).to(args.device)
    critics = Critics(obs_dim, action_dim, args.hidden).to(args.device)
    target_actor = deepcopy(actor)
    target_critics = deepcopy(critics)
    adam = partial(Adam, lr=args.learning_rate, fused=True, capturable=True)
    actor_optimizer = adam(actor.parameters())
    critic_optimizer = adam(critics.parameters())

    # replay buffer: every transition, and the physics states, which only the dataset needs
    columns = [obs_dim, action_dim, 1, obs_dim]  # (s, a, r, s')
    replay = torch.zeros(args.total_timesteps, sum(columns), device=args.device)
    physics = torch.zeros(args.total_timesteps, len(env.physics.get_state()), dtype=torch.float64)

    # resume
    trained = {  # what a resume point holds
        "actor": actor,
        "critics": critics,
        "target_actor": target_actor,
        "target_critics": target_critics,
        "actor_optimizer": actor_optimizer,
        "critic_optimizer": critic_optimizer,
    }
    start = 0
    rows = {  # of the CSV files
        "returns": [["step", "task", "episode", "return"]],
        "losses": [["step", "metric", "value"]],
    }
    behaviors = {}  # level -> step and weights of that behaviour
    if resume_point:
        stored = resume_point["args"]
        check(stored["task"] == args.task, "--resume: expected the same --task")
        start = resume_point["step"]
        check(start <= args.total_timesteps, f"--total-timesteps: {start} are already made")
        rows = resume_point["rows"]
        behaviors = resume_point["policies"]
        for name in ("medium_step", "medium_return"):
            fits = getattr(args, name) == stored[name] or "medium" not in behaviors
            check(fits, f"--{name}: expected {stored[name]}, as this run has its medium policy")
        if args.medium_return is None and "medium" not in behaviors:
            check(args.medium_step > start, f"--medium-step: expected more than the {start} made")
        replay[:start] = resume_point.pop("replay")  # the largest parts: freed once they are copied
        physics[:start] = resume_point.pop("physics")
        for name, part in trained.items():
            part.load_state_dict(resume_point[name])
        for optimizer in (actor_optimizer, critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate
        random_states = resume_point["random_states"]  # of the CPU, then of every GPU
        torch.set_rng_state(random_states[0])
        torch.cuda.set_rng_state_all(random_states[1 : 1 + torch.cuda.device_count()])

    writer = SummaryWriter(run_dir, purge_step=start + 1)

    def update_critics(obs, action, reward, next_obs):
        batch = (obs, action, reward.squeeze(1), next_obs)
        loss = td3_critic_loss(critics, target_critics, target_actor, batch, args)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        return loss.detach()

    def update_actor_and_targets(obs):
        loss = td3_actor_loss(actor, critics, obs)
        actor_optimizer.zero_grad()
        loss.backward(inputs=list(actor.parameters()))  # gradients for the actor only
        actor_optimizer.step()
        move_target(target_actor, actor, args.tau)
        move_target(target_critics, critics, args.tau)
        return loss.detach()

    if args.cuda_graph:
        from tensordict.nn import CudaGraphModule  # here, as it takes seconds to import

        update_critics = CudaGraphModule(update_critics)
        update_actor_and_targets = CudaGraphModule(update_actor_and_targets)
    metrics = {}
    progress = tqdm(range(start + 1, args.total_timesteps + 1), desc=args.task, disable=None)
    for step in progress:
        if step % length == 1:
            episode_seed = zlib.crc32(f"{args.seed} {args.task} {step // length}".encode())
            env.task.random.seed(episode_seed % 2**31)
            obs = flat(env.reset())
            episode_return = 0.0

        # act
        if step <= args.learning_starts:
            action = 2 * torch.rand(action_dim) - 1
        else:
            with torch.no_grad():
                action = actor(torch.from_numpy(obs)[None].to(args.device))[0].cpu()
            noise = args.exploration_noise * torch.randn(action_dim)
            action = (action + noise).clamp(-1, 1)

        # learn from the steps before this one, on a GPU while the physics below runs
        if step > max(args.learning_starts, 1):  # before step 1 there is nothing to learn from
            index = torch.randint(step - 1, (args.batch_size,), device=args.device)
            batch = replay[index].split(columns, dim=1)
            metrics["loss/critics"] = update_critics(*batch)
            if step % args.policy_frequency == 0:
                metrics["loss/actor"] = update_actor_and_targets(batch[0])

        # environment
        try:
            time_step = env.step(action.numpy())
        except PhysicsError as error:
            check(False, f"step {step}: {args.task}: {error}")
        ended = time_step.last()
        check(ended == (step % length == 0), f"step {step}: expected episodes of {length} steps")
        next_obs = flat(time_step)
        transition = np.concatenate([obs, action.numpy(), [time_step.reward], next_obs])
        replay[step - 1] = torch.from_numpy(transition)
        physics[step - 1] = torch.from_numpy(env.physics.get_state())
        obs = next_obs
        episode_return += time_step.reward

        # log
        if step % length == 0:
            metrics["return/training"] = episode_return
            log(writer, rows["losses"], step, metrics)

        # evaluate, save
        if step % args.eval_every == 0 or step == args.total_timesteps:
            seeds = EVAL_SEEDS[: args.eval_episodes]
            episodes = run_episodes(actor, args.task, seeds, args.threads)
            returns = log_returns(writer, rows["returns"], step, args.task, episodes)
            report = f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}"
            progress.write(f"step {step}: {report}")
            progress.set_postfix_str(report)
            if args.medium_return is None:
                is_medium = step == args.medium_step
            else:
                is_medium = np.mean(returns) >= args.medium_return
            if is_medium and "medium" not in behaviors:
                behaviors["medium"] = {"step": step, "actor": deepcopy(actor.state_dict())}
            for name in rows:
                write_csv(run_dir / f"{name}.csv", rows[name])
            resume_point = {
                "kind": f"resume point of {Path(__file__).name}",
                "args": vars(args),
                "step": step,
                "rows": rows,
                "policies": behaviors,
                "replay": replay[:step].clone(),  # of a view torch saves the whole
                "physics": physics[:step].clone(),
                "random_states": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            }
            for name, part in trained.items():
                resume_point[name] = part.state_dict()
            save(run_dir / "resume.pt", resume_point)
    writer.close()
    print(f"wrote returns.csv and losses.csv in {run_dir}")
    behaviors["expert"] = {"step": args.total_timesteps, "actor": deepcopy(actor.state_dict())}

    # checkpoints and their datasets
    for path in outputs:  # another run may have written them
        check_output(path, args)
    for level, behavior in behaviors.items():
        actor.load_state_dict(behavior["actor"])
        seeds = EVAL_SEEDS[: args.final_eval_episodes]
        episodes = run_episodes(actor, args.task, seeds, args.threads)
        returns = [float(episode["rewards"].sum()) for episode in episodes]
        print(f"{level}, step {behavior['step']}: {np.mean(returns):.1f} +- {np.std(returns):.1f}")
        checkpoint = {
            "schema_version": SCHEMA_VERSION,
            "kind": "behavior",
            "tasks": [args.task],
            "level": level,
            "args": vars(args),
            "step": behavior["step"],
            "sizes": {
                "in_dim": obs_dim,
                "action_dim": action_dim,
                "hidden": args.hidden,
                "layer_norm": True,
            },
            "returns": {args.task: returns},
            "actor": behavior["actor"],
            "versions": VERSIONS,
        }
        path = checkpoint_paths[level]
        save(path, checkpoint)
        print(f"wrote {path}")
        if level in args.datasets:
            collect(path, "online", data_paths[level], args)
    if "medium-replay" in args.datasets and "medium" in behaviors:
        num_rows = behaviors["medium"]["step"]
        parts = replay[:num_rows].cpu().split(columns, dim=1)
        data = {
            "observations": parts[0].numpy(),
            "actions": parts[1].numpy(),
            "rewards": parts[2][:, 0].numpy(),
            "next_observations": parts[3].numpy(),
            "terminals": np.zeros(num_rows, bool),
            "timeouts": np.arange(1, num_rows + 1) % length == 0,
            "physics": physics[:num_rows].numpy(),
        }
        source = {"level": "medium-replay", "mix": "training", "policy": None}
        save_dataset(data_paths["medium-replay"], data, args.task, source, args)
    check("medium" in behaviors, "no medium policy: no evaluation reached --medium-return")


# ----------------------------------------------------------------------------------- collecting
def collect(policy_path, mix: str, path: Path, args) -> None:
    """A dataset by a checkpoint's policy: episodes by it alone, then those of --mix."""
    checkpoint = read_pt(policy_path, "behavior", "teacher")
    actor = load_actor(checkpoint)
    task = checkpoint["tasks"][0]
    level = checkpoint["level"]
    length = math.ceil(make_env(task)._step_limit)
    one_in = PLAIN_ONE_IN[mix]
    fits = one_in == 1 or args.num_transitions % (one_in * length) == 0
    check(fits, f"--num-transitions: --mix {mix} takes a multiple of {one_in * length}")
    num_episodes = math.ceil(args.num_transitions / length)
    num_plain = num_episodes // one_in

    # every task, level and mix has initial states of its own
    rng = np.random.default_rng([args.seed, zlib.crc32(f"{task} {level} {mix}".encode())])
    seeds = rng.integers(2**31, size=num_episodes).tolist()
    episodes = run_episodes(actor, task, seeds[:num_plain], args.threads)
    episodes += run_episodes(actor, task, seeds[num_plain:], args.threads, mix=mix)
    data = {
        "terminals": np.zeros(num_episodes * length, bool),
        "timeouts": np.arange(1, num_episodes * length + 1) % length == 0,
    }
    for name in episodes[0]:
        data[name] = np.concatenate([episode[name] for episode in episodes])
    whole = len(data["rewards"]) == num_episodes * length
    check(whole, f"{policy_path}: expected episodes of {length} steps; the physics may be unstable")
    for name, array in data.items():
        data[name] = array[: args.num_transitions]
    data["timeouts"][-1] = True  # where the last episode is cut short
    source = {
        "level": level,
        "mix": mix,
        "policy": Path(policy_path).name,
        "policy_episodes": num_plain,
    }
    save_dataset(path, data, task, source, args)


def save_dataset(path: Path, data: dict, task: str, source: dict, args) -> None:
    """Arrays and metadata as in docs/formats.md, in a file that appears whole."""
    starts = np.flatnonzero(np.append(True, data["timeouts"][:-1]))
    returns = np.add.reduceat(data["rewards"], starts, dtype=np.float64).tolist()
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "task": task,
        **source,
        "seed": args.seed,
        "episode_returns": returns,
        "versions": VERSIONS,
    }
    for name, dtype in DATASET.items():
        data[name] = data[name].astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:  # np.savez adds .npz to a name that lacks it
        np.savez(file, **data, metadata=np.array(json.dumps(metadata)))
    os.replace(temporary, path)
    print(f"wrote {path}: {len(data['rewards'])} transitions, return {np.mean(returns):.1f}")


def main():
    args, resume_point = parse_args()
    check(args.seed >= 0, "--seed: expected 0 or more")
    if args.policy is None:
        neither = args.mix == "online" and args.output is None
        check(neither, "--mix, --output: expected --policy, whose episodes they are for")
        train(args, resume_point)
    else:
        check(args.resume is None, "--resume: expected no --policy, which is not trained")
        # a behaviour's plain dataset has the name that training gives it
        name = Path(args.policy).stem.removesuffix("-behavior")
        if args.mix != "online" or not args.policy.endswith("-behavior.pt"):
            name = f"{name}-{args.mix}"
        path = Path(args.output or f"data/{name}.npz").expanduser()
        check_output(path, args)
        collect(args.policy, args.mix, path, args)


# ===================================== the method ends here; below: command line, episodes, files
def parse_args():
    """The command line -> (args, resume point or None).

    The defaults are those of the run to resume, else of --scale; flags that are given win.
    """
    args = tyro.cli(Args, description=__doc__)  # a first time, to know the defaults of the second
    default = Args()
    resume_point = None
    if args.resume:
        path = Path(args.resume).expanduser() / "resume.pt"
        resume_point = read_pt(path, f"resume point of {Path(__file__).name}")
        default = replace(Args(**resume_point["args"]), overwrite=False)
    elif args.scale == "laptop":
        default = replace(default, scale="laptop", **LAPTOP)
    args = tyro.cli(Args, description=__doc__, default=default)
    check(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: found no CUDA device")
    check(args.device == "cuda" or not args.cuda_graph, "--cuda-graph: expected --device cuda")
    fewest = min(args.eval_every, args.eval_episodes, args.final_eval_episodes)
    check(fewest > 0, "--eval-every, --eval-episodes, --final-eval-episodes: expected 1 or more")
    if args.resume:
        for name in ("device", "seed", "scale", "run_dir"):
            old = getattr(default, name)
            check(getattr(args, name) == old, f"--resume: expected --{name} {old}, as before")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    return args, resume_point


def make_run_dir(args, name: str) -> Path:
    """The run's folder, a new or an empty one unless it is resumed or overwritten."""
    default = f"runs/{Path(__file__).stem}-{name}-seed{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.resume or args.run_dir or default).expanduser()
    run_dir.mkdir(parents=True, exist_ok=True)
    free = args.resume or args.overwrite or not any(run_dir.iterdir())
    check(free, f"--run-dir {run_dir}: not empty; pass --overwrite, or --resume {run_dir}")
    if not args.resume:  # what an overwritten run left
        for file in ("resume.pt", "student.pt", "returns.csv", "losses.csv", "tau.csv"):
            (run_dir / file).unlink(missing_ok=True)
    return run_dir


@cache
def make_env(task: str):
    """dm_control's environment of DOMAIN-TASK, one per process, with flat observations and actions
    in [-1, 1].
    """
    domain, _, name = task.partition("-")
    check((domain, name) in suite.ALL_TASKS, f"task {task}: not one of the dm_control suite")
    env = suite.load(domain, name, environment_kwargs={"flat_observation": True})
    check(env._step_limit < math.inf, f"task {task}: its episodes have no end")
    bounds = env.action_spec()
    if np.any(bounds.minimum != -1) or np.any(bounds.maximum != 1):
        env = action_scale.Wrapper(env, minimum=-1, maximum=1)
    return env


def task_sizes(task: str) -> tuple[int, int]:
    """Sizes of a task's observations and actions."""
    env = make_env(task)
    obs_shape = env.observation_spec()["observations"].shape
    return obs_shape[0], env.action_spec().shape[0]


def run_episodes(policy: nn.Module, task: str, seeds, workers: int, **options) -> list[dict]:
    """An episode per seed, spread over worker processes -> the dicts of `run_episode`.

    An episode depends on the policy, its seed and the options only, not on the workers.
    """
    run = partial(run_episode, pickle.dumps(deepcopy(policy).cpu()), task, **options)
    episodes = map(run, seeds) if workers == 1 else make_workers(workers).map(run, seeds)
    return list(tqdm(episodes, desc=task, total=len(seeds), leave=False, disable=None))


@cache
def make_workers(workers: int) -> ProcessPoolExecutor:
    """Processes that stay for the whole run, since to start them takes seconds."""
    precision = torch.get_float32_matmul_precision()
    context = get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(precision,))


def start_worker(precision: str) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process


@torch.no_grad()
def run_episode(pickled: bytes, task: str, seed: int, mix: str = "online") -> dict:
    """One whole episode, the policy on the CPU with one state at a time.

    pickled: the policy, (1, obs) -> (1, act), of a Gaussian one the mean comes first; seed: of
    the initial state and the noise; mix: noise adds N(0, 1) noise to the actions, random90 and
    random99 replace them by uniform ones. Returns a dataset's arrays, (T, ..), but for the ends.
    """
    policy = pickle.loads(pickled)
    env = make_env(task)
    action_dim = env.action_spec().shape[0]
    names = ["observations", "actions", "rewards", "next_observations", "physics"]
    episode = {name: [] for name in names}
    rng = np.random.default_rng(seed)
    env.task.random.seed(seed)
    time_step = env.reset()
    while not time_step.last():
        obs = flat(time_step)
        action = policy(torch.from_numpy(obs)[None])[0, :action_dim].numpy()
        if mix == "noise":
            action = np.clip(action + rng.standard_normal(action_dim), -1, 1).astype(np.float32)
        elif mix in ("random90", "random99"):
            action = rng.uniform(-1, 1, action_dim).astype(np.float32)
        try:
            time_step = env.step(action)
        except PhysicsError:  # an unstable state: the episode counts as it stands
            break
        episode["observations"].append(obs)
        episode["actions"].append(action)
        episode["rewards"].append(time_step.reward)
        episode["next_observations"].append(flat(time_step))
        episode["physics"].append(env.physics.get_state())
    return {name: np.array(values) for name, values in episode.items()}


def flat(time_step) -> np.ndarray:
    """The observation of a time step of dm_control, (obs,) float32."""
    return time_step.observation["observations"].astype(np.float32)


def read_pt(path, *kinds: str) -> dict:
    """A checkpoint or resume point of one of the kinds, read without running pickled code."""
    expected = " or ".join(kinds)
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare check sums
        content = torch.load(path, map_location="cpu", weights_only=True)
        kind = content["kind"]
    except Exception as error:
        check(False, f"{path}: expected a {expected}, a .pt file; found {error!r:.300}")
    check(damaged is None, f"{path}: damaged bytes in {damaged}")
    check(kind in kinds, f"{path}: expected a {expected}, found a {kind}")
    version = content.get("schema_version", SCHEMA_VERSION)
    check(version == SCHEMA_VERSION, f"{path}: expected schema {SCHEMA_VERSION}, found {version}")
    check_finite(path, content)
    return content


def load_actor(checkpoint: dict) -> Actor:
    """The frozen policy of a checkpoint."""
    sizes = checkpoint["sizes"]
    out_dim = sizes["action_dim"] * (2 if sizes.get("log_std") else 1)
    actor = Actor(sizes["in_dim"], out_dim, sizes["hidden"], sizes["layer_norm"])
    actor.load_state_dict(checkpoint["actor"])
    return actor.requires_grad_(False)


def log(writer: SummaryWriter, rows: list, step: int, metrics: dict) -> None:
    """Metrics to TensorBoard and to the rows of losses.csv; stop at one that is not finite."""
    for name, value in metrics.items():
        value = float(value)
        check(math.isfinite(value), f"step {step}: {name} is {value}; try a lower learning rate")
        writer.add_scalar(name, value, step)
        rows.append([step, name, value])


def log_returns(writer: SummaryWriter, rows: list, step: int, task: str, episodes: list) -> list:
    """Episode returns, also to TensorBoard (their mean) and to the rows of returns.csv."""
    returns = [float(episode["rewards"].sum()) for episode in episodes]
    for e, value in enumerate(returns):
        rows.append([step, task, e, value])
    writer.add_scalar(f"return/{task}", np.mean(returns), step)
    return returns


def write_csv(path: Path, rows: list) -> None:
    """The rows, the first of which is the header, as a CSV file that appears whole."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(temporary, path)


def save(path: Path, content: dict) -> None:
    """The content as a .pt file that appears whole; stop where a tensor in it is not finite."""
    check_finite(path.name, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    torch.save(content, temporary)
    os.replace(temporary, path)


def check_finite(name, content) -> None:
    """Stop at the first tensor of a nested dict that holds NaN or infinite values."""
    if isinstance(content, dict):
        for key, part in content.items():
            check_finite(f"{name}: {key}", part)
    if isinstance(content, Tensor):
        check(content.isfinite().all(), f"{name}: NaN or infinite values")


def check_output(path: Path, args) -> None:
    """Stop where a file would be replaced."""
    check(args.overwrite or not path.exists(), f"{path}: exists; pass --overwrite to replace it")


def check(condition, message: str) -> None:
    """Stop with one line on standard error and exit code 1 unless the condition holds."""
    if not condition:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}")


if __name__ == "__main__":
    main()
