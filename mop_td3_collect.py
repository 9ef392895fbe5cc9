"""TD3 behaviour policies and offline datasets: stage 1 of MOP (van Lith 2024, section 4.4.3).

TD3 (Fujimoto et al. 2018, arXiv 1802.09477) learns one task of the dm_control suite. Stopped early it is the medium
behaviour, at its end the expert one. Each is then rolled out in many lockstep environments to make a dataset.

  python mop_td3_collect.py --task walker-walk                      train, then collect medium, expert, medium-replay
  python mop_td3_collect.py --policy checkpoints/walker-walk-medium-behavior.pt --mix noise           collect only

Critic k:  y = r + gamma * min_k Q-_k(s', clip(pi-(s') + clip(eps, -c, c), -1, 1)),  eps ~ N(0, policy_noise)
           L_k = mean (Q_k(s, a) - y)^2;   actor, every 2nd step: maximise mean Q_1(s, pi(s)).
In:  nothing, or a behaviour or teacher checkpoint (--policy).
Out: checkpoints/<task>-<level>-behavior.pt, data/<task>-<level>.npz, and the run's folder under runs/.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from mujoco.batch import Batch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
WALKER = ("walker-stand", "walker-walk", "walker-run")  # simulated in mujoco.batch
PLAIN_ONE_IN = {"online": 1, "noise": 10, "random90": 10, "random99": 100}  # episodes of a mix by the plain policy
VERSIONS = {module.__name__: str(module.__version__) for module in (np, torch, mujoco)}
DATASET = {"observations": ("f4", 2), "actions": ("f4", 2), "rewards": ("f4", 1), "next_observations": ("f4", 2)}
DATASET |= {"terminals": ("bool", 1), "timeouts": ("bool", 1), "physics": ("f8", 2)}  # numpy type, dimensions
MAY_BE_ZERO = {"seed", "threads", "gamma", "policy_noise", "noise_clip", "exploration_noise", "ood_noise", "beta_in"}
MAY_BE_ZERO |= {"beta_ood", "beta_ood_min", "beta_ood_decay", "bc_coef", "reg_lambda", "learning_starts"}
LIMITS = {"gamma": 1, "tau": 1, "actor_tau": 1, "threads": 1024, "num_critics": 1024, "num_ood": 1024}  # of flags
LIMITS |= dict.fromkeys(("hidden", "teacher_hidden", "batch_size", "teacher_batch_size", "num_envs"), 2**16)
LAPTOP = {"hidden": 256, "batch_size": 128, "learning_rate": 3e-4, "total_timesteps": 250_000}  # --scale laptop


@dataclass
class Args:
    # experiment
    task: str = "walker-walk"  # task of the dm_control suite, DOMAIN-TASK
    seed: int = 1  # seed of the weights, the noise, the batches and the initial states
    scale: Literal["thesis", "laptop"] = "thesis"  # defaults of the flags: the thesis's, or LAPTOP's for one CPU core
    run_dir: str | None = None  # of logs, curves and the resume point; default: runs/<script and settings>-<time>
    resume: str | None = None  # run folder to continue; its stored command line comes before this one
    eval_every: int = 10_000  # steps between evaluations and resume points; a multiple of the episode length
    eval_episodes: int = 10  # episodes per evaluation during training, always from the same initial states
    final_eval_episodes: int = 100  # episodes of the evaluation stored in the checkpoint
    # data
    policy: str | None = None  # behaviour or teacher checkpoint: no training, collect with this policy only
    mix: Literal["online", "noise", "random90", "random99"] = "online"
    """with --policy: all episodes by the policy | 10%, 90% with N(0, 1) noise | 10% or 1%, the rest uniform actions"""
    output: str | None = None  # with --policy: dataset to write; default: data/<name of the checkpoint>[-mix].npz
    datasets: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium", "expert", "medium-replay")
    """after training: datasets to write"""
    num_transitions: int = 1_000_000  # transitions per dataset (medium-replay has as many as training saw)
    num_envs: int = 100  # environments stepped in lockstep while collecting
    medium_step: int = 1_000_000  # step at which the policy is the medium one; a multiple of --eval-every
    medium_return: float | None = None  # instead of --medium-step: the first evaluation with this mean return or more
    overwrite: bool = False  # replace output files that exist
    # algorithm
    total_timesteps: int = 2_000_000  # environment steps, each with one critic update; the replay buffer holds them all
    learning_rate: float = 1e-4  # Adam's, actor and critics
    batch_size: int = 1024  # transitions per update
    hidden: int = 1024  # width of both hidden layers
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # target smoothing rate, critics and actor
    policy_noise: float = 0.3  # std of the target policy's noise (author's code: 0.2)
    noise_clip: float = 0.3  # bound of the target policy's noise
    exploration_noise: float = 0.2  # std of the acting policy's noise
    policy_frequency: int = 2  # critic updates per actor update
    learning_starts: int = 4_000  # steps of uniform random actions before the first update
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads of torch and of the physics; 0: all cores
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of torch.set_float32_matmul_precision
    cuda_graph: bool = False  # on CUDA: replay an update as one CUDA graph instead of operation by operation


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


class Critics(nn.Module):
    """K independent Q-networks with stacked weights, (B, obs_dim), (B, action_dim) -> (K, B)."""

    def __init__(self, k: int, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        for j, (n_in, n_out) in enumerate([(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)], start=1):
            layers = [nn.Linear(n_in, n_out) for _ in range(k)]  # for torch's default initialisation
            self.register_parameter(f"w{j}", nn.Parameter(torch.stack([x.weight.detach().T for x in layers])))
            self.register_parameter(f"b{j}", nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers])))
        self.scale, self.shift = nn.Parameter(torch.ones(k, 1, hidden)), nn.Parameter(torch.zeros(k, 1, hidden))

    def network(self, x, w1, b1, w2, b2, w3, b3, scale, shift):
        """One critic, (B, in + 1) -> (B,), or all at once, (K, B, in + 1) -> (K, B); the last input is 1."""
        h = x @ torch.cat([w1, b1], dim=-2)  # the bias as one more row of the weights: no pass of its own
        if h.dim() == 2:  # one operation, which takes no scales per critic
            h = F.layer_norm(h, h.shape[-1:], scale[0], shift[0]).tanh_()
        else:
            h = (F.layer_norm(h, h.shape[-1:]) * scale + shift).tanh_()
        h = (h @ w2).add_(b2).relu_()
        return (h @ w3).add_(b3).squeeze(-1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x, parameters = torch.cat([obs, action, obs.new_ones(len(obs), 1)], dim=-1), list(self.parameters())
        if x.is_cuda:  # one batched product per layer; on a CPU a loop over the critics is faster
            return self.network(x.expand(len(self.w1), *x.shape), *parameters)
        return torch.stack([self.network(x, *weights) for weights in zip(*parameters, strict=True)])


# ---------------------------------------------------------------------------------------------------------- algorithm
def td3_critic_loss(critics, target_critics, target_actor, batch, noise, args) -> torch.Tensor:
    """TD3's critic loss (arXiv 1802.09477, algorithm 1), summed over the K = 2 critics; noise ~ N(0, 1), (B, act).

    No transition terminates (episodes end by timeout), so every target is bootstrapped.
    """
    obs, action, reward, next_obs = batch
    with torch.no_grad():
        noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = (target_actor(next_obs) + noise).clamp(-1, 1)
        target = reward + args.gamma * target_critics(next_obs, next_action).min(dim=0).values  # (B,)
    return (critics(obs, action) - target).square().mean(dim=1).sum()  # (K, B) -> ()


def td3_actor_loss(actor, critics, obs) -> torch.Tensor:
    """- mean Q_1(s, pi(s)), the deterministic policy gradient of the first critic."""
    return -critics(obs, actor(obs))[0].mean()


def collect(policy, env, seeds, plain: int, mix: str, generator, device) -> dict:
    """One episode per seed of the initial state, by `policy` the first `plain` ones, then by its mix (thesis 5.2.4).

    env: LockstepEnv, n episodes at once; generator: numpy's, of the mix. Returns arrays as in docs/formats.md.
    """
    length, episodes = env.episode_length, len(seeds)
    widths = {"observations": (env.obs_dim,), "actions": (env.action_dim,), "next_observations": (env.obs_dim,)}
    widths |= {"rewards": (), "terminals": (), "timeouts": (), "physics": (env.state_dim,)}
    arrays = {name: np.zeros((episodes * length, *widths[name]), dtype) for name, (dtype, _) in DATASET.items()}
    arrays["timeouts"][length - 1 :: length] = True
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's other threads would wait busily on the physics' cores
    for start in range(0, episodes, env.n):
        wave = np.arange(start, min(start + env.n, episodes))
        n, is_plain = len(wave), (np.arange(start, start + env.n) < plain)[:, None]
        obs = env.reset(np.resize(seeds[wave], env.n))  # what the last wave has too many is not kept
        for t in tqdm(range(length), desc=f"{env.task} {mix}, from episode {start}", disable=None, leave=False):
            with torch.no_grad():
                actions = policy(torch.from_numpy(obs).to(device))[:, : env.action_dim].cpu().numpy()
            if mix == "noise":
                noisy = np.clip(actions + generator.standard_normal(actions.shape, np.float32), -1, 1)
                actions = np.where(is_plain, actions, noisy)
            elif mix != "online":
                actions = np.where(is_plain, actions, generator.uniform(-1, 1, actions.shape).astype(np.float32))
            next_obs, reward, physics = env.step(actions)
            row = {"observations": obs, "actions": actions, "rewards": reward, "next_observations": next_obs}
            for name, values in (row | {"physics": physics}).items():
                arrays[name][wave * length + t] = values[:n]
            obs = next_obs
    torch.set_num_threads(threads)
    return arrays


def evaluate(policy, env, device) -> list[float]:
    """Return of one episode in each of env's environments, from fixed initial states."""
    seeds = EVAL_SEED + np.arange(env.n)
    rewards = collect(policy, env, seeds, env.n, "online", None, device)["rewards"]
    return rewards.reshape(env.n, -1).sum(axis=1, dtype=np.float64).tolist()


def main():
    args, point, device = parse_args(Args, LAPTOP)
    if args.policy is not None:  # roll out this checkpoint, write one dataset
        stem, plain = Path(args.policy).stem, args.mix == "online" and args.policy.endswith("-behavior.pt")
        path = Path(args.output or f"data/{stem.removesuffix('-behavior')}{'' if plain else '-' + args.mix}.npz")
        prepare_outputs(args, None, [path], [args.policy])
        return print_result(collect_dataset(args.policy, args.mix, path, args, device), [path])
    task, env = args.task, LockstepEnv(args.task, 1, threads=1)
    length, total = env.episode_length, args.total_timesteps
    checkpoints, datasets, run_dir = check_inputs(args, length)

    # networks
    seed = zlib.crc32(f"{args.seed} behavior {task}".encode())
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    sizes = env.obs_dim, env.action_dim, args.hidden
    actor, critics = Actor(*sizes, True).to(device), Critics(2, *sizes).to(device)
    target_actor, target_critics = deepcopy(actor), deepcopy(critics)
    adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
    actor_optimizer, critic_optimizer = adam(actor.parameters()), adam(critics.parameters())
    online = [*actor.parameters(), *critics.parameters()]
    targets = [*target_actor.parameters(), *target_critics.parameters()]
    modules = {"actor": actor, "critics": critics, "target_actor": target_actor, "target_critics": target_critics}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    start, rows = restore(point, total, modules, generator, [])
    require(all(row[1] == task for row in rows), f"--resume {args.resume}: expected a run of {task}, found another's")

    # replay buffer: one row (s, a, r, s', physics) per step, never overwritten
    columns = [env.obs_dim, env.action_dim, 1, env.obs_dim, env.state_dim]
    need = 2 * 8 * total * sum(columns)  # an old resume point and a new one
    free = shutil.disk_usage(run_dir).free + (run_dir / "resume.pt").exists() * need / 2
    require(free > need, f"{run_dir}: expected {need / 2**30:.1f} GiB of disk space, found {free / 2**30:.1f}")
    replay = torch.zeros(total, sum(columns), dtype=torch.float64, device=device)
    with expecting("a resume point with all its parts", "--resume"):
        medium, replay[:start] = (point.pop("medium"), point.pop("replay")) if point else (None, replay[:0])
    filled = torch.zeros((), dtype=torch.float64, device=device)  # rows in it

    def update(with_actor: bool) -> dict:
        """The critics, with_actor also the actor and all targets."""
        index = torch.rand(args.batch_size, generator=generator, dtype=torch.float64, device=device) * filled
        obs, action, reward, next_obs, _ = replay[index.long()].float().split(columns, dim=1)
        batch = obs, action, reward.squeeze(1), next_obs
        noise = torch.randn(action.shape, generator=generator, device=device)
        q_loss = td3_critic_loss(critics, target_critics, target_actor, batch, noise, args)
        critic_optimizer.zero_grad()
        q_loss.backward()
        critic_optimizer.step()
        if not with_actor:
            return {"loss/critics": q_loss.detach()}
        pi_loss = td3_actor_loss(actor, critics, obs)
        actor_optimizer.zero_grad()
        pi_loss.backward(inputs=list(actor.parameters()))  # none for the critics
        actor_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, online, args.tau)
        return {"loss/critics": q_loss.detach(), "value/mean_q1": -pi_loss.detach()}

    updates = {flag: in_cuda_graph(partial(update, flag), args.cuda_graph, generator) for flag in (False, True)}
    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    eval_env = LockstepEnv(task, args.eval_episodes, args.threads)
    progress = tqdm(range(start, total), total=total, initial=start, desc=task, unit="step", disable=None)
    clock, metrics = time.time(), {}
    for step in progress:
        if step % length == 0:
            obs = env.reset([zlib.crc32(f"{args.seed} {task} {step // length}".encode()) % EVAL_SEED])
            episode_return = 0.0

        # act
        if step < args.learning_starts:
            action = torch.rand(1, env.action_dim, generator=generator, device=device) * 2 - 1
        else:
            noise = torch.randn(1, env.action_dim, generator=generator, device=device) * args.exploration_noise
            with torch.no_grad():
                action = (actor(torch.from_numpy(obs).to(device)) + noise).clamp(-1, 1)
        action = action.cpu().numpy()

        # learn from the steps before this one: on a GPU while the physics below runs on the CPU
        if step >= max(args.learning_starts, 1):
            filled.fill_(step)
            metrics |= updates[step % args.policy_frequency == 0]()

        # environment
        next_obs, reward, physics = env.step(action)
        replay[step] = torch.from_numpy(np.concatenate([obs, action, reward[:, None], next_obs, physics], axis=1)[0])
        obs, episode_return = next_obs, episode_return + reward[0]

        # log, evaluate, save
        now = step + 1
        if now % length == 0:
            speed = {"speed/steps_per_second": (now - start) / (time.time() - clock)}
            log(writer, now, metrics | speed | {"return/training": episode_return})
        if now % args.eval_every == 0 or now == total:
            rows.append([now, task, evaluate(actor, eval_env, device)])
            progress.write(write_returns(run_dir, writer, rows, {}, 1))
            wanted, value = args.medium_return, np.mean(rows[-1][2])
            if medium is None and (now == args.medium_step if wanted is None else value >= wanted):
                medium = {"step": now, "actor": {k: v.detach().clone() for k, v in actor.state_dict().items()}}
            save_point(run_dir, now, modules, generator, [], rows, medium=medium, replay=replay[:now].clone())
    writer.close()

    # final evaluation, checkpoints, datasets
    policies = {"expert": {"step": total, "actor": actor.state_dict()}} | ({"medium": medium} if medium else {})
    final_env, returns = LockstepEnv(task, args.final_eval_episodes, args.threads), {}
    sizes = {"in_dim": env.obs_dim, "action_dim": env.action_dim, "hidden": args.hidden, "layer_norm": True}
    for level, policy in policies.items():
        actor.load_state_dict(policy["actor"])
        returns[f"{task} {level}"] = evaluate(actor, final_env, device)
        checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "behavior", "tasks": [task], "level": level}
        checkpoint |= {"args": vars(args), **policy, "sizes": sizes, "returns": {task: returns[f"{task} {level}"]}}
        write_atomic(checkpoints[level], partial(torch.save, checkpoint | {"versions": VERSIONS}))
        if level in datasets:
            collect_dataset(checkpoints[level], "online", datasets[level], args, device)
    if "medium-replay" in datasets and "medium" in policies:
        n, names = medium["step"], ("observations", "actions", "rewards", "next_observations", "physics")
        parts = zip(names, replay[:n].cpu().split(columns, dim=1), strict=True)
        arrays = {name: part.numpy().astype(DATASET[name][0]) for name, part in parts}
        arrays |= {"terminals": np.zeros(n, bool), "timeouts": np.arange(1, n + 1) % length == 0}
        arrays["rewards"] = arrays["rewards"][:, 0]
        save_dataset(datasets["medium-replay"], arrays, args, task, "medium-replay", mix="training", policy=None)
    files = [path for path in [*checkpoints.values(), *datasets.values()] if path.exists()]
    print_result(returns, files, run_dir=str(run_dir), seconds=round(time.time() - clock))
    missed = f"--medium-return {args.medium_return}: never reached, no medium files were written"
    require("medium" in policies or datasets.keys() <= {"expert"}, missed)


# ==================================== the method ends here; below: inputs, evaluation, files, command line, CUDA graph
def check_inputs(args, length: int) -> tuple[dict, dict, Path]:
    """Check the flags of a training run -> (checkpoint files by level, dataset files by name, the run's folder)."""
    for name in ("eval_every", "total_timesteps"):  # so that every resume point lies between two episodes
        fits = getattr(args, name) % length == 0
        require(fits, f"--{name.replace('_', '-')}: expected a multiple of {length}, the episode length of {args.task}")
    fits = args.medium_step % args.eval_every == 0 and args.medium_step <= args.total_timesteps
    fits = fits or args.medium_return is not None or set(args.datasets) <= {"expert"}
    limits = f"a multiple of --eval-every {args.eval_every} up to --total-timesteps {args.total_timesteps}"
    require(fits, f"--medium-step: expected {limits}, found {args.medium_step}; or give a --medium-return")
    checkpoints = {level: Path(f"checkpoints/{args.task}-{level}-behavior.pt") for level in ("medium", "expert")}
    datasets = {name: Path(f"data/{args.task}-{name}.npz") for name in args.datasets}
    outputs = [*checkpoints.values(), *datasets.values()]
    return checkpoints, datasets, prepare_outputs(args, f"{args.task}-seed{args.seed}", outputs, [])


def print_result(returns: dict, files: list, **more) -> None:
    """The last line of the output."""
    found = {k: {"mean": round(np.mean(v), 1), "std": round(np.std(v), 1)} for k, v in returns.items()}
    print("RESULT", json.dumps({"returns": found, "files": [str(path) for path in files], **more}))


def collect_dataset(policy, mix: str, path: Path, args, device) -> dict:
    """Roll out a checkpoint's policy and write num_transitions rows as a dataset -> {task: episode returns}."""
    checkpoint = load_checkpoint(policy, ("behavior", "teacher"))
    actor, task, level = load_actor(checkpoint, policy).to(device), checkpoint["tasks"][0], checkpoint["level"]
    n, share, length = args.num_transitions, PLAIN_ONE_IN[mix], int(make_envs(task, 1)[0]._step_limit)
    wanted = f"a multiple of {share * length}, so that one episode in {share} is by the plain policy"
    require(share == 1 or n % (share * length) == 0, f"--num-transitions: expected {wanted} (--mix {mix}), found {n}")
    episodes = -(-n // length)
    generator = np.random.default_rng([args.seed, zlib.crc32(f"{task} {level} {mix}".encode())])
    seeds = generator.integers(EVAL_SEED, size=episodes)
    env = LockstepEnv(task, min(args.num_envs, episodes), args.threads)
    arrays = collect(actor, env, seeds, episodes // share, mix, generator, device)
    arrays = {name: array[:n] for name, array in arrays.items()}
    arrays["timeouts"][-1] = True  # where the last episode is cut short
    source = {"mix": mix, "policy": Path(policy).name, "policy_episodes": episodes // share}
    return {task: save_dataset(path, arrays, args, task, level, **source)}


def save_dataset(path, arrays: dict, args, task: str, level: str, **source) -> list[float]:
    """Write arrays and metadata as in docs/formats.md -> the episode returns."""
    starts = np.flatnonzero(np.append(True, arrays["timeouts"][:-1]))
    returns = np.add.reduceat(arrays["rewards"], starts, dtype=np.float64).tolist()
    metadata = {"schema_version": SCHEMA_VERSION, "task": task, "level": level, **source, "seed": args.seed}
    metadata |= {"episode_returns": returns, "versions": VERSIONS}
    write_atomic(path, lambda file: np.savez(file, **arrays, metadata=np.array(json.dumps(metadata))))
    return returns


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
