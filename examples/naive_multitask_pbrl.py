"""Naive multi-task PBRL: one actor learns all tasks from their data at once, without distillation.

  python examples/naive_multitask_pbrl.py --tasks walker-stand walker-walk --level medium

This file is a copy of mop_pbrl_teacher.py, which has the formulas. Here the actor reads a state s
and a task id i, and every task has critics and data of its own. A gradient step makes a full update
per task in turn: its critics and, every second step, the actor; then all targets move once.

Own: add_code, act, main, Args.tasks, Args.level, Args.data, Args.output

Source: van Lith 2024, section 5.1.2 and Figs 5.2, 5.3.

In: per task data/<task>-<level>.npz of mop_td3_collect.py, else the bundled file in pretrained/.

Out: checkpoints/<task>+<task>-<level>-naive.pt with the actor and each task's critics, and in the
run's folder under runs/ returns.csv, losses.csv, resume.pt and TensorBoard logs.
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
import torch.nn.functional as F
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
LOG_STD = {"deterministic": None, "gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}  # bounds
LAPTOP = {  # defaults with --scale laptop
    "gradient_steps": 15_000,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "policy_frequency": 1,
    "num_ood": 1,
    "tau": 0.02,
    "actor_tau": 0.02,
    "policy_noise": 0.05,
    "beta_ood_decay": 0.9997,
    "anneal": 0.5,
    "bc_coef": 10.0,
    "matmul_precision": "medium",
}


@dataclass
class Args:
    # experiment
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")
    """tasks of the dm_control suite, DOMAIN-TASK; the position is the task id"""
    seed: int = 1
    """seed of the weights, the batches and the noise"""
    scale: Literal["thesis", "laptop"] = "thesis"
    """the defaults of the other flags: the thesis's, as below, or for one CPU core (LAPTOP)"""
    run_dir: str | None = None
    """folder of logs, curves and the resume point; default: runs/<script, settings, time>"""
    resume: str | None = None
    """run folder to continue with its arguments; flags given beside it win"""
    eval_every: int = 10_000
    """steps between evaluations, each followed by a resume point"""
    eval_episodes: int = 10
    """episodes per evaluation and task, always from the same initial states"""
    final_eval_episodes: int = 100
    """episodes of the evaluation at the last step, which the checkpoint holds"""
    overwrite: bool = False
    """replace files of an earlier run"""

    # data
    level: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium",)
    """level of the behaviour that made the data: one, or one per task"""
    data: tuple[str, ...] = ()
    """dataset files, one per task, instead of data/<task>-<level>.npz"""
    output: str | None = None
    """checkpoint to write; default: checkpoints/<task>+<task>-<level>-naive.pt"""

    # algorithm
    actor: Literal["deterministic", "gaussian", "gaussian-tanh"] = "deterministic"
    """gaussian: log std in [-5, 0]; gaussian-tanh: in [-1, 1], as in the thesis author's code"""
    gradient_steps: int = 1_000_000
    """updates of the critics"""
    learning_rate: float = 1e-4
    """learning rate of Adam, for actor and critics"""
    batch_size: int = 1024
    """transitions per update"""
    hidden: int = 256
    """width of both hidden layers"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """target smoothing rate of the critics (1: no targets, as in the thesis author's code)"""
    actor_tau: float = 0.005
    """target smoothing rate of the actor"""
    policy_noise: float = 0.2
    """std of the target policy's noise"""
    noise_clip: float = 0.5
    """bound of the target policy's noise and of the OOD noise"""
    policy_frequency: int = 2
    """critic updates per actor update"""
    num_critics: int = 5
    """critics in the ensemble, K"""
    num_ood: int = 3
    """OOD actions around pi(s), and as many around pi(s')"""
    ood_noise: float = 0.01
    """std of the OOD actions around the policy's"""
    beta_in: float = 0.001
    """uncertainty penalty in the in-distribution targets"""
    beta_ood: float = 3.0
    """uncertainty penalty in the OOD targets, at the start"""
    beta_ood_min: float = 0.1
    """lower bound of beta_ood"""
    beta_ood_decay: float = 0.99995
    """factor of beta_ood per step"""
    anneal: float = 0.0
    """share of the updates, at their end, in which the learning rate falls linearly to 0"""
    bc_coef: float = 0.0
    """weight of behaviour cloning in the actor's loss, not in the thesis (docs/pretrained.md)"""
    bc_temperature: float = 0.05
    """the lower, the more of the cloning goes to the episodes of the highest return; inf: to all"""

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
    """Policy, (B, in_dim) -> (B, out_dim) in [-1, 1]: actions, or means and scaled log stds."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_dim),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Critics(nn.Module):
    """K independent Q-networks with stacked weights, (B, obs), (B, act) -> (K, B)."""

    def __init__(self, num_critics: int, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        sizes = [(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]  # see forward, too
        for j, (n_in, n_out) in enumerate(sizes, start=1):
            layers = [nn.Linear(n_in, n_out) for _ in range(num_critics)]  # torch's initialisation
            weight = torch.stack([layer.weight.detach().T for layer in layers])
            bias = torch.stack([layer.bias.detach()[None] for layer in layers])
            self.register_parameter(f"w{j}", nn.Parameter(weight))  # (K, n_in, n_out)
            self.register_parameter(f"b{j}", nn.Parameter(bias))  # (K, 1, n_out)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)
        if x.is_cuda:  # one batched product per layer
            x = x.expand(len(self.w1), *x.shape)
            h = F.relu(torch.baddbmm(self.b1, x, self.w1))
            h = F.relu(torch.baddbmm(self.b2, h, self.w2))
            return torch.baddbmm(self.b3, h, self.w3).squeeze(-1)
        values = []
        for k in range(len(self.w1)):  # on a CPU faster than batched products
            h = F.relu(torch.addmm(self.b1[k], x, self.w1[k]))
            h = F.relu(torch.addmm(self.b2[k], h, self.w2[k]))
            values.append(torch.addmm(self.b3[k], h, self.w3[k]).squeeze(-1))
        return torch.stack(values)


# --------------------------------------------------------------------------------------- losses
def clipped_noise(like: Tensor, std: float, bound: float) -> Tensor:
    """N(0, std^2) noise within [-bound, bound], in the shape of `like`."""
    return (std * torch.randn_like(like)).clamp(-bound, bound)


def uncertainty(q: Tensor) -> Tensor:
    """U: sample std over the K critics, (K, B) -> (B,); torch.std is slow for so few."""
    return ((q - q.mean(dim=0)).square().sum(dim=0) / (len(q) - 1)).sqrt()


def pbrl_critic_loss(critics, target_critics, policy, target_policy, batch, beta_ood, args):
    """PBRL's loss, summed over the K critics (arXiv 2202.11566, section 3; thesis 5.1.1).

    mean (Q_k(s, a) - r - gamma (Q^-_k(s', a') - beta_in U^-(s', a')))^2 over the batch, plus
    mean (Q_k(s, b) - max(Q_k(s, b) - beta_ood U(s, b), 0))^2 over OOD actions b in s and s'.
    batch: tensors with the names and shapes of a dataset, (B, ..); a timeout is not terminal.
    Returns the loss () and metrics, a dict of () tensors.
    """
    obs = batch["observations"]
    next_obs = batch["next_observations"]
    with torch.no_grad():
        # target of the data
        next_action = target_policy(next_obs)
        target_noise = clipped_noise(next_action, args.policy_noise, args.noise_clip)
        next_action = (next_action + target_noise).clamp(-1, 1)
        next_q = target_critics(next_obs, next_action)  # (K, B)
        next_value = next_q - args.beta_in * uncertainty(next_q)
        target = batch["rewards"] + args.gamma * ~batch["terminals"] * next_value

        # OOD actions around pi(s) and pi(s')
        both_obs = torch.cat([obs, next_obs])  # (2B, obs)
        ood_action = policy(both_obs).repeat(args.num_ood, 1)  # (num_ood * 2B, act)
        ood_noise = clipped_noise(ood_action, args.ood_noise, args.noise_clip)
        ood_action = (ood_action + ood_noise).clamp(-1, 1)
        ood_obs = both_obs.repeat(args.num_ood, 1)

    # one pass over data and OOD rows, which is faster than two
    all_action = torch.cat([batch["actions"], ood_action])
    all_q = critics(torch.cat([obs, ood_obs]), all_action)  # (K, B + num_ood * 2B)
    q = all_q[:, : len(obs)]
    ood_q = all_q[:, len(obs) :]
    ood_u = uncertainty(ood_q.detach())
    ood_target = (ood_q.detach() - beta_ood * ood_u).clamp(min=0)
    in_loss = (q - target).square().mean(dim=1).sum()
    ood_loss = (ood_q - ood_target).square().mean(dim=1).sum()
    metrics = {
        "loss/in_distribution": in_loss.detach(),
        "loss/ood": ood_loss.detach(),
        "value/q_data": q.detach().mean(),
        "value/q_ood": ood_q.detach().mean(),
        "uncertainty/data": uncertainty(q.detach()).mean(),
        "uncertainty/ood": ood_u.mean(),
    }
    return in_loss + ood_loss, metrics


def cloning_weights(rewards: Tensor, ends: Tensor, temperature: float) -> Tensor:
    """Weights of the transitions in behaviour cloning, by the return R of their episode. (N,).

    w ~ exp((min(R, R_90) - R_90) / (temperature |R_90|)), of mean 1, where R_90 is the 90% quantile
    of the returns; ends: the last transitions of the episodes, (N,). After Hong et al. 2023 (arXiv
    2306.13085), who draw transitions so, with R_max for R_90 and R_max - R_min for |R_90|. With
    these, a few lucky episodes count most, and those with the hardest starts nothing.
    """
    episode = ends.cumsum(dim=0) - ends.long()  # number of the episode of each transition
    returns = torch.bincount(episode, rewards.double())
    best = returns.quantile(0.9)
    scale = temperature * best.abs().clamp(min=1e-8)
    weights = ((returns.clamp(max=best) - best) / scale).exp()[episode]
    return (weights / weights.mean()).float()


def pbrl_actor_loss(policy, critics, obs, action, weight, bc_coef: float) -> Tensor:
    """- mean over the batch of min_k Q_k(s, pi(s)). (B, obs), (B, act), (B,) -> ().

    With bc_coef > 0 (not in the thesis), the objective of TD3+BC (Fujimoto & Gu 2021, arXiv
    2106.06860) with weights w of `cloning_weights`:
    - mean min_k Q_k / mean |min_k Q_k| + bc_coef * mean w || pi(s) - a ||^2.
    """
    policy_action = policy(obs)
    q = critics(obs, policy_action).min(dim=0).values  # (B,)
    if bc_coef == 0:
        return -q.mean()
    cloning_loss = (weight * (policy_action - action).square().sum(dim=1)).mean()
    return -q.mean() / q.abs().mean().detach() + bc_coef * cloning_loss


@torch.no_grad()
def move_target(target: nn.Module, network: nn.Module, rate: float) -> None:
    """Polyak averaging: target <- (1 - rate) * target + rate * network."""
    for old, new in zip(target.parameters(), network.parameters(), strict=True):
        old.lerp_(new, rate)


def gaussian(output: Tensor, bounds) -> tuple[Tensor, Tensor]:
    """Mean and log std, (B, act) each, of an actor's output (B, 2 act) in [-1, 1].

    bounds: the log std that -1 and 1 stand for.
    """
    mean, unit = output.chunk(2, dim=-1)
    low, high = bounds
    return mean, low + (high - low) * (unit + 1) / 2


def add_code(obs: Tensor, code: Tensor) -> Tensor:
    """States with a task's code appended, (B, obs), (code,) -> (B, obs + code)."""
    return torch.cat([obs, code.expand(len(obs), -1)], dim=1)


def act(actor: Actor, log_std_bounds, code, obs: Tensor) -> Tensor:
    """Actions in training, (B, obs) -> (B, act); of a Gaussian a reparameterised sample."""
    output = actor(add_code(obs, code))
    if log_std_bounds is None:
        return output
    mean, log_std = gaussian(output, log_std_bounds)
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


# ------------------------------------------------------------------------------------- training
def main():
    args, resume_point = parse_args()
    check(args.num_critics > 1, "--num-critics: expected 2 or more, U is their std")
    check(args.bc_temperature > 0, "--bc-temperature: expected more than 0")
    num_tasks = len(args.tasks)
    check(len(set(args.tasks)) == num_tasks > 1, "--tasks: expected two or more distinct tasks")
    check(len(args.level) in (1, num_tasks), "--level: expected one level, or one per task")
    levels = args.level if len(args.level) == num_tasks else args.level * num_tasks
    obs_dim, action_dim = task_sizes(args.tasks[0])  # the files have to agree

    # data and outputs
    names = [f"{task}-{level}" for task, level in zip(args.tasks, levels, strict=True)]
    paths = args.data or [find_file(f"data/{x}.npz") for x in names]
    check(len(paths) == num_tasks, "--data: expected one file per task")
    transitions = []
    data_returns = []
    for i, task in enumerate(args.tasks):
        data = load_dataset(paths[i], task, levels[i], obs_dim, action_dim)
        del data["physics"]  # which only data sharing needs
        tensors = {name: torch.from_numpy(array).to(args.device) for name, array in data.items()}
        transitions.append(tensors)
        ends = transitions[i]["terminals"] | transitions[i].pop("timeouts")
        rewards = transitions[i]["rewards"]
        transitions[i]["cloning_weights"] = cloning_weights(rewards, ends, args.bc_temperature)
        data_returns.append(rewards.sum().item() / ends.sum().item())
        print(f"{paths[i]}: {len(rewards)} transitions, return {data_returns[i]:.1f}")
    all_tasks = "+".join(args.tasks)
    level = "+".join(dict.fromkeys(levels))
    suffix = "naive" if args.actor == "deterministic" else f"naive-{args.actor}"
    output = Path(args.output or f"checkpoints/{all_tasks}-{level}-{suffix}.pt").expanduser()
    check_output(output, args)
    run_dir = make_run_dir(args, output.stem)

    # networks
    seed_text = f"{args.seed} teacher {all_tasks} from {all_tasks}"
    torch.manual_seed(zlib.crc32(seed_text.encode()))
    log_std_bounds = LOG_STD[args.actor]
    out_dim = 2 * action_dim if log_std_bounds else action_dim
    codes = torch.arange(num_tasks, device=args.device).float()[:, None]  # (task, code)
    actor = Actor(obs_dim + 1, out_dim, args.hidden).to(args.device)
    target_actor = deepcopy(actor)
    # a tensor, as beta_ood below, since a CUDA graph reads tensors only
    learning_rate = torch.tensor(args.learning_rate, device=args.device)
    adam = partial(Adam, lr=learning_rate, fused=True, capturable=True)
    actor_optimizer = adam(actor.parameters())
    critics = []
    target_critics = []
    critic_optimizers = []
    policies = []
    target_policies = []
    for i in range(num_tasks):
        critics.append(Critics(args.num_critics, obs_dim, action_dim, args.hidden).to(args.device))
        target_critics.append(deepcopy(critics[i]))
        critic_optimizers.append(adam(critics[i].parameters()))
        policies.append(partial(act, actor, log_std_bounds, codes[i]))
        target_policies.append(partial(act, target_actor, log_std_bounds, codes[i]))

    # resume
    trained = {  # what a resume point holds
        "actor": actor,
        "target_actor": target_actor,
        "actor_optimizer": actor_optimizer,
    }
    for i in range(num_tasks):
        trained[f"critics_{i}"] = critics[i]
        trained[f"target_critics_{i}"] = target_critics[i]
        trained[f"critic_optimizer_{i}"] = critic_optimizers[i]
    start = 0
    rows = {  # of the CSV files
        "returns": [["step", "task", "episode", "return"]],
        "losses": [["step", "metric", "value"]],
    }
    if resume_point:
        for name in ("tasks", "actor"):
            same = resume_point["args"][name] == getattr(args, name)
            check(same, f"--resume: expected the same --{name}")
        start = resume_point["step"]
        rows = resume_point["rows"]
        for name, part in trained.items():
            part.load_state_dict(resume_point[name])
        for optimizer in (actor_optimizer, *critic_optimizers):
            optimizer.param_groups[0]["lr"] = learning_rate
        random_states = resume_point["random_states"]  # of the CPU, then of every GPU
        torch.set_rng_state(random_states[0])
        torch.cuda.set_rng_state_all(random_states[1 : 1 + torch.cuda.device_count()])

    check(start < args.gradient_steps, f"--gradient-steps: expected more than the {start} made")
    writer = SummaryWriter(run_dir, purge_step=start + 1)

    def update_critics(i, index, beta_ood):
        batch = {name: values[index] for name, values in transitions[i].items()}
        loss, metrics = pbrl_critic_loss(
            critics[i], target_critics[i], policies[i], target_policies[i], batch, beta_ood, args
        )
        critic_optimizers[i].zero_grad()
        loss.backward()
        critic_optimizers[i].step()
        return metrics

    def update_actor(i, index):
        obs = transitions[i]["observations"][index]
        action = transitions[i]["actions"][index]
        weight = transitions[i]["cloning_weights"][index]
        loss = pbrl_actor_loss(policies[i], critics[i], obs, action, weight, args.bc_coef)
        actor_optimizer.zero_grad()
        loss.backward(inputs=list(actor.parameters()))  # gradients for the actor only
        actor_optimizer.step()
        return loss.detach()

    def update_targets():
        for i in range(num_tasks):
            move_target(target_critics[i], critics[i], args.tau)
        move_target(target_actor, actor, args.actor_tau)

    critic_updates = [partial(update_critics, i) for i in range(num_tasks)]
    actor_updates = [partial(update_actor, i) for i in range(num_tasks)]
    if args.cuda_graph:
        from tensordict.nn import CudaGraphModule  # here, as it takes seconds to import

        critic_updates = [CudaGraphModule(update) for update in critic_updates]
        actor_updates = [CudaGraphModule(update) for update in actor_updates]
        update_targets = CudaGraphModule(update_targets)
    progress = tqdm(range(start + 1, args.gradient_steps + 1), desc=output.stem, disable=None)
    for step in progress:
        share_left = 1 - (step - 1) / args.gradient_steps
        if share_left < args.anneal:
            learning_rate.fill_(args.learning_rate * share_left / args.anneal)
        beta_ood = max(args.beta_ood * args.beta_ood_decay**step, args.beta_ood_min)
        beta_ood_tensor = torch.full((), beta_ood, device=args.device)
        metrics = {"beta_ood": beta_ood}
        for i, task in enumerate(args.tasks):
            num_transitions = len(transitions[i]["rewards"])
            index = torch.randint(num_transitions, (args.batch_size,), device=args.device)
            task_metrics = critic_updates[i](index, beta_ood_tensor)
            for name, value in task_metrics.items():
                metrics[f"{name}/{task}"] = value
            if step % args.policy_frequency == 0:
                metrics[f"loss/actor/{task}"] = actor_updates[i](index)
        update_targets()
        last = step == args.gradient_steps
        evaluate = last or step % args.eval_every == 0

        # log
        if evaluate or step % 1000 == 0:
            log(writer, rows["losses"], step, metrics)

        # evaluate, save
        if evaluate:
            num_episodes = args.final_eval_episodes if last else args.eval_episodes
            seeds = EVAL_SEEDS[:num_episodes]
            returns = {}
            report = f"step {step}:"
            for i, task in enumerate(args.tasks):
                code = codes[i].tolist()
                episodes = run_episodes(actor, task, seeds, args.threads, code=code)
                returns[task] = log_returns(writer, rows["returns"], step, task, episodes)
                report += f" {task} {np.mean(returns[task]):.1f} +- {np.std(returns[task]):.1f}"
                report += f" (data {data_returns[i]:.1f})"
            progress.write(report)
            progress.set_postfix({task: f"{np.mean(returns[task]):.0f}" for task in args.tasks})
        if last:
            checkpoint = {
                "schema_version": SCHEMA_VERSION,
                "kind": "naive",
                "tasks": list(args.tasks),
                "level": level,
                "args": vars(args),
                "step": step,
                "sizes": {
                    "in_dim": obs_dim + 1,
                    "obs_dim": obs_dim,
                    "action_dim": action_dim,
                    "hidden": args.hidden,
                    "num_critics": args.num_critics,
                    "log_std": log_std_bounds,
                    "layer_norm": False,
                    "task_encoding": "number",
                },
                "returns": returns,
                "actor": actor.state_dict(),
                "critics": [module.state_dict() for module in critics],
                "versions": VERSIONS,
            }
            for i, task in enumerate(args.tasks):
                check_finite(f"{output.name}: critics of {task}", critics[i].state_dict())
            check_output(output, args)  # another run may have written it
            save(output, checkpoint)
        if evaluate:
            for name in rows:
                write_csv(run_dir / f"{name}.csv", rows[name])
            files = {
                "data": tuple(map(os.path.abspath, paths)),
                "output": os.path.abspath(output),
            }
            resume_point = {
                "kind": f"resume point of {Path(__file__).name}",
                "args": vars(replace(args, **files)),
                "step": step,
                "rows": rows,
                "random_states": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            }
            for name, part in trained.items():
                resume_point[name] = part.state_dict()
            save(run_dir / "resume.pt", resume_point)
    writer.close()
    print(f"wrote {output}, and returns.csv and losses.csv in {run_dir}")


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


def find_file(path: str) -> str:
    """The path, else that name in pretrained/, beside this script or in a folder above."""
    candidates = [Path(path)]
    for folder in Path(__file__).resolve().parents:
        candidates.append(folder / "pretrained" / Path(path).name)
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    check(False, f"{path}: not found, nor in pretrained/; docs/README.md says what makes it")


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
def run_episode(pickled: bytes, task: str, seed: int, code=()) -> dict:
    """One whole episode, the policy on the CPU with one state at a time.

    pickled: the policy, (1, obs + code) -> (1, act), of a Gaussian one the mean comes first;
    seed: of the initial state; code: the task id as the policy reads it. Returns the states in
    which it acted, observations (T, obs), and rewards (T,).
    """
    policy = pickle.loads(pickled)
    env = make_env(task)
    action_dim = env.action_spec().shape[0]
    observations = []
    rewards = []
    env.task.random.seed(seed)
    time_step = env.reset()
    while not time_step.last():
        obs = time_step.observation["observations"].astype(np.float32)
        x = torch.cat([torch.from_numpy(obs), torch.tensor(code).float()])
        action = policy(x[None])[0, :action_dim].numpy()
        try:
            time_step = env.step(action)
        except PhysicsError:  # an unstable state: the episode counts as it stands
            break
        observations.append(obs)
        rewards.append(time_step.reward)
    return {"observations": np.array(observations), "rewards": np.array(rewards)}


def load_dataset(path, task: str, level: str, obs_dim: int, action_dim: int) -> dict:
    """The arrays of a dataset .npz as in docs/formats.md, checked."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # np.load would not notice a changed shape
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in DATASET}
            metadata = json.loads(str(file["metadata"]))
        found = (metadata["task"], metadata.get("level", level), metadata["schema_version"])
    except Exception as error:
        check(False, f"{path}: expected a dataset as in docs/formats.md; found {error!r:.300}")
    check(damaged is None, f"{path}: damaged bytes in {damaged}")
    expected = (task, level, SCHEMA_VERSION)
    check(found == expected, f"{path}: expected (task, level, schema) {expected}, found {found}")
    num_rows = len(data["rewards"])
    row_shapes = {
        "observations": (obs_dim,),
        "actions": (action_dim,),
        "next_observations": (obs_dim,),
        "physics": data["physics"].shape[1:],
    }
    for name, dtype in DATASET.items():
        array = data[name]
        shape = (num_rows, *row_shapes.get(name, ()))
        fits = array.shape == shape and array.dtype.kind == np.dtype(dtype).kind
        check(fits, f"{path}: {name}: expected {dtype} {shape}, found {array.dtype} {array.shape}")
        data[name] = np.ascontiguousarray(array, dtype)
        check(np.isfinite(data[name]).all(), f"{path}: {name}: found NaN or infinite values")
    check(num_rows > 0, f"{path}: expected transitions, found none")
    largest = np.abs(data["actions"]).max()
    check(largest <= 1, f"{path}: expected actions in [-1, 1], found {largest} in size")
    data["timeouts"][-1] = not data["terminals"][-1]  # the last row ends an episode, too
    ends = data["terminals"] | data["timeouts"]
    follows = (data["observations"][1:] == data["next_observations"][:-1]).all(axis=1)
    num_breaks = (~follows & ~ends[:-1]).sum()
    check(
        num_breaks == 0,
        f"{path}: next_observations: within an episode expected the next row's observations, "
        f"found others in {num_breaks} rows",
    )
    return data


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
