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
Out: student.pt, returns.csv, learning_curve.png, tau.csv (per-state Kendall's tau of the hidden layers between task
ids) and TensorBoard logs in the run's folder under runs/.
"""

import ctypes
import dataclasses
import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
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
RESUMABLE = {"device", "threads", "tf32", "cuda_graph", "gradient_steps", "eval_episodes", "final_eval_episodes"}


@dataclass
class Args:
    # experiment
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")
    """tasks of the dm_control suite, DOMAIN-TASK; the position is the task id"""
    seed: int = 1
    """seed of the weights, the noise, the batches and the initial states"""
    run_dir: str | None = None
    """folder for the logs, curves and the resume point; default: runs/<script and settings>-<time>"""
    resume: str | None = None
    """run folder to continue; its stored arguments become the defaults"""
    eval_every: int = 10_000
    """steps between evaluations and resume points"""
    eval_episodes: int = 10
    """episodes per evaluation during training, always from the same initial states"""
    final_eval_episodes: int = 100
    """episodes of the evaluation stored in the checkpoint"""
    # data
    level: tuple[Literal["medium", "expert", "medium-replay"], ...] = ("medium",)
    """level of the behaviour policy in the default file names; one, or one per task"""
    data: tuple[str, ...] = ()
    """dataset files, one per task; default: data/<task>-<level>.npz, else the bundled one in pretrained/"""
    states: tuple[str, ...] = ("offline",)
    """offline: the states of the datasets; online: of the teachers' own trajectories; or .npz files, one per task"""
    teachers: tuple[str, ...] = ()
    """teacher checkpoints, one per task; default: checkpoints/<task>-<level>-teacher.pt (kl: -teacher-gaussian.pt)"""
    output: str | None = None
    """file to write instead of the default one"""
    overwrite: bool = False
    """replace output files that exist"""
    # algorithm
    loss: Literal["mse", "q", "kl"] = "mse"
    """distillation loss; kl needs Gaussian teachers"""
    regularizer: Literal["none", "ndcg", "pairwise", "listwise"] = "none"
    """ranking loss between a hidden layer's activations under the own and under another task id"""
    reg_lambda: float = 100.0
    """weight of the regularizer"""
    task_encoding: Literal["number", "onehot"] = "number"
    """how the student reads the task id: as one number, or as one flag per task"""
    gradient_steps: int = 500_000
    """updates"""
    learning_rate: float = 1e-4
    """Adam's"""
    batch_size: int = 1024
    """states per task and update"""
    hidden: int = 256
    """width of both hidden layers"""
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    threads: int = 0
    """CPU threads of torch and of the physics; 0: all cores"""
    tf32: bool = False
    """on CUDA: matrix products with 10-bit mantissas (see docs/speed.md)"""
    cuda_graph: int = 0
    """on CUDA: updates that are replayed at once as one CUDA graph; 0: none, PyTorch runs every operation"""


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


def check_cuda_graph(n: int, frequency: int, *intervals: int) -> None:
    """Fail unless n updates per CUDA graph fit a whole number of times between logs, evaluations and to the end."""
    if n and (n % frequency or any(interval % n for interval in (1000, *intervals))):
        expected = f"a multiple of {frequency} that divides 1000 and {', '.join(map(str, intervals))}"
        fail(f"--cuda-graph: expected {expected} (the intervals of the loop), found {n}")


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
def find_file(folder: str, name: str, hint: str) -> Path:
    """folder/name, else the bundled pretrained/name beside this script (and say so); fail with the hint otherwise."""
    if (path := Path(folder) / name).is_file():
        return path
    if (bundled := Path(__file__).parent / "pretrained" / name).is_file():
        print(f"{path} is not there: using the bundled pretrained/{name}")
        return bundled
    fail(f"{path}: not found, nor in pretrained/; make it with: {hint}")


def load_dataset(path, task: str | None = None) -> tuple[dict, dict]:
    """Read and check a dataset .npz (docs/formats.md) of the task, if given -> (arrays, metadata)."""
    if not Path(path).is_file():
        fail(f"{path}: no such dataset; collect one with: python mop_td3_collect.py --task {task or 'TASK'}")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except Exception as error:
        fail(f"{path}: not a readable .npz dataset without pickled objects ({type(error).__name__}); collect it anew")
    kinds = {"observations": ("f", 2), "actions": ("f", 2), "rewards": ("f", 1), "next_observations": ("f", 2)}
    kinds |= {"terminals": ("b", 1), "timeouts": ("b", 1), "physics": ("f", 2)}
    if missing := [name for name in [*kinds, "metadata"] if name not in data]:
        fail(f"{path}: missing {', '.join(missing)}; expected {', '.join(kinds)} and metadata")
    try:
        metadata = json.loads(str(data.pop("metadata")))
        found = metadata["schema_version"], metadata["task"], float(np.mean(metadata["episode_returns"]))
    except (ValueError, KeyError, TypeError):
        fail(f"{path}: metadata: expected JSON text with schema_version, task and episode_returns (docs/formats.md)")
    if found[0] != SCHEMA_VERSION:
        fail(f"{path}: expected schema version {SCHEMA_VERSION}, found {found[0]}")
    if task is not None and found[1] != task:
        fail(f"{path}: expected data of {task}, found {found[1]}")
    n = len(data["observations"]) if data["observations"].ndim else 0
    for name, (kind, ndim) in kinds.items():
        array = data[name]
        if array.dtype.kind != kind or array.ndim != ndim:
            wanted = f"{'float' if kind == 'f' else 'bool'} array with {ndim} dimension(s)"
            fail(f"{path}: {name}: expected a {wanted}, found {array.dtype} with shape {array.shape}")
        if len(array) != n or n == 0:
            fail(f"{path}: {name}: expected {n} rows as in observations (and more than 0), found {len(array)}")
        if kind == "f" and not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array.reshape(n, -1)).all(axis=1)))
            fail(f"{path}: {name}: NaN or infinite value, first in row {row}")
    if data["next_observations"].shape != data["observations"].shape:
        fail(f"{path}: next_observations: expected shape {data['observations'].shape} as observations")
    if np.abs(data["actions"]).max() > 1:
        fail(f"{path}: actions: expected values in [-1, 1], found {np.abs(data['actions']).max():.4g} in size")
    return data, metadata


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


def load_critics(checkpoint: dict, path) -> Critics:
    """The frozen critics of a teacher's checkpoint."""
    sizes = checkpoint["sizes"]
    try:
        critics = Critics(sizes["num_critics"], sizes["obs_dim"], sizes["action_dim"], sizes["hidden"])
        critics.load_state_dict(checkpoint["critics"])
    except (KeyError, RuntimeError, TypeError) as error:
        fail(f"{path}: critics and sizes do not fit together ({str(error).splitlines()[0]})")
    return critics.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- algorithm
def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def mse_loss(student, x, teacher_action) -> torch.Tensor:
    """|| pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (thesis 5.1.3). Rows x: (R, in_dim) -> (R,)."""
    return (teacher_action - student(x)).square().sum(dim=1)


def q_loss(student, x, critics, obs_dim: int) -> torch.Tensor:
    """- min_k Q_{i,k}^T(s, pi^S(s, i)) (thesis 5.1.3). Rows x: (R, in_dim), as many per task, in order -> (R,)."""
    parts = zip(critics, x[:, :obs_dim].chunk(len(critics)), student(x).chunk(len(critics)), strict=True)
    return -torch.cat([critic(obs, action).min(dim=0).values for critic, obs, action in parts])


def kl_loss(student, x, teacher_mean, teacher_log_std) -> torch.Tensor:
    """KL(student || teacher) of diagonal Gaussians, summed over action dimensions. Rows x: (R, in_dim) -> (R,).

    Thesis 5.1.3; its last line has the sign of the log term reversed, torch.distributions agrees with this one.
    """
    mean, log_std = student.gaussian(x)
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


class PairwiseLoss(torch.autograd.Function):
    """sum_ij log(1 + exp(-(x_i - x_j) (y_i - y_j))), (R, n) -> (R,).

    The (R, n, n) terms are made a few rows at a time and their gradient with them: memory stays that of x and y. With
    s_ij = sigmoid(-(x_i - x_j) (y_i - y_j)), d/dx_i = - 2 sum_j s_ij (y_i - y_j), and the same for y.
    """

    @staticmethod
    def forward(ctx, x, y):
        losses, gradients = [], []
        for a, b in zip(x.split(16), y.split(16), strict=True):  # (r, n)
            terms = (a[:, None, :] - a[:, :, None]).mul_(
                b[:, :, None] - b[:, None, :]
            )  # -(a_i - a_j)(b_i - b_j), (r, n, n)
            losses.append(F.softplus(terms).sum(dim=(1, 2)))
            s = terms.sigmoid_()
            sums = s @ torch.stack([torch.ones_like(a), a, b], dim=2)  # sum_j s_ij, s_ij x_j, s_ij y_j: (r, n, 3)
            gradients.append(-2 * torch.stack([sums[..., 0] * b - sums[..., 2], sums[..., 0] * a - sums[..., 1]]))
        ctx.save_for_backward(*torch.cat(gradients, dim=1))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad[:, None] * gradient for gradient in ctx.saved_tensors)


RANKING_LOSSES = {"ndcg": ndcg_loss, "pairwise": PairwiseLoss.apply, "listwise": listwise_loss}


def ranking_regularizer(ranking_loss, student, x, others) -> torch.Tensor:
    """sum over hidden layers j of L_rank(l_j(s, i), l_j(s, i')), mean over the other ids i' (thesis 6.3.2) -> (R,).

    x: (R, in_dim) rows under their own task id; others: the same rows under each of the other ids.
    """
    own = hidden_layers(student, x)
    pairs = [pair for other in others for pair in zip(own, hidden_layers(student, other), strict=True)]
    return sum(ranking_loss(a, b) for a, b in pairs) / len(others)


def tied_pairs(first: np.ndarray) -> np.ndarray:
    """first (R, n): True where a run of equal values begins -> number of pairs within the runs, (R,)."""
    position = np.arange(first.shape[1], dtype=np.int32)
    return (position - np.maximum.accumulate(np.where(first, position, 0), axis=1)).sum(axis=1, dtype=np.int64)


def kendall_tau(x: np.ndarray, y: np.ndarray, threads: int = 0, rows: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's tau-a and tau-b between rows of x and y: (R, n) f32 -> (R,), (R,) f64. tau-b of a constant row is NaN.

    Knight's method (1966): sorted by x, ties by y, the discordant pairs are the inversions of y. Sorting is numpy's, on
    64-bit keys (value, rank); inversions are counted by comparing ranks, one byte each, `rows` rows at a time.
    """
    n = x.shape[1]
    rank_type = np.uint8 if n <= 256 else np.uint16

    def keys(values, low):  # float32 -> an unsigned integer of the same order, above `low`
        bits = (values + np.float32(0)).view(np.uint32)  # + 0: no negative zero
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64) << np.uint64(32) | low

    def first_of_run(ordered):
        return np.concatenate([np.ones((len(ordered), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)

    def block(start):
        a, b = (np.ascontiguousarray(v[start : start + rows], np.float32) for v in (x, y))
        ordered = np.sort(keys(b, np.arange(n, dtype=np.uint64)), axis=1)
        first = first_of_run(ordered >> np.uint64(32))
        y_ties, rank = tied_pairs(first), np.empty(ordered.shape, np.uint64)
        dense = first.cumsum(axis=1, dtype=np.uint64) - np.uint64(1)
        np.put_along_axis(rank, (ordered & np.uint64(0xFFFFFFFF)).astype(np.intp), dense, axis=1)
        ordered = np.sort(keys(a, rank), axis=1)
        x_ties, both_ties = tied_pairs(first_of_run(ordered >> np.uint64(32))), tied_pairs(first_of_run(ordered))
        sequence = np.ascontiguousarray((ordered & np.uint64(0xFFFFFFFF)).astype(rank_type).T)  # (n, R)
        discordant, above = np.zeros(len(a), np.int64), np.empty(sequence.shape, bool)
        for i in range(n - 1):
            np.greater(sequence[i], sequence[i + 1 :], out=above[i + 1 :])
            discordant += np.add.reduce(above[i + 1 :], axis=0, dtype=rank_type)
        pairs = n * (n - 1) // 2
        difference = pairs - x_ties - y_ties + both_ties - 2 * discordant  # concordant - discordant
        with np.errstate(invalid="ignore"):
            return difference / pairs, difference / np.sqrt((pairs - x_ties).astype(float) * (pairs - y_ties))

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        a, b = zip(*pool.map(block, range(0, len(x), rows)), strict=True)
    return np.concatenate(a), np.concatenate(b)


@torch.no_grad()
def layer_taus(student: Actor, own: torch.Tensor, others: list[torch.Tensor], threads: int) -> np.ndarray:
    """Per-state tau-a and tau-b of each hidden layer, own id against the others: (2 layers, 2 taus, B x others)."""
    layers = [hidden_layers(student, x) for x in (own, *others)]  # ids x layers x (B, hidden)
    arrays = [[activation.cpu().numpy() for activation in pair] for pair in layers]
    taus = [[kendall_tau(a, b, threads) for a, b in zip(arrays[0], other, strict=True)] for other in arrays[1:]]
    return np.concatenate(taus, axis=-1)  # over the others


@torch.no_grad()
def in_parts(function, obs: torch.Tensor, rows: int = 65_536) -> torch.Tensor:
    """function applied to a whole dataset, some rows at a time."""
    return torch.cat([function(part) for part in obs.split(rows)])


def main():
    args, point = parse_args(Args)

    # validate before anything is written
    positive = ["eval_every", "eval_episodes", "final_eval_episodes", "gradient_steps", "learning_rate", "batch_size"]
    check_numbers(args, *positive, "hidden")
    start = point["step"] if point else 0
    check_cuda_graph(args.cuda_graph, 1, args.eval_every, args.gradient_steps, start)
    tasks, m = args.tasks, len(args.tasks)
    for name in ("data", "teachers"):
        if len(getattr(args, name)) not in (0, m):
            fail(f"--{name}: expected one file per task ({m}: {', '.join(tasks)}), found {len(getattr(args, name))}")
    if m < 1 or len(set(tasks)) < m or len(args.level) not in (1, m):
        fail(f"--tasks, --level: expected distinct tasks, and one level or one per task, found {tasks}, {args.level}")
    offline, online = args.states == ("offline",), args.states == ("online",)
    if not (offline or online) and (len(args.states) != m or args.data):
        fail(f"--states: expected offline, online, or one file per task ({m}) and no --data, found {args.states}")
    if online and args.data:
        fail("--states online: the states are those of the teachers' trajectories, --data would not be read")
    if m == 1 and args.regularizer != "none":
        fail("--regularizer: expected two or more tasks, it compares a layer under two task ids")
    levels = args.level * m if len(args.level) == 1 else args.level
    torch.set_flush_denormal(args.regularizer == "pairwise")  # its sigmoids underflow, and such numbers are slow
    device = select_device(args.device, args.threads, args.tf32)
    eval_envs = [LockstepEnv(task, args.eval_episodes, args.threads) for task in tasks]
    obs_dim, action_dim = eval_envs[0].obs_dim, eval_envs[0].action_dim
    for env in eval_envs:
        if (env.obs_dim, env.action_dim) != (obs_dim, action_dim):
            fail(f"--tasks: {env.task} has other observation or action sizes than {tasks[0]}; expected equal ones")

    # teachers and states: one table row (s, i, what the teacher says) per state, all tasks below one another
    onehot = m if args.task_encoding == "onehot" else 0
    in_dim, kind = obs_dim + (onehot or 1), "teacher-gaussian" if args.loss == "kl" else "teacher"
    tables, critics, references, log_std = [], [], {}, None
    for i, (task, level) in enumerate(zip(tasks, levels, strict=True)):
        hint = f"python mop_pbrl_teacher.py --task {task} --level {level}"
        hint += " --actor gaussian" if args.loss == "kl" else ""
        name = f"{task}-{level}-{kind}.pt"
        teacher_path = args.teachers[i] if args.teachers else find_file("checkpoints", name, hint)
        checkpoint = load_checkpoint(teacher_path, ("teacher",), task)
        teacher = load_actor(checkpoint, teacher_path).to(device)
        if args.loss == "q":
            critics.append(load_critics(checkpoint, teacher_path).to(device))
        if args.loss == "kl" and (teacher.log_std is None or (i and list(teacher.log_std) != list(log_std))):
            found = "a deterministic one" if teacher.log_std is None else f"log std in {teacher.log_std}, not {log_std}"
            fail(f"{teacher_path}: expected Gaussian teachers of one kind, found {found}; make it with: {hint}")
        log_std = teacher.log_std if args.loss == "kl" else None
        if offline:
            hint = f"python mop_td3_collect.py --task {task}"
            data_path = args.data[i] if args.data else find_file("data", f"{task}-{level}.npz", hint)
        elif online:
            hint = f"python mop_td3_collect.py --policy {teacher_path} --mix online"
            data_path = find_file("data", f"{Path(teacher_path).stem}-online.npz", hint)
        else:
            data_path = args.states[i]
        data, _ = load_dataset(data_path, None if data_path in args.states else task)
        if data["observations"].shape[1] != checkpoint["sizes"]["in_dim"] or checkpoint["sizes"]["in_dim"] != obs_dim:
            found = f"{data['observations'].shape[1]} in {data_path}, {checkpoint['sizes']['in_dim']} in {teacher_path}"
            fail(f"{task}: expected observations of {obs_dim} values, found {found}")
        obs = torch.from_numpy(data["observations"].astype(np.float32, copy=False)).to(device)
        columns = [add_task(obs, i, onehot)]
        if args.loss == "mse":
            columns.append(in_parts(teacher, obs))
        elif args.loss == "kl":
            columns.append(in_parts(lambda part: torch.cat(teacher.gaussian(part), dim=1), obs))
        tables.append(torch.cat(columns, dim=1))
        references[task] = {"teacher": float(np.mean(checkpoint["returns"][task]))}
        print(f"task {i}: {task}, {len(obs)} states, teacher's return {references[task]['teacher']:.1f}")
    counts, table = [len(part) for part in tables], torch.cat(tables)
    offsets = np.cumsum([0, *counts[:-1]]).tolist()
    del tables, data, obs, columns

    name = args.loss + ("" if args.regularizer == "none" else f"-{args.regularizer}")
    name = f"{Path(__file__).stem}-{name}-{args.hidden}-{'+'.join(dict.fromkeys(levels))}-seed{args.seed}"
    run_dir = prepare_outputs(args, name, [Path(args.output)] if args.output else [])
    output = Path(args.output or run_dir / "student.pt")

    # network
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    sizes = {"in_dim": in_dim, "action_dim": action_dim, "hidden": args.hidden}
    options = {"layer_norm": False, "log_std": log_std}
    student = Actor(*sizes.values(), **options).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, fused=True, capturable=True)

    # resume
    rows, tau_rows = [], []
    if point is not None:
        rows, tau_rows = point["rows"], point["tau_rows"]
        student.load_state_dict(point["student"])
        optimizer.load_state_dict(point["optimizer"])
        generator.set_state(point["generator"])

    def update(step: int) -> tuple[torch.Tensor, ...]:
        # sample a batch of every task
        shape, keywords = (args.batch_size,), {"generator": generator, "device": device}
        index = [torch.randint(o, o + n, shape, **keywords) for o, n in zip(offsets, counts, strict=True)]
        x, label = table[torch.cat(index)].tensor_split([in_dim], dim=1)

        # student
        if args.loss == "mse":
            losses = mse_loss(student, x, label)
        elif args.loss == "q":
            losses = q_loss(student, x, critics, obs_dim)
        else:
            losses = kl_loss(student, x, *label.chunk(2, dim=1))
        loss = losses.mean()
        rank_loss = torch.zeros(())
        if args.regularizer != "none":
            batches = x[:, :obs_dim].chunk(m)
            others = [torch.cat([add_task(batches[i], (i + k) % m, onehot) for i in range(m)]) for k in range(1, m)]
            rank_loss = ranking_regularizer(RANKING_LOSSES[args.regularizer], student, x, others).mean()
            loss = loss + args.reg_lambda * rank_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return losses.detach(), loss.detach(), rank_loss.detach()

    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    progress = tqdm(total=args.gradient_steps, initial=start, desc="distill", unit="step", disable=None)
    clock = time.time()
    updates, n = in_cuda_graph(update, args.cuda_graph, generator), args.cuda_graph or 1
    for step in range(start, args.gradient_steps, n):
        losses, loss, rank_loss = updates(step)

        # log, evaluate, save
        progress.update(n)
        now = step + n
        if now % 1000 == 0:
            for task, part in zip(tasks, losses.chunk(m), strict=True):
                writer.add_scalar(f"loss/{args.loss}/{task}", part.mean().item(), now)
            if args.regularizer != "none":
                writer.add_scalar(f"loss/{args.regularizer}", rank_loss.item(), now)
            writer.add_scalar("speed/steps_per_second", (now - start) / (time.time() - clock), now)
        if now % args.eval_every == 0 or now == args.gradient_steps:
            texts = []
            for i, env in enumerate(eval_envs):
                visited = []

                def policy(obs):
                    visited.append(obs)
                    return student(add_task(obs, i, onehot))

                returns = evaluate(policy, env, device)
                rows.append([now, env.task, returns])
                mean, teacher_return = float(np.mean(returns)), references[env.task]["teacher"]
                writer.add_scalar(f"return/{env.task}", mean, now)
                texts.append(f"{env.task} {mean:.1f} (teacher {teacher_return:.1f})")
                if m > 1:
                    ids = [i, *(j for j in range(m) if j != i)]
                    own, *others = [add_task(torch.cat(visited), j, onehot) for j in ids]
                    taus = layer_taus(student, own, others, args.threads)  # (2 layers, tau-a and tau-b, states)
                    for layer, (tau_a, tau_b) in enumerate(taus, start=1):
                        values = tau_a.mean(), tau_a.std(), np.nansum(tau_b) / max(np.isfinite(tau_b).sum(), 1)
                        tau_rows.append([now, env.task, layer, *map(float, values)])
                        writer.add_scalar(f"tau_layer{layer}/{env.task}", values[0], now)
                    texts[-1] += f" tau {taus[0, 0].mean():.2f}, {taus[1, 0].mean():.2f}"
            progress.set_postfix({task: f"{np.mean(r):.0f}" for _, task, r in rows[-m:]})
            progress.write(f"step {now}: {'; '.join(texts)}; loss {loss.item():.2g}")
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
            state |= {"step": now, "rows": rows, "tau_rows": tau_rows, "generator": generator.get_state()}
            write_returns(run_dir, rows, references)
            lines = [("step", "task", "layer", "tau_a_mean", "tau_a_std", "tau_b_mean"), *tau_rows]
            text = "\n".join(",".join(map(str, line)) for line in lines) + "\n"
            write_atomic(run_dir / "tau.csv", lambda file: file.write(text.encode()))
            write_atomic(run_dir / "resume.pt", partial(torch.save, state))
    progress.close()
    writer.close()

    # final evaluation, checkpoint
    returns = {}
    for i, task in enumerate(tasks):
        env = LockstepEnv(task, args.final_eval_episodes, args.threads)
        returns[task] = evaluate(lambda obs: student(add_task(obs, i, onehot)), env, device)
    sizes |= {**options, "obs_dim": obs_dim, "task_encoding": args.task_encoding}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "student", "tasks": list(tasks), "level": list(levels)}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "versions": VERSIONS}
    checkpoint |= {"actor": student.cpu().state_dict(), "returns": returns}
    write_atomic(output, partial(torch.save, checkpoint))
    summary = {task: {**summarize(v), "teacher": round(references[task]["teacher"], 1)} for task, v in returns.items()}
    files = [str(output), *(str(run_dir / name) for name in ("returns.csv", "learning_curve.png", "tau.csv"))]
    result = {"returns": summary, "files": files}
    if m > 1:
        last = [row for row in tau_rows if row[0] == args.gradient_steps]
        result["tau"] = {task: [round(row[3], 3) for row in last if row[1] == task] for task in tasks}
    print("RESULT", json.dumps({**result, "run_dir": str(run_dir), "seconds": round(time.time() - clock)}))


if __name__ == "__main__":
    main()
