"""Distillation from states that are drawn by a weight, against a shift between data and teacher.

  python examples/distill_reweighted.py --weights q-ratio --hidden 32 --scale laptop \\
      --data data/walker-stand-medium-teacher-random99.npz \\
             data/walker-walk-medium-teacher-random99.npz

This file is a copy of mop_distill.py, which has the losses. There every state of a dataset is drawn
alike; here state s of task i with probability in proportion to

  none:     1
  value:    V_i(s) = min_k Q_{i,k}^T(s, pi_i^T(s)), the teacher's value
  q-ratio:  V_i(s) / Q_i^B(s, a), B the behaviour that made the data, Q^B learned from the data
  density:  p_i^T(s) / p_i^B(s), by a classifier between the data and the teacher's own episodes

q-ratio is what the thesis proposes (5.3, 8.3) where the density ratio is not known. density needs
states of the teacher's episodes, which nobody has offline: it is the best that weights can do.

Own: behavior_values, density_ratio, state_weights, draw, teacher_share, main, MIN_VALUE,
MAX_RATIO, Args.states, Args.weights, Args.teacher_data, Args.weight_steps, Args.gamma, Critics,
DATASET, load_dataset

Source: van Lith 2024, sections 5.2.4, 5.3, 8.3.

In: as mop_distill.py; for density also data/<teacher>-online.npz, made by mop_td3_collect.py --mix
online.

Out: as mop_distill.py, and weights.csv: where the weights of a composed dataset lie.
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
from torch.utils.checkpoint import checkpoint as recompute
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
}
EVAL_SEEDS = range(2**31, 2**32)  # of the evaluation's episodes; all others' seeds are lower
TAU_STATES = 1000  # states per task and evaluation in which tau is taken
MIN_VALUE = 0.1  # of the behaviour in q-ratio, so that no state takes all the weight
MAX_RATIO = 100.0  # of density, where 1% of the data is the teacher's; more is overconfidence
LAPTOP = {"gradient_steps": 20_000, "learning_rate": 1e-3}  # defaults with --scale laptop


@dataclass
class Args:
    # experiment
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")
    """tasks of the dm_control suite, DOMAIN-TASK; the position is the task id"""
    seed: int = 1
    """seed of the weights and the batches"""
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
    states: Literal["offline", "online"] = "offline"
    """states of data/<task>-<level>.npz, or of the teachers' episodes, data/<teacher>-online.npz"""
    data: tuple[str, ...] = ()
    """dataset files, one per task, instead of those that --states names"""
    teachers: tuple[str, ...] = ()
    """teacher checkpoints, one per task, instead of checkpoints/<task>-<level>-teacher.pt, with
    --loss kl -teacher-gaussian.pt"""

    # algorithm
    loss: Literal["mse", "q", "kl"] = "mse"
    """distillation loss; kl needs Gaussian teachers"""
    regularizer: Literal["none", "ndcg", "pairwise", "listwise"] = "none"
    """ranking loss between the hidden layers under two task ids"""
    reg_lambda: float = 100.0
    """weight of the regularizer"""
    weights: Literal["none", "value", "q-ratio", "density"] = "q-ratio"
    """weights of the states, see above"""
    teacher_data: tuple[str, ...] = ()
    """of density: the teachers' own states, one file per task, not data/<teacher>-online.npz"""
    weight_steps: int = 20_000
    """updates of the behaviour's critic or of the classifier"""
    gamma: float = 0.99
    """discount factor of the behaviour's critic: the teachers' one"""
    task_encoding: Literal["number", "onehot"] = "number"
    """the student reads the task id as one number or as one flag per task"""
    gradient_steps: int = 500_000
    """updates"""
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    batch_size: int = 1024
    """states per task and update"""
    hidden: int = 256
    """width of both hidden layers"""

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
def add_code(obs: Tensor, code: Tensor) -> Tensor:
    """States with a task's code appended, (B, obs), (code,) -> (B, obs + code)."""
    return torch.cat([obs, code.expand(len(obs), -1)], dim=1)


def gaussian(output: Tensor, bounds) -> tuple[Tensor, Tensor]:
    """Mean and log std, (B, act) each, of an actor's output (B, 2 act) in [-1, 1].

    bounds: the log std that -1 and 1 stand for.
    """
    mean, unit = output.chunk(2, dim=-1)
    low, high = bounds
    return mean, low + (high - low) * (unit + 1) / 2


def mse_loss(action: Tensor, teacher_action: Tensor) -> Tensor:
    """|| pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (5.1.3). (B, act) -> (B,)."""
    return (teacher_action - action).square().sum(dim=1)


def q_values(critics: dict, obs: Tensor, action: Tensor) -> Tensor:
    """Q_k(s, a) of a teacher's K critics, (B, obs), (B, act) -> (K, B).

    critics: their weights as in a checkpoint, w1 (K, obs + act, hidden), b1 (K, 1, hidden), w2, ..
    """
    x = torch.cat([obs, action], dim=1)
    values = []
    for k in range(len(critics["w1"])):  # on a CPU faster than batched products
        h = F.relu(torch.addmm(critics["b1"][k], x, critics["w1"][k]))
        h = F.relu(torch.addmm(critics["b2"][k], h, critics["w2"][k]))
        values.append(torch.addmm(critics["b3"][k], h, critics["w3"][k])[:, 0])
    return torch.stack(values)


def q_loss(action: Tensor, obs: Tensor, critics: dict) -> Tensor:
    """- min_k Q_{i,k}^T(s, pi^S(s, i)) (5.1.3). (B, act), (B, obs) -> (B,)."""
    return -q_values(critics, obs, action).min(dim=0).values


def kl_loss(output: Tensor, teacher_output: Tensor, bounds) -> Tensor:
    """KL(student || teacher) of diagonal Gaussians (5.1.3). (B, 2 act) -> (B,).

    The last line of the thesis's derivation has the sign of the log term reversed;
    torch.distributions agrees with this one.
    """
    mean, log_std = gaussian(output, bounds)
    teacher_mean, teacher_log_std = gaussian(teacher_output, bounds)
    log_ratio = 2 * (log_std - teacher_log_std)  # ln(var_S / var_T)
    distance = (teacher_mean - mean).square() * (-2 * teacher_log_std).exp()
    return 0.5 * (log_ratio.exp() + distance - 1 - log_ratio).sum(dim=1)


def hidden_layers(actor: Actor, x: Tensor) -> list[Tensor]:
    """Activations of every hidden layer after its ReLU, (B, hidden) each."""
    activations = []
    for layer in actor.net:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            activations.append(x)
    return activations


def ndcg_loss(x: Tensor, y: Tensor) -> Tensor:
    """- NDCG of the scores y in the order of x (6.3.2). (B, n) -> (B,).

    An order has no gradient, so the gradient flows through y only: the activations under the
    other task.
    """
    rank = torch.arange(1, y.shape[1] + 1, dtype=y.dtype, device=y.device)
    discount = 1 / torch.log2(rank + 1)
    order = x.argsort(dim=1, descending=True, stable=True)
    gain = y.gather(1, order) @ discount
    best_gain = y.sort(dim=1, descending=True).values @ discount
    return -gain / best_gain.clamp(min=1e-8)


def listwise_loss(x: Tensor, y: Tensor) -> Tensor:
    """- sum_i softmax(y)_i log softmax(x)_i (6.3.2). (B, n) -> (B,)."""
    return -(y.softmax(dim=1) * x.log_softmax(dim=1)).sum(dim=1)


def pairwise_loss(x: Tensor, y: Tensor) -> Tensor:
    """sum_ij log(1 + exp(-(x_i - x_j) (y_i - y_j))) (6.3.2). (B, n) -> (B,).

    The (B, n, n) terms exist for 16 rows at a time, and are computed again in the backward pass.
    """

    def some_rows(x, y):
        difference_x = x[:, :, None] - x[:, None, :]
        difference_y = y[:, :, None] - y[:, None, :]
        return F.softplus(-difference_x * difference_y).sum(dim=(1, 2))

    losses = []
    for rows_x, rows_y in zip(x.split(16), y.split(16), strict=True):
        loss = recompute(some_rows, rows_x, rows_y, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss)
    return torch.cat(losses)


RANKING_LOSSES = {"ndcg": ndcg_loss, "pairwise": pairwise_loss, "listwise": listwise_loss}


def ranking_regularizer(ranking_loss, student: Actor, x, other_x) -> Tensor:
    """sum over hidden layers j of L_rank(l_j(s, i), l_j(s, i')) (6.3.2). (B, in_dim) -> (B,).

    x: states under their own task id; other_x: the same states under another one.
    """
    layers = hidden_layers(student, x)
    other_layers = hidden_layers(student, other_x)
    loss = 0
    for own, other in zip(layers, other_layers, strict=True):
        loss = loss + ranking_loss(own, other)
    return loss


def pair_signs(x: Tensor) -> Tensor:
    """sign(x_i - x_j) of every pair of a row's values, (B, n) -> (B, n, n) int8."""
    left = x[:, :, None]
    right = x[:, None, :]
    return (left > right).char() - (left < right).char()


@torch.no_grad()
def kendall_tau(x: Tensor, y: Tensor) -> Tensor:
    """Kendall's tau-a between rows of x and y (6.2.1). (B, n) -> (B,) float64.

    Pairs (i, j) that x and y order alike, less those that they order differently, over all pairs;
    a tie counts 0.
    """
    taus = []
    num_pairs = x.shape[1] * (x.shape[1] - 1)  # every pair counts twice
    for rows_x, rows_y in zip(x.split(64), y.split(64), strict=True):  # (64, n, n) fit in memory
        agreement = pair_signs(rows_x) * pair_signs(rows_y)
        taus.append(agreement.sum(dim=(1, 2)).double() / num_pairs)
    return torch.cat(taus)


@torch.no_grad()
def layer_taus(student: Actor, obs: Tensor, code, other_code) -> list[Tensor]:
    """Per hidden layer, tau between its activations under two task codes. (B, obs) -> (B,)."""
    layers = hidden_layers(student, add_code(obs, code))
    other_layers = hidden_layers(student, add_code(obs, other_code))
    return [kendall_tau(own, other) for own, other in zip(layers, other_layers, strict=True)]


# -------------------------------------------------------------------------------------- weights
def behavior_values(data: dict, args) -> Tensor:
    """Q^B(s, a) of the data's own actions, (N,), learned by temporal differences.

    The target of a row is r + gamma Q(s', a') with the next row's action a'. The last row of an
    episode that ends by a timeout has no a', so nothing is learned from it.
    """
    obs = torch.from_numpy(data["observations"]).to(args.device)
    action = torch.from_numpy(data["actions"]).to(args.device)
    reward = torch.from_numpy(data["rewards"]).to(args.device)
    goes_on = torch.from_numpy(~data["terminals"]).to(args.device)
    rows = torch.from_numpy(np.flatnonzero(~data["timeouts"])).to(args.device)
    critic = Critics(1, obs.shape[1], action.shape[1], 256).to(args.device)
    target_critic = deepcopy(critic)
    optimizer = Adam(critic.parameters(), lr=3e-4, fused=True)
    for _ in tqdm(range(args.weight_steps), desc="Q of the behaviour", leave=False, disable=None):
        row = rows[torch.randint(len(rows), (256,), device=args.device)]
        next_row = (row + 1).clamp(max=len(obs) - 1)  # after the last one if that is terminal
        with torch.no_grad():
            next_q = target_critic(obs[next_row], action[next_row])[0]
            target = reward[row] + args.gamma * goes_on[row] * next_q
        loss = (critic(obs[row], action[row])[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(target_critic.parameters(), critic.parameters(), strict=True):
                old.lerp_(new, 0.005)
    values = []
    with torch.no_grad():
        for part_obs, part_action in zip(obs.split(65_536), action.split(65_536), strict=True):
            values.append(critic(part_obs, part_action)[0])
    return torch.cat(values)


def density_ratio(obs: Tensor, teacher_obs: Tensor, args) -> Tensor:
    """p^T(s) / p^B(s) of every state in the data, (N, obs), (M, obs) -> (N,).

    A classifier that tells the teacher's states from the data's with the logistic loss, both
    drawn equally often, has the logarithm of this ratio as its logit (Sugiyama et al. 2012).
    """
    mean = obs.mean(dim=0)
    std = obs.std(dim=0).clamp(min=1e-6)
    classifier = nn.Sequential(
        nn.Linear(obs.shape[1], 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, 1),
    ).to(obs.device)
    optimizer = Adam(classifier.parameters(), lr=1e-3, fused=True)
    for _ in tqdm(range(args.weight_steps), desc="classifier", leave=False, disable=None):
        index = torch.randint(len(obs), (512,), device=obs.device)
        teacher_index = torch.randint(len(teacher_obs), (512,), device=obs.device)
        logit = classifier((obs[index] - mean) / std)
        teacher_logit = classifier((teacher_obs[teacher_index] - mean) / std)
        loss = F.softplus(logit).mean() + F.softplus(-teacher_logit).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = []
    with torch.no_grad():
        for part in obs.split(65_536):
            logits.append(classifier((part - mean) / std)[:, 0])
    return torch.cat(logits).exp().clamp(max=MAX_RATIO)


def state_weights(data: dict, teacher: dict, teacher_obs, args) -> Tensor:
    """Weights of the data's states, (N,), of mean 1. teacher_obs: (M, obs), for density only."""
    obs = torch.from_numpy(data["observations"]).to(args.device)
    if args.weights == "none":
        weights = torch.ones(len(obs), device=args.device)
    elif args.weights == "density":
        weights = density_ratio(obs, torch.from_numpy(teacher_obs).to(args.device), args)
    else:
        actor = load_actor(teacher).to(args.device)
        critics = {name: weight.to(args.device) for name, weight in teacher["critics"].items()}
        action_dim = data["actions"].shape[1]  # a Gaussian actor's means come first
        values = []
        with torch.no_grad():
            for part in obs.split(65_536):
                action = actor(part)[:, :action_dim]
                values.append(q_values(critics, part, action).min(dim=0).values)
        weights = torch.cat(values).clamp(min=0)
        if args.weights == "q-ratio":
            weights = weights / behavior_values(data, args).clamp(min=MIN_VALUE)
    check(weights.mean() > 0, f"--weights {args.weights}: every state has weight 0")
    return weights / weights.mean()


def draw(cumulative_weights: Tensor, size: int) -> Tensor:
    """Indices drawn in proportion to the weights, whose running sum is given, (N,) -> (size,)."""
    place = torch.rand(size, device=cumulative_weights.device, dtype=torch.float64)
    index = torch.searchsorted(cumulative_weights, place * cumulative_weights[-1], right=True)
    return index.clamp(max=len(cumulative_weights) - 1)


def teacher_share(data: dict, weights: Tensor, teacher_path) -> tuple[float, float]:
    """Share of the rows and of the weight in the teacher's own episodes of a composed dataset.

    They are the first ones, `policy_episodes` many. NaN where the dataset has none.
    """
    metadata = data["metadata"]
    if metadata.get("policy") != Path(teacher_path).name:
        return math.nan, math.nan
    num_rows = np.flatnonzero(data["timeouts"])[metadata["policy_episodes"] - 1] + 1
    return num_rows / len(weights), (weights[:num_rows].sum() / weights.sum()).item()


# ------------------------------------------------------------------------------------- training
def main():
    args, resume_point = parse_args()
    torch.set_flush_denormal(args.regularizer == "pairwise")  # denormal gradients are slow
    num_tasks = len(args.tasks)
    check(len(set(args.tasks)) == num_tasks > 0, "--tasks: expected distinct tasks")
    check(num_tasks > 1 or args.regularizer == "none", "--regularizer: expected two tasks or more")
    check(len(args.level) in (1, num_tasks), "--level: expected one level, or one per task")
    levels = args.level if len(args.level) == num_tasks else args.level * num_tasks
    obs_dim, action_dim = task_sizes(args.tasks[0])  # the files have to agree

    # files
    names = [f"{task}-{level}" for task, level in zip(args.tasks, levels, strict=True)]
    kind = "teacher-gaussian" if args.loss == "kl" else "teacher"
    teacher_paths = args.teachers or [find_file(f"checkpoints/{x}-{kind}.pt") for x in names]
    check(len(teacher_paths) == num_tasks, "--teachers: expected one file per task")
    if args.states == "online":
        names = [f"{Path(path).stem}-online" for path in teacher_paths]
    data_paths = args.data or [find_file(f"data/{x}.npz") for x in names]
    check(len(data_paths) == num_tasks, "--data: expected one file per task")

    if args.weights == "density" and not args.teacher_data:
        online = [f"data/{Path(path).stem}-online.npz" for path in teacher_paths]
        args.teacher_data = tuple(find_file(path) for path in online)
    args.teacher_data = tuple(map(os.path.abspath, args.teacher_data))  # as in a resume point
    fits = len(args.teacher_data) in (0, num_tasks)
    check(fits, "--teacher-data: expected one file per task")

    # states, their weights, and what the frozen teachers say about them
    torch.manual_seed(zlib.crc32(f"{args.seed} weights".encode()))
    states = []
    cumulative_weights = []
    weight_rows = [["task", "states", "teacher_share", "teacher_weight", "effective_share"]]
    labels = []
    critics = []
    log_std_bounds = []
    teacher_returns = []
    for i, task in enumerate(args.tasks):
        data = load_dataset(data_paths[i], task, levels[i], obs_dim, action_dim)
        teacher = load_teacher(teacher_paths[i], task, obs_dim, action_dim)
        actor = load_actor(teacher).to(args.device)
        states.append(torch.from_numpy(data["observations"]).to(args.device))
        with torch.no_grad():
            labels.append(torch.cat([actor(part) for part in states[i].split(65_536)]))
        if args.loss == "q" or args.weights in ("value", "q-ratio"):
            text = f"--loss {args.loss} --weights {args.weights} needs"
            check("critics" in teacher, f"{teacher_paths[i]}: has no critics, as {text}")
        if args.loss == "q":
            weights = teacher["critics"]
            critics.append({name: weight.to(args.device) for name, weight in weights.items()})
        log_std_bounds.append(teacher["sizes"]["log_std"])  # None of a deterministic teacher
        mean = np.mean(teacher["returns"][task])
        teacher_returns.append(mean)
        print(f"task {i}: {task}, {len(states[i])} states of {data_paths[i]},")
        print(f"  teacher {teacher_paths[i]}, {teacher['level']}, return {mean:.1f}")
        teacher_obs = None
        if args.weights == "density":
            teacher_data = load_dataset(
                args.teacher_data[i], task, teacher["level"], obs_dim, action_dim
            )
            teacher_obs = teacher_data["observations"]
        weights = state_weights(data, teacher, teacher_obs, args).double()
        cumulative_weights.append(weights.cumsum(dim=0))
        effective_share = (weights.mean().square() / weights.square().mean()).item()
        print(f"  weights {args.weights}: effective share of the states {effective_share:.3f}")
        share_of_rows, share_of_weight = teacher_share(data, weights, teacher_paths[i])
        print(f"  of the teacher's own episodes: {share_of_rows:.1%} of the states, ", end="")
        print(f"{share_of_weight:.1%} of the weight")
        weight_rows.append([task, len(weights), share_of_rows, share_of_weight, effective_share])
    if args.loss == "kl":
        alike = log_std_bounds.count(log_std_bounds[0]) == num_tasks
        check(alike and log_std_bounds[0], "--loss kl: expected Gaussian teachers of one kind")

    # student
    torch.manual_seed(zlib.crc32(f"{args.seed} student".encode()))
    if args.task_encoding == "onehot":
        codes = torch.eye(num_tasks, device=args.device)  # (task, code)
    else:
        codes = torch.arange(num_tasks, device=args.device).float()[:, None]
    in_dim = obs_dim + codes.shape[1]
    out_dim = 2 * action_dim if args.loss == "kl" else action_dim
    student = Actor(in_dim, out_dim, args.hidden).to(args.device)
    optimizer = Adam(student.parameters(), lr=args.learning_rate, fused=True, capturable=True)

    # run folder, resume
    run_dir = make_run_dir(args, f"{args.weights}-{args.loss}-{args.hidden}-{levels[0]}")
    start = 0
    rows = {  # of the CSV files
        "returns": [["step", "task", "episode", "return"]],
        "losses": [["step", "metric", "value"]],
        "tau": [["step", "task", "other_task", "layer", "tau_a_mean", "tau_a_std"]],
    }
    if resume_point:
        for name in ("states", "weights", "teacher_data", "weight_steps", "gamma"):
            same = resume_point["args"][name] == getattr(args, name)
            check(same, f"--resume: expected the same --{name.replace('_', '-')}")
        start = resume_point["step"]
        rows = resume_point["rows"]
        student.load_state_dict(resume_point["student"])
        optimizer.load_state_dict(resume_point["optimizer"])
        optimizer.param_groups[0]["lr"] = args.learning_rate
        random_states = resume_point["random_states"]  # of the CPU, then of every GPU
        torch.set_rng_state(random_states[0])
        torch.cuda.set_rng_state_all(random_states[1 : 1 + torch.cuda.device_count()])

    check(start < args.gradient_steps, f"--gradient-steps: expected more than the {start} made")
    write_csv(run_dir / "weights.csv", weight_rows)
    writer = SummaryWriter(run_dir, purge_step=start + 1)

    def update() -> dict:
        """One gradient step on a batch of every task -> metrics."""
        metrics = {}
        total_loss = 0
        for i, task in enumerate(args.tasks):
            index = draw(cumulative_weights[i], args.batch_size)
            obs = states[i][index]
            label = labels[i][index]
            x = add_code(obs, codes[i])
            if args.loss == "mse":
                mean_action = label[:, :action_dim]  # of a Gaussian teacher, else all
                loss = mse_loss(student(x), mean_action).mean()
            elif args.loss == "q":
                loss = q_loss(student(x), obs, critics[i]).mean()
            elif args.loss == "kl":
                loss = kl_loss(student(x), label, log_std_bounds[0]).mean()
            metrics[f"loss/{args.loss}/{task}"] = loss.detach()
            if args.regularizer != "none":
                ranking_loss = RANKING_LOSSES[args.regularizer]
                for j, other_task in enumerate(args.tasks):
                    if j == i:
                        continue
                    other_x = add_code(obs, codes[j])
                    rank_loss = ranking_regularizer(ranking_loss, student, x, other_x).mean()
                    metrics[f"loss/{args.regularizer}/{task}/{other_task}"] = rank_loss.detach()
                    loss = loss + args.reg_lambda * rank_loss / (num_tasks - 1)
            total_loss = total_loss + loss / num_tasks
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
        metrics["loss/total"] = total_loss.detach()
        return metrics

    if args.cuda_graph:
        from tensordict.nn import CudaGraphModule  # here, as it takes seconds to import

        update = CudaGraphModule(update)
    progress = tqdm(range(start + 1, args.gradient_steps + 1), desc="student", disable=None)
    for step in progress:
        metrics = update()
        last = step == args.gradient_steps
        evaluate = last or step % args.eval_every == 0

        # log
        if evaluate or step % 1000 == 0:
            log(writer, rows["losses"], step, metrics)

        # evaluate
        if evaluate:
            num_episodes = args.final_eval_episodes if last else args.eval_episodes
            returns = {}
            report = f"step {step}:"
            for i, task in enumerate(args.tasks):
                seeds = EVAL_SEEDS[:num_episodes]
                code = codes[i].tolist()
                episodes = run_episodes(student, task, seeds, args.threads, code=code)
                returns[task] = log_returns(writer, rows["returns"], step, task, episodes)
                report += f" {task} {np.mean(returns[task]):.1f} +- {np.std(returns[task]):.1f}"
                report += f" (teacher {teacher_returns[i]:.1f})"
                visited = np.concatenate([episode["observations"] for episode in episodes])
                order = np.random.default_rng(step).permutation(len(visited))
                obs = torch.from_numpy(visited[order[:TAU_STATES]]).to(args.device)
                for j, other_task in enumerate(args.tasks):
                    if j == i:
                        continue
                    taus = layer_taus(student, obs, codes[i], codes[j])
                    report += f", tau with {other_task}"
                    for layer, tau in enumerate(taus, start=1):
                        mean = tau.mean().item()
                        rows["tau"].append([step, task, other_task, layer, mean, tau.std().item()])
                        writer.add_scalar(f"tau/{task}/{other_task}/{layer}", mean, step)
                        report += f" {mean:.2f}"
            progress.write(report)
            progress.set_postfix({task: f"{np.mean(returns[task]):.0f}" for task in args.tasks})

        # save
        if last:
            checkpoint = {
                "schema_version": SCHEMA_VERSION,
                "kind": "student",
                "tasks": list(args.tasks),
                "level": list(levels),
                "args": vars(args),
                "step": step,
                "sizes": {
                    "in_dim": in_dim,
                    "obs_dim": obs_dim,
                    "action_dim": action_dim,
                    "hidden": args.hidden,
                    "log_std": log_std_bounds[0] if args.loss == "kl" else None,
                    "layer_norm": False,
                    "task_encoding": args.task_encoding,
                },
                "returns": returns,
                "actor": student.state_dict(),
                "versions": VERSIONS,
            }
            save(run_dir / "student.pt", checkpoint)
        if evaluate:
            for name in rows:
                write_csv(run_dir / f"{name}.csv", rows[name])
            files = {
                "data": tuple(map(os.path.abspath, data_paths)),
                "teachers": tuple(map(os.path.abspath, teacher_paths)),
            }
            resume_point = {
                "kind": f"resume point of {Path(__file__).name}",
                "args": vars(replace(args, **files)),
                "step": step,
                "rows": rows,
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random_states": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            }
            save(run_dir / "resume.pt", resume_point)
    writer.close()
    print(f"wrote student.pt, returns.csv, losses.csv and tau.csv in {run_dir}")


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
    """The arrays of a dataset .npz and its metadata, as in docs/formats.md, all checked."""
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
    data["metadata"] = metadata
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


def load_teacher(path, task: str, obs_dim: int, action_dim: int) -> dict:
    """A teacher's checkpoint, as in docs/formats.md, of the task and its sizes."""
    teacher = read_pt(path, "teacher")
    found = (teacher["tasks"], teacher["sizes"]["in_dim"], teacher["sizes"]["action_dim"])
    expected = ([task], obs_dim, action_dim)
    check(found == expected, f"{path}: expected (task, obs, actions) {expected}, found {found}")
    return teacher


def load_actor(checkpoint: dict) -> Actor:
    """The frozen policy of a checkpoint."""
    sizes = checkpoint["sizes"]
    out_dim = sizes["action_dim"] * (2 if sizes["log_std"] else 1)
    actor = Actor(sizes["in_dim"], out_dim, sizes["hidden"])
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


def check(condition, message: str) -> None:
    """Stop with one line on standard error and exit code 1 unless the condition holds."""
    if not condition:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}")


if __name__ == "__main__":
    main()
