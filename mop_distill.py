"""Distil one teacher per task into one multi-task student, offline: stage 3 of MOP (van Lith 2024, 5.1.3, 5.2, 6.3).

  python mop_distill.py --loss mse --hidden 64

Student pi^S(s, i): an MLP that reads the state and the task id. Teachers pi_i^T are frozen, so what they say about the
datasets is computed once. Per step one batch of every task, in one forward pass; L is a mean over tasks i and states s:

  mse:  || pi_i^T(s) - pi^S(s, i) ||_2^2
  q:    - min_k Q_{i,k}^T(s, pi^S(s, i))
  kl:   KL( N(mu^S, Sigma^S) || N(mu_i^T, Sigma_i^T) ), Gaussian teachers (mop_pbrl_teacher.py --actor gaussian)
  + reg_lambda * sum over hidden layers j of  L_rank(l_j(s, i), l_j(s, i')),  i' the other task; L_rank one of ndcg,
        pairwise, listwise

In:  per task data/<task>-<level>.npz and checkpoints/<task>-<level>-teacher.pt, else the bundled ones in pretrained/.
Out: student.pt, returns.csv, tau.csv (per-state Kendall's tau of the hidden layers between task ids) and TensorBoard
logs in the run's folder under runs/.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered here
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, until the run has a folder
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from dm_control import suite
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
VERSIONS = {module.__name__: str(module.__version__) for module in (np, torch, mujoco)}
DATASET = {"observations": ("f4", 2), "actions": ("f4", 2), "rewards": ("f4", 1), "next_observations": ("f4", 2)}
DATASET |= {"terminals": ("bool", 1), "timeouts": ("bool", 1), "physics": ("f8", 2)}  # numpy type, dimensions
MAY_BE_ZERO = {"seed", "threads", "gamma", "policy_noise", "noise_clip", "exploration_noise", "ood_noise", "beta_in"}
MAY_BE_ZERO |= {"beta_ood", "beta_ood_min", "beta_ood_decay", "bc_coef", "reg_lambda", "learning_starts"}
LIMITS = {"gamma": 1, "tau": 1, "actor_tau": 1, "threads": 1024, "num_critics": 1024, "num_ood": 1024}  # of flags
LIMITS |= dict.fromkeys(("hidden", "teacher_hidden", "batch_size", "teacher_batch_size", "num_envs"), 2**16)
TAU_STATES = 1000  # of an evaluation's states, in which the hidden layers' tau is taken
LAPTOP = {"gradient_steps": 20_000, "learning_rate": 1e-3}  # --scale laptop


@dataclass
class Args:
    # experiment
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")  # suite tasks, DOMAIN-TASK; the position is the id
    seed: int = 1  # seed of the weights, the noise and the batches
    scale: Literal["thesis", "laptop"] = "thesis"  # defaults of the flags: the thesis's, or LAPTOP's for one CPU core
    run_dir: str | None = None  # of logs, curves and the resume point; default: runs/<script and settings>-<time>
    resume: str | None = None  # run folder to continue; its stored command line comes before this one
    eval_every: int = 10_000  # steps between evaluations and resume points
    eval_episodes: int = 10  # episodes per evaluation during training, always from the same initial states
    final_eval_episodes: int = 100  # episodes of the evaluation stored in the checkpoint
    # data
    level: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium",)  # of the behaviour; one or per task
    data: tuple[str, ...] = ()  # dataset files, one per task; default: data/<task>-<level>.npz, else in pretrained/
    states: tuple[str, ...] = ("offline",)  # offline: the datasets'; online: of the teachers' episodes; or .npz files
    teachers: tuple[str, ...] = ()  # one per task; default: checkpoints/<task>-<level>-teacher[-gaussian].pt
    output: str | None = None  # student's file instead of the one in the run's folder
    overwrite: bool = False  # replace output files that exist
    # algorithm
    loss: Literal["mse", "q", "kl"] = "mse"  # distillation loss; kl needs Gaussian teachers
    regularizer: Literal["none", "ndcg", "pairwise", "listwise"] = "none"  # of hidden layers, between task ids
    reg_lambda: float = 100.0  # weight of the regularizer
    task_encoding: Literal["number", "onehot"] = "number"  # the task id as one number or as a flag per task
    gradient_steps: int = 500_000  # updates
    learning_rate: float = 1e-4  # Adam's
    batch_size: int = 1024  # states per task and update
    hidden: int = 256  # width of both hidden layers
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads of torch and of the physics; 0: all cores
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of torch.set_float32_matmul_precision
    cuda_graph: bool = False  # on CUDA: replay an update as one CUDA graph instead of operation by operation


# ----------------------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Policy, (B, in_dim) -> (B, out_dim) in [-1, 1]: actions; of a Gaussian, mean and unscaled log std (gaussian)."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int):
        super().__init__()
        layers = [nn.Linear(in_dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, out_dim), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Critics(nn.Module):
    """K independent Q-networks with stacked weights, (B, obs_dim), (B, action_dim) -> (K, B)."""

    def __init__(self, k: int, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        for j, (n_in, n_out) in enumerate([(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)], start=1):
            layers = [nn.Linear(n_in, n_out) for _ in range(k)]  # for torch's default initialisation
            self.register_parameter(f"w{j}", nn.Parameter(torch.stack([x.weight.detach().T for x in layers])))
            self.register_parameter(f"b{j}", nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers])))

    def network(self, x, w1, b1, w2, b2, w3, b3):
        """One critic, (B, in + 1) -> (B,), or all at once, (K, B, in + 1) -> (K, B); the last input is 1."""
        h = (x @ torch.cat([w1, b1], dim=-2)).relu_()  # the bias as one more row of the weights: no pass of its own
        h = (h @ w2).add_(b2).relu_()
        return (h @ w3).add_(b3).squeeze(-1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x, parameters = torch.cat([obs, action, obs.new_ones(len(obs), 1)], dim=-1), list(self.parameters())
        if x.is_cuda:  # one batched product per layer; on a CPU a loop over the critics is faster
            return self.network(x.expand(len(self.w1), *x.shape), *parameters)
        return torch.stack([self.network(x, *weights) for weights in zip(*parameters, strict=True)])


# ---------------------------------------------------------------------------------------------------------- algorithm
def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def gaussian(output: torch.Tensor, bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log std within the bounds, (B, act) each, of an actor's output (B, 2 act)."""
    mean, unit = output.chunk(2, dim=-1)
    low, high = bounds
    return mean, low + (high - low) * (unit + 1) / 2


def mse_loss(student, x, teacher_action) -> torch.Tensor:
    """|| pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (thesis 5.1.3). Rows x: (R, in_dim) -> (R,)."""
    return (teacher_action - student(x)).square().sum(dim=1)


def q_loss(student, x, critics, obs_dim: int) -> torch.Tensor:
    """- min_k Q_{i,k}^T(s, pi^S(s, i)) (thesis 5.1.3). Rows x: (R, in_dim), as many per task, in order -> (R,)."""
    parts = zip(critics, x[:, :obs_dim].chunk(len(critics)), student(x).chunk(len(critics)), strict=True)
    return -torch.cat([critic(obs, action).min(dim=0).values for critic, obs, action in parts])


def kl_loss(student, x, teacher_output, bounds) -> torch.Tensor:
    """KL(student || teacher) of diagonal Gaussians, summed over action dimensions. Rows x: (R, in_dim) -> (R,).

    Thesis 5.1.3; its last line has the sign of the log term reversed, torch.distributions agrees with this one.
    """
    (mean, log_std), (teacher_mean, teacher_log_std) = gaussian(student(x), bounds), gaussian(teacher_output, bounds)
    log_ratio = 2 * (log_std - teacher_log_std)  # ln(var_S / var_T)
    distance = (teacher_mean - mean).square() * (-2 * teacher_log_std).exp()
    return 0.5 * (log_ratio.exp() + distance - 1 - log_ratio).sum(dim=1)


def hidden_layers(actor: Actor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of both hidden layers after the ReLU, (B, hidden) each."""
    first = actor.net[:2](x)
    return first, actor.net[2:4](first)


def ndcg_loss(x, y) -> torch.Tensor:
    """- NDCG of the scores y in the order of x, (R, n) -> (R,). An order has no gradient: it flows through y only."""
    discount = 1 / torch.log2(torch.arange(2, y.shape[1] + 2, dtype=y.dtype, device=y.device))
    gain = y.gather(1, x.argsort(dim=1, descending=True, stable=True)) @ discount
    return -gain / (y.sort(dim=1, descending=True).values @ discount).clamp(min=1e-8)


def listwise_loss(x, y) -> torch.Tensor:
    """Softmax cross-entropy, - sum_i softmax(y)_i log softmax(x)_i, (R, n) -> (R,)."""
    return -(y.softmax(dim=1) * x.log_softmax(dim=1)).sum(dim=1)


def pairwise_loss(x, y) -> torch.Tensor:
    """sum_ij log(1 + exp(-(x_i - x_j) (y_i - y_j))), (R, n) -> (R,); the (R, n, n) terms exist a few rows at a time."""

    def some_rows(a, b):
        return F.softplus((a[:, None] - a[:, :, None]) * (b[:, :, None] - b[:, None])).sum(dim=(1, 2))

    rows = partial(recompute, some_rows, use_reentrant=False, preserve_rng_state=False)  # again in the backward pass
    return torch.cat([rows(a, b) for a, b in zip(x.split(16), y.split(16), strict=True)])


def ranking_regularizer(ranking_loss, student, x, others) -> torch.Tensor:
    """sum over hidden layers j of L_rank(l_j(s, i), l_j(s, i')), mean over the other ids i' (thesis 6.3.2) -> (R,).

    x: (R, in_dim) rows under their own task id; others: the same rows under each of the other ids.
    """
    own = hidden_layers(student, x)
    pairs = [pair for other in others for pair in zip(own, hidden_layers(student, other), strict=True)]
    return sum(ranking_loss(a, b) for a, b in pairs) / len(others)


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


@torch.no_grad()
def layer_taus(student: Actor, obs: torch.Tensor, i: int, m: int, onehot: int) -> list[tuple[float, float, float]]:
    """Per hidden layer, tau of states (B, obs) under id i and each other id: tau-a's mean and std, tau-b's mean."""
    own, *others = (hidden_layers(student, add_task(obs, (i + k) % m, onehot)) for k in range(m))
    layers = [(own[j].repeat(m - 1, 1), torch.cat([other[j] for other in others])) for j in range(2)]
    taus = [kendall_tau(*layer) for layer in layers]  # layers x (tau-a, tau-b)
    return [(a.mean().item(), a.std().item(), b.nanmean().item()) for a, b in taus]


def main():
    args, point, device = parse_args(Args, LAPTOP)
    torch.set_flush_denormal(args.regularizer == "pairwise")  # its sigmoids underflow, and such numbers are slow
    tasks, m, total = args.tasks, len(args.tasks), args.gradient_steps
    require(tasks, "--tasks: expected one task or more, found none")
    envs = [make_envs(task, args.eval_episodes) for task in tasks]
    obs_dim, action_dim = envs[0][0].observation_spec()["observations"].shape[0], envs[0][0].action_spec().shape[0]
    onehot = m if args.task_encoding == "onehot" else 0
    in_dim = obs_dim + (onehot or 1)
    table, counts, critics, bounds, references, inputs = load_inputs(args, (obs_dim, action_dim), onehot, device)
    name = f"{args.loss}-{args.regularizer}-{args.hidden}-{'+'.join(dict.fromkeys(args.level))}-seed{args.seed}"
    run_dir = prepare_outputs(args, name, [Path(args.output)] if args.output else [], inputs)
    output = Path(args.output or run_dir / "student.pt")

    # network
    seed = zlib.crc32(f"{args.seed} student".encode())
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    student = Actor(in_dim, action_dim if bounds is None else 2 * action_dim, args.hidden).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, fused=True, capturable=True)
    modules = {"student": student, "optimizer": optimizer}
    start, rows = restore(point, total, modules, generator, [table])
    with expecting("a resume point with all its parts", "--resume"):
        tau_rows = [[int(n), str(t), int(j), *map(float, v)] for n, t, j, *v in point["tau_rows"]] if point else []
    ranking_loss = {"ndcg": ndcg_loss, "pairwise": pairwise_loss, "listwise": listwise_loss}.get(args.regularizer)
    ends, visited = np.cumsum(counts).tolist(), []  # of the tables' rows; the states of an evaluation

    def update() -> dict:
        # sample a batch of every task
        shape, keywords = (args.batch_size,), {"generator": generator, "device": device}
        index = [torch.randint(end - n, end, shape, **keywords) for end, n in zip(ends, counts, strict=True)]
        x, label = table[torch.cat(index)].tensor_split([in_dim], dim=1)

        # student
        if args.loss == "mse":
            losses = mse_loss(student, x, label)
        elif args.loss == "q":
            losses = q_loss(student, x, critics, obs_dim)
        else:
            losses = kl_loss(student, x, label, bounds)
        loss = losses.mean()
        by_task = losses.detach().view(m, -1).mean(dim=1)
        metrics = {f"loss/{args.loss}/{task}": value for task, value in zip(tasks, by_task, strict=True)}
        if args.regularizer != "none":
            batches = x[:, :obs_dim].chunk(m)
            others = [torch.cat([add_task(batches[i], (i + k) % m, onehot) for i in range(m)]) for k in range(1, m)]
            rank_loss = ranking_regularizer(ranking_loss, student, x, others).mean()
            loss = loss + args.reg_lambda * rank_loss
            metrics[f"loss/{args.regularizer}"] = rank_loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return metrics | {"loss/total": loss.detach()}

    def policy(i: int, obs: torch.Tensor) -> torch.Tensor:
        visited.append(obs)
        return student(add_task(obs, i, onehot))

    updates = in_cuda_graph(update, args.cuda_graph, generator)
    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    progress = tqdm(range(start + 1, total + 1), total=total, initial=start, desc="distill", unit="step", disable=None)
    clock = time.time()
    for now in progress:
        metrics = updates()

        # log, evaluate, save
        at_evaluation = now % args.eval_every == 0 or now == total
        if now % 1000 == 0 or at_evaluation:
            log(writer, now, metrics | {"speed/steps_per_second": (now - start) / (time.time() - clock)})
        if at_evaluation:
            for i, task in enumerate(tasks):
                visited.clear()
                rows.append([now, task, evaluate(partial(policy, i), envs[i], device)])
                states = torch.cat(visited)
                sample = np.random.default_rng(now).permutation(len(states))[:TAU_STATES]
                taus = layer_taus(student, states[torch.from_numpy(sample).to(device)], i, m, onehot) if m > 1 else []
                tau_rows += [[now, task, layer, *values] for layer, values in enumerate(taus, start=1)]
            text = write_returns(run_dir, writer, rows, references, m) + write_taus(run_dir, writer, tau_rows, now)
            progress.write(f"{text}; loss {metrics['loss/total'].item():.2g}")
            save_point(run_dir, now, modules, generator, [table], rows, tau_rows=tau_rows)
    writer.close()

    # final evaluation, checkpoint
    envs = [make_envs(task, args.final_eval_episodes) for task in tasks]
    returns = {task: evaluate(partial(policy, i), envs[i], device) for i, task in enumerate(tasks)}
    sizes = {"in_dim": in_dim, "obs_dim": obs_dim, "action_dim": action_dim, "hidden": args.hidden, "log_std": bounds}
    sizes |= {"layer_norm": False, "task_encoding": args.task_encoding}
    levels = [args.level[i % len(args.level)] for i in range(m)]
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "student", "tasks": list(tasks), "level": levels}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "returns": returns}
    write_atomic(output, partial(torch.save, checkpoint | {"actor": student.state_dict(), "versions": VERSIONS}))
    files = [str(path) for path in (output, run_dir / "returns.csv", run_dir / "tau.csv")]
    taus = {task: [round(row[3], 3) for row in tau_rows[-2 * m :] if row[1] == task] for task in tasks}
    found = {t: {"mean": round(np.mean(v), 1), "std": round(np.std(v), 1)} | references[t] for t, v in returns.items()}
    result = {"returns": found, "files": files, "run_dir": str(run_dir), "tau": taus}
    print("RESULT", json.dumps(result | {"seconds": round(time.time() - clock)}))


# ==================================== the method ends here; below: inputs, evaluation, files, command line, CUDA graph
def load_inputs(args, sizes: tuple, onehot: int, device):
    """Check the flags, read the teachers and states -> (table of rows (s, i, what the teacher says), one task below the
    other; rows per task; critics for q; bounds of log std for kl; {task: {"teacher": return}}; the files read)."""
    tasks, m = args.tasks, len(args.tasks)
    fits = len(set(tasks)) == m and len({task.partition("-")[0] for task in tasks}) == 1
    require(fits, f"--tasks: expected distinct tasks of one domain, found {', '.join(tasks)}")
    fits = len(args.level) in (1, m) and len(args.data) in (0, m) and len(args.teachers) in (0, m)
    require(fits, f"--level, --data, --teachers: expected one per task ({m}: {', '.join(tasks)})")
    offline, online = args.states == ("offline",), args.states == ("online",)
    fits = offline or (not args.data and (online or len(args.states) == m))
    require(fits, f"--states: expected offline, or without --data online or one file per task, found {args.states}")
    require(m > 1 or args.regularizer == "none", "--regularizer: expected two or more tasks, it compares task ids")
    tables, critics, references, bounds, paths = [], [], {}, None, []
    kl = " --actor gaussian" if args.loss == "kl" else ""
    for i, task in enumerate(tasks):
        level = args.level[i % len(args.level)]
        hint = f"python mop_pbrl_teacher.py --task {task} --level {level}{kl}"
        name = f"{task}-{level}-teacher{'-gaussian' if kl else ''}.pt"
        teacher_path = args.teachers[i] if args.teachers else find_file("checkpoints", name, hint)
        teacher = load_checkpoint(teacher_path, ("teacher",), task)
        actor, found = load_network(Actor, teacher, teacher_path).to(device), teacher["sizes"].get("log_std")
        critics += [load_network(Critics, teacher, teacher_path).to(device)] if args.loss == "q" else []
        bounds = list(found) if kl and i == 0 and found else bounds
        fits = not kl or (found and list(found) == bounds)
        require(fits, f"{teacher_path}: expected Gaussian teachers of one kind, found log std {found}; {hint}")
        stem = f"{Path(teacher_path).stem}-online" if online else f"{task}-{level}"
        hint = f"python mop_td3_collect.py {f'--policy {teacher_path} --mix online' if online else f'--task {task}'}"
        files = args.data or (() if offline or online else args.states)
        path = files[i] if files else find_file("data", f"{stem}.npz", hint)
        data, _ = load_dataset(path, task if offline or online else None, sizes)
        found = actor.net[0].in_features
        require(found == sizes[0], f"{teacher_path}: expected a teacher of {sizes[0]} observations, found {found}")
        obs = torch.from_numpy(data["observations"]).to(device)
        width = {"mse": sizes[1], "q": 0, "kl": 2 * sizes[1]}[args.loss]  # for mse, of a Gaussian teacher the mean
        said = torch.cat([actor(part)[:, :width] for part in obs.split(65_536)])
        tables.append(torch.cat([add_task(obs, i, onehot), said], dim=1))
        references[task] = {"teacher": round(float(np.mean(teacher["returns"][task])), 1)}
        paths += [teacher_path, path]
        print(f"task {i}: {task}, {len(obs)} states, teacher's return {references[task]['teacher']:.1f}")
    return torch.cat(tables), [len(part) for part in tables], critics, bounds, references, paths


def write_taus(run_dir: Path, writer: SummaryWriter, rows: list, now: int) -> str:
    """tau.csv of rows (step, task, layer, tau-a's mean and std, tau-b's mean); TensorBoard's and text of this step."""
    lines = [("step", "task", "layer", "tau_a_mean", "tau_a_std", "tau_b_mean"), *rows]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomic(run_dir / "tau.csv", lambda file: file.write(text.encode()))
    last = [row for row in rows if row[0] == now]
    for _, task, layer, tau, *_ in last:
        writer.add_scalar(f"tau_layer{layer}/{task}", tau, now)
    return f"; tau {', '.join(f'{row[3]:.2f}' for row in last)}" if last else ""


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


@torch.no_grad()
def evaluate(policy, envs: list, device: torch.device) -> list[float]:
    """Return of one episode in each environment, from fixed initial states, all stepped together; policy: (n, obs) ->
    (n, act or more) tensors, of which a Gaussian policy's mean comes first."""
    for e, env in enumerate(envs):
        env.task.random.seed(EVAL_SEED + e)
    steps, returns, action_dim = [env.reset() for env in envs], np.zeros(len(envs)), envs[0].action_spec().shape[0]
    while not steps[0].last():  # all episodes have the same time limit
        obs = torch.from_numpy(np.stack([step.observation["observations"] for step in steps])).float()
        actions = policy(obs.to(device))[:, :action_dim].cpu().numpy()
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        returns += np.array([step.reward for step in steps], np.float32)
    return returns.tolist()


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


def find_file(folder: str, name: str, hint: str) -> Path:
    """folder/name, else the bundled pretrained/name beside this script (and say so); fail with the hint otherwise."""
    path, bundled = Path(folder) / name, Path(__file__).resolve().parent / "pretrained" / name
    require(path.is_file() or bundled.is_file(), f"{path}: not found, nor in pretrained/; make it with: {hint}")
    if path.is_file():
        return path
    print(f"{path} is not there: using the bundled pretrained/{name}")
    return bundled


def load_dataset(path, task: str | None, sizes: tuple) -> tuple[dict, dict]:
    """Read a dataset .npz and check it, for the sizes (obs, act) and, if given, the task -> (arrays, metadata)."""
    hint = f"python mop_td3_collect.py --task {task or 'TASK'}"
    text = f"a dataset .npz with metadata as in docs/formats.md, no pickled objects (made by {hint})"
    with expecting(text, path), np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        file = np.load(path, allow_pickle=False)
        data, metadata = {name: file[name] for name in DATASET}, json.loads(str(file["metadata"]))
        assert metadata["schema_version"] == SCHEMA_VERSION, f"schema version {metadata['schema_version']}"
        assert task in (None, metadata["task"]), f"data of {metadata['task']}, not of {task}"
        assert np.isfinite(sum(r := metadata["episode_returns"]) / len(r)), "episode_returns that are not all finite"
        n = data["rewards"].size
        for name, (dtype, ndim) in DATASET.items():
            array, kind = data[name], np.dtype(dtype).kind
            fits = array.dtype.kind == kind and array.ndim == ndim and len(array) == n and array.size > 0
            assert fits, f"{name}: {array.dtype} with shape {array.shape} (rewards: {n} rows)"
            data[name] = array.astype(dtype, copy=False)
            finite = np.isfinite(data[name].reshape(n, -1)).all(axis=1)
            assert finite.all(), f"{name}: a NaN or infinite value, first in row {finite.argmin()}"
        found, wanted = [data[k].shape[1] for k in ("observations", "actions", "next_observations")], [*sizes, sizes[0]]
        assert found == wanted, f"observations, actions and next_observations of {found} values, not {wanted}"
        assert np.abs(data["actions"]).max() <= 1, f"actions outside [-1, 1]: {np.abs(data['actions']).max():.4g}"
    return data, metadata


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


def load_network(cls, checkpoint: dict, path) -> nn.Module:
    """The frozen Actor or Critics of a checkpoint, built without memory until the weights are known to fit."""
    with expecting("weights and sizes that fit together", path), torch.device("meta"):
        sizes, weights = checkpoint["sizes"], checkpoint["actor" if cls is Actor else "critics"]
        if cls is Actor:
            assert sizes.get("log_std") is None or len(sizes["log_std"]) == 2, f"log_std {sizes['log_std']}"
            out_dim = sizes["action_dim"] * (2 if sizes.get("log_std") else 1)
            network = Actor(sizes["in_dim"], out_dim, sizes["hidden"])
        else:
            network = Critics(len(weights["w1"]), sizes["obs_dim"], sizes["action_dim"], sizes["hidden"])
        network.load_state_dict(weights, assign=True)
        sane = all(w.is_floating_point() and (w.abs() < 1e6).all() for w in network.parameters())
        assert sane, "weights that are NaN, infinite or beyond a million"
    return network.float().requires_grad_(False)


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


def save_point(run_dir: Path, step: int, modules: dict, generator, tables, rows: list, **more) -> None:
    """Write the run's resume point: everything that restore puts back or compares, and more; only if it is finite."""
    require(all_finite(modules), f"step {step}: weights or Adam's states are not finite; try a lower learning rate")
    state = {name: module.state_dict() for name, module in modules.items()} | more
    state |= {"script": Path(__file__).stem, "argv": sys.argv[1:], "step": step, "rows": rows}
    state |= {"data_key": [zlib.crc32(table.cpu().numpy()) for table in tables], "generator": generator.get_state()}
    write_atomic(run_dir / "resume.pt", partial(torch.save, state))


def all_finite(modules: dict) -> bool:
    """Whether the weights of the networks and Adam's states are."""
    states = [s for module in modules.values() for s in getattr(module, "state", {}).values()]
    weights = [module.parameters() for module in modules.values() if isinstance(module, nn.Module)]
    return all(x.isfinite().all() for values in [*weights, *(s.values() for s in states)] for x in values)


def restore(point: dict | None, steps: int, modules: dict, generator, tables) -> tuple[int, list]:
    """Put a resume point's networks, optimisers and random numbers back -> (steps done, evaluations); None: (0, [])."""
    if point is None:
        return 0, []
    with expecting("a resume point that fits the arguments and the data", "--resume"):
        assert point["data_key"] == [zlib.crc32(table.cpu().numpy()) for table in tables], "one of other data"
        assert point["step"] in range(1, steps + 1), f"{point['step']} steps done of {steps}"
        for name, module in modules.items():  # Adam with the learning rate of these arguments
            module.load_state_dict(point[name] | {k: v for k, v in module.state_dict().items() if k == "param_groups"})
            for parameter, state in getattr(module, "state", {}).items():  # Adam's, whose shapes torch does not check
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape, f"other shapes in {name}"
        assert all_finite(modules), "weights or Adam's states that are not finite"
        generator.set_state(point["generator"])
        return int(point["step"]), [[int(now), str(task), list(map(float, v))] for now, task, v in point["rows"]]


def parse_args(cls, laptop: dict):
    """Command line -> (arguments, resume point or None, device); --resume puts the stored command line before this one,
    --scale gives the defaults of the flags. Sets torch's CPU threads (0: all cores) and precision."""
    parse = partial(tyro.cli, cls, description=sys.modules[cls.__module__].__doc__)
    args, point = parse(), None
    if args.resume is not None:
        path = Path(args.resume) / "resume.pt"
        with expecting(f"a run folder with a resume point of {Path(__file__).name}", f"--resume {args.resume}"):
            assert zipfile.ZipFile(path).testzip() is None, "damaged bytes"
            point = torch.load(path, map_location="cpu", weights_only=True)
            assert point["script"] == Path(__file__).stem, f"one of {point['script']}.py"
            sys.argv[1:] = [*map(str, point["argv"]), *sys.argv[1:], "--run-dir", args.resume]
        args = parse()
    if args.scale == "laptop":
        args = parse(default=replace(cls(), **laptop, scale="laptop"))
        print("--scale laptop:", *(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in laptop))
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            low, high = 0 if name in MAY_BE_ZERO or isinstance(value, bool) else "above 0", LIMITS.get(name, 2**31 - 1)
            fits = 0 <= value <= high and (value > 0 or low == 0)  # not so of NaN
            require(fits, f"--{name.replace('_', '-')}: expected a number from {low} to {high}, found {value}")
    cuda = torch.cuda.is_available()
    require(args.device != "cuda" or cuda, "--device cuda: no CUDA device was found; use --device cpu")
    torch.set_num_threads(args.threads or os.cpu_count())
    torch.set_float32_matmul_precision(args.matmul_precision)
    with suppress(AttributeError, OSError, TypeError):  # glibc only: reuse freed memory, new pages cost page faults
        for option, value in ((-1, 2**30), (-3, 2**26)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    return args, point, torch.device("cuda" if args.device != "cpu" and cuda else "cpu")


def prepare_outputs(args, name: str | None, outputs: list[Path], inputs: list) -> Path:
    """Make the run's folder (if named) and those of the outputs; fail where something would be lost or not written."""
    run_dir = Path(args.run_dir or f"runs/{Path(__file__).stem}-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if args.resume is None and name:
        empty = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
        hint = "choose another, or continue a run that has a resume.pt with --resume"
        require(empty, f"--run-dir {run_dir}: expected an empty folder or a new one; {hint}")
    taken = [*inputs, *(run_dir / part for part in ("", ".lock", "resume.pt", "returns.csv", "tau.csv"))]
    for path in outputs:
        require(not path.exists() or args.resume or args.overwrite, f"{path}: exists; pass --overwrite to replace it")
        fits = path.resolve() not in [Path(x).resolve() for x in taken] and (path.is_file() or not path.exists())
        require(fits, f"{path}: expected a file to write, found an input, a part of {run_dir}, or no plain file")
    for path in [*outputs, *([run_dir / "resume.pt"] if name else [])]:
        with expecting("a folder that can be made and written, and no other run that will write this file", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            assert os.access(path.parent, os.W_OK), "no permission"
            lock = os.open(path.parent / ".lock", os.O_CREAT | os.O_RDWR)  # a byte per file, till the process ends
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(path.name.encode()))

    def stop(number, frame):
        hint = f"; continue with --resume {run_dir}" if (run_dir / "resume.pt").exists() else ", without a resume point"
        print(f"{Path(sys.argv[0]).name}: stopped{hint}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; kill
        signal.signal(number, stop)
    return run_dir


def log(writer: SummaryWriter, step: int, metrics: dict) -> dict:
    """Write () tensors and numbers to TensorBoard, return them as numbers; stop at one that is NaN or infinite."""
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        hint = "training diverged, the last resume point is from before; try a lower learning rate"
        require(np.isfinite(value), f"step {step}: {name} is {value}: {hint}")
        writer.add_scalar(name, value, step)
    return values


def write_returns(run_dir: Path, writer: SummaryWriter, rows: list, references: dict, new: int) -> str:
    """returns.csv of rows (step, task, episode returns); of the `new` last ones TensorBoard's means, and text."""
    lines = [f"{step},{task},{e},{value:.4f}\n" for step, task, values in rows for e, value in enumerate(values)]
    write_atomic(run_dir / "returns.csv", lambda f: f.write("".join(["step,task,episode,return\n", *lines]).encode()))
    texts = [f"step {rows[-1][0]}:"]
    for step, task, values in rows[-new:]:
        writer.add_scalar(f"return/{task}", np.mean(values), step)
        beside = ", ".join(f"{name} {value:.1f}" for name, value in references.get(task, {}).items())
        texts.append(f"{task} {np.mean(values):.1f} +- {np.std(values):.1f}{beside and f' ({beside})'}")
    return " ".join(texts)


def in_cuda_graph(update, enabled: bool, generator: torch.Generator):
    """update itself, or if enabled on CUDA a call that replays it as one CUDA graph: the same kernels on the same
    memory without Python between them, so that what a call returns is overwritten by the next one."""
    if not enabled or generator.device.type != "cuda":
        return update

    def calls():
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        graph.register_generator_state(generator)
        for _ in range(3):  # run eagerly: lazily made states and workspaces come to be outside the graph
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                result = update()
            torch.cuda.synchronize()
            yield result
        with torch.cuda.graph(graph, stream=side):
            result = update()  # recorded, not run
        while True:
            graph.replay()
            yield result

    return calls().__next__


if __name__ == "__main__":
    main()
