"""Data sharing: MOP with every teacher trained on every task's data, relabelled (van Lith 2024, section 6.4.2).

  python mop_ds.py --level medium

The reward functions are known, so each task's data serves the others: r_{j->i} = R_i(s, a, s'), through dm_control's
reward of the stored physics state of s'. Teacher i learns with PBRL (mop_pbrl_teacher.py) from the union over j of
D_{j->i}; the student is distilled on the states of the union D, every state fed to every teacher:

  L_DS = mean over tasks i and states s of D of  || pi_i^T(s) - pi^S(s, i) ||_2^2

In:  data/<task>-<level>.npz of every task, else the bundled ones in pretrained/.
Out: checkpoints/<task>-<level>-ds-teacher.pt, student.pt in the run's folder, relabelled rewards beside each dataset.
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
VERSIONS = {module.__name__: str(module.__version__) for module in (np, torch, mujoco)}
DATASET = {"observations": ("f4", 2), "actions": ("f4", 2), "rewards": ("f4", 1), "next_observations": ("f4", 2)}
DATASET |= {"terminals": ("bool", 1), "timeouts": ("bool", 1), "physics": ("f8", 2)}  # numpy type, dimensions
MAY_BE_ZERO = {"seed", "threads", "gamma", "policy_noise", "noise_clip", "exploration_noise", "ood_noise", "beta_in"}
MAY_BE_ZERO |= {"beta_ood", "beta_ood_min", "beta_ood_decay", "bc_coef", "reg_lambda", "learning_starts"}
LIMITS = {"gamma": 1, "tau": 1, "actor_tau": 1, "threads": 1024, "num_critics": 1024, "num_ood": 1024}  # of flags
LIMITS |= dict.fromkeys(("hidden", "teacher_hidden", "batch_size", "teacher_batch_size", "num_envs"), 2**16)
LAPTOP = {"gradient_steps": 20_000, "learning_rate": 1e-3, "matmul_precision": "medium"}  # --scale laptop; teachers:
LAPTOP |= {"teacher_steps": 30_000, "teacher_batch_size": 256, "teacher_learning_rate": 3e-4}
LAPTOP |= {"num_ood": 1, "tau": 0.02, "actor_tau": 0.02, "policy_noise": 0.05, "beta_ood_decay": 0.9997, "bc_coef": 1.0}


@dataclass
class Args:
    # experiment
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")  # suite tasks, DOMAIN-TASK; the position is the id
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
    teachers: tuple[str, ...] = ()  # teachers of an earlier run of this script, one per task, instead of training them
    output: str | None = None  # student's file instead of the one in the run's folder
    overwrite: bool = False  # replace output files that exist
    # student
    gradient_steps: int = 500_000  # updates of the student
    learning_rate: float = 1e-4  # Adam's
    batch_size: int = 1024  # states per task and update
    hidden: int = 256  # width of both hidden layers
    task_encoding: Literal["number", "onehot"] = "number"  # the task id as one number or as a flag per task
    # teachers (PBRL)
    teacher_steps: int = 1_000_000  # updates of each teacher
    teacher_learning_rate: float = 1e-4  # Adam's, actor and critics
    teacher_batch_size: int = 1024  # transitions per update of a teacher
    teacher_hidden: int = 256  # width of a teacher's hidden layers
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
def compute_rewards(task: str, physics: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """r_{j->i} = R_i(s, a, s') from the physics states of s', (N, state), and the actions, (N, act) -> (N,) f32."""
    env = make_envs(task, 1)[0]
    simulation, rewards = env.physics, np.empty(len(physics), np.float32)
    for row in tqdm(range(len(physics)), desc=f"rewards of {task}", unit="state", disable=None):
        simulation.set_state(physics[row])
        simulation.set_control(actions[row])
        simulation.forward()
        rewards[row] = env.task.get_reward(simulation)
    return rewards


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


def train_teacher(label, seed: int, transitions, envs, args, device, point, output):
    """PBRL on one table of transitions, as in mop_pbrl_teacher.py -> (actor, critics).

    transitions: rows (s, a, r, s', terminal); envs: for evaluation; point: this teacher's resume point or None; output:
    the run's (folder, TensorBoard writer, evaluations, number of this teacher).
    """
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    (run_dir, writer, rows, number), total = output, args.teacher_steps
    obs_dim, action_dim = envs[0].observation_spec()["observations"].shape[0], envs[0].action_spec().shape[0]
    columns, sizes = [obs_dim, action_dim, 1, obs_dim, 1], (obs_dim, action_dim, args.teacher_hidden)
    actor, target_actor = (Actor(*sizes).to(device) for _ in range(2))
    critics, target_critics = (Critics(args.num_critics, *sizes).to(device) for _ in range(2))
    adam = partial(torch.optim.Adam, lr=args.teacher_learning_rate, fused=True, capturable=True)
    actor_optimizer, critic_optimizer = adam(actor.parameters()), adam(critics.parameters())
    target_actor.load_state_dict(actor.state_dict())
    target_critics.load_state_dict(critics.state_dict())
    modules = {"actor": actor, "critics": critics, "target_actor": target_actor, "target_critics": target_critics}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    start, _ = restore(point, total, modules, generator, [transitions])
    count = torch.tensor(float(start), dtype=torch.float64, device=device)  # the step, where a CUDA graph can read it

    def update(with_actor: bool) -> dict:
        """The critics, with_actor the actor, and the targets."""
        # sample
        beta_ood = (args.beta_ood * args.beta_ood_decay**count).clamp(min=args.beta_ood_min)
        count.add_(1)
        index = torch.randint(len(transitions), (args.teacher_batch_size,), generator=generator, device=device)
        obs, action, reward, next_obs, terminal = transitions[index].split(columns, dim=1)
        target_noise = torch.randn(action.shape, generator=generator, device=device)
        ood_noise = torch.randn(args.num_ood, 2 * len(obs), action_dim, generator=generator, device=device)

        # critics
        batch, noise = (obs, action, reward.squeeze(1), next_obs, terminal.squeeze(1)), (target_noise, ood_noise)
        networks = critics, target_critics, actor, target_actor
        loss, metrics = pbrl_critic_loss(*networks, batch, noise, beta_ood, args)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        # actor
        if with_actor:
            pi_loss = pbrl_actor_loss(actor, critics, obs, action, args.bc_coef)
            actor_optimizer.zero_grad()
            pi_loss.backward(inputs=list(actor.parameters()))  # none for the critics
            actor_optimizer.step()

        # targets
        with torch.no_grad():
            torch._foreach_lerp_(list(target_critics.parameters()), list(critics.parameters()), args.tau)
            torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.actor_tau)
        return {**metrics, "beta_ood": beta_ood}

    updates = {flag: in_cuda_graph(partial(update, flag), args.cuda_graph, generator) for flag in (False, True)}
    progress = tqdm(range(start, total), total=total, initial=start, desc=label, unit="step", disable=None)
    for step in progress:
        metrics = updates[step % args.policy_frequency == 0]()

        # log, evaluate, save
        now = step + 1
        at_evaluation = now % args.eval_every == 0 or now == total
        if now % 1000 == 0 or at_evaluation:
            values = log(writer, now, {f"{label}/{name}": value for name, value in metrics.items()})
        if at_evaluation:
            rows.append([now, label, evaluate(actor, envs, device)])
            texts = (f"{name.split('/', 1)[1]} {value:.3g}" for name, value in values.items())
            progress.write(f"{write_returns(run_dir, writer, rows, {}, 1)}; {', '.join(texts)}")
            save_point(run_dir, now, modules, generator, [transitions], rows, phase=number)
    return actor.requires_grad_(False), critics.requires_grad_(False)


def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def mse_loss(student, x, teacher_action) -> torch.Tensor:
    """|| pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (thesis 5.1.3). Rows x: (R, in_dim) -> (R,)."""
    return (teacher_action - student(x)).square().sum(dim=1)


def main():
    args, point, device = parse_args(Args, LAPTOP)
    tasks, m, total = args.tasks, len(args.tasks), args.gradient_steps
    require(tasks, "--tasks: expected one task or more, found none")
    envs = [make_envs(task, args.eval_episodes) for task in tasks]
    obs_dim, action_dim = envs[0][0].observation_spec()["observations"].shape[0], envs[0][0].action_spec().shape[0]
    onehot = m if args.task_encoding == "onehot" else 0
    tables, jobs, run_dir = load_inputs(args, (obs_dim, action_dim), device)
    output, levels = Path(args.output or run_dir / "student.pt"), [args.level[i % len(args.level)] for i in range(m)]
    obs = torch.cat([table[:, :obs_dim] for table in tables])  # the union's states

    # teachers
    writer = SummaryWriter(run_dir)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    with expecting("a resume point with all its parts", "--resume"):
        rows, phase = (list(point["rows"]), range(len(jobs) + 1).index(point["phase"])) if point else ([], 0)
    clock, teachers, references = time.time(), [], {task: {} for task in tasks}
    sizes = {"in_dim": obs_dim, "obs_dim": obs_dim, "action_dim": action_dim, "layer_norm": False, "log_std": None}
    for number, (i, label, sources, level, path, trained) in enumerate(jobs):
        if trained and phase <= number:
            names, n = [tasks[j] for j in sources], obs_dim + action_dim
            columns = [*range(n), n + i, *range(n + m, tables[0].shape[1])]  # (s, a, r_i, s', terminal)
            transitions = torch.cat([tables[j][:, columns] for j in sources])
            seed = zlib.crc32(f"{args.seed} teacher {tasks[i]} from {'+'.join(sorted(names))}".encode())
            seed = args.seed if args.common_seed else seed
            job = f"{tasks[i]} {label}", seed, transitions, envs[i], args, device, point if phase == number else None
            actor, critics = train_teacher(*job, (run_dir, writer, rows, number))
            returns = evaluate(actor, make_envs(tasks[i], args.final_eval_episodes), device)
            checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "teacher", "tasks": [tasks[i]], "level": level}
            checkpoint |= {"args": vars(args), "step": args.teacher_steps, "data_tasks": names, "versions": VERSIONS}
            checkpoint["sizes"] = sizes | {"hidden": args.teacher_hidden, "num_critics": args.num_critics}
            checkpoint |= {"actor": actor.state_dict(), "critics": critics.state_dict(), "returns": {tasks[i]: returns}}
            write_atomic(path, partial(torch.save, checkpoint))
            del transitions
        actor, critics, returns = load_teacher(path, tasks[i], (obs_dim, action_dim), device)
        teachers.append((actor, critics))
        references[tasks[i]][label] = round(float(np.mean(returns)), 1)
        print(f"{tasks[i]} {label}: {path}, return {np.mean(returns):.1f} +- {np.std(returns):.1f}")

    # what the student is to do in every state, for every task
    parts = [
        torch.cat([add_task(part, i, onehot), teachers[i][0](part)], dim=1)
        for i in range(m)
        for part in obs.split(65_536)
    ]
    table = torch.cat(parts)  # (m * N, in_dim + act)
    del parts

    # student
    seed = zlib.crc32(f"{args.seed} student".encode())
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    in_dim = obs_dim + (onehot or 1)
    student = Actor(in_dim, action_dim, args.hidden).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, fused=True, capturable=True)
    modules = {"student": student, "optimizer": optimizer}
    start, _ = restore(point if phase == len(jobs) else None, total, modules, generator, [table])

    def update() -> dict:
        # sample a batch of every task, all from the union
        shape, keywords = (args.batch_size,), {"generator": generator, "device": device}
        index = torch.cat([torch.randint(i * len(obs), (i + 1) * len(obs), shape, **keywords) for i in range(m)])
        x, target_action = table[index].tensor_split([in_dim], dim=1)

        # student
        losses = mse_loss(student, x, target_action)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        by_task = losses.detach().view(m, -1).mean(dim=1)
        return {f"loss/mse/{task}": value for task, value in zip(tasks, by_task, strict=True)}

    updates = in_cuda_graph(update, args.cuda_graph, generator)
    policies = [partial(lambda i, x: student(add_task(x, i, onehot)), i) for i in range(m)]
    progress = tqdm(range(start + 1, total + 1), total=total, initial=start, desc="student", unit="step", disable=None)
    for now in progress:
        metrics = updates()

        # log, evaluate, save
        at_evaluation = now % args.eval_every == 0 or now == total
        if now % 1000 == 0 or at_evaluation:
            values = log(writer, now, metrics)
        if at_evaluation:
            rows += [[now, task, evaluate(policies[i], envs[i], device)] for i, task in enumerate(tasks)]
            text = write_returns(run_dir, writer, rows, references, m)
            progress.write(f"{text}; {', '.join(f'{name} {value:.3g}' for name, value in values.items())}")
            save_point(run_dir, now, modules, generator, [table], rows, phase=len(jobs))
    writer.close()

    # final evaluation, checkpoint
    returns = {t: evaluate(policies[i], make_envs(t, args.final_eval_episodes), device) for i, t in enumerate(tasks)}
    sizes |= {"in_dim": in_dim, "hidden": args.hidden, "task_encoding": args.task_encoding}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "student", "tasks": list(tasks), "level": levels}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "returns": returns}
    checkpoint |= {"actor": student.state_dict(), "versions": VERSIONS}
    write_atomic(output, partial(torch.save, checkpoint))
    files = [output, *(path for *_, path, trained in jobs if trained), run_dir / "returns.csv"]
    found = {t: {"mean": round(np.mean(v), 1), "std": round(np.std(v), 1)} | references[t] for t, v in returns.items()}
    result = {"returns": found, "files": [str(path) for path in files]}
    print("RESULT", json.dumps(result | {"run_dir": str(run_dir), "seconds": round(time.time() - clock)}))


# ==================================== the method ends here; below: inputs, evaluation, files, command line, CUDA graph
def load_inputs(args, sizes: tuple, device):
    """Check the flags, read the datasets -> (a table of rows (s, a, reward under every task, s', terminal) per dataset,
    jobs (task, name, whose data it learns from, level, file, whether it is trained here) per teacher, run folder)."""
    tasks, m = args.tasks, len(args.tasks)
    fits = m > 1 and len(set(tasks)) == m and len({task.partition("-")[0] for task in tasks}) == 1
    require(fits, f"--tasks: expected two or more distinct tasks of one domain, found {', '.join(tasks)}")
    fits = len(args.level) in (1, m) and len(args.data) in (0, m)
    require(fits, f"--level, --data: expected one level or one per task, and one file per task ({', '.join(tasks)})")
    require(args.num_critics > 1, f"--num-critics: expected 2 or more (U is their std), found {args.num_critics}")
    levels = [args.level[i % len(args.level)] for i in range(m)]
    names = [f"{task}-{level}" for task, level in zip(tasks, levels, strict=True)]
    require(len(args.teachers) in (0, m), f"--teachers: expected none or {m} files, found {len(args.teachers)}")
    jobs = [(i, "teacher", range(m), levels[i], Path(f"checkpoints/{names[i]}-ds-teacher.pt"), True) for i in range(m)]
    jobs = [(*job[:4], path, False) for job, path in zip(jobs, args.teachers, strict=True)] if args.teachers else jobs
    hint = "python mop_td3_collect.py --task"
    paths = list(args.data) or [find_file("data", f"{n}.npz", f"{hint} {t}") for n, t in zip(names, tasks, strict=True)]
    datasets = [load_dataset(path, task, sizes)[0] for path, task in zip(paths, tasks, strict=True)]
    for i, *_, path, trained in jobs:
        if not trained:
            load_teacher(path, tasks[i], sizes, device)
    outputs = [path for *_, path, trained in jobs if trained] + ([Path(args.output)] if args.output else [])
    inputs = paths + [path for *_, path, trained in jobs if not trained]
    name = f"{args.hidden}-{'+'.join(dict.fromkeys(args.level))}-seed{args.seed}"
    run_dir = prepare_outputs(args, name, outputs, inputs)
    tables = []
    for j, (path, data) in enumerate(zip(paths, datasets, strict=True)):
        rows = np.linspace(0, len(data["rewards"]) - 1, 50).astype(int)
        with expecting("physics states after the actions, which give the rewards", path):
            again = compute_rewards(tasks[j], data["physics"][rows], data["actions"][rows])
            worst = np.abs(again - data["rewards"][rows]).max()
            assert worst < 1e-3, f"rewards that differ by up to {worst:.3g}"
        rewards = [data["rewards"] if task == tasks[j] else relabel(path, data, task) for task in tasks]
        rows = [data["observations"], data["actions"], *rewards, data["next_observations"], data["terminals"]]
        rows = [row.reshape(len(data["rewards"]), -1) for row in rows]
        tables.append(torch.from_numpy(np.concatenate(rows, axis=1, dtype=np.float32)).to(device))
        means = ", ".join(f"{reward.mean():.3f} as {task}" for reward, task in zip(rewards, tasks, strict=True))
        print(f"task {j}: {tasks[j]}, {len(tables[j])} transitions, mean reward {means}")
    return tables, jobs, run_dir


def relabel(path, data: dict, task: str) -> np.ndarray:
    """The dataset's rewards under another task (N,) f32; kept beside it, in a file with a hash of it in its name."""
    key = zlib.crc32(np.ascontiguousarray(data["physics"]), zlib.crc32(np.ascontiguousarray(data["actions"])))
    cache = Path(path).with_name(f"{Path(path).stem}.{task}-{VERSIONS['mujoco']}-{key:08x}.npy")
    with suppress(OSError, ValueError, EOFError):  # none there, or a broken one, which is made anew
        rewards = np.load(cache, allow_pickle=False)
        if rewards.shape == data["rewards"].shape and np.isfinite(rewards).all():
            return rewards.astype(np.float32)
    rewards = compute_rewards(task, data["physics"], data["actions"])
    with suppress(SystemExit, OSError):  # no room for it: it can be computed again
        own = cache.with_suffix(f".{os.getpid()}.npy")  # another run may be writing the same one
        write_atomic(own, lambda file: np.save(file, rewards))
        own.replace(cache)
    return rewards


def load_teacher(path, task: str, sizes: tuple, device):
    """Actor, critics and episode returns of a teacher's checkpoint."""
    checkpoint = load_checkpoint(path, ("teacher",), task)
    actor, critics = (load_network(cls, checkpoint, path).to(device) for cls in (Actor, Critics))
    found = actor.net[0].in_features, actor.net[-2].out_features
    wanted = "a deterministic teacher of {} observations and {} actions".format(*sizes)
    require(found == sizes, f"{path}: expected {wanted}, found {found}")
    return actor, critics, checkpoint["returns"][task]


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
