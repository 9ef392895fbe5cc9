"""PBRL teachers from offline data: stage 2 of MOP (van Lith 2024, section 5.1.1).

Pessimistic Bootstrapping for offline RL (Bai et al. 2022, arXiv 2202.11566) on one dataset, without the environment
(which serves for evaluation only). Uncertainty is the disagreement of K critics, U(s, a) = std_k Q_k(s, a).

  python mop_pbrl_teacher.py --task walker-walk --level medium

Critic k, data rows:  y = r + gamma * (Q-_k(s', a') - beta_in * U-(s', a')),  a' = clip(pi-(s') + clip(eps, -c, c))
Critic k, OOD rows:   y = max(Q_k(s, a~) - beta_ood * U(s, a~), 0), a~ around pi(s) and around pi(s'); stop-gradient
           L_k = mean (Q_k - y)^2 over the data rows + the same over the OOD rows;  - = target network
Actor, every 2nd step: maximise mean min_k Q_k(s, pi(s)).   beta_ood decays 3 -> 0.1 by 0.99995 a step.
In:  data/<task>-<level>.npz (mop_td3_collect.py).
Out: checkpoints/<task>-<level>-teacher.pt with actor and critics, and the run's folder under runs/.
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
import tyro
from dm_control import suite
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
LOG_STD = {"deterministic": None, "gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}  # bounds
VERSIONS = {module.__name__: str(module.__version__) for module in (np, torch, mujoco)}
DATASET = {"observations": ("f4", 2), "actions": ("f4", 2), "rewards": ("f4", 1), "next_observations": ("f4", 2)}
DATASET |= {"terminals": ("bool", 1), "timeouts": ("bool", 1), "physics": ("f8", 2)}  # numpy type, dimensions
MAY_BE_ZERO = {"seed", "threads", "gamma", "policy_noise", "noise_clip", "exploration_noise", "ood_noise", "beta_in"}
MAY_BE_ZERO |= {"beta_ood", "beta_ood_min", "beta_ood_decay", "bc_coef", "reg_lambda", "learning_starts"}
LIMITS = {"gamma": 1, "tau": 1, "actor_tau": 1, "threads": 1024, "num_critics": 1024, "num_ood": 1024}  # of flags
LIMITS |= dict.fromkeys(("hidden", "teacher_hidden", "batch_size", "teacher_batch_size", "num_envs"), 2**16)
LAPTOP = {"gradient_steps": 30_000, "batch_size": 256, "learning_rate": 3e-4, "matmul_precision": "medium"}
LAPTOP |= {"num_ood": 1, "tau": 0.02, "actor_tau": 0.02, "policy_noise": 0.05, "beta_ood_decay": 0.9997, "bc_coef": 1.0}


@dataclass
class Args:
    # experiment
    task: str = "walker-walk"  # task of the dm_control suite, DOMAIN-TASK
    tasks: tuple[str, ...] = ()  # naive multi-task PBRL on these: one actor that reads the task id, critics per task
    seed: int = 1  # seed of the weights, the noise and the batches
    common_seed: bool = False  # every task's teacher from the same weights, batches and noise; else its own
    scale: Literal["thesis", "laptop"] = "thesis"  # defaults of the flags: the thesis's, or LAPTOP's for one CPU core
    run_dir: str | None = None  # of logs, curves and the resume point; default: runs/<script and settings>-<time>
    resume: str | None = None  # run folder to continue; its stored command line comes before this one
    eval_every: int = 10_000  # steps between evaluations and resume points
    eval_episodes: int = 10  # episodes per evaluation during training, always from the same initial states
    final_eval_episodes: int = 100  # episodes of the evaluation stored in the checkpoint
    # data
    level: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium",)  # of the behaviour; one or per task
    data: tuple[str, ...] = ()  # dataset files, one per task; default: data/<task>-<level>.npz, else in pretrained/
    output: str | None = None  # to write; default: checkpoints/<task>-<level>-teacher.pt (or -teacher-gaussian, -naive)
    overwrite: bool = False  # replace output files that exist
    # algorithm
    actor: Literal["deterministic", "gaussian", "gaussian-tanh"] = "deterministic"
    """gaussian: log std in [-5, 0]; gaussian-tanh: in [-1, 1] as in the author's code (the std stays above 0.36)"""
    gradient_steps: int = 1_000_000  # updates of the critics
    learning_rate: float = 1e-4  # Adam's, actor and critics
    batch_size: int = 1024  # transitions per update
    hidden: int = 256  # width of both hidden layers
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # target smoothing rate of the critics, every step (1: no targets, as in the author's code)
    actor_tau: float = 0.005  # target smoothing rate of the actor, every step
    policy_noise: float = 0.2  # std of the target policy's noise
    noise_clip: float = 0.5  # bound of the target policy's noise and of the OOD noise
    policy_frequency: int = 2  # critic updates per actor update
    num_critics: int = 5  # critics in the ensemble, K
    num_ood: int = 3  # OOD actions around pi(s), and as many around pi(s')
    ood_noise: float = 0.01  # std of the OOD actions around the policy's
    beta_in: float = 0.001  # uncertainty penalty in the targets of the data rows
    beta_ood: float = 3.0  # uncertainty penalty in the targets of the OOD rows, at the start
    beta_ood_min: float = 0.1  # the same, at the end
    beta_ood_decay: float = 0.99995  # factor of beta_ood per step
    bc_coef: float = 0.0  # weight of behaviour cloning in the actor's loss, not in the thesis (docs/pretrained.md)
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
def uncertainty(q: torch.Tensor) -> torch.Tensor:
    """U = std_k Q_k with K - 1, (K, B) -> (B,); on a CPU torch.std takes 25 times as long over so short a dimension."""
    return ((q - q.mean(dim=0)).square().sum(dim=0) / (len(q) - 1)).sqrt()


def pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, beta_ood, args):
    """PBRL's critic loss, summed over the K critics (arXiv 2202.11566, section 3; thesis 5.1.1).

    batch: obs (B, obs), action (B, act), reward (B,), next_obs (B, obs), terminal (B,), which is 0 at a timeout;
    noise: standard normal, (B, act) for the target action and (num_ood, 2B, act) for the OOD actions.
    Returns (loss (), metrics: dict of () tensors).
    """
    obs, action, reward, next_obs, terminal = batch
    target_noise, ood_noise = noise
    clip, n = args.noise_clip, len(obs)
    with torch.no_grad():
        next_action = (target_actor(next_obs) + (args.policy_noise * target_noise).clamp(-clip, clip)).clamp(-1, 1)
        next_q = target_critics(next_obs, next_action)  # (K, B)
        target = reward + args.gamma * (1 - terminal) * (next_q - args.beta_in * uncertainty(next_q))  # (K, B)
        states = torch.cat([obs, next_obs])  # (2B, obs)
        ood_noise = (args.ood_noise * ood_noise).clamp(-clip, clip)
        ood_action = (actor(states) + ood_noise).clamp(-1, 1)  # (num_ood, 2B, act)
    rows = torch.cat([obs, states.repeat(len(ood_noise), 1)])  # data and OOD rows in one forward
    q = critics(rows, torch.cat([action, ood_action.flatten(0, 1)]))  # (K, B + num_ood * 2B)
    q, ood_q = q[:, :n], q[:, n:]
    with torch.no_grad():
        ood_u = uncertainty(ood_q)  # (num_ood * 2B,)
        ood_target = (ood_q - beta_ood * ood_u).clamp(min=0)
        metrics = {"value/q_data": q.mean(), "value/q_ood": ood_q.mean()}
        metrics |= {"uncertainty/data": uncertainty(q).mean(), "uncertainty/ood": ood_u.mean()}
    in_loss = (q - target).square().mean(dim=1).sum()
    ood_loss = (ood_q - ood_target).square().mean(dim=1).sum()
    metrics |= {"loss/in_distribution": in_loss.detach(), "loss/ood": ood_loss.detach()}
    return in_loss + ood_loss, metrics


def pbrl_actor_loss(actor, critics, obs, action, bc_coef: float = 0.0) -> torch.Tensor:
    """- mean over the batch of min_k Q_k(s, pi(s)).

    With bc_coef > 0 (not in the thesis), the objective of TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860) over the same
    pessimistic value: - mean min_k Q_k / mean |min_k Q_k| + bc_coef * mean || pi(s) - a ||^2.
    """
    policy = actor(obs)
    q = critics(obs, policy).min(dim=0).values  # (B,)
    if bc_coef == 0:
        return -q.mean()
    return -q.mean() / q.abs().mean().detach() + bc_coef * (policy - action).square().sum(dim=1).mean()


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


def act(actor, generator, bounds, task_id: int | None, obs: torch.Tensor) -> torch.Tensor:
    """The policy's actions in training, (B, obs) -> (B, act); of a Gaussian one a reparameterised sample, clipped."""
    output = actor(obs if task_id is None else add_task(obs, task_id))
    if bounds is None:
        return output
    mean, log_std = gaussian(output, bounds)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + log_std.exp() * noise).clamp(-1, 1)


def main():
    args, point, device = parse_args(Args, LAPTOP)
    tasks, naive, bounds = args.tasks or (args.task,), bool(args.tasks), LOG_STD[args.actor]
    ids = range(len(tasks)) if naive else [None]  # the task ids that the actor reads
    envs = [make_envs(task, args.eval_episodes) for task in tasks]
    obs_dim, action_dim = envs[0][0].observation_spec()["observations"].shape[0], envs[0][0].action_spec().shape[0]
    tables, references, level, inputs = load_inputs(args, tasks, (obs_dim, action_dim), device)
    kind = "naive" if naive else "teacher" if bounds is None else f"teacher-{args.actor}"
    output = Path(args.output or f"checkpoints/{'+'.join(tasks)}-{level}-{kind}.pt")
    run_dir = prepare_outputs(args, f"{output.stem}-seed{args.seed}", [output], inputs)

    # networks
    name, total = "+".join(tasks), args.gradient_steps
    seed = args.seed if args.common_seed else zlib.crc32(f"{args.seed} teacher {name} from {name}".encode())
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    columns = [obs_dim, action_dim, 1, obs_dim, 1]  # (s, a, r, s', terminal)
    out_dim = action_dim if bounds is None else 2 * action_dim
    actor, target_actor = (Actor(obs_dim + naive, out_dim, args.hidden).to(device) for _ in range(2))
    critics, target_critics = (
        [Critics(args.num_critics, obs_dim, action_dim, args.hidden).to(device) for _ in tasks] for _ in range(2)
    )
    adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
    actor_optimizer, critic_optimizers = adam(actor.parameters()), [adam(c.parameters()) for c in critics]
    target_actor.load_state_dict(actor.state_dict())
    modules = {"actor": actor, "target_actor": target_actor, "actor_optimizer": actor_optimizer}
    for i in range(len(tasks)):
        target_critics[i].load_state_dict(critics[i].state_dict())
        parts = {"critics": critics[i], "target_critics": target_critics[i], "critic_optimizer": critic_optimizers[i]}
        modules |= {f"{name}_{i}" if naive else name: part for name, part in parts.items()}
    start, rows = restore(point, total, modules, generator, tables)
    count = torch.tensor(float(start), dtype=torch.float64, device=device)  # the step, where a CUDA graph can read it

    def update(with_actor: bool) -> dict:
        """The critics of every task in turn, with_actor the actor after each of them, and the targets."""
        beta_ood = (args.beta_ood * args.beta_ood_decay**count).clamp(min=args.beta_ood_min)
        metrics = {"beta_ood": beta_ood}
        count.add_(1)
        for i, task_id in enumerate(ids):
            # sample
            index = torch.randint(len(tables[i]), (args.batch_size,), generator=generator, device=device)
            obs, action, reward, next_obs, terminal = tables[i][index].split(columns, dim=1)
            target_noise = torch.randn(action.shape, generator=generator, device=device)
            ood_noise = torch.randn(args.num_ood, 2 * len(obs), action_dim, generator=generator, device=device)
            policy, target_policy = (partial(act, a, generator, bounds, task_id) for a in (actor, target_actor))

            # critics
            batch, noise = (obs, action, reward.squeeze(1), next_obs, terminal.squeeze(1)), (target_noise, ood_noise)
            networks = critics[i], target_critics[i], policy, target_policy
            loss, found = pbrl_critic_loss(*networks, batch, noise, beta_ood, args)
            critic_optimizers[i].zero_grad()
            loss.backward()
            critic_optimizers[i].step()
            metrics |= {f"{name}/{tasks[i]}" if naive else name: value for name, value in found.items()}

            # actor
            if with_actor:
                pi_loss = pbrl_actor_loss(policy, critics[i], obs, action, args.bc_coef)
                actor_optimizer.zero_grad()
                pi_loss.backward(inputs=list(actor.parameters()))  # none for the critics
                actor_optimizer.step()

            # targets
            with torch.no_grad():
                torch._foreach_lerp_(list(target_critics[i].parameters()), list(critics[i].parameters()), args.tau)
        with torch.no_grad():
            torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.actor_tau)
        return metrics

    updates = {flag: in_cuda_graph(partial(update, flag), args.cuda_graph, generator) for flag in (False, True)}
    policies = [actor if i is None else partial(lambda i, obs: actor(add_task(obs, i)), i) for i in ids]
    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    progress = tqdm(range(start, total), total=total, initial=start, desc=output.stem, unit="step", disable=None)
    clock = time.time()
    for step in progress:
        metrics = updates[step % args.policy_frequency == 0]()

        # log, evaluate, save
        now = step + 1
        at_evaluation = now % args.eval_every == 0 or now == total
        if now % 1000 == 0 or at_evaluation:
            speed = {"speed/steps_per_second": (now - start) / (time.time() - clock)}
            values = log(writer, now, metrics | speed)
        if at_evaluation:
            rows += [[now, task, evaluate(policies[i], envs[i], device)] for i, task in enumerate(tasks)]
            text = write_returns(run_dir, writer, rows, references, len(tasks))
            progress.write(f"{text}; {', '.join(f'{name} {value:.3g}' for name, value in values.items())}")
            save_point(run_dir, now, modules, generator, tables, rows)
    writer.close()

    # final evaluation, checkpoint
    returns = {t: evaluate(policies[i], make_envs(t, args.final_eval_episodes), device) for i, t in enumerate(tasks)}
    sizes = {"in_dim": obs_dim + naive, "obs_dim": obs_dim, "action_dim": action_dim, "hidden": args.hidden}
    sizes |= {"num_critics": args.num_critics, "log_std": bounds, "layer_norm": False}
    sizes |= {"task_encoding": "number"} if naive else {}
    weights = {"critics": [c.state_dict() for c in critics] if naive else critics[0].state_dict()}
    weights |= {"actor": actor.state_dict()}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": kind.split("-")[0], "tasks": list(tasks), "level": level}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "returns": returns, **weights}
    write_atomic(output, partial(torch.save, checkpoint | {"versions": VERSIONS}))
    found = {t: {"mean": round(np.mean(v), 1), "std": round(np.std(v), 1)} | references[t] for t, v in returns.items()}
    result = {"returns": found, "files": [str(output)], "run_dir": str(run_dir)}
    print("RESULT", json.dumps(result | {"seconds": round(time.time() - clock)}))


# ==================================== the method ends here; below: inputs, evaluation, files, command line, CUDA graph
def load_inputs(args, tasks, sizes, device):
    """Check the flags, read the datasets -> (a table (N, s + a + r + s' + terminal) per task, {task: {"data": return}},
    level in the file names, the files read)."""
    m, names = len(tasks), ", ".join(tasks)
    distinct = len(set(tasks)) == m and (m > 1 or not args.tasks)
    require(distinct, f"--tasks: expected two or more distinct tasks (one task: --task), found {names}")
    fits = len(args.level) in (1, m) and len(args.data) in (0, m)
    require(fits, f"--level, --data: expected one level or one per task, and one file per task ({names})")
    require(args.num_critics > 1, f"--num-critics: expected 2 or more (U is their std), found {args.num_critics}")
    levels = args.level * m if len(args.level) == 1 else args.level
    tables, references, paths = [], {}, list(args.data)
    for i, task in enumerate(tasks):
        if not args.data:
            paths.append(find_file("data", f"{task}-{levels[i]}.npz", f"python mop_td3_collect.py --task {task}"))
        data, metadata = load_dataset(paths[i], task, sizes)
        rows = [data[k].reshape(len(data["rewards"]), -1) for k in DATASET if k not in ("timeouts", "physics")]
        tables.append(torch.from_numpy(np.concatenate(rows, axis=1, dtype=np.float32)).to(device))
        references[task] = {"data": round(float(np.mean(metadata["episode_returns"])), 1)}
        del data, rows
    return tables, references, "+".join(dict.fromkeys(levels)), paths


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
