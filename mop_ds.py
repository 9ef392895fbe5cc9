"""Data sharing: MOP with every teacher trained on every task's data, relabelled (van Lith 2024, section 6.4.2).

  python mop_ds.py --level medium

The reward functions are known, so each task's data serves the others: r_{j->i} = R_i(s, a, s'), through dm_control's
reward of the stored physics state of s'. Teacher i learns with PBRL (mop_pbrl_teacher.py) from the union over j of
D_{j->i}; the student is distilled on the states of the union D, every state fed to every teacher:

  L_DS = mean over tasks i and states s of D of  || pi_i^T(s) - pi^S(s, i) ||_2^2

In:  data/<task>-<level>.npz of every task, else the bundled ones in pretrained/.
Out: checkpoints/<task>-<level>-ds-teacher.pt, student.pt in the run's folder under runs/, and the relabelled rewards
beside each dataset.
"""

import ctypes
import dataclasses
import hashlib
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
    teachers: tuple[str, ...] = ()
    """teachers of an earlier run of this script, one per task, instead of training them"""
    output: str | None = None
    """student's file instead of the one in the run's folder"""
    overwrite: bool = False
    """replace output files that exist"""
    # student
    gradient_steps: int = 500_000
    """updates of the student"""
    learning_rate: float = 1e-4
    """Adam's"""
    batch_size: int = 1024
    """states per task and update"""
    hidden: int = 256
    """width of both hidden layers"""
    task_encoding: Literal["number", "onehot"] = "number"
    """how the student reads the task id: as one number, or as one flag per task"""
    # teachers (PBRL)
    teacher_steps: int = 1_000_000
    """updates of each teacher"""
    teacher_learning_rate: float = 1e-4
    """Adam's, actor and critics"""
    teacher_batch_size: int = 1024
    """transitions per update of a teacher"""
    teacher_hidden: int = 256
    """width of a teacher's hidden layers"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """target smoothing rate of the critics, every step (1: the online critics, as in the author's code)"""
    actor_tau: float = 0.005
    """target smoothing rate of the actor, every step"""
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
    """uncertainty penalty in the targets of the data rows"""
    beta_ood: float = 3.0
    """uncertainty penalty in the targets of the OOD rows, at the start"""
    beta_ood_min: float = 0.1
    """the same, at the end"""
    beta_ood_decay: float = 0.99995
    """factor of beta_ood per step"""
    bc_coef: float = 0.0
    """weight of a behaviour-cloning term in the actor's loss, not in the thesis (see docs/pretrained.md)"""
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
def compute_rewards(task: str, physics: np.ndarray, actions: np.ndarray, threads: int) -> np.ndarray:
    """R_task(s, a, s') from the physics states of s', (N, state) f64, and the actions, (N, act) -> (N,) f32.

    The walker in mujoco.batch, other tasks through dm_control's own task.get_reward, one state after the other.
    """
    n = len(physics)
    env = LockstepEnv(task, min(n, 1000) if task in WALKER_SPEED else 1, threads)
    if physics.shape[1] != env.state_dim:
        fail(f"task {task}: expected physics states of {env.state_dim} values, found {physics.shape[1]}")
    result = np.empty(n, np.float32)
    if env.batch:
        nq = env.arrays["qpos"].shape[1]
        for start in range(0, n, env.n):
            part = physics[start : start + env.n]
            env.arrays["qpos"][: len(part)], env.arrays["qvel"][: len(part)] = part[:, :nq], part[:, nq:]
            env.batch.forward(stage=mujoco.mjtStage.mjSTAGE_VEL)
            result[start : start + env.n] = env.walker_rewards()[: len(part)]
        return result
    simulation, get_reward = env.envs[0].physics, env.envs[0].task.get_reward
    for row in range(n):
        with simulation.reset_context():
            simulation.set_state(physics[row])
            simulation.set_control(actions[row])
        result[row] = get_reward(simulation)
    return result


def relabel(path, data: dict, task: str, threads: int) -> np.ndarray:
    """The dataset's rewards under another task, r_{j->i} = R_i(s, a, s') (thesis 6.4.2), (N,) f32.

    Computed once: kept beside the dataset in <dataset>.<task>-<key>.npy; the key is a hash of its states and actions.
    """
    key = hashlib.sha256(VERSIONS["mujoco"].encode())
    for name in ("physics", "actions"):
        key.update(np.ascontiguousarray(data[name]))
    cache = Path(path).with_name(f"{Path(path).stem}.{task}-{key.hexdigest()[:16]}.npy")
    with suppress(OSError, ValueError, EOFError):  # none there, or a broken one, which is made anew
        result = np.load(cache, allow_pickle=False)
        if result.shape == data["rewards"].shape and result.dtype == np.float32 and np.isfinite(result).all():
            return result
    clock = time.time()
    result = compute_rewards(task, data["physics"], data["actions"], threads)
    kept = f"kept in {cache}" if os.access(cache.parent, os.W_OK) else "not kept, the folder cannot be written"
    print(f"{path}: {len(result)} rewards of {task} in {time.time() - clock:.1f} s, {kept}")
    if os.access(cache.parent, os.W_OK):
        write_atomic(cache, lambda file: np.save(file, result))
    return result


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


def train_teacher(label, transitions, env, device, args, point, log):
    """PBRL on one table of transitions, as in mop_pbrl_teacher.py -> (actor, critics).

    transitions: rows (s, a, r, s', terminal), (N, obs + act + 1 + obs + 1); env: for evaluation; point: this teacher's
    resume point or None; log(step, metrics, state): called every 1000 steps and, with the state, every eval_every.
    """
    columns = [env.obs_dim, env.action_dim, 1, env.obs_dim, 1]
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    sizes = env.obs_dim, env.action_dim, args.teacher_hidden
    actor, target_actor = (Actor(*sizes).to(device) for _ in range(2))
    critics, target_critics = (Critics(args.num_critics, *sizes).to(device) for _ in range(2))
    target_actor.load_state_dict(actor.state_dict())
    target_critics.load_state_dict(critics.state_dict())
    adam = partial(torch.optim.Adam, lr=args.teacher_learning_rate, fused=True, capturable=True)
    actor_optimizer, critic_optimizer = adam(actor.parameters()), adam(critics.parameters())
    modules = {"actor": actor, "critics": critics, "target_actor": target_actor, "target_critics": target_critics}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    start = 0
    if point is not None:
        start = point["step"]
        for name, module in modules.items():
            module.load_state_dict(point[name])
        generator.set_state(point["generator"])

    count = torch.tensor(float(start), dtype=torch.float64, device=device)  # the step, where a CUDA graph can read it

    def update(step: int) -> dict:
        # sample
        index = torch.randint(len(transitions), (args.teacher_batch_size,), generator=generator, device=device)
        obs, action, reward, next_obs, terminal = transitions[index].split(columns, dim=1)
        target_noise = torch.randn(action.shape, generator=generator, device=device)
        ood_noise = torch.randn(args.num_ood, 2 * len(obs), env.action_dim, generator=generator, device=device)
        beta_ood = (args.beta_ood * args.beta_ood_decay**count).clamp(min=args.beta_ood_min)
        count.add_(1)

        # critics
        batch, noise = (obs, action, reward.squeeze(1), next_obs, terminal.squeeze(1)), (target_noise, ood_noise)
        networks = critics, target_critics, actor, target_actor
        loss, metrics = pbrl_critic_loss(*networks, batch, noise, beta_ood, args)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        # actor
        if step % args.policy_frequency == 0:
            pi_loss = pbrl_actor_loss(actor, critics, obs, action, args.bc_coef)
            gradients = torch.autograd.grad(pi_loss, list(actor.parameters()))  # none for the critics
            for parameter, gradient in zip(actor.parameters(), gradients, strict=True):
                parameter.grad = gradient
            actor_optimizer.step()

        # targets
        with torch.no_grad():
            torch._foreach_lerp_(list(target_critics.parameters()), list(critics.parameters()), args.tau)
            torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.actor_tau)
        return {**metrics, "beta_ood": beta_ood}

    progress = tqdm(total=args.teacher_steps, initial=start, desc=label, unit="step", disable=None)
    updates, n = in_cuda_graph(update, args.cuda_graph, generator), args.cuda_graph or 1
    for step in range(start, args.teacher_steps, n):
        metrics = updates(step)

        # log, evaluate, save
        progress.update(n)
        now, state = step + n, None
        if now % args.eval_every == 0 or now == args.teacher_steps:
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {"generator": generator.get_state(), "returns": evaluate(actor, env, device)}
        if now % 1000 == 0 or state:
            log(now, metrics, state)
    progress.close()
    return actor.requires_grad_(False), critics.requires_grad_(False)


def load_teacher(path, task: str, obs_dim: int, device):
    """Actor, critics and episode returns of a teacher's checkpoint."""
    checkpoint = load_checkpoint(path, ("teacher",), task)
    actor, critics = load_actor(checkpoint, path).to(device), load_critics(checkpoint, path).to(device)
    if actor.net[0].in_features != obs_dim:
        fail(f"{path}: expected a teacher of {obs_dim} observations, found {actor.net[0].in_features}")
    return actor, critics, checkpoint["returns"][task]


def save_teacher(path, actor, critics, task, level, sources, returns, args) -> None:
    """Write a teacher's checkpoint (docs/formats.md); sources: the tasks whose data it learned from."""
    sizes = {"in_dim": actor.net[0].in_features, "obs_dim": actor.net[0].in_features, "hidden": args.teacher_hidden}
    sizes |= {"action_dim": actor.net[-2].out_features, "layer_norm": False, "log_std": None}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "teacher", "tasks": [task], "level": level}
    checkpoint |= {"args": vars(args), "step": args.teacher_steps, "sizes": {**sizes, "num_critics": args.num_critics}}
    checkpoint |= {"actor": actor.state_dict(), "critics": critics.state_dict(), "returns": {task: returns}}
    write_atomic(path, partial(torch.save, {**checkpoint, "data_tasks": list(sources), "versions": VERSIONS}))


def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def mse_loss(student, x, teacher_action) -> torch.Tensor:
    """|| pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (thesis 5.1.3). Rows x: (R, in_dim) -> (R,)."""
    return (teacher_action - student(x)).square().sum(dim=1)


@torch.no_grad()
def in_parts(function, obs: torch.Tensor, rows: int = 65_536) -> torch.Tensor:
    """function applied to a whole dataset, some rows at a time."""
    return torch.cat([function(part) for part in obs.split(rows)])


def main():
    args, point = parse_args(Args)

    # validate before anything is written
    positive = ["eval_every", "eval_episodes", "final_eval_episodes", "gradient_steps", "learning_rate", "batch_size"]
    positive += ["hidden", "teacher_steps", "teacher_learning_rate", "teacher_batch_size", "teacher_hidden"]
    check_numbers(args, *positive, "tau", "actor_tau", "policy_frequency", "num_critics", "num_ood")
    lengths = args.teacher_steps, args.gradient_steps, point["step"] if point else 0
    check_cuda_graph(args.cuda_graph, args.policy_frequency, args.eval_every, *lengths)
    tasks, m = args.tasks, len(args.tasks)
    if m < 2 or len(set(tasks)) < m or len({task.partition("-")[0] for task in tasks}) > 1:
        fail(f"--tasks: expected two or more distinct tasks of one domain, found {', '.join(tasks)}")
    if len(args.level) not in (1, m) or len(args.data) not in (0, m):
        fail(f"--level, --data: expected one level or one per task, and one file per task ({', '.join(tasks)})")
    if len(args.teachers) not in (0, m):
        fail(f"--teachers: expected one file per task ({m}: {', '.join(tasks)}), found {len(args.teachers)}")
    if args.num_critics < 2:
        fail(f"--num-critics: expected at least 2 (the uncertainty is their disagreement), found {args.num_critics}")
    levels = args.level * m if len(args.level) == 1 else args.level
    device = select_device(args.device, args.threads, args.tf32)
    eval_envs = [LockstepEnv(task, args.eval_episodes, args.threads) for task in tasks]
    obs_dim, action_dim = eval_envs[0].obs_dim, eval_envs[0].action_dim
    onehot = m if args.task_encoding == "onehot" else 0
    hint = "python mop_td3_collect.py --task"
    names = [f"{task}-{level}" for task, level in zip(tasks, levels, strict=True)]
    data_paths = args.data or [find_file("data", f"{n}.npz", f"{hint} {t}") for n, t in zip(names, tasks, strict=True)]
    teacher_outputs = [] if args.teachers else [Path(f"checkpoints/{name}-ds-teacher.pt") for name in names]
    paths = args.teachers or teacher_outputs
    jobs = [(i, range(m), path) for i, path in enumerate(paths)]  # (task, whose data it learns from, file)
    datasets, given = [load_dataset(path, task)[0] for path, task in zip(data_paths, tasks, strict=True)], {}
    for path, data in zip(data_paths, datasets, strict=True):
        found = data["observations"].shape[1], data["actions"].shape[1]
        if found != (obs_dim, action_dim):
            fail(f"{path}: expected {obs_dim} observations and {action_dim} actions, found {found}")
    for i, _, path in jobs:
        if path not in teacher_outputs:
            given[path] = load_teacher(path, tasks[i], obs_dim, device)
    name = f"{Path(__file__).stem}-{args.hidden}-{'+'.join(dict.fromkeys(levels))}-seed{args.seed}"
    run_dir = prepare_outputs(args, name, [*teacher_outputs, *([Path(args.output)] if args.output else [])])
    output = Path(args.output or run_dir / "student.pt")

    # data: rows (s, a, s', terminal) of every dataset j, and their rewards under every task i
    tables, rewards_of = [], []
    for j, (path, data) in enumerate(zip(data_paths, datasets, strict=True)):
        others = [data["rewards"] if task == tasks[j] else relabel(path, data, task, args.threads) for task in tasks]
        rewards_of.append([torch.from_numpy(reward)[:, None].to(device) for reward in others])
        columns = [data[name] for name in ("observations", "actions", "next_observations", "terminals")]
        columns = [column.reshape(len(data["rewards"]), -1) for column in columns]
        tables.append(torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)).to(device))
        means = ", ".join(f"{reward.mean():.3f} as {task}" for reward, task in zip(others, tasks, strict=True))
        print(f"task {j}: {tasks[j]}, {len(tables[j])} transitions, mean reward {means}")
    obs = torch.cat([part[:, :obs_dim] for part in tables])  # the union's states
    del datasets, data, others, columns

    # teachers
    writer = SummaryWriter(run_dir)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    clock, rows = time.time(), point["rows"] if point else []
    phase, references = point["phase"] if point else 0, {}
    teachers = []
    for number, (i, sources, path) in enumerate(jobs):
        task, label = tasks[i], f"{tasks[i]} teacher"
        if path in given:
            actor, critics, teacher_returns = given[path]
        elif phase > number:  # finished before this run was resumed
            actor, critics, teacher_returns = load_teacher(path, task, obs_dim, device)
        else:
            action_end = obs_dim + action_dim
            parts = [[tables[j][:, :action_end], rewards_of[j][i], tables[j][:, action_end:]] for j in sources]
            transitions = torch.cat([torch.cat(part, dim=1) for part in parts])  # (s, a, r, s', terminal)

            def log(step, metrics, state):
                for name, value in metrics.items():
                    writer.add_scalar(f"{label}/{name}", value.item(), step)
                if state is None:
                    return
                returns = state.pop("returns")
                rows.append([step, label, returns])
                writer.add_scalar(f"return/{label}", float(np.mean(returns)), step)
                values = ", ".join(f"{name} {value.item():.3g}" for name, value in metrics.items())
                tqdm.write(f"{label}, step {step}: {np.mean(returns):.1f} +- {np.std(returns):.1f}; {values}")
                write_returns(run_dir, rows)
                state |= {"args": vars(args), "phase": number, "step": step, "rows": rows}
                write_atomic(run_dir / "resume.pt", partial(torch.save, state))

            this_point = point if point and phase == number else None
            actor, critics = train_teacher(label, transitions, eval_envs[i], device, args, this_point, log)
            teacher_returns = evaluate(actor, LockstepEnv(task, args.final_eval_episodes, args.threads), device)
            names = [tasks[j] for j in sources]
            save_teacher(path, actor, critics, task, levels[i], names, teacher_returns, args)
            del parts, transitions
        teachers.append((actor, critics))
        references.setdefault(task, {})["teacher"] = float(np.mean(teacher_returns))
        print(f"{label}: {path}, return {np.mean(teacher_returns):.1f} +- {np.std(teacher_returns):.1f}")

    parts = [[add_task(obs, i, onehot), in_parts(teachers[i][0], obs)] for i in range(m)]
    table = torch.cat([torch.cat(part, dim=1) for part in parts])  # (m * N, in_dim + act): all states, for every task
    del parts

    # student
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    sizes = {"in_dim": obs_dim + (onehot or 1), "action_dim": action_dim, "hidden": args.hidden}
    student = Actor(*sizes.values()).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, fused=True, capturable=True)
    start = 0
    if point and phase == m:
        start = point["step"]
        student.load_state_dict(point["student"])
        optimizer.load_state_dict(point["optimizer"])
        generator.set_state(point["generator"])

    def update(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        # sample a batch of every task, all from the union
        shape, keywords = (args.batch_size,), {"generator": generator, "device": device}
        index = torch.cat([torch.randint(i * len(obs), (i + 1) * len(obs), shape, **keywords) for i in range(m)])
        x, target_action = table[index].tensor_split([sizes["in_dim"]], dim=1)

        # student
        losses = mse_loss(student, x, target_action)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return losses.detach(), loss.detach()

    progress = tqdm(total=args.gradient_steps, initial=start, desc="student", unit="step", disable=None)
    student_clock = time.time()
    updates, n = in_cuda_graph(update, args.cuda_graph, generator), args.cuda_graph or 1
    for step in range(start, args.gradient_steps, n):
        losses, loss = updates(step)

        # log, evaluate, save
        progress.update(n)
        now = step + n
        if now % 1000 == 0:
            for task, part in zip(tasks, losses.chunk(m), strict=True):
                writer.add_scalar(f"loss/mse/{task}", part.mean().item(), now)
            writer.add_scalar("speed/steps_per_second", (now - start) / (time.time() - student_clock), now)
        if now % args.eval_every == 0 or now == args.gradient_steps:
            texts = []
            for i, env in enumerate(eval_envs):
                returns = evaluate(lambda x: student(add_task(x, i, onehot)), env, device)
                rows.append([now, env.task, returns])
                writer.add_scalar(f"return/{env.task}", float(np.mean(returns)), now)
                reference = ", ".join(f"{k} {v:.1f}" for k, v in references[env.task].items())
                texts.append(f"{env.task} {np.mean(returns):.1f} ({reference})")
            progress.set_postfix({task: f"{np.mean(r):.0f}" for _, task, r in rows[-m:]})
            progress.write(f"step {now}: {'; '.join(texts)}; loss {loss.item():.2g}")
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
            state |= {"phase": m, "step": now, "rows": rows, "generator": generator.get_state()}
            write_returns(run_dir, rows, references)
            write_atomic(run_dir / "resume.pt", partial(torch.save, state))
    progress.close()
    writer.close()

    # final evaluation, checkpoint
    returns = {}
    for i, task in enumerate(tasks):
        env = LockstepEnv(task, args.final_eval_episodes, args.threads)
        returns[task] = evaluate(lambda x: student(add_task(x, i, onehot)), env, device)
    sizes |= {"obs_dim": obs_dim, "layer_norm": False, "log_std": None, "task_encoding": args.task_encoding}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "student", "tasks": list(tasks), "level": list(levels)}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "versions": VERSIONS}
    checkpoint |= {"actor": student.cpu().state_dict(), "returns": returns}
    write_atomic(output, partial(torch.save, checkpoint))
    summary = {}
    for task, values in returns.items():
        summary[task] = {**summarize(values), **{name: round(v, 1) for name, v in references[task].items()}}
    files = [str(output), *map(str, teacher_outputs), str(run_dir / "returns.csv"), str(run_dir / "learning_curve.png")]
    result = {"returns": summary, "files": files}
    print("RESULT", json.dumps({**result, "run_dir": str(run_dir), "seconds": round(time.time() - clock)}))


if __name__ == "__main__":
    main()
