"""Measure students, policies and datasets: stage 4 of MOP.

  python mop_measure.py --student runs/<name>/student.pt

Of a student pi^S(s, i) in every task i: returns, and how much computation its tasks share. D_i are
the states that it visits in task i under task id i; l_j(s, i) are the activations of hidden layer j
after its ReLU. For every layer and every pair of task ids i, i':

  per-state tau:  tau( l_j(s, i), l_j(s, i') ), mean and std over a sample of states of all tasks
  average tau:    tau( mean of l_j(s, i) over D_i, mean of l_j(s, i') over D_i' )
  CKA:            linear, debiased, of l_j(., i) and l_j(., i') on the same sample

With C concordant and D discordant pairs of n neurons tau-a is 2 (C - D) / (n (n - 1)); tau-b leaves
tied pairs out of the denominator.

--teachers: every policy under the reward of every task, the cross-task table.

--shift A B: how far the states of two datasets lie apart. A classifier's logit on episodes held out
is f(s) ~ ln p_A(s) / p_B(s); JS(A, B) is 1 minus its cross-entropy in bits, KL(A||B) the mean of f
over A, KL(B||A) minus the mean of f over B.

Source: van Lith 2024, sections 5.2.2 (shift), 6.2 (tau), 6.4.5 (cross-task table); CKA is
Kornblith et al. 2019 (arXiv 1905.00414).

In: checkpoints, datasets; any or all of them.

Out: in the run's folder under runs/ measure.json with everything; of a student also activations.png
and activations_sorted.png (Fig. 6.3).
"""

import json
import math
import os
import pickle
import signal
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
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
EVAL_SEEDS = range(2**31, 2**32)  # of the evaluation's episodes; all others' seeds are lower
SHIFT_STEPS = 4_000  # of the classifier of the shift
SPLIT = {  # shares of the episodes to train, stop and test the classifier of the shift on
    "train": (0.0, 0.6),
    "validation": (0.6, 0.8),
    "test": (0.8, 1.0),
}


@dataclass
class Args:
    # experiment
    student: str | None = None
    """checkpoint of a student, or of another policy that reads a task id, measured in its tasks"""
    episodes: int = 1000
    """episodes of the student per task, always from the same initial states"""
    teachers: tuple[str, ...] = ()
    """checkpoints of teachers and behaviours, the rows of the cross-task table"""
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")
    """columns of the cross-task table, DOMAIN-TASK of the dm_control suite"""
    cross_episodes: int = 100
    """episodes per policy and task of the cross-task table"""
    shift: tuple[str, str] | None = None
    """two dataset files, A and B, of whose states the divergence is estimated"""
    seed: int = 1
    """seed of the samples of states, of the split into episodes, and of the classifier"""
    run_dir: str | None = None
    """folder of the results; default: runs/<script, time>"""
    overwrite: bool = False
    """replace files of an earlier run"""

    # algorithm
    num_states: int = 100_000
    """states in which tau and CKA are taken, and states per dataset of the shift, at most"""

    # system
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """of the networks; episodes run on the CPU"""
    threads: int = torch.get_num_threads()
    """CPU threads, and processes that run episodes"""


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


def add_code(obs: Tensor, code: Tensor) -> Tensor:
    """States with a task's code appended, (B, obs), (code,) -> (B, obs + code)."""
    return torch.cat([obs, code.expand(len(obs), -1)], dim=1)


def hidden_layers(actor: Actor, x: Tensor) -> list[Tensor]:
    """Activations of every hidden layer after its ReLU, (B, hidden) each."""
    activations = []
    for layer in actor.net:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            activations.append(x)
    return activations


# --------------------------------------------------------------------------- shared computation
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


def kendall_taus(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Kendall's tau-a and tau-b between rows of x and y. (B, n) -> (B,), (B,) float64.

    tau-b divides by the pairs that are not tied instead of all pairs (by the geometric mean of
    those of x and those of y); it is NaN for a row whose values are all equal.
    """
    tau_a = kendall_tau(x, y)
    untied_x = kendall_tau(x, x)  # the share of pairs that are not tied
    untied_y = kendall_tau(y, y)
    return tau_a, tau_a / (untied_x * untied_y).sqrt()


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """n (n - 3) times the unbiased HSIC (Song et al. 2012) of centred (n, p) and (n, q) -> ().

    With K = x x' and L = y y', both with 0 on the diagonal, it is

      tr(K L) + 1'K1 1'L1 / ((n - 1) (n - 2)) - 2 / (n - 2) 1'K L 1

    As centred columns sum to 0, K1 = - k with k_i = |x_i|^2, and no (n, n) matrix is needed.
    """
    n = len(x)
    squares_x = x.square().sum(dim=1)
    squares_y = y.square().sum(dim=1)
    products = (x.T @ y).square().sum() - n / (n - 2) * squares_x @ squares_y
    return products + squares_x.sum() * squares_y.sum() / ((n - 1) * (n - 2))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of features of n states, (n, p), (n, q), n > 3 (arXiv 1905.00414)."""
    x = x.double() - x.mean(dim=0, dtype=torch.float64)
    y = y.double() - y.mean(dim=0, dtype=torch.float64)
    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


def mean_activations(student: Actor, obs: Tensor, code: Tensor) -> Tensor:
    """Mean of every neuron over states, (N, obs) -> (2 layers, hidden) float64."""
    total = 0
    for part in obs.split(16_384):
        layers = torch.stack(hidden_layers(student, add_code(part, code)))
        total = total + layers.sum(dim=1, dtype=torch.float64)
    return total / len(obs)


def describe(taus: Tensor) -> dict:
    """Mean and std over the states where tau is defined, and how many are left out (NaN)."""
    defined = taus[~taus.isnan()]
    return {
        "mean": defined.mean().item(),
        "std": defined.std().item(),
        "undefined": len(taus) - len(defined),
    }


def per_state_taus(student: Actor, obs: Tensor, code, other_code):
    """tau-a and tau-b of every hidden layer under two task codes, (N, obs) -> (layers, N) each."""
    taus_a = []
    taus_b = []
    for part in tqdm(obs.split(1024), desc="tau", disable=None, leave=False):
        layers = torch.cat(hidden_layers(student, add_code(part, code)))  # (layers * B, hidden)
        other_layers = torch.cat(hidden_layers(student, add_code(part, other_code)))
        tau_a, tau_b = kendall_taus(layers, other_layers)
        taus_a.append(tau_a.view(-1, len(part)).cpu())
        taus_b.append(tau_b.view(-1, len(part)).cpu())
    return torch.cat(taus_a, dim=1), torch.cat(taus_b, dim=1)


def shared_computation(student: Actor, codes: Tensor, visited: dict, args) -> dict:
    """What the student computes for each task, and how alike under two task ids.

    codes: (task, code); visited: the states of each task, (N, obs). Returns parts of the report.
    """
    tasks = list(visited)
    means = []
    for i, task in enumerate(tasks):
        means.append(mean_activations(student, visited[task], codes[i]))

    # a sample of the states of all tasks
    states = torch.cat(list(visited.values()))
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(states)))
    obs = states[order[: args.num_states]]

    rows = []
    for i, j in combinations(range(len(tasks)), 2):
        taus_a, taus_b = per_state_taus(student, obs, codes[i], codes[j])
        averages_a, averages_b = kendall_taus(means[i], means[j])
        features = hidden_layers(student, add_code(obs, codes[i]))
        other_features = hidden_layers(student, add_code(obs, codes[j]))
        for layer in range(len(features)):
            row = {
                "ids": [i, j],
                "layer": layer + 1,
                "per_state": {
                    "tau_a": describe(taus_a[layer]),
                    "tau_b": describe(taus_b[layer]),
                },
                "average": {
                    "tau_a": averages_a[layer].item(),
                    "tau_b": averages_b[layer].item(),
                },
                "cka": linear_cka(features[layer], other_features[layer]),
            }
            rows.append(row)
    return {
        "mean_activations": {task: means[i].tolist() for i, task in enumerate(tasks)},
        "num_states": len(obs),
        "shared_computation": rows,
    }


# ---------------------------------------------------------------------------------------- shift
def split_episodes(ends: np.ndarray, max_states: int, rng) -> tuple[np.ndarray, dict]:
    """The episode of every row, (N,), and which rows to train, to validate and to test on.

    ends: whether a row is the last one of its episode, (N,).

    Whole episodes at random: neighbouring rows are nearly equal, so after a split by rows the
    classifier would know test rows by their neighbours. Of fewer than ten episodes ten blocks of
    rows take the place. The rows are a sample of at most max_states.
    """
    episode = np.cumsum(ends) - ends
    if episode[-1] < 9:
        episode = np.arange(len(ends)) * 10 // len(ends)
    num_episodes = episode[-1] + 1
    place = rng.permutation(num_episodes)[episode] / num_episodes  # of each row's episode, [0, 1)
    rows = {}
    for use, (low, high) in SPLIT.items():
        candidates = np.flatnonzero((low <= place) & (place < high))
        size = min(len(candidates), round(max_states * (high - low)))
        rows[use] = np.sort(rng.choice(candidates, size, replace=False))
    return episode, rows


def logistic_loss(net: nn.Module, obs_a: Tensor, obs_b: Tensor) -> Tensor:
    """Mean cross-entropy on states of A, plus that on states of B. (n, d), (n, d) -> ()."""
    return F.softplus(-net(obs_a)).mean() + F.softplus(net(obs_b)).mean()


def train_classifier(train: list, validation: list, seed: int) -> nn.Module:
    """A network of the logit ln p_A(s) / p_B(s), (n, d) -> (n, 1).

    train, validation: [states of A, states of B], (n, d) each. The learning rate falls linearly to
    0; the weights with the lowest validation loss, taken every 200 steps, are kept.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(train[0].shape[1], 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, 1),
    ).to(train[0].device)
    optimizer = Adam(net.parameters(), lr=1e-3, fused=True)
    best_loss = math.inf
    best_weights = None
    for step in tqdm(range(1, SHIFT_STEPS + 1), desc="classifier", disable=None, leave=False):
        batch = []
        for obs in train:
            batch.append(obs[torch.randint(len(obs), (256,), device=obs.device)])
        loss = logistic_loss(net, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / SHIFT_STEPS)
        if step % 200 == 0:
            with torch.no_grad():
                validation_loss = logistic_loss(net, *validation).item()
            if validation_loss < best_loss:
                best_loss = validation_loss
                best_weights = deepcopy(net.state_dict())
    net.load_state_dict(best_weights)
    return net


def clustered(values: np.ndarray, episode: np.ndarray) -> dict:
    """Mean of values (N,) and its standard error, with whole episodes as the independent draws."""
    _, episode = np.unique(episode, return_inverse=True)  # numbered without gaps
    num_episodes = episode.max() + 1
    deviations = np.bincount(episode, values - values.mean())  # the sum of each episode's
    correction = num_episodes / (num_episodes - 1) if num_episodes > 1 else np.nan
    error = np.sqrt(correction * np.square(deviations).sum()) / len(values)
    return {"value": float(values.mean()), "error": float(error)}


def divergences(logit_a, logit_b, episode_a, episode_b) -> dict:
    """Estimates from the logits f ~ ln p_A / p_B of held-out states of A and B and their episodes.

    js_bits, before it is clipped to [0, 1], is on average at most the true JS. kl_ab and kl_ba,
    in nats, are no bounds, and n states cannot confirm a KL above kl_limit = ln n (McAllester &
    Stratos 2020): one above it says "large", no more. All arrays (n_A,) or (n_B,).
    """
    js_a = clustered(1 - np.logaddexp(0, -logit_a) / np.log(2), episode_a)
    js_b = clustered(1 - np.logaddexp(0, logit_b) / np.log(2), episode_b)
    js = {
        "value": min(max((js_a["value"] + js_b["value"]) / 2, 0.0), 1.0),
        "error": math.hypot(js_a["error"], js_b["error"]) / 2,
    }
    return {
        "js_bits": js,
        "kl_ab": clustered(logit_a, episode_a),
        "kl_ba": clustered(-logit_b, episode_b),
        "kl_limit": math.log(min(len(logit_a), len(logit_b))),
        "accuracy": float((logit_a > 0).mean() + (logit_b < 0).mean()) / 2,
    }


def state_shift(data: list, max_states: int, seed: int, device) -> dict:
    """Divergence of the states of two datasets, data: (observations (N, d), ends (N,)) each.

    The classifier is trained, stopped and tested on states of different episodes.
    """
    rng = np.random.default_rng(seed)
    train = []
    validation = []
    test = []
    test_episodes = []
    for obs, ends in data:
        episode, rows = split_episodes(ends, max_states, rng)
        train.append(torch.from_numpy(obs[rows["train"]]).to(device))
        validation.append(torch.from_numpy(obs[rows["validation"]]).to(device))
        test.append(torch.from_numpy(obs[rows["test"]]).to(device))
        test_episodes.append(episode[rows["test"]])
    mean = torch.cat(train).mean(dim=0)
    std = torch.cat(train).std(dim=0)
    std[std < 1e-6] = 1.0  # a constant column
    train = [(part - mean) / std for part in train]
    validation = [(part - mean) / std for part in validation]
    net = train_classifier(train, validation, seed)
    logits = []
    with torch.no_grad():
        for part in test:
            logits.append(net((part - mean) / std)[:, 0].double().cpu().numpy())
    counts = {
        "train_states": [len(part) for part in train],
        "test_states": [len(part) for part in test],
        "test_episodes": [len(np.unique(episode)) for episode in test_episodes],
    }
    return divergences(*logits, *test_episodes) | counts


# ------------------------------------------------------------------------------------ measuring
def main():
    args = parse_args()
    check(
        args.student or args.teachers or args.shift,
        "nothing to measure: pass --student, --teachers or --shift",
    )

    check(args.seed >= 0, "--seed: expected 0 or more")
    check(args.num_states > 3, "--num-states: expected 4 or more, as CKA needs")

    # files
    if args.student:
        checkpoint = read_pt(args.student, "student", "naive")
        student_tasks = checkpoint["tasks"]
        num_tasks = len(student_tasks)
        if checkpoint["sizes"]["task_encoding"] == "onehot":
            codes = torch.eye(num_tasks, device=args.device)  # (task, code)
        else:
            codes = torch.arange(num_tasks, device=args.device).float()[:, None]
        check_sizes(args.student, checkpoint, student_tasks, codes.shape[1])
        student = load_actor(checkpoint).to(args.device)
    teachers = []
    for path in args.teachers:
        teacher = read_pt(path, "teacher", "behavior")
        check_sizes(path, teacher, args.tasks, 0)
        teachers.append(teacher)
    shift_data = []
    for path in args.shift or ():
        shift_data.append(load_states(path))
    if args.shift:
        widths = [obs.shape[1] for obs, _ in shift_data]
        check(widths[0] == widths[1], f"--shift: expected states of one size, found {widths}")
    run_dir = make_run_dir(args)
    report = {"args": vars(args), "versions": VERSIONS}

    # the student in each task, under its own id
    if args.student:
        visited = {}
        report["student"] = {
            "checkpoint": Path(args.student).name,
            "kind": checkpoint["kind"],
            "tasks": student_tasks,
            "step": checkpoint["step"],
            "sizes": checkpoint["sizes"],
        }
        report["returns"] = {}
        report["states"] = {}
        for i, task in enumerate(student_tasks):
            seeds = EVAL_SEEDS[: args.episodes]
            episodes = run_episodes(student, task, seeds, args.threads, code=codes[i].tolist())
            states = np.concatenate([episode["observations"] for episode in episodes])
            visited[task] = torch.from_numpy(states).to(args.device)
            report["returns"][task] = return_statistics(episodes)
            report["states"][task] = len(states)
            print(f"{task}: return {text_of(report['returns'][task])}, {len(episodes)} episodes")
        report |= shared_computation(student, codes, visited, args)
        for row in report["shared_computation"]:
            per_state = row["per_state"]
            average = row["average"]
            print(
                f"layer {row['layer']}, ids {row['ids'][0]}, {row['ids'][1]}:"
                f" per-state tau-a {per_state['tau_a']['mean']:.3f}"
                f" +- {per_state['tau_a']['std']:.3f},"
                f" tau-b {per_state['tau_b']['mean']:.3f} +- {per_state['tau_b']['std']:.3f};"
                f" average tau-a {average['tau_a']:.3f}, tau-b {average['tau_b']:.3f};"
                f" CKA {row['cka']:.3f}"
            )
        plot_activations(run_dir / "activations.png", report, sort=False)
        plot_activations(run_dir / "activations_sorted.png", report, sort=True)
        print(f"wrote activations.png and activations_sorted.png in {run_dir}")

    # every policy under the reward of every task
    if teachers:
        report["cross_task"] = []
        for path, teacher in zip(args.teachers, teachers, strict=True):
            row = {
                "checkpoint": Path(path).name,
                "kind": teacher["kind"],
                "task": teacher["tasks"][0],
                "returns": {},
            }
            actor = load_actor(teacher)
            line = f"{row['checkpoint']} ({row['task']}):"
            for task in args.tasks:
                seeds = EVAL_SEEDS[: args.cross_episodes]
                episodes = run_episodes(actor, task, seeds, args.threads)
                row["returns"][task] = return_statistics(episodes)
                line += f" {task} {text_of(row['returns'][task])}"
            report["cross_task"].append(row)
            print(line)

    # how far two datasets lie apart
    if args.shift:
        shift = state_shift(shift_data, args.num_states, args.seed, args.device)
        names = {"a": Path(args.shift[0]).name, "b": Path(args.shift[1]).name}
        report["shift"] = names | shift
        print(f"shift between A = {names['a']} and B = {names['b']}, +- standard error:")
        for name in ("js_bits", "kl_ab", "kl_ba"):
            print(f"{name} {shift[name]['value']:.3f} +- {shift[name]['error']:.3f}")
        print(f"a KL above {shift['kl_limit']:.1f} says no more than: large")
        print(f"accuracy {shift['accuracy']:.3f}")

    # file
    temporary = run_dir / ".measure.json"
    temporary.write_text(json.dumps(null_for_nan(report), indent=1) + "\n")
    os.replace(temporary, run_dir / "measure.json")
    print(f"wrote measure.json in {run_dir}")


# ===================================== the method ends here; below: command line, episodes, files
def parse_args():
    args = tyro.cli(Args, description=__doc__)
    check(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: found no CUDA device")
    torch.set_num_threads(args.threads)
    return args


def make_run_dir(args) -> Path:
    """The run's folder, a new or an empty one unless it is overwritten."""
    default = f"runs/{Path(__file__).stem}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.run_dir or default).expanduser()
    run_dir.mkdir(parents=True, exist_ok=True)
    free = args.overwrite or not any(run_dir.iterdir())
    check(free, f"--run-dir {run_dir}: not empty; pass --overwrite")
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


def return_statistics(episodes: list) -> dict:
    """Mean, std and number of the episodes' returns, and the returns themselves."""
    returns = [float(episode["rewards"].sum()) for episode in episodes]
    return {
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        "episodes": len(returns),
        "values": returns,
    }


def text_of(statistics: dict) -> str:
    return f"{statistics['mean']:.1f} +- {statistics['std']:.1f}"


def load_states(path) -> tuple[np.ndarray, np.ndarray]:
    """Observations (N, obs) and ends of episodes (N,) of a dataset (docs/formats.md), checked."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # np.load would not notice a changed shape
        with np.load(path, allow_pickle=False) as file:
            obs = file["observations"]
            ends = file["terminals"].astype(bool) | file["timeouts"].astype(bool)
            version = json.loads(str(file["metadata"]))["schema_version"]
    except Exception as error:
        check(False, f"{path}: expected a dataset as in docs/formats.md; found {error!r:.300}")
    check(damaged is None, f"{path}: damaged bytes in {damaged}")
    check(version == SCHEMA_VERSION, f"{path}: expected schema {SCHEMA_VERSION}, found {version}")
    fits = obs.dtype.kind == "f" and obs.ndim == 2 and ends.shape == (len(obs),) and len(obs) >= 100
    found = f"observations {obs.dtype} {obs.shape}, timeouts {ends.shape}"
    check(fits, f"{path}: expected 100 or more rows of floats (N, obs) and (N,), found {found}")
    check(np.isfinite(obs).all(), f"{path}: observations: found NaN or infinite values")
    return obs.astype(np.float32), ends


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


def check_sizes(path, checkpoint: dict, tasks, code_size: int) -> None:
    """Stop unless the checkpoint's policy reads the tasks' states, and the code of a task id."""
    found = (checkpoint["sizes"]["in_dim"], checkpoint["sizes"]["action_dim"])
    for task in tasks:
        obs_dim, action_dim = task_sizes(task)
        expected = (obs_dim + code_size, action_dim)
        check(found == expected, f"{path}: {task} has (inputs, actions) {expected}, not {found}")


def load_actor(checkpoint: dict) -> Actor:
    """The frozen policy of a checkpoint."""
    sizes = checkpoint["sizes"]
    out_dim = sizes["action_dim"] * (2 if sizes.get("log_std") else 1)
    actor = Actor(sizes["in_dim"], out_dim, sizes["hidden"], sizes["layer_norm"])
    actor.load_state_dict(checkpoint["actor"])
    return actor.requires_grad_(False)


def plot_activations(path: Path, report: dict, sort: bool) -> None:
    """Fig. 6.3: mean activation per neuron and layer, a line per task.

    sort: show each layer's neurons in the order of their mean in the first task.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    tasks = list(report["mean_activations"])
    means = np.array(list(report["mean_activations"].values()))  # (task, layer, neuron)
    for layer, axes in enumerate(figure.subplots(2, 1)):
        neurons = np.arange(means.shape[2])
        if sort:
            neurons = np.argsort(means[0, layer], kind="stable")
        for i in reversed(range(len(tasks))):  # the first task's line on top
            label = f"{tasks[i]} (id {i})"
            axes.plot(means[i, layer, neurons], f"C{i}.-", lw=1.2, ms=3, label=label)
        title = f"hidden layer {layer + 1}"
        for row in report["shared_computation"]:
            if row["layer"] == layer + 1:
                title += f", average tau-a {row['average']['tau_a']:.3f}"
                if len(tasks) > 2:
                    title += f" (ids {row['ids'][0]}, {row['ids'][1]})"
        axes.set_title(title, fontsize=11)
        axes.set_ylabel("mean activation")
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"neuron, by its mean activation in {tasks[0]}" if sort else "neuron")
    figure.legend(handles=axes.lines[::-1], loc="outside upper center", ncols=len(tasks))
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def null_for_nan(value):
    """The value with None, JSON's null, in place of every NaN."""
    if isinstance(value, dict):
        return {name: null_for_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [null_for_nan(part) for part in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


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
