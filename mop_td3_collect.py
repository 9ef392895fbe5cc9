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
import dataclasses
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered here
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from dm_control import suite
from dm_control.utils import rewards
from matplotlib.figure import Figure
from mujoco.batch import Batch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
WALKER_SPEED = {"walker-stand": 0.0, "walker-walk": 1.0, "walker-run": 8.0}  # m/s, as in dm_control.suite.walker
VERSIONS = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
VERSIONS |= {"numpy": np.__version__, "mujoco": mujoco.__version__}
RESUMABLE = {"device", "threads", "tf32", "cuda_graph", "total_timesteps", "eval_episodes", "final_eval_episodes"}
RESUMABLE |= {"expert_return", "datasets", "num_transitions", "num_envs"}


@dataclass
class Args:
    # experiment
    task: str = "walker-walk"
    """task of the dm_control suite, DOMAIN-TASK"""
    seed: int = 1
    """seed of the weights, the noise, the batches and the initial states"""
    run_dir: str | None = None
    """folder for the logs, curves and the resume point; default: runs/<script>-<task>-seed<seed>-<time>"""
    resume: str | None = None
    """run folder to continue; its stored arguments become the defaults"""
    eval_every: int = 10_000
    """steps between evaluations and resume points; a multiple of the episode length"""
    eval_episodes: int = 10
    """episodes per evaluation during training, always from the same initial states"""
    final_eval_episodes: int = 100
    """episodes of the evaluation stored in the checkpoint"""
    # data
    policy: str | None = None
    """behaviour or teacher checkpoint: no training, collect with this policy only"""
    mix: Literal["online", "noise", "random90", "random99"] = "online"
    """with --policy: all episodes by the policy | 10%, 90% with N(0, 1) noise | 10% or 1%, the rest uniform actions"""
    output: str | None = None
    """with --policy: dataset to write; default: data/<name of the checkpoint>[-mix].npz"""
    datasets: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium", "expert", "medium-replay")
    """after training: datasets to write"""
    num_transitions: int = 1_000_000
    """transitions per dataset (medium-replay has as many as training saw)"""
    compress: bool = False
    """smaller dataset files: deflated, physics states rounded to 28 significant bits"""
    num_envs: int = 100
    """environments stepped in lockstep while collecting"""
    medium_step: int = 1_000_000
    """step at which the policy is the medium one; a multiple of --eval-every"""
    medium_return: float | None = None
    """instead of --medium-step: the evaluated policy closest to this return, up to the first one that reaches it"""
    expert_return: float | None = None
    """stop training at the first evaluation that reaches this return (and the medium level)"""
    overwrite: bool = False
    """replace output files that exist"""
    # algorithm
    total_timesteps: int = 2_000_000
    """environment steps, each with one critic update; the replay buffer holds them all"""
    learning_rate: float = 1e-4
    """Adam's, actor and critics"""
    batch_size: int = 1024
    """transitions per update"""
    hidden: int = 1024
    """width of both hidden layers"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.01
    """target smoothing rate, critics and actor"""
    policy_noise: float = 0.3
    """std of the target policy's noise (author's code: 0.2)"""
    noise_clip: float = 0.3
    """bound of the target policy's noise"""
    exploration_noise: float = 0.2
    """std of the acting policy's noise"""
    policy_frequency: int = 2
    """critic updates per actor update"""
    learning_starts: int = 4_000
    """steps of uniform random actions before the first update"""
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    threads: int = 0
    """CPU threads of torch and of the physics; 0: all cores"""
    tf32: bool = False
    """on CUDA: matrix products with 10-bit mantissas (see docs/speed.md)"""
    cuda_graph: Literal[0, 1] = 0
    """on CUDA: 1 replays an update as one CUDA graph, beside the physics; 0: PyTorch runs every operation"""


# ---------------------------------------------------------------------------------------------------------- utilities
def fail(message: str):
    """One clear line on standard error, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}")


def check_numbers(args, *names: str) -> None:
    """Fail unless every named argument is above 0, every other number is 0 or more, and gamma and tau are at most 1."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in names and not value > 0:
            fail(f"{flag}: expected a positive number, found {value}")
        if isinstance(value, int | float) and not value >= 0:
            fail(f"{flag}: expected 0 or more, found {value}")
        if name in ("gamma", "tau", "actor_tau") and value > 1:
            fail(f"{flag}: expected at most 1, found {value}")


def write_atomic(path, write) -> None:
    """Call write(temporary file object beside path), then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror or error}); choose a folder you may write to")
    finally:
        with suppress(OSError):
            temporary.unlink()


def parse_args(cls):
    """Command line -> (arguments, resume point or None). With --resume the run's stored arguments are the defaults."""
    args = tyro.cli(cls, description=sys.modules[cls.__module__].__doc__)
    if args.resume is None:
        return args, None
    path = Path(args.resume) / "resume.pt"
    if not path.is_file():
        fail(f"--resume {args.resume}: expected a run folder with resume.pt in it, found none")
    try:
        point = torch.load(path, map_location="cpu", weights_only=True)
        stored = cls(**point["args"])
    except Exception as error:
        fail(f"{path}: not a resume point of this script ({type(error).__name__}); start the run anew")
    stored = dataclasses.replace(stored, resume=args.resume, run_dir=args.resume)
    args = tyro.cli(cls, default=stored)
    for name, old in vars(stored).items():
        if getattr(args, name) != old and name not in RESUMABLE:
            fail(f"--{name.replace('_', '-')}: the run was started with {old}, --resume cannot change that")
    return args, point


def select_device(device: str, threads: int, tf32: bool = False) -> torch.device:
    """Set torch's CPU threads (0: all cores) and return the device; fail where cuda is asked for and there is none."""
    torch.set_num_threads(threads or os.cpu_count())
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device was found; use --device cpu")
    device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if tf32 and device.type == "cuda" else "highest")
    with suppress(AttributeError, OSError, TypeError):  # glibc only: reuse freed memory, new pages cost page faults
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**26)
    return device


def in_cuda_graph(update, n: int, generator: torch.Generator):
    """call(step), which makes the updates update(step) to update(step + n - 1) and returns the last one's tensors.

    On CUDA the n updates run eagerly three times, are then recorded as one CUDA graph, and from there on replayed: the
    same kernels on the same memory without Python between them, so what they return is overwritten by the next call,
    and step may matter modulo n only. On a CPU they run eagerly. n = 0: update itself.
    """

    def eager(step):
        for i in range(n):
            result = update(step + i)
        return result

    if n == 0 or generator.device.type != "cuda":
        return eager if n else update
    graph, stream, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None
    graph.register_generator_state(generator)

    def call(step):
        nonlocal calls, result
        calls += 1
        if calls <= 3:  # lazily made states and workspaces come to be outside the graph
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = eager(step)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if calls == 4:
            with torch.cuda.graph(graph, stream=stream):
                result = eager(step)  # recorded, not run
        graph.replay()
        return result

    return call


def make_folder(folder: Path) -> None:
    """Create the folder; fail where that, or writing in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: cannot be created ({error.strerror}); choose another folder")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: cannot be written; choose another folder")


def prepare_outputs(args, name: str, outputs: list[Path]) -> Path:
    """Create the run's folder and those of the outputs; fail where something would be overwritten or not be written."""
    run_dir = Path(args.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if args.resume is None:
        if run_dir.is_dir() and any(run_dir.iterdir()):
            fail(f"--run-dir {run_dir}: not empty; continue it with --resume {run_dir} or choose another folder")
        for path in outputs:
            if path.exists() and not args.overwrite:
                fail(f"{path}: exists already; pass --overwrite to replace it")
    for folder in [run_dir, *(path.parent for path in outputs)]:
        make_folder(folder)
    return run_dir


def summarize(returns: list[float]) -> dict:
    """Mean and std over episodes, for the RESULT line."""
    mean, std = float(np.mean(returns)), float(np.std(returns))
    return {"mean": round(mean, 1), "std": round(std, 1), "episodes": len(returns)}


def write_returns(run_dir: Path, rows: list, references: dict | None = None) -> None:
    """returns.csv (step, task, episode, return) and learning_curve.png of rows (step, task, episode returns)."""
    lines = [("step", "task", "episode", "return")]
    lines += [(step, task, e, f"{value:.4f}") for step, task, values in rows for e, value in enumerate(values)]
    text = "\n".join(",".join(map(str, line)) for line in lines) + "\n"
    write_atomic(run_dir / "returns.csv", lambda file: file.write(text.encode()))
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for i, task in enumerate(dict.fromkeys(task for _, task, _ in rows)):
        steps = [step for step, name, _ in rows if name == task]
        values = [np.asarray(v) for _, name, v in rows if name == task]
        mean, std = np.array([v.mean() for v in values]), np.array([v.std() for v in values])
        axes.plot(steps, mean, f"C{i}", marker="." if len(steps) < 20 else "", label=task)
        axes.fill_between(steps, mean - std, mean + std, color=f"C{i}", alpha=0.2, lw=0)
        for name, value in (references or {}).get(task, {}).items():
            axes.axhline(value, color=f"C{i}", ls="--", label=f"{task} {name}")
    axes.set(xlabel="step", ylabel="episode return (mean, std over episodes)", xlim=(0, None), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomic(run_dir / "learning_curve.png", lambda file: figure.savefig(file, format="png", dpi=120))


# -------------------------------------------------------------------------------------------------------- environment
class LockstepEnv:
    """n environments of one suite task, stepped together.

    The walker runs in mujoco.batch on a thread pool, equal to dm_control bit for bit (tests/test_env.py); every other
    task in n dm_control environments one after the other. Episodes end by the time limit only, after
    `episode_length` steps: a timeout, never a termination.
    """

    def __init__(self, task: str, n: int, threads: int = 0):
        domain, _, name = task.partition("-")
        if (domain, name) not in suite.ALL_TASKS:
            known = sorted(t for d, t in suite.ALL_TASKS if d == domain)
            hint = f"the tasks of {domain} are {', '.join(known)}" if known else "for example walker-walk, cheetah-run"
            fail(f"task {task}: expected DOMAIN-TASK of the dm_control suite; {hint}")
        self.task, self.n = task, n
        load = partial(suite.load, domain, name, environment_kwargs={"flat_observation": True})
        self.envs = [load()]
        action = self.envs[0].action_spec()
        if not (np.all(action.minimum == -1) and np.all(action.maximum == 1) and np.isfinite(self.envs[0]._step_limit)):
            fail(f"task {task}: expected actions in [-1, 1] and a time limit, found other bounds or no limit")
        self.episode_length = int(self.envs[0]._step_limit)
        self.obs_dim = self.envs[0].observation_spec()["observations"].shape[0]
        self.action_dim = action.shape[0]
        self.state_dim = self.envs[0].physics.get_state().shape[0]
        if task in WALKER_SPEED:
            self.substeps = self.envs[0]._n_sub_steps
            self.batch = Batch(self.envs[0].physics.model.ptr, n, nthread=threads, persistent=True)
            self.arrays = {k: self.batch.bind(k) for k in ("qpos", "qvel", "ctrl", "xmat", "xpos", "sensordata")}
        else:
            self.batch = None
            self.envs += [load() for _ in range(n - 1)]

    def reset(self, seeds) -> np.ndarray:
        """Start n episodes, the i-th from dm_control's initial state for seeds[i]. Returns observations (n, obs)."""
        observations = np.empty((self.n, self.obs_dim), np.float32)
        for i, seed in enumerate(seeds):
            env = self.envs[0 if self.batch else i]
            env.task.random.seed(int(seed))
            observations[i] = env.reset().observation["observations"]
            if self.batch:
                data = env.physics.data
                self.arrays["qpos"][i], self.arrays["qvel"][i] = data.qpos, data.qvel
                self.batch.qacc_warmstart[i] = data.qacc_warmstart
        if self.batch:
            self.batch.forward()
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """actions (n, act) in [-1, 1] -> observations (n, obs) f32, rewards (n,) f32."""
        if not self.batch:
            steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
            observations = np.stack([s.observation["observations"] for s in steps])
            return observations.astype(np.float32), np.array([s.reward for s in steps], np.float32)
        self.arrays["ctrl"][:] = actions
        self.batch.step(nstep=self.substeps, stage=mujoco.mjtStage.mjSTAGE_VEL)  # ends like dm_control, with mj_step1
        return self.walker_observations(), self.walker_rewards()

    def walker_observations(self) -> np.ndarray:
        """OrientationsHeightVelocities of dm_control.suite.walker, on arrays: (n, 24) f32."""
        orientations = self.arrays["xmat"].reshape(self.n, -1, 9)[:, 1:, [0, 2]]  # xx, xz; body 0 is the world
        height = self.arrays["xpos"].reshape(self.n, -1, 3)[:, 1, 2:]  # body 1 is the torso
        parts = orientations.reshape(self.n, -1), height, self.arrays["qvel"]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def walker_rewards(self) -> np.ndarray:
        """PlanarWalker.get_reward of dm_control.suite.walker, on arrays: (n,) f32."""
        height = self.arrays["xpos"].reshape(self.n, -1, 3)[:, 1, 2]
        upright = (1 + self.arrays["xmat"].reshape(self.n, -1, 9)[:, 1, 8]) / 2
        reward = (3 * rewards.tolerance(height, bounds=(1.2, np.inf), margin=0.6) + upright) / 4
        if speed := WALKER_SPEED[self.task]:
            velocity = self.arrays["sensordata"].reshape(self.n, -1)[:, 0]
            bounds = {"bounds": (speed, np.inf), "margin": speed / 2}
            move = rewards.tolerance(velocity, **bounds, value_at_margin=0.5, sigmoid="linear")
            reward = reward * (5 * move + 1) / 6
        return reward.astype(np.float32)

    def physics_state(self) -> np.ndarray:
        """physics.get_state() of every environment, (n, state) f64."""
        if self.batch:
            return np.concatenate([self.arrays["qpos"], self.arrays["qvel"]], axis=1)
        return np.stack([env.physics.get_state() for env in self.envs])


@torch.no_grad()
def evaluate(policy, env: LockstepEnv, device: torch.device) -> list[float]:
    """Episode returns of env.n whole episodes from the fixed initial states; policy: (n, obs) -> (n, act) tensors."""
    observations, returns = env.reset(EVAL_SEED + np.arange(env.n)), np.zeros(env.n)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's other threads would wait busily on the physics' cores
    for _ in range(env.episode_length):
        actions = policy(torch.from_numpy(observations).to(device)).cpu().numpy()
        observations, reward = env.step(actions)
        returns += reward
    torch.set_num_threads(threads)
    return returns.tolist()


# ----------------------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Policy, (B, in_dim) -> actions (B, action_dim) in [-1, 1]; layer_norm: the first layer is Linear-LayerNorm-Tanh.

    log_std: the two bounds of a Gaussian policy's log std; such a policy's mean is its deterministic action.
    """

    def __init__(self, in_dim: int, action_dim: int, hidden: int, layer_norm: bool = False, log_std=None):
        super().__init__()
        self.log_std = log_std
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            *([nn.LayerNorm(hidden), nn.Tanh()] if layer_norm else [nn.ReLU(inplace=True)]),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, 2 * action_dim if log_std else action_dim),
            nn.Tanh(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).chunk(2, dim=-1)[0] if self.log_std else self.net(x)

    def gaussian(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log std of the diagonal Gaussian, (B, action_dim) each."""
        mean, unit = self.net(x).chunk(2, dim=-1)
        low, high = self.log_std
        return mean, low + (high - low) * (unit + 1) / 2


class Critics(nn.Module):
    """K independent Q-networks with stacked weights, (B, obs_dim), (B, action_dim) -> (K, B)."""

    def __init__(self, k: int, obs_dim: int, action_dim: int, hidden: int, layer_norm: bool = False):
        super().__init__()
        self.layer_norm = layer_norm
        sizes = [obs_dim + action_dim, hidden, hidden, 1]
        for j, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
            layers = [nn.Linear(n_in, n_out) for _ in range(k)]  # for torch's default initialisation
            self.register_parameter(f"w{j}", nn.Parameter(torch.stack([x.weight.detach().T for x in layers])))
            self.register_parameter(f"b{j}", nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers])))
        if layer_norm:
            self.scale, self.shift = nn.Parameter(torch.ones(k, 1, hidden)), nn.Parameter(torch.zeros(k, 1, hidden))

    def network(self, x, w1, b1, w2, b2, w3, b3, scale=None, shift=None):
        """One critic, (B, in + 1) -> (B,), or all at once, (K, B, in + 1) -> (K, B); the last input is 1."""
        h = x @ torch.cat([w1, b1], dim=-2)  # the bias as one more row of the weights: no pass of its own
        if not self.layer_norm:
            h = h.relu_()
        elif h.dim() == 2:  # one operation, which takes no scales per critic
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


# -------------------------------------------------------------------------------------------------------------- files
def load_checkpoint(path, kinds: tuple[str, ...], task: str | None = None) -> dict:
    """Read a checkpoint of one of the kinds (and of the task, if given). Never executes pickled code. Fails clearly."""
    if not Path(path).is_file():
        fail(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch on odd pickles; the line below says it
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{path}: not a readable checkpoint, or one with pickled objects (refused); {type(error).__name__}")
    if not isinstance(checkpoint, dict) or "schema_version" not in checkpoint:
        fail(f"{path}: not a checkpoint of these scripts (no schema_version)")
    if checkpoint["schema_version"] != SCHEMA_VERSION:
        fail(f"{path}: expected schema version {SCHEMA_VERSION}, found {checkpoint['schema_version']}")
    missing = {"kind", "tasks", "args", "step", "sizes", "actor", "returns"} - checkpoint.keys()
    if missing:
        fail(f"{path}: incomplete checkpoint, without {', '.join(sorted(missing))}")
    if checkpoint["kind"] not in kinds:
        fail(f"{path}: expected a checkpoint of kind {' or '.join(kinds)}, found {checkpoint['kind']}")
    if task is not None and checkpoint["tasks"] != [task]:
        fail(f"{path}: expected a checkpoint for {task}, found {', '.join(checkpoint['tasks'])}")
    if set(checkpoint["tasks"]) - set(checkpoint["returns"]):
        fail(f"{path}: incomplete checkpoint, without the returns of {', '.join(checkpoint['tasks'])}")
    return checkpoint


def load_actor(checkpoint: dict, path) -> Actor:
    """The frozen policy of a checkpoint."""
    sizes = checkpoint["sizes"]
    try:
        options = {"layer_norm": sizes["layer_norm"], "log_std": sizes.get("log_std")}
        actor = Actor(sizes["in_dim"], sizes["action_dim"], sizes["hidden"], **options)
        actor.load_state_dict(checkpoint["actor"])
    except (KeyError, RuntimeError, TypeError) as error:
        fail(f"{path}: weights and sizes do not fit together ({str(error).splitlines()[0]})")
    return actor.requires_grad_(False)


def save_dataset(path, arrays: dict, metadata: dict, compress: bool = False) -> None:
    """Write a dataset .npz atomically; arrays as in docs/formats.md, metadata as one JSON string."""
    metadata = {"schema_version": SCHEMA_VERSION, **metadata, "versions": VERSIONS}
    if compress:  # the last bits of the float64 states are most of what does not compress
        mantissa, exponent = np.frexp(arrays["physics"])
        arrays = {**arrays, "physics": np.ldexp(np.round(mantissa * 2**28) / 2**28, exponent)}
    save = np.savez_compressed if compress else np.savez
    write_atomic(path, lambda file: save(file, **arrays, metadata=np.array(json.dumps(metadata))))


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


def update_medium(medium: dict | None, step: int, mean: float, actor, args) -> dict | None:
    """The medium policy after this evaluation: that of --medium-step, or the one closest to --medium-return among the
    evaluations up to the first that reaches it ("final" from then on)."""
    if medium is not None and medium["final"]:
        return medium
    weights = {k: v.detach().clone() for k, v in actor.state_dict().items()}
    new = {"step": step, "return": mean, "actor": weights, "final": True}
    if args.medium_return is None:
        return new if step == args.medium_step else None
    new["final"] = mean >= args.medium_return
    if medium is None or abs(mean - args.medium_return) <= abs(medium["return"] - args.medium_return):
        return new
    return {**medium, "final": new["final"]}


def is_expert(rows: list, medium: dict | None, args) -> bool:
    """Whether training may stop: the last evaluation reached --expert-return, and the medium policy is known."""
    if args.expert_return is None or np.mean(rows[-1][2]) < args.expert_return:
        return False
    return medium is not None and medium["final"]


def collect(actor, task: str, mix: str, num_transitions: int, num_envs: int, seed: int, device, threads: int):
    """Whole episodes of `actor` mixed with noisy or random ones (thesis 5.2.4); the policy's episodes come first.

    Returns (arrays of num_transitions rows, episode returns, number of episodes by the plain policy).
    """
    probe = LockstepEnv(task, 1)
    length = probe.episode_length
    episodes = -(-num_transitions // length)
    plain = {"online": episodes, "noise": episodes / 10, "random90": episodes / 10, "random99": episodes / 100}[mix]
    plain = max(1, round(plain))
    rows, rng = episodes * length, np.random.default_rng(seed)
    arrays = {
        "observations": np.empty((rows, probe.obs_dim), np.float32),
        "actions": np.empty((rows, probe.action_dim), np.float32),
        "rewards": np.empty(rows, np.float32),
        "next_observations": np.empty((rows, probe.obs_dim), np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(1, rows + 1) % length == 0,
        "physics": np.empty((rows, probe.state_dim), np.float64),
    }
    by_episode = {k: v.reshape(episodes, length, *v.shape[1:]) for k, v in arrays.items()}  # views
    progress = tqdm(total=rows, desc=f"collect {task} {mix}", unit="step", disable=None)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's other threads would wait busily on the physics' cores
    for wave in np.split(np.arange(episodes), range(num_envs, episodes, num_envs)):
        env = LockstepEnv(task, len(wave), threads)
        observations = env.reset((seed * 1_000_003 + 500_000 + wave) % EVAL_SEED)
        is_plain = (wave < plain)[:, None]
        for t in range(length):
            with torch.no_grad():
                actions = actor(torch.from_numpy(observations).to(device)).cpu().numpy()
            if mix == "noise":
                noisy = np.clip(actions + rng.standard_normal(actions.shape, np.float32), -1, 1)
                actions = np.where(is_plain, actions, noisy)
            elif mix != "online":
                actions = np.where(is_plain, actions, rng.uniform(-1, 1, actions.shape).astype(np.float32))
            next_observations, reward = env.step(actions)
            by_episode["observations"][wave, t] = observations
            by_episode["actions"][wave, t] = actions
            by_episode["rewards"][wave, t] = reward
            by_episode["next_observations"][wave, t] = next_observations
            by_episode["physics"][wave, t] = env.physics_state()
            observations = next_observations
            progress.update(len(wave))
    progress.close()
    torch.set_num_threads(torch_threads)
    returns = by_episode["rewards"].sum(axis=1, dtype=np.float64).tolist()
    arrays = {k: v[:num_transitions] for k, v in arrays.items()}
    arrays["timeouts"][-1] = True  # where the last episode is cut short
    return arrays, returns, plain


def write_collected(path, actor, args, task, level, mix, policy_name, device) -> list[float]:
    """Collect num_transitions and write them as a dataset; returns the episode returns."""
    arrays, returns, plain = collect(
        actor, task, mix, args.num_transitions, args.num_envs, args.seed, device, args.threads
    )
    source = {"policy": policy_name, "mix": mix, "policy_episodes": plain}
    metadata = {"task": task, "level": level, **source, "seed": args.seed, "episode_returns": returns}
    save_dataset(path, arrays, metadata, args.compress)
    return returns


def collect_only(args: Args) -> None:
    """--policy: roll out one checkpoint and write one dataset."""
    check_numbers(args, "num_transitions", "num_envs")
    checkpoint = load_checkpoint(args.policy, ("behavior", "teacher"))
    task, level, stem = checkpoint["tasks"][0], checkpoint["level"], Path(args.policy).stem.removesuffix("-behavior")
    mix = "" if args.mix == "online" and checkpoint["kind"] == "behavior" else f"-{args.mix}"
    path = Path(args.output or f"data/{stem}{mix}.npz")
    if path.exists() and not args.overwrite:
        fail(f"{path}: exists already; pass --overwrite to replace it or choose another --output")
    make_folder(path.parent)
    device = select_device(args.device, args.threads, args.tf32)
    actor = load_actor(checkpoint, args.policy).to(device)
    returns = write_collected(path, actor, args, task, level, args.mix, Path(args.policy).name, device)
    print("RESULT", json.dumps({"returns": {task: summarize(returns)}, "files": [str(path)]}))


def main():
    args, point = parse_args(Args)
    if args.policy is not None:
        return collect_only(args)

    # validate before anything is written
    positive = ["eval_every", "eval_episodes", "final_eval_episodes", "num_transitions", "num_envs", "total_timesteps"]
    check_numbers(args, *positive, "learning_rate", "batch_size", "hidden", "tau", "policy_frequency")
    task, length = args.task, (env := LockstepEnv(args.task, 1, threads=1)).episode_length
    for name in ("eval_every", "total_timesteps"):  # so that every resume point lies between two episodes
        if getattr(args, name) % length:
            fail(f"--{name.replace('_', '-')}: expected a multiple of {length}, the episode length of {task}")
    wants_medium = args.medium_return is None and {"medium", "medium-replay"} & set(args.datasets)
    if wants_medium and (args.medium_step % args.eval_every or not 0 < args.medium_step <= args.total_timesteps):
        limits = f"a multiple of --eval-every {args.eval_every} up to --total-timesteps {args.total_timesteps}"
        fail(f"--medium-step: expected {limits}, found {args.medium_step}; or give a --medium-return")
    checkpoints = {level: Path(f"checkpoints/{task}-{level}-behavior.pt") for level in ("medium", "expert")}
    datasets = {name: Path(f"data/{task}-{name}.npz") for name in args.datasets}
    device = select_device(args.device, args.threads, args.tf32)
    name, outputs = f"{Path(__file__).stem}-{task}-seed{args.seed}", [*checkpoints.values(), *datasets.values()]
    run_dir = prepare_outputs(args, name, outputs)

    # networks
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    actor = Actor(env.obs_dim, env.action_dim, args.hidden, layer_norm=True).to(device)
    critics = Critics(2, env.obs_dim, env.action_dim, args.hidden, layer_norm=True).to(device)
    target_actor = Actor(env.obs_dim, env.action_dim, args.hidden, layer_norm=True).to(device)
    target_critics = Critics(2, env.obs_dim, env.action_dim, args.hidden, layer_norm=True).to(device)
    target_actor.load_state_dict(actor.state_dict())
    target_critics.load_state_dict(critics.state_dict())
    adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
    actor_optimizer, critic_optimizer = adam(actor.parameters()), adam(critics.parameters())
    online = [*actor.parameters(), *critics.parameters()]
    targets = [*target_actor.parameters(), *target_critics.parameters()]

    # replay buffer: one row (s, a, r, s') per step in a mapped file, never overwritten: a resume point needs no copy
    columns = [env.obs_dim, env.action_dim, 1, env.obs_dim]
    for name, row_bytes in (("replay.f32", 4 * sum(columns)), ("replay_physics.f64", 8 * env.state_dim)):
        size = (run_dir / name).stat().st_size if (run_dir / name).is_file() else 0
        if point is not None and size < point["step"] * row_bytes:
            fail(
                f"{run_dir / name}: expected the replay buffer of {point['step']} steps, found less; start the run anew"
            )
    mode, n = "w+" if point is None else "r+", args.total_timesteps
    replay_file = np.memmap(run_dir / "replay.f32", np.float32, mode, shape=(n, sum(columns)))
    replay_physics = np.memmap(run_dir / "replay_physics.f64", np.float64, mode, shape=(n, env.state_dim))
    replay = torch.from_numpy(replay_file).to(device)  # the mapped file itself on the CPU, a copy on a GPU

    # resume
    start, rows, medium, done = 0, [], None, False
    modules = {"actor": actor, "critics": critics, "target_actor": target_actor, "target_critics": target_critics}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    if point is not None:
        start, rows, medium = point["step"], point["rows"], point["medium"]
        done = start >= args.total_timesteps or is_expert(rows, medium, args)
        for name, module in modules.items():
            module.load_state_dict(point[name])
        generator.set_state(point["generator"])

    filled = torch.zeros((), dtype=torch.float64, device=device)  # rows in the replay buffer
    zero = torch.zeros((), device=device)

    def update(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The critics, and in every policy_frequency-th step the actor and the targets; returns both losses."""
        index = torch.rand(args.batch_size, generator=generator, dtype=torch.float64, device=device) * filled
        o, a, r, o2 = replay[index.long()].split(columns, dim=1)
        noise = torch.randn(a.shape, generator=generator, device=device)
        q_loss = td3_critic_loss(critics, target_critics, target_actor, (o, a, r.squeeze(1), o2), noise, args)
        critic_optimizer.zero_grad()
        q_loss.backward()
        critic_optimizer.step()
        if step % args.policy_frequency:
            return q_loss.detach(), zero
        pi_loss = td3_actor_loss(actor, critics, o)
        gradients = torch.autograd.grad(pi_loss, list(actor.parameters()))  # none for the critics
        for parameter, gradient in zip(actor.parameters(), gradients, strict=True):
            parameter.grad = gradient
        actor_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, online, args.tau)
        return q_loss.detach(), pi_loss.detach()

    critics_only, with_actor = (in_cuda_graph(update, args.cuda_graph, generator) for _ in range(2))  # two graphs

    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    eval_env = LockstepEnv(task, args.eval_episodes, args.threads)
    progress = tqdm(total=args.total_timesteps, initial=start, desc=task, unit="step", disable=None)
    clock = time.time()
    q_loss = pi_loss = zero
    for step in range(start, start if done else args.total_timesteps):
        if step % length == 0:
            obs = env.reset([(args.seed * 1_000_003 + step // length) % EVAL_SEED])

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
            if step % args.policy_frequency == 0:
                q_loss, pi_loss = with_actor(step)
            else:
                q_loss, _ = critics_only(step)

        # environment
        next_obs, reward = env.step(action)
        row = np.concatenate([obs, action, reward[:, None], next_obs], axis=1)
        replay_file[step], replay_physics[step] = row[0], env.physics_state()[0]
        if replay.is_cuda:
            replay[step] = torch.from_numpy(row[0])
        obs = next_obs

        # log, evaluate, save
        progress.update()
        now = step + 1
        if now % 1000 == 0 and step > args.learning_starts:
            writer.add_scalar("loss/critics", q_loss.item(), now)
            writer.add_scalar("value/mean_q1", -pi_loss.item(), now)
            writer.add_scalar("speed/steps_per_second", (now - start) / (time.time() - clock), now)
        if now % args.eval_every == 0 or now == args.total_timesteps:
            returns = evaluate(actor, eval_env, device)
            mean = float(np.mean(returns))
            rows.append([now, task, returns])
            writer.add_scalar(f"return/{task}", mean, now)
            progress.set_postfix({"return": f"{mean:.0f}"})
            progress.write(f"step {now}: {task} {mean:.1f} +- {np.std(returns):.1f}")
            medium = update_medium(medium, now, mean, actor, args)
            replay_file.flush()
            replay_physics.flush()
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {"args": vars(args), "step": now, "rows": rows, "medium": medium}
            state |= {"generator": generator.get_state()}
            write_returns(run_dir, rows)
            write_atomic(run_dir / "resume.pt", partial(torch.save, state))
            if is_expert(rows, medium, args):
                break
    progress.close()
    writer.close()

    # final evaluation, checkpoints, datasets
    policies, steps = {"expert": actor}, {"expert": rows[-1][0]}
    if medium is not None and medium["final"]:
        policies["medium"] = Actor(env.obs_dim, env.action_dim, args.hidden, layer_norm=True).to(device)
        policies["medium"].load_state_dict(medium["actor"])
        steps["medium"] = medium["step"]
    final_env, result, files = LockstepEnv(task, args.final_eval_episodes, args.threads), {}, []
    for level, policy in policies.items():
        returns = evaluate(policy, final_env, device)
        sizes = {"in_dim": env.obs_dim, "action_dim": env.action_dim, "hidden": args.hidden, "layer_norm": True}
        checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "behavior", "tasks": [task], "level": level}
        checkpoint |= {"args": vars(args), "step": steps[level], "sizes": sizes, "versions": VERSIONS}
        checkpoint |= {"actor": {k: v.cpu() for k, v in policy.state_dict().items()}, "returns": {task: returns}}
        write_atomic(checkpoints[level], partial(torch.save, checkpoint))
        files.append(str(checkpoints[level]))
        result[f"{task} {level}"] = summarize(returns)
        if level in datasets:
            write_collected(datasets[level], policy, args, task, level, "online", checkpoints[level].name, device)
            files.append(str(datasets[level]))
    if "medium-replay" in datasets and "medium" in policies:
        n = steps["medium"]
        o, a, r, o2 = np.split(replay_file[:n], np.cumsum(columns)[:-1], axis=1)
        ends = np.arange(1, n + 1) % length == 0
        arrays = {"observations": o, "actions": a, "rewards": r[:, 0], "next_observations": o2}
        arrays |= {"terminals": np.zeros(n, bool), "timeouts": ends, "physics": replay_physics[:n]}
        returns = r.reshape(-1, length).sum(axis=1, dtype=np.float64).tolist()
        source = {"policy": None, "mix": "training", "seed": args.seed, "episode_returns": returns}
        metadata = {"task": task, "level": "medium-replay", **source}
        save_dataset(datasets["medium-replay"], arrays, metadata, args.compress)
        files.append(str(datasets["medium-replay"]))
    result = {"returns": result, "files": files}
    print("RESULT", json.dumps({**result, "run_dir": str(run_dir), "seconds": round(time.time() - clock)}))
    if "medium" not in policies and {"medium", "medium-replay"} & set(datasets):
        best = max(np.mean(values) for _, _, values in rows)
        fail(f"--medium-return {args.medium_return}: never reached (best {best:.1f}), no medium files were written")


if __name__ == "__main__":
    main()
