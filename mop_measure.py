"""Measure a student: returns, computation shared between tasks, shift between datasets (van Lith 2024, 5.2.2, 6.2).

  python mop_measure.py --student runs/<name>/student.pt

D_i^S: the states that student pi^S visits in task i under task id i. l_j(s, i): activations of hidden layer j after the
ReLU. tau of two vectors of N values with C concordant and D discordant pairs: 2 (C - D) / (N (N - 1)), which is tau-a;
tied pairs count 0. tau-b leaves them out of the denominator, too. For every pair of task ids i, i' and every layer:

  per-state:  tau( l_j(s, i), l_j(s, i') ), mean and std over s in a sample of the union of all D_i^S
  average:    tau( mean of l_j(s, i) over D_i^S, mean of l_j(s, i') over D_i'^S )
  CKA:        linear, debiased, of l_j(., i) and l_j(., i') on a sample of the union (Kornblith et al. 2019)

--teachers: every teacher under the reward of every task (6.4.5, Table 6.3).
--shift A B: divergence of the observations of two datasets, from a classifier's logit f(s) ~ ln p_A(s) / p_B(s) on
episodes held out: JS = 1 - its cross-entropy in bits, KL(A||B) = mean of f over A, KL(B||A) = - mean of f over B.

In:  a student (or naive multi-task) checkpoint, teacher or behaviour checkpoints, dataset files; any or all of them.
Out: measure.json with everything; of a student also activations.png, activations_sorted.png (Fig. 6.3) and <task>.gif.
"""

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

os.environ["GIF_GL"] = os.environ.get("MUJOCO_GL", "")  # for the process that renders the GIFs
os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered in this one
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from dm_control import suite
from matplotlib.figure import Figure
from mujoco.batch import Batch
from PIL import Image
from scipy.stats import rankdata
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
WALKER = ("walker-stand", "walker-walk", "walker-run")  # simulated in mujoco.batch
VERSIONS = {module.__name__: str(module.__version__) for module in (np, torch, mujoco)}
LEAST = {"seed": 0, "threads": 0, "tau_states": 0, "cka_states": 100, "shift_states": 100}  # of flags; of others 1
GL_PACKAGES = {"egl": "libegl1 libgl1", "osmesa": "libosmesa6"}  # of Debian and Ubuntu


@dataclass
class Args:
    # experiment
    student: str | None = None  # checkpoint of the student, or of a naive multi-task policy; its tasks are measured
    episodes: int = 1000  # episodes of the student per task, always from the same initial states
    teachers: tuple[str, ...] = ()  # checkpoints of teachers or behaviours, the rows of the cross-task table
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")  # columns of the cross-task table, DOMAIN-TASK
    cross_episodes: int = 100  # episodes per teacher and task in the cross-task table
    shift: tuple[str, ...] = ()  # two dataset files, A and B; the divergence of their observations is estimated
    seed: int = 1  # seed of the samples of states, of the split into train and test episodes, and of the classifier
    run_dir: str | None = None  # folder for the results; default: runs/<script>-<time>
    overwrite: bool = False  # replace output files that exist
    gif: bool = True  # render the student's first episode of each task
    gif_fps: int = 10  # pictures per second of the GIF, which plays in real time
    # algorithm
    tau_states: int = 100_000  # visited states in which per-state tau is taken, at random (error 0.0003); 0: all
    cka_states: int = 100_000  # visited states in the sample for CKA, at most
    shift_states: int = 100_000  # states per dataset for the shift, at most
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads of torch and of the physics; 0: all cores


# ----------------------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Policy, (B, in_dim) -> (B, out_dim) in [-1, 1]; layer_norm: of a behaviour, Linear-LayerNorm-Tanh comes first."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int, layer_norm: bool):
        super().__init__()
        first = [nn.LayerNorm(hidden), nn.Tanh()] if layer_norm else [nn.ReLU(inplace=True)]
        layers = [nn.Linear(in_dim, hidden), *first, nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, out_dim), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


# ----------------------------------------------------------------------------------------------------------- measures
def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def hidden_layers(actor: Actor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of both hidden layers after the ReLU, (B, hidden) each."""
    first = actor.net[:2](x)
    return first, actor.net[2:4](first)


@torch.no_grad()
def rollout(policy, env, episodes: int, device) -> tuple[list[float], torch.Tensor, np.ndarray]:
    """Whole episodes from fixed initial states, env.n at a time; policy: (n, obs) -> (n, act or more) tensors.

    env: LockstepEnv. Returns the episode returns, every state an action was taken in, (T * episodes, obs) f32, and
    episode 0's physics state after every step, (T, state) f64.
    """
    length, returns, film = env.episode_length, np.zeros(episodes), []
    visited = np.empty((length, episodes, env.obs_dim), np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's other threads would wait busily on the physics' cores
    for start in range(0, episodes, env.n):
        wave = np.arange(start, min(start + env.n, episodes))
        n = len(wave)  # what the last wave has too many is not kept
        obs = env.reset(EVAL_SEED + start + np.arange(env.n))
        for t in tqdm(range(length), desc=f"{env.task}, from episode {start}", unit="step", disable=None, leave=False):
            visited[t, wave] = obs[:n]
            actions = policy(torch.from_numpy(obs).to(device))[:, : env.action_dim].cpu().numpy()
            obs, reward, physics = env.step(actions)
            returns[wave] += reward[:n]
            film.append(physics[0])
    torch.set_num_threads(threads)
    return returns.tolist(), torch.from_numpy(visited.reshape(-1, env.obs_dim)), np.stack(film[:length])


@torch.no_grad()
@partial(torch.vmap, chunk_size=64)
def kendall_tau(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kendall's tau-a and tau-b between rows of x and of y, (B, n) -> (B,), (B,) f64; tau-b of a constant row is NaN.

    s_ij = sign(x_i - x_j) sign(y_i - y_j) is 1 for a concordant pair, -1 for a discordant one and 0 for a tie; tau-a
    divides its sum by the number of pairs, tau-b by that of pairs not tied in x or y (their geometric mean).
    """
    a, b = ((v[:, None] > v).char() - (v[:, None] < v).char() for v in (x, y))  # (n, n) of one row
    both, in_x, in_y = ((u * v).sum(dtype=torch.float64) for u, v in ((a, b), (a, a), (b, b)))  # all pairs twice
    return both / (len(x) * (len(x) - 1)), both / (in_x * in_y).sqrt()


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Debiased linear CKA of features x (n, p) and y (n, q), in O(n p q), without the n x n kernels.

    HSIC is the unbiased estimator of Song et al. 2012, times n (n - 3), with K = x x', L = y y' less their diagonals:
    tr(K L) + 1'K1 1'L1 / ((n - 1) (n - 2)) - 2 / (n - 2) 1'K L 1. The features' means do not change it. Once these are
    0, K1 = - k, the diagonal k_i = |x_i|^2, and it is |x'y|_F^2 - n / (n - 2) k'l + 1'k 1'l / ((n - 1) (n - 2)).
    """
    n = len(x)
    x, y = (v.double() - v.mean(dim=0, dtype=torch.float64) for v in (x, y))

    def hsic(a, b):
        k, l_ = a.square().sum(dim=1), b.square().sum(dim=1)
        return (a.T @ b).square().sum() - n / (n - 2) * k @ l_ + k.sum() * l_.sum() / ((n - 1) * (n - 2))

    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


def mean_activations(layers, states: torch.Tensor, i: int) -> torch.Tensor:
    """Mean of every neuron over states (N, obs) under task id i: (2 layers, hidden) f64. layers: as in compare_ids."""
    sums = [torch.stack([x.sum(dim=0, dtype=torch.float64) for x in layers(p, i)]) for p in states.split(16_384)]
    return sum(sums) / len(states)


def compare_ids(layers, i: int, j: int, tau_states, tau_tasks, cka_states, means, tasks: list) -> list[dict]:
    """All measures of what a student computes under task ids i and j, a dict per hidden layer.

    layers: (states (N, obs), task id) -> activations of both hidden layers, (N, hidden) each; tau_states, cka_states:
    samples of the visited states; tau_tasks: the task each of the former was visited in, (N,); means: of the
    activations, one (2 layers, hidden) per task.
    """
    taus = []  # parts x layers x (tau-a and tau-b) x states
    for part in tqdm(tau_states.split(1024), desc=f"tau of ids {i}, {j}", disable=None, leave=False):
        pairs = zip(layers(part, i), layers(part, j), strict=True)
        taus.append(torch.stack([torch.stack(kendall_tau(a, b)) for a, b in pairs]).cpu())
    averages = torch.stack(kendall_tau(means[i], means[j])).T.tolist()  # layers x (tau-a and tau-b)
    ckas = [linear_cka(a, b) for a, b in zip(layers(cka_states, i), layers(cka_states, j), strict=True)]
    rows, groups = [], {"": slice(None)} | {task: tau_tasks == k for k, task in enumerate(tasks)}
    for layer, (tau, average, cka) in enumerate(zip(torch.cat(taus, dim=-1), averages, ckas, strict=True), start=1):
        found = {task: {"tau_a": describe(tau[0][g]), "tau_b": describe(tau[1][g])} for task, g in groups.items()}
        per_state = found.pop("") | {"by_task": found}
        average = {"tau_a": average[0], "tau_b": average[1]}
        rows.append({"ids": [i, j], "layer": layer, "per_state": per_state, "average": average, "cka": cka})
    return rows


def describe(values: torch.Tensor) -> dict:
    """Mean and std of the defined values, and how many are not defined (NaN)."""
    defined = values[~values.isnan()]
    mean = defined.mean()
    std = (defined - mean).square().mean().sqrt()
    return {"mean": mean.item(), "std": std.item(), "undefined": len(values) - len(defined)}


def split_episodes(timeouts: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Episode of every row, and its use: 0 train, 1 validation, 2 test; timeouts (N,) -> (N,), (N,) int.

    By whole episodes, 60, 20 and 20% of them at random: neighbouring rows are nearly equal, so after a split by rows
    the classifier would know test rows by their neighbours. Fewer than five episodes: ten blocks of rows instead.
    """
    episode = np.cumsum(timeouts) - timeouts
    if episode[-1] < 4:
        episode = np.arange(len(timeouts)) * 10 // len(timeouts)
    position = rng.permutation(episode[-1] + 1)
    return episode, np.searchsorted([0.6, 0.8], position / len(position), side="right")[episode]


def train_classifier(train: list, validation: list, seed: int, hidden: int = 128, epochs: int = 100):
    """Logit ln p_A(s) / p_B(s), a function (n, d) -> (n,), from samples [of A, of B], (n_A, d) and (n_B, d) tensors.

    An MLP with equal weight on A and B, and Adam; after two epochs without a lower validation loss the best weights are
    taken back and the learning rate falls to 0.3 of it, four times at most. Then the best weights are kept.
    """
    torch.manual_seed(seed)
    x = torch.cat(train)
    mean, std = x.mean(dim=0), x.std(dim=0)
    std[std < 1e-6] = 1.0  # a constant column
    layers = nn.Linear(x.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
    net = nn.Sequential(*layers).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    label = torch.cat([torch.full((len(part),), 1.0 - i) for i, part in enumerate(train)]).to(x)
    weight = torch.cat([torch.full((len(part),), len(x) / (2 * len(part))) for part in train]).to(x)
    x = (x - mean) / std
    best, waited, drops = np.inf, 0, 0
    for _ in tqdm(range(epochs), desc="classifier", unit="epoch", disable=None, leave=False):
        for index in torch.randperm(len(x)).to(x.device).split(1024):
            loss = F.binary_cross_entropy_with_logits(net(x[index])[:, 0], label[index], weight[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            a, b = (net((part - mean) / std) for part in validation)
            loss = (F.softplus(-a).mean() + F.softplus(b).mean()).item()
        waited += 1
        if loss < best:
            best, waited, state = loss, 0, {name: value.clone() for name, value in net.state_dict().items()}
        elif waited == 2:
            net.load_state_dict(state)
            waited, drops = 0, drops + 1
            optimizer.param_groups[0]["lr"] *= 0.3
        if drops > 3:
            break
    net.load_state_dict(state)
    return torch.no_grad()(lambda s: net((s - mean) / std)[:, 0])


def clustered(values: np.ndarray, episode: np.ndarray) -> dict:
    """Mean of values (N,) and its standard error, with whole episodes as the independent draws (NaN of one episode)."""
    episode = np.unique(episode, return_inverse=True)[1]
    count = episode.max() + 1
    deviation = np.bincount(episode, values - values.mean())
    error = np.sqrt(np.square(deviation).sum() * count / (count - 1)) / len(values) if count > 1 else np.nan
    return {"value": float(values.mean()), "error": float(error)}


def divergences(f_a: np.ndarray, f_b: np.ndarray, episode_a: np.ndarray, episode_b: np.ndarray) -> dict:
    """Estimates from the logits f ~ ln p_A / p_B of held-out states, (n_A,) and (n_B,), and the states' episodes.

    js_bits, 1 - cross-entropy in bits: on average at most the true JS, whatever the classifier. kl_ab, kl_ba, the mean
    log-ratio in nats: no bound. n states cannot confirm a KL above ln n (McAllester & Stratos 2020): those above it are
    named in beyond_limit and say "large", no more. (Of the Donsker-Varadhan bound's mean of exp(f) one state decides.)
    """
    n_a, n_b = len(f_a), len(f_b)
    ranks = rankdata(np.concatenate([f_a, f_b]))
    auc = (ranks[:n_a].sum() - n_a * (n_a + 1) / 2) / (n_a * n_b)
    accuracy = ((f_a > 0).mean() + (f_b < 0).mean()) / 2
    js_a = clustered(1 - np.logaddexp(0, -f_a) / np.log(2), episode_a)
    js_b = clustered(1 - np.logaddexp(0, f_b) / np.log(2), episode_b)
    js = min(max((js_a["value"] + js_b["value"]) / 2, 0), 1)
    found = {"js_bits": {"value": js, "error": float(np.hypot(js_a["error"], js_b["error"]) / 2)}}
    found |= {"kl_ab": clustered(f_a, episode_a), "kl_ba": clustered(-f_b, episode_b)}
    limit = float(np.log(min(n_a, n_b)))
    beyond = [name for name in ("kl_ab", "kl_ba") if found[name]["value"] > limit]
    return found | {"auc": float(auc), "accuracy": float(accuracy), "kl_limit": limit, "beyond_limit": beyond}


def state_shift(data: list, seed: int, device: torch.device, max_states: int) -> dict:
    """Divergence of the states of two datasets, data = [(observations (N, d), timeouts (N,)) of A, of B].

    Train, validation and test states come from different episodes; at most max_states states per dataset are used.
    """
    rng, parts, episodes = np.random.default_rng(seed), [], []
    for observations, timeouts in data:
        episode, use = split_episodes(timeouts, rng)
        rows = [np.flatnonzero(use == k) for k in range(3)]
        limits = [int(max_states * share) for share in (0.6, 0.2, 0.2)]
        rows = [np.sort(rng.choice(r, min(len(r), k), replace=False)) for r, k in zip(rows, limits, strict=True)]
        parts.append([torch.from_numpy(observations[r]).to(device) for r in rows])
        episodes.append(episode[rows[2]])
    train, validation, test = zip(*parts, strict=True)
    logit = train_classifier(train, validation, seed)
    logits = [logit(part).double().cpu().numpy() for part in test]
    counts = {"train_states": [len(part) for part in train], "test_states": [len(part) for part in test]}
    return {**divergences(*logits, *episodes), **counts, "test_episodes": [len(np.unique(e)) for e in episodes]}


def main():
    args, device = read_args()
    tasks, figures = [], []
    if args.student:
        checkpoint, student, onehot = load_policy(args.student, ("student", "naive"), None, device)
        tasks, figures = checkpoint["tasks"], ["activations.png", "activations_sorted.png"]
    teachers = [load_policy(path, ("teacher", "behavior"), args.tasks, device) for path in args.teachers]
    data = load_observations(args.shift)
    gifs = {task: f"{task}.gif" for task in tasks} if args.gif else {}
    run_dir = results_folder(args, ["measure.json", *figures, *gifs.values()])
    names = {"student": args.student and Path(args.student).name, "run_dir": run_dir.name}
    names |= {flag: [Path(path).name for path in getattr(args, flag)] for flag in ("teachers", "shift")}
    report = {"args": vars(args) | names, "versions": VERSIONS}  # without folders: the results may be published
    clock = time.time()

    def layers(states, i):
        return hidden_layers(student, add_task(states.to(device), i, onehot))

    if args.student:
        # the student in each task under its own id
        returns, visited, films = {}, [], {}
        for i, task in enumerate(tasks):
            env = LockstepEnv(task, min(args.episodes, 100), args.threads)  # more at once would hardly be faster
            policy = lambda obs: student(add_task(obs, i, onehot))  # noqa: E731
            returns[task], states, films[task] = rollout(policy, env, args.episodes, device)
            visited.append(states)
        means = [mean_activations(layers, states, i) for i, states in enumerate(visited)]
        report["student"] = {"checkpoint": names["student"]}
        report["student"] |= {name: checkpoint[name] for name in ("kind", "tasks", "step", "sizes")}
        report["returns"] = statistics(returns)
        report["states"] = {task: len(states) for task, states in zip(tasks, visited, strict=True)}
        report["mean_activations"] = {task: mean.tolist() for task, mean in zip(tasks, means, strict=True)}

        # what it computes under one task id and under another
        visited_in = torch.cat([torch.full((len(states),), i) for i, states in enumerate(visited)])
        visited = torch.cat(visited)
        order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(visited)))
        tau_sample, cka_sample = order[: args.tau_states or None], order[: args.cka_states]
        samples = visited[tau_sample], visited_in[tau_sample], visited[cka_sample]
        pairs = combinations(range(len(tasks)), 2)
        rows = [row for pair in pairs for row in compare_ids(layers, *pair, *samples, means, tasks)]
        report |= {"tau_states": len(tau_sample), "cka_states": len(cka_sample), "shared_computation": rows}
        for name in figures:
            plot_activations(run_dir / name, tasks, torch.stack(means).cpu().numpy(), rows, "sorted" in name)
        if args.gif:
            reason = write_gifs(films, run_dir, args.gif_fps)
            report |= {"gif": None, "gif_reason": reason} if reason else {"gif": gifs}

    # every teacher under the reward of every task
    if teachers:
        envs = [LockstepEnv(task, min(args.cross_episodes, 100), args.threads) for task in args.tasks]
        report["cross_task"] = []
    for name, (teacher, actor, _) in zip(names["teachers"], teachers, strict=True):
        returns = {env.task: rollout(actor, env, args.cross_episodes, device)[0] for env in envs}
        row = {"checkpoint": name, "kind": teacher["kind"], "task": teacher["tasks"][0]}
        report["cross_task"].append({**row, "returns": statistics(returns)})

    # how far two datasets lie apart
    if data:
        a, b = names["shift"]
        report["shift"] = {"a": a, "b": b, **state_shift(data, args.seed, device, args.shift_states)}

    report["seconds"] = round(time.time() - clock)
    write_atomic(run_dir / "measure.json", lambda file: file.write(f"{to_json(report, 9, indent=1)}\n".encode()))
    print_tables(report)
    files = [str(run_dir / name) for name in ["measure.json", *figures, *(report.get("gif") or {}).values()]]
    bulk = ("args", "versions", "student", "values", "mean_activations", "by_task")
    print("RESULT", to_json(report | {"files": files, "run_dir": str(run_dir)}, 3, without=bulk))


# ==================================== the method ends here; below: inputs, evaluation, files, command line, CUDA graph
def read_args() -> tuple[Args, torch.device]:
    """The command line, its numbers checked, and the device; sets torch's CPU threads (0: all cores)."""
    args = tyro.cli(Args, description=__doc__)
    for name, value in vars(args).items():
        low, high = LEAST.get(name, 1), 1024 if name == "threads" else 2**31 - 1
        fits = type(value) is not int or low <= value <= high
        require(fits, f"--{name.replace('_', '-')}: expected a number from {low} to {high}, found {value}")
    hint = "for example: python mop_measure.py --student runs/NAME/student.pt (see --help)"
    require(args.student or args.teachers or args.shift, f"nothing to measure; {hint}")
    require(args.tasks or not args.teachers, "--tasks: expected one task or more, the columns of the cross-task table")
    require(len(args.shift) in (0, 2), f"--shift: expected two dataset files, found {len(args.shift)}")

    def stop(number, frame):
        print(f"{Path(sys.argv[0]).name}: stopped, nothing was measured", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; kill
        signal.signal(number, stop)
    cuda = torch.cuda.is_available()
    require(args.device != "cuda" or cuda, "--device cuda: no CUDA device was found; use --device cpu")
    torch.set_num_threads(args.threads or os.cpu_count())
    with suppress(AttributeError, OSError, TypeError):  # glibc only: reuse freed memory, new pages cost page faults
        for option, value in ((-1, 2**30), (-3, 2**26)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    return args, torch.device("cuda" if args.device != "cpu" and cuda else "cpu")


def load_policy(path, kinds: tuple[str, ...], tasks, device) -> tuple[dict, Actor, int]:
    """Checkpoint, network and number of flags that encode the task id (0: one number, or none); fail where the policy
    does not fit the tasks, by default its own."""
    checkpoint = load_checkpoint(path, kinds)
    actor, sizes, reads_id = load_actor(checkpoint, path), checkpoint["sizes"], "student" in kinds
    fits = not reads_id or (sizes["hidden"] > 1 and not sizes["layer_norm"])
    require(fits, f"{path}: expected two or more neurons per hidden layer and no layer norm, found {sizes}")
    onehot = len(checkpoint["tasks"]) if sizes.get("task_encoding") == "onehot" else 0
    found = sizes["in_dim"] - (onehot or int(reads_id)), sizes["action_dim"]
    for task in tasks or checkpoint["tasks"]:
        env = make_envs(task, 1)[0]
        wanted = env.observation_spec()["observations"].shape[0], env.action_spec().shape[0]
        require(found == wanted, f"{path}: expected (observations, actions) of {task}, {wanted}, found {found}")
    return checkpoint, actor.to(device), onehot


def load_observations(paths) -> list[tuple]:
    """Observations (N, d) f32 and timeouts (N,) of each dataset file, all of the same d."""
    data = []
    for path in paths:
        with expecting("a dataset .npz as in docs/formats.md, of 100 rows or more, without pickled objects", path):
            file = np.load(path, allow_pickle=False)
            assert json.loads(str(file["metadata"]))["schema_version"] == SCHEMA_VERSION, "another schema version"
            obs, timeouts = file["observations"].astype(np.float32), file["timeouts"].astype(bool).ravel()
            data.append((obs, timeouts))
            assert np.abs(obs).max() < 1e6, "observations that are NaN, infinite or beyond a million"
            fits = len(obs) >= 100 and obs.shape == (len(timeouts), data[0][0].shape[1])
            assert fits, f"observations {obs.shape}, timeouts {timeouts.shape} ({paths[0]}: {data[0][0].shape})"
    return data


def results_folder(args, names: list[str]) -> Path:
    """Make the run's folder; fail where a file of these names would be lost or cannot be written."""
    run_dir = Path(args.run_dir or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    with expecting("a folder that can be written, without the results of another run (or pass --overwrite)", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        assert os.access(run_dir, os.W_OK), "no permission"
        for path in [run_dir / name for name in names]:
            assert not path.exists() or (args.overwrite and path.is_file()), path
    return run_dir


def statistics(returns: dict) -> dict:
    """{task: episode returns} -> mean, std and number of the episodes, and the returns themselves."""
    return {t: {"mean": np.mean(v), "std": np.std(v), "episodes": len(v), "values": v} for t, v in returns.items()}


def print_tables(report: dict) -> None:
    """The report's main numbers."""
    text = "{mean:.1f} ± {std:.1f}"
    for task, found in report.get("returns", {}).items():
        print(f"{task}: return {text.format(**found)}, {found['episodes']} episodes")
    for row in report.get("shared_computation", []):
        a, b = (f"{x['mean']:.3f} ± {x['std']:.3f}" for x in (row["per_state"]["tau_a"], row["per_state"]["tau_b"]))
        average = "tau-a {tau_a:.3f}, tau-b {tau_b:.3f}".format(**row["average"])
        ids = f"layer {row['layer']}, ids {row['ids'][0]}, {row['ids'][1]}"
        print(f"{ids}: per-state tau-a {a}, tau-b {b}; average {average}; CKA {row['cka']:.3f}")
    if reason := report.get("gif_reason"):
        print(f"no GIF: {reason}")
    for row in report.get("cross_task", []):
        returns = (f"{task} {text.format(**found):15}" for task, found in row["returns"].items())
        print("{checkpoint} ({task}):".format(**row).ljust(48), *returns)
    if shift := report.get("shift"):
        texts = {name: "{value:.3f} ± {error:.3f}".format(**shift[name]) for name in ("js_bits", "kl_ab", "kl_ba")}
        texts |= {name: f"{texts[name]}, above ln(test states): large, no more" for name in shift["beyond_limit"]}
        print("shift between A = {a} and B = {b} (± standard error over held-out episodes):".format(**shift))
        print(f"JS {texts['js_bits']} bits, AUC {shift['auc']:.3f}, accuracy {shift['accuracy']:.3f}")
        print(f"KL(A||B) in nats: {texts['kl_ab']}\nKL(B||A) in nats: {texts['kl_ba']}")


def to_json(value, digits: int, without: tuple = (), indent: int | None = None) -> str:
    """JSON text, with rounded numbers, null for what is not defined (NaN), and without some names."""
    hooks = {"parse_float": lambda text: round(float(text), digits), "parse_constant": lambda text: None}
    hooks["object_hook"] = lambda found: {name: part for name, part in found.items() if name not in without}
    return json.dumps(json.loads(json.dumps(value), **hooks), indent=indent)


def plot_activations(path: Path, tasks: list[str], means: np.ndarray, rows: list[dict], order: bool) -> None:
    """Fig. 6.3: mean activation per neuron, one line per task; order: neurons ascending by the first task's.

    means: (tasks, 2 layers, hidden); rows: of compare_ids, for the titles.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    for layer, axes in enumerate(figure.subplots(2, 1)):
        neurons = np.argsort(means[0, layer], kind="stable") if order else np.arange(means.shape[2])
        for i in reversed(range(len(tasks))):  # the first task's line on top
            axes.plot(means[i, layer, neurons], f"C{i}.-", lw=1.2, ms=3, label=f"{tasks[i]} (id {i})")
        taus = [f"{row['average']['tau_a']:.3f}" for row in rows if row["layer"] == layer + 1]  # of pairs of tasks
        axes.set_title(f"hidden layer {layer + 1}{', average tau-a ' if taus else ''}{', '.join(taus)}", fontsize=11)
        axes.set(ylabel="mean activation", xlim=(0, len(neurons) - 1))
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"neuron, each layer sorted by its mean activation in {tasks[0]}" if order else "neuron")
    figure.legend(handles=axes.lines[::-1], loc="outside upper center", ncols=len(tasks), frameon=False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def render_gifs(folder: str, fps: str) -> None:
    """In a process of its own, with MUJOCO_GL egl or osmesa: folder/<task>.gif for every task of an .npz on standard
    input, which holds the task's physics states (T, state)."""
    films = np.load(io.BytesIO(sys.stdin.buffer.read()))
    for task in films:
        env = suite.load(*task.split("-", 1))
        physics, step = env.physics, env.control_timestep()
        stride = max(1, round(1 / (float(fps) * step)))
        camera = {"camera_id": 0 if physics.model.ncam else -1}
        camera["render_flag_overrides"] = {"shadow": False, "reflection": False}  # a third of the time in software
        frames = []
        for state in films[task][::stride]:
            with physics.reset_context():
                physics.set_state(state)
            frames.append(Image.fromarray(physics.render(240, 320, **camera)))
        palette = frames[0].quantize(64)  # one for all frames, so that what does not move takes no space
        first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options = {"save_all": True, "append_images": others, "loop": 0, "duration": round(1000 * stride * step)}
        write_atomic(Path(folder) / f"{task}.gif", lambda file: first.save(file, format="GIF", **options))


def write_gifs(films: dict, folder: Path, fps: int) -> str:
    """render_gifs in another process, with EGL or else OSMesa: a GL library that is missing or crashes ends only that.

    films: per task the physics states (T, state). Returns the reason why there is no GIF, or nothing.
    """
    buffer, reasons, asked = io.BytesIO(), [], os.environ["GIF_GL"].lower()
    np.savez(buffer, **films)
    # dm_control takes MUJOCO_GL, which the script, run as a module then, sets to disable
    code = "import dm_control.suite, runpy, sys; runpy.run_path(sys.argv[1])['render_gifs'](*sys.argv[2:])"
    command = [sys.executable, "-c", code, str(Path(__file__).resolve()), str(folder), str(fps)]
    for backend in (asked,) if asked in GL_PACKAGES else GL_PACKAGES:
        options = {"env": {**os.environ, "MUJOCO_GL": backend}, "input": buffer.getvalue(), "capture_output": True}
        try:
            subprocess.run(command, check=True, timeout=900, **options)
            return ""
        except subprocess.SubprocessError as error:  # an exit code, or not ready in time
            lines = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [type(error).__name__]
            reasons.append(f"{backend} (Debian: apt-get install {GL_PACKAGES[backend]}): {lines[-1]}")
    return "; ".join(reasons)


class LockstepEnv:
    """n environments of one suite task, stepped together; an episode ends by the time limit alone, a timeout.

    The walker runs in mujoco.batch on a thread pool, equal to dm_control bit for bit (tests/test_env.py), every other
    task in n dm_control environments one after the other.
    """

    def __init__(self, task: str, n: int, threads: int = 0):
        self.task, self.n, self.envs = task, n, make_envs(task, 1 if task in WALKER else n)
        env = self.envs[0]
        self.obs_dim, self.action_dim = env.observation_spec()["observations"].shape[0], env.action_spec().shape[0]
        self.state_dim, self.episode_length = len(env.physics.get_state()), int(env._step_limit)
        if task in WALKER:
            self.batch = Batch(env.physics.model.ptr, n, nthread=threads, persistent=True)
            names = ("qpos", "qvel", "qacc_warmstart", "ctrl", "xmat", "xpos", "sensordata")
            self.arrays = {name: self.batch.bind(name) for name in names}

    def reset(self, seeds) -> np.ndarray:
        """Start n episodes, the i-th from dm_control's initial state for seeds[i] -> observations (n, obs) f32."""
        observations = []
        for i, seed in enumerate(seeds):
            env = self.envs[i % len(self.envs)]
            env.task.random.seed(int(seed))
            observations.append(env.reset().observation["observations"])
            for name in ("qpos", "qvel", "qacc_warmstart") if self.task in WALKER else ():
                self.arrays[name][i] = getattr(env.physics.data, name)
        if self.task in WALKER:
            self.batch.forward()
        return np.array(observations, np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """actions (n, act) in [-1, 1] -> observations (n, obs) f32, rewards (n,) f32, physics states (n, state)."""
        if self.task not in WALKER:
            steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
            observations = np.stack([s.observation["observations"] for s in steps]).astype(np.float32)
            states = np.stack([env.physics.get_state() for env in self.envs])
            return observations, np.array([s.reward for s in steps], np.float32), states
        self.arrays["ctrl"][:] = actions
        self.batch.step(nstep=self.envs[0]._n_sub_steps, stage=mujoco.mjtStage.mjSTAGE_VEL)  # ends with mj_step1
        xmat, xpos = (self.arrays[name].reshape(self.n, -1, size) for name, size in (("xmat", 9), ("xpos", 3)))
        height, upright = xpos[:, 1, 2], xmat[:, 1, 8]  # of body 1, the torso; body 0 is the world
        speed = self.arrays["sensordata"].reshape(self.n, -1)[:, 0]
        parts = xmat[:, 1:, [0, 2]].reshape(self.n, -1), height[:, None], self.arrays["qvel"]
        observations = np.concatenate(parts, axis=1).astype(np.float32)  # orientations xx, xz; height; velocity
        torso = {"torso_height": lambda: height, "torso_upright": lambda: upright, "horizontal_velocity": lambda: speed}
        reward = self.envs[0].task.get_reward(SimpleNamespace(**torso))  # PlanarWalker's own formula, of arrays
        states = np.concatenate([self.arrays["qpos"], self.arrays["qvel"]], axis=1)
        return observations, reward.astype(np.float32), states


def make_envs(task: str, n: int) -> list:
    """n dm_control environments of DOMAIN-TASK, with flat observations; fail where the scripts cannot handle it."""
    domain, _, name = task.partition("-")
    hint = ", ".join(f"{d}-{t}" for d, t in suite.ALL_TASKS if d == domain) or "for example walker-walk"
    require((domain, name) in suite.ALL_TASKS, f"task {task}: expected DOMAIN-TASK of the dm_control suite: {hint}")
    envs = [suite.load(domain, name, environment_kwargs={"flat_observation": True}) for _ in range(n)]
    action = envs[0].action_spec()
    fits = np.all(action.minimum == -1) and np.all(action.maximum == 1) and np.isfinite(envs[0]._step_limit)
    require(fits, f"task {task}: expected actions in [-1, 1] and a time limit, found other bounds or no limit")
    return envs


def require(condition, message: str) -> None:
    """One clear line on standard error and exit code 1, no traceback, unless the condition holds."""
    if not condition:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}")


@contextmanager
def expecting(what: str, subject):
    """Whatever fails inside becomes one line: its subject (a file, a flag), what was expected of it, what was found."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        require(False, f"{subject}: expected {what}; found {kind}{' '.join(str(error).split())[:300]}")


def load_checkpoint(path, kinds: tuple[str, ...], task: str | None = None) -> dict:
    """Read a checkpoint (docs/formats.md) and check it, of one of the kinds, and of the task if given."""
    with expecting("a readable checkpoint of these scripts, without pickled objects (those are refused)", path):
        assert zipfile.ZipFile(path).testzip() is None, "damaged bytes"  # torch.load does not compare check sums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, tasks, _, _ = (checkpoint[key] for key in ("schema_version", "tasks", "level", "step"))
        assert found == SCHEMA_VERSION, f"schema version {found}, not {SCHEMA_VERSION}"
        assert checkpoint["kind"] in kinds, f"kind {checkpoint['kind']}, not {' or '.join(kinds)}"
        assert task is None or tasks == [task], f"{', '.join(tasks)}, not {task}"
        assert all(np.isfinite(sum(r := checkpoint["returns"][t]) / len(r)) for t in tasks), "returns not all finite"
    return checkpoint


def load_actor(checkpoint: dict, path) -> Actor:
    """The frozen policy of a checkpoint, built without memory until the weights are known to fit."""
    with expecting("weights and sizes that fit together", path), torch.device("meta"):
        sizes = checkpoint["sizes"]
        out_dim = sizes["action_dim"] * (2 if sizes.get("log_std") else 1)
        actor = Actor(sizes["in_dim"], out_dim, sizes["hidden"], sizes["layer_norm"])
        actor.load_state_dict(checkpoint["actor"], assign=True)
        sane = all(w.is_floating_point() and (w.abs() < 1e6).all() for w in actor.parameters())
        assert sane, "weights that are NaN, infinite or beyond a million"
    return actor.float().requires_grad_(False)


def write_atomic(path, write) -> None:
    """Call write(temporary file object beside path), then rename: a reader sees the old file or the whole new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    with expecting("free space and a folder you may write to", path):
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
