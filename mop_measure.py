"""Measure a student: returns, computation shared between tasks, shift between datasets (van Lith 2024, 5.2.2, 6.2).

  python mop_measure.py --student runs/<name>/student.pt

D_i^S: the states that student pi^S visits in task i under task id i. l_j(s, i): activations of hidden layer j after the
ReLU. tau of two vectors of N values with C concordant and D discordant pairs: 2 (C - D) / (N (N - 1)), which is tau-a;
tied pairs count 0. tau-b leaves them out of the denominator, too. For every pair of task ids i, i' and every layer:

  per-state:  tau( l_j(s, i), l_j(s, i') ), mean and std over s in the union of all D_i^S
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
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from dm_control.utils import rewards
from matplotlib.figure import Figure
from mujoco.batch import Batch
from PIL import Image
from scipy.stats import kendalltau, rankdata
from tqdm import tqdm

SCHEMA_VERSION = 1  # of datasets and checkpoints
EVAL_SEED = 2**31  # evaluation episode e starts from seed EVAL_SEED + e; training and collection stay below
WALKER_SPEED = {"walker-stand": 0.0, "walker-walk": 1.0, "walker-run": 8.0}  # m/s, as in dm_control.suite.walker
VERSIONS = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
VERSIONS |= {"numpy": np.__version__, "mujoco": mujoco.__version__}
GL_PACKAGES = {"egl": "libegl1 libgl1", "osmesa": "libosmesa6"}  # of Debian and Ubuntu
RENDER = """import importlib.util, io, sys
import dm_control.suite  # takes MUJOCO_GL, which the script then sets to disable
spec = importlib.util.spec_from_file_location("measure", sys.argv[1])
sys.modules["measure"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
states = module.np.load(io.BytesIO(sys.stdin.buffer.read()))
module.render_gifs(states, module.Path(sys.argv[2]), float(sys.argv[3]))"""


@dataclass
class Args:
    # experiment
    student: str | None = None
    """checkpoint of the student, or of a naive multi-task policy; its tasks are measured"""
    episodes: int = 1000
    """episodes of the student per task, always from the same initial states"""
    teachers: tuple[str, ...] = ()
    """checkpoints of teachers or behaviours, the rows of the cross-task table"""
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk")
    """tasks of the dm_control suite, DOMAIN-TASK; the columns of the cross-task table"""
    cross_episodes: int = 100
    """episodes per teacher and task in the cross-task table"""
    shift: tuple[str, ...] = ()
    """two dataset files, A and B; the divergence of their observations is estimated"""
    seed: int = 1
    """seed of the samples of states, of the split into train and test episodes, and of the classifier"""
    run_dir: str | None = None
    """folder for the results; default: runs/<script>-<time>"""
    overwrite: bool = False
    """replace output files that exist"""
    gif: bool = True
    """render the student's first episode of each task"""
    gif_fps: int = 10
    """pictures per second of the GIF, which plays in real time"""
    # algorithm
    cka_states: int = 100_000
    """visited states in the sample for CKA, at most"""
    shift_states: int = 100_000
    """states per dataset for the shift, at most"""
    # system
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    threads: int = 0
    """CPU threads of torch and of the physics; 0: all cores"""


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


def make_folder(folder: Path) -> None:
    """Create the folder; fail where that, or writing in it, is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{folder}: cannot be created ({error.strerror}); choose another folder")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: cannot be written; choose another folder")


def summarize(returns: list[float]) -> dict:
    """Mean and std over episodes, for the RESULT line."""
    mean, std = float(np.mean(returns)), float(np.std(returns))
    return {"mean": round(mean, 1), "std": round(std, 1), "episodes": len(returns)}


def number(value, digits: int = 9) -> float | None:
    """For JSON: rounded, None where it is not defined (NaN)."""
    return None if value is None or np.isnan(value) else round(float(value), digits)


def describe(values: np.ndarray) -> dict:
    """Mean and std of the defined values, and how many are not defined (NaN)."""
    defined = values[~np.isnan(values)]
    mean, std = (defined.mean(), defined.std()) if len(defined) else (np.nan, np.nan)
    return {"mean": number(mean), "std": number(std), "undefined": len(values) - len(defined)}


def show(value, digits: int = 3) -> str:
    """A number, or one ± another, the first two of a dict, for the printed tables."""
    if isinstance(value, dict):
        return " ± ".join(show(part, digits) for part in list(value.values())[:2])
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(rows: list) -> None:
    """Rows of texts, the first one the header, in columns, the first of them flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def plot_activations(path: Path, tasks: list[str], means: np.ndarray, titles: list[str], order: bool) -> None:
    """Fig. 6.3: mean activation per neuron, one line per task; order: neurons ascending by the first task's.

    means: (tasks, 2 layers, hidden); titles: one per layer.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    for layer, axes in enumerate(figure.subplots(2, 1)):
        neurons = np.argsort(means[0, layer], kind="stable") if order else np.arange(means.shape[2])
        for i in reversed(range(len(tasks))):  # the first task's line on top
            marker = "." if len(neurons) <= 64 else ""
            axes.plot(means[i, layer, neurons], f"C{i}", lw=1.2, marker=marker, label=f"{tasks[i]} (id {i})")
        axes.set_title(titles[layer], fontsize=11)
        axes.set(ylabel="mean activation", xlim=(0, len(neurons) - 1))
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"neuron, each layer sorted by its mean activation in {tasks[0]}" if order else "neuron")
    figure.legend(handles=axes.lines[::-1], loc="outside upper center", ncols=len(tasks), frameon=False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


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


@torch.no_grad()
def rollout(policy, env: LockstepEnv, episodes: int, device: torch.device) -> tuple[list, torch.Tensor, np.ndarray]:
    """Whole episodes from the fixed initial states, env.n at a time; policy: (n, obs) -> (n, act) tensors.

    Returns the episode returns, every state an action was taken in, (T * episodes, obs) f32, and the physics states of
    episode 0, (T, state) f64.
    """
    length, returns = env.episode_length, np.zeros(episodes)
    visited = np.empty((length, episodes, env.obs_dim), np.float32)
    physics = np.empty((length, env.state_dim))
    starts, threads = range(0, episodes, env.n), torch.get_num_threads()
    torch.set_num_threads(1)  # torch's other threads would wait busily on the physics' cores
    with tqdm(total=len(starts) * length, desc=env.task, unit="step", disable=None) as progress:
        for start in starts:
            observations = env.reset(EVAL_SEED + start + np.arange(env.n))
            chunk = slice(start, min(start + env.n, episodes))
            count = chunk.stop - start
            for t in range(length):
                visited[t, chunk] = observations[:count]
                if start == 0:
                    physics[t] = env.physics_state()[0]
                actions = policy(torch.from_numpy(observations).to(device)).cpu().numpy()
                observations, reward = env.step(actions)
                returns[chunk] += reward[:count]
                progress.update()
    torch.set_num_threads(threads)
    return returns.tolist(), torch.from_numpy(visited.reshape(-1, env.obs_dim)), physics


def render_gifs(states, folder: Path, fps: float) -> None:
    """folder/<task>.gif for every task in states, of its physics states (T, state); needs MUJOCO_GL egl or osmesa."""
    for task in states:
        env = suite.load(*task.split("-", 1))
        physics, step = env.physics, env.control_timestep()
        stride = max(1, round(1 / (fps * step)))
        camera = {"camera_id": 0 if physics.model.ncam else -1}
        camera["render_flag_overrides"] = {"shadow": False, "reflection": False}  # a third of the time in software
        frames = []
        for state in states[task][::stride]:
            with physics.reset_context():
                physics.set_state(state)
            frames.append(Image.fromarray(physics.render(240, 320, **camera)))
        sample = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: max(1, len(frames) // 8)]]))
        palette = sample.quantize(64)  # one for all frames, so that what does not move takes no space
        first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options = {"save_all": True, "append_images": others, "loop": 0, "optimize": True}
        options |= {"format": "GIF", "duration": round(1000 * stride * step)}
        write_atomic(folder / f"{task}.gif", lambda file: first.save(file, **options))


def write_gifs(states: dict, folder: Path, fps: float) -> tuple[dict | None, str | None]:
    """render_gifs in another process, with EGL or else OSMesa: a GL library that is missing or crashes ends only that.

    Returns ({task: file name}, None), or (None, the reason why there is no GIF).
    """
    buffer, reasons = io.BytesIO(), []
    np.savez(buffer, **states)
    asked = os.environ["GIF_GL"].lower()
    for backend in (asked,) if asked in GL_PACKAGES else GL_PACKAGES:
        command = [sys.executable, "-c", RENDER, __file__, str(folder), str(fps)]
        options = {"env": {**os.environ, "MUJOCO_GL": backend}, "input": buffer.getvalue(), "capture_output": True}
        try:
            child = subprocess.run(command, timeout=900, **options)
        except subprocess.TimeoutExpired:
            reasons.append(f"{backend}: not ready after 900 s")
            continue
        if child.returncode == 0:
            return {task: f"{task}.gif" for task in states}, None
        lines = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
        reasons.append(f"{backend} (Debian: apt-get install {GL_PACKAGES[backend]}): {lines[-1]}")
    return None, "; ".join(reasons)


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


# -------------------------------------------------------------------------------------------------------------- files
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


# ---------------------------------------------------------------------------------------------------------- algorithm
def add_task(obs: torch.Tensor, task_id: int, onehot: int = 0) -> torch.Tensor:
    """States with the task id as one more number, (B, obs_dim) -> (B, obs_dim + 1), or as one of `onehot` flags."""
    code = obs.new_zeros(len(obs), onehot or 1)
    code[:, task_id if onehot else 0].fill_(1 if onehot else task_id)
    return torch.cat([obs, code], dim=1)


def hidden_layers(actor: Actor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of both hidden layers after the ReLU, (B, hidden) each."""
    first = actor.net[:2](x)
    return first, actor.net[2:4](first)


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


def per_state_taus(
    student, states, i: int, j: int, onehot: int, device, threads: int, rows: int = 16_384
) -> np.ndarray:
    """tau-a and tau-b between ids i and j in every state (N, obs), `rows` at a time: (2 layers, 2 taus, N)."""
    taus = []
    for part in tqdm(states.split(rows), desc=f"tau of ids {i}, {j}", disable=None):
        part = part.to(device)
        taus.append(layer_taus(student, add_task(part, i, onehot), [add_task(part, j, onehot)], threads))
    return np.concatenate(taus, axis=-1)


@torch.no_grad()
def mean_activations(student, states, i: int, onehot: int, device, rows: int = 16_384) -> np.ndarray:
    """Mean of every neuron over states (N, obs) under task id i, summed in float64: (2 layers, hidden)."""
    total = 0.0
    for part in states.split(rows):
        layers = hidden_layers(student, add_task(part.to(device), i, onehot))
        total = total + torch.stack([layer.sum(dim=0, dtype=torch.float64) for layer in layers])
    return (total / len(states)).cpu().numpy()


def vector_taus(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """tau-a by its definition and scipy's tau-b of two vectors (N,); tau-b of a constant vector is not defined."""
    agreement = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)  # (N, N)
    return float(agreement.sum() / (len(x) * (len(x) - 1))), number(kendalltau(x, y).statistic)


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


@torch.no_grad()
def layer_ckas(student, states, i: int, j: int, onehot: int, device) -> list[float | None]:
    """CKA of each hidden layer between task ids i and j on the same states (N, obs)."""
    pairs = zip(*(hidden_layers(student, add_task(states.to(device), k, onehot)) for k in (i, j)), strict=True)
    return [number(linear_cka(a, b)) for a, b in pairs]


def compare_layers(taus: np.ndarray, means: np.ndarray, ckas: list, visited: dict) -> list[dict]:
    """One dict of all measures per hidden layer, for one pair of task ids.

    taus: (2 layers, 2 taus, N) of the states of all tasks, in the order of visited: {task: number of states};
    means: (2 ids, 2 layers, hidden); ckas: one per layer.
    """
    rows, ends = [], np.cumsum(list(visited.values()))[:-1]
    for layer, (tau_a, tau_b) in enumerate(taus):
        by_task = zip(visited, np.split(tau_a, ends), np.split(tau_b, ends), strict=True)
        per_state = {"tau_a": describe(tau_a), "tau_b": describe(tau_b)}
        per_state["by_task"] = {task: {"tau_a": describe(a), "tau_b": describe(b)} for task, a, b in by_task}
        average = dict(zip(("tau_a", "tau_b"), vector_taus(*means[:, layer]), strict=True))
        rows.append({"layer": layer + 1, "per_state": per_state, "average": average, "cka": ckas[layer]})
    return rows


def split_episodes(timeouts: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Episode of every row, and its use: 0 train, 1 validation, 2 test; timeouts (N,) -> (N,), (N,) int.

    By whole episodes, 60, 20 and 20% of them at random: neighbouring rows are nearly equal, so after a split by rows
    the classifier would know test rows by their neighbours. Fewer than five episodes: ten blocks of rows instead.
    """
    n = len(timeouts)
    episode = np.cumsum(timeouts) - timeouts
    if episode[-1] < 4:
        episode = np.arange(n) * 10 // n
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
    net = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
    net = net.append(nn.Linear(hidden, 1)).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    label = torch.cat([torch.full((len(part),), 1.0 - i) for i, part in enumerate(train)]).to(x)
    weight = torch.cat([torch.full((len(part),), len(x) / (2 * len(part))) for part in train]).to(x)
    x = (x - mean) / std
    best, waited, drops = np.inf, 0, 0
    for _ in tqdm(range(epochs), desc="classifier", unit="epoch", disable=None):
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


def clustered(values: np.ndarray, episode: np.ndarray) -> tuple[float, float]:
    """Mean of values (N,) and its standard error, with whole episodes as the independent draws (NaN of one episode)."""
    episode = np.unique(episode, return_inverse=True)[1]
    count = episode.max() + 1
    deviation = np.bincount(episode, values - values.mean())
    error = np.sqrt(np.square(deviation).sum() * count / (count - 1)) / len(values) if count > 1 else np.nan
    return float(values.mean()), float(error)


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
    parts = [(1 - np.logaddexp(0, -f_a) / np.log(2), episode_a), (1 - np.logaddexp(0, f_b) / np.log(2), episode_b)]
    (js_a, error_a), (js_b, error_b) = (clustered(*part) for part in parts)
    values = {"js_bits": (np.clip((js_a + js_b) / 2, 0, 1), np.hypot(error_a, error_b) / 2)}
    values |= {"kl_ab": clustered(f_a, episode_a), "kl_ba": clustered(-f_b, episode_b)}
    estimates = {name: {"value": number(value), "error": number(error)} for name, (value, error) in values.items()}
    limit = float(np.log(min(n_a, n_b)))
    beyond = [name for name in ("kl_ab", "kl_ba") if estimates[name]["value"] > limit]
    return {"auc": float(auc), "accuracy": float(accuracy), **estimates, "kl_limit": limit, "beyond_limit": beyond}


def state_shift(data: list, seed: int, device: torch.device, max_states: int) -> dict:
    """Divergence of the states of two datasets, data = [(observations (N, d), timeouts (N,)) of A, of B].

    Train, validation and test states come from different episodes; at most max_states states per dataset are used.
    """
    rng, parts, episodes = np.random.default_rng(seed), [], []
    for observations, timeouts in data:
        episode, use = split_episodes(timeouts, rng)
        rows = [np.flatnonzero(use == k) for k in range(3)]
        limits = [max(1, int(max_states * share)) for share in (0.6, 0.2, 0.2)]
        rows = [np.sort(rng.choice(r, min(len(r), k), replace=False)) for r, k in zip(rows, limits, strict=True)]
        parts.append([torch.from_numpy(observations[r].astype(np.float32)).to(device) for r in rows])
        episodes.append(episode[rows[2]])
    train, validation, test = zip(*parts, strict=True)
    logit = train_classifier(train, validation, seed)
    logits = [logit(part).double().cpu().numpy() for part in test]
    counts = {"train_states": [len(part) for part in train], "test_states": [len(part) for part in test]}
    return {**divergences(*logits, *episodes), **counts, "test_episodes": [len(np.unique(e)) for e in episodes]}


def main():
    args = tyro.cli(Args, description=__doc__)

    # validate before anything is written
    check_numbers(args, "episodes", "cross_episodes", "gif_fps", "cka_states", "shift_states")
    if not (args.student or args.teachers or args.shift):
        fail("nothing to measure; for example: python mop_measure.py --student runs/NAME/student.pt (see --help)")
    if len(args.shift) not in (0, 2):
        fail(f"--shift: expected two dataset files, found {len(args.shift)}; for example: --shift A.npz B.npz")
    if min(args.cka_states, args.shift_states) < 100:
        fail("--cka-states, --shift-states: expected 100 or more, an estimate from less says nothing")
    device = select_device(args.device, args.threads)
    tasks, m, student = [], 0, None
    if args.student:
        checkpoint = load_checkpoint(args.student, ("student", "naive"))
        student, sizes = load_actor(checkpoint, args.student).to(device), checkpoint["sizes"]
        tasks, m = checkpoint["tasks"], len(checkpoint["tasks"])
        onehot = m if sizes.get("task_encoding") == "onehot" else 0
        expected = {"obs_dim": sizes["in_dim"] - (onehot or 1), "action_dim": sizes["action_dim"]}
        for task in tasks:
            env = LockstepEnv(task, 1, 1)
            found = {"obs_dim": env.obs_dim, "action_dim": env.action_dim}
            if found != expected:
                fail(f"{args.student}: expected the sizes of {task}, {found}, found those of a policy for {expected}")
        if sizes["hidden"] < 2 or sizes["layer_norm"]:
            found = "layer norm" if sizes["layer_norm"] else f"{sizes['hidden']}"
            fail(f"{args.student}: expected hidden layers of 2 or more neurons with ReLU, found {found}")
    if args.teachers:
        envs = [LockstepEnv(task, args.cross_episodes, args.threads) for task in args.tasks]
        if not envs:
            fail("--tasks: expected one task or more, the columns of the cross-task table")
    teachers = []
    for path in args.teachers:
        teacher = load_checkpoint(path, ("teacher", "behavior"))
        teachers.append((Path(path).name, teacher, load_actor(teacher, path).to(device)))
        found = teacher["sizes"]["in_dim"], teacher["sizes"]["action_dim"]
        for env in envs:
            if (env.obs_dim, env.action_dim) != found:
                fail(f"{path}: expected the sizes of {env.task}, {(env.obs_dim, env.action_dim)}, found {found}")
    data = []
    for path in args.shift:
        arrays, _ = load_dataset(path)
        data.append((arrays["observations"], arrays["timeouts"]))
        if len(arrays["observations"]) < 100:
            fail(f"{path}: expected 100 rows or more for --shift, found {len(arrays['observations'])}")
        if arrays["observations"].shape[1] != data[0][0].shape[1]:
            found = f"{data[0][0].shape[1]} in {args.shift[0]} and {arrays['observations'].shape[1]} in {path}"
            fail(f"--shift: expected observations of equal size, found {found}")
        del arrays

    run_dir = Path(args.run_dir or f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    outputs = ["measure.json", *(["activations.png", "activations_sorted.png"] if student else [])]
    for path in [run_dir / name for name in [*outputs, *(f"{task}.gif" for task in tasks if args.gif)]]:
        if path.exists() and not args.overwrite:
            fail(f"{path}: exists already; pass --overwrite to replace it")
    make_folder(run_dir)

    # file names only: the results may be published
    settings = vars(args) | {"run_dir": run_dir.name, "student": Path(args.student).name if args.student else None}
    settings |= {name: [Path(path).name for path in getattr(args, name)] for name in ("teachers", "shift")}
    report, summary = {"args": settings, "versions": VERSIONS}, {}
    seconds, clock = {}, time.time()

    def lap(name):
        seconds[name] = round(time.time() - clock - sum(seconds.values()), 3)

    if student:
        # returns: the student in each task under its own id
        states, physics, returns = [], {}, {}
        for i, task in enumerate(tasks):
            at_once = 1000 if task in WALKER_SPEED else 100  # every other task's environment is an object of its own
            env = LockstepEnv(task, -(-args.episodes // -(-args.episodes // at_once)), args.threads)

            def policy(obs):
                return student(add_task(obs, i, onehot))

            returns[task], visited, physics[task] = rollout(policy, env, args.episodes, device)
            states.append(visited)
            print(f"{task} (id {i}): return {show(describe(np.array(returns[task])), 1)}, {args.episodes} episodes")
        lap("rollouts")
        report["student"] = {"checkpoint": Path(args.student).name, "kind": checkpoint["kind"], "tasks": tasks}
        report["student"] |= {"step": checkpoint["step"], "sizes": sizes}
        report["returns"] = {task: {**summarize(v), "values": v} for task, v in returns.items()}
        summary["returns"] = {task: summarize(values) for task, values in returns.items()}

        # shared computation, for every pair of task ids
        means = np.stack([mean_activations(student, states[i], i, onehot, device) for i in range(m)])
        visited, states = {task: len(part) for task, part in zip(tasks, states, strict=True)}, torch.cat(states)
        sample = np.random.default_rng(args.seed).choice(len(states), min(len(states), args.cka_states), replace=False)
        sample, rows = states[np.sort(sample)], []
        lap("mean_activations")
        for i, j in itertools.combinations(range(m), 2):
            taus = per_state_taus(student, states, i, j, onehot, device, args.threads)
            lap(f"per_state_tau_{i}_{j}")
            ckas = layer_ckas(student, sample, i, j, onehot, device)
            rows += [{"ids": [i, j], **row} for row in compare_layers(taus, means[[i, j]], ckas, visited)]
            lap(f"cka_{i}_{j}")
        report["states"], report["cka_states"], report["shared_computation"] = visited, len(sample), rows
        report["mean_activations"] = dict(zip(tasks, means.tolist(), strict=True))
        if m == 1:
            print(f"{tasks[0]} is the student's only task: no tau and no CKA, they compare a layer under two task ids")
        else:
            table = [["layer", "ids", "per-state tau-a", "tau-b", "average tau-a", "tau-b", "CKA"]]
            summary["shared_computation"] = []
            for row in rows:
                per_state, average = row["per_state"], row["average"]
                values = per_state["tau_a"], per_state["tau_b"], average["tau_a"], average["tau_b"], row["cka"]
                table.append([str(row["layer"]), "{}, {}".format(*row["ids"]), *map(show, values)])
                brief = {"per_state_tau_a": per_state["tau_a"]["mean"], "average_tau_a": average["tau_a"]}
                brief = {name: number(value, 3) for name, value in {**brief, "cka": row["cka"]}.items()}
                summary["shared_computation"].append({"ids": row["ids"], "layer": row["layer"], **brief})
            print_table(table)

        # Fig. 6.3
        titles = ["hidden layer 1", "hidden layer 2"]
        if m > 1:
            text = "average tau-a" if m == 2 else "average tau-a (mean over pairs of tasks)"
            pairs = [[row["average"]["tau_a"] for row in rows if row["layer"] == layer] for layer in (1, 2)]
            titles = [f"{title}, {text} {np.mean(v):.3f}" for title, v in zip(titles, pairs, strict=True)]
        plot_activations(run_dir / "activations.png", tasks, means, titles, False)
        plot_activations(run_dir / "activations_sorted.png", tasks, means, titles, True)
        lap("plots")

        if args.gif:
            report["gif"], reason = write_gifs(physics, run_dir, args.gif_fps)
            outputs += (report["gif"] or {}).values()
            if reason:
                report["gif_reason"] = reason
                print(f"no GIF: {reason}")
            lap("gif")

    if teachers:
        report["cross_task"], summary["cross_task"] = [], []
        table = [["return (*: its own task)", *args.tasks]]
        for name, teacher, actor in teachers:
            returns, own = {env.task: evaluate(actor, env, device) for env in envs}, teacher["tasks"][0]
            row = {"checkpoint": name, "kind": teacher["kind"], "task": own}
            row["returns"] = {task: {**summarize(v), "values": v} for task, v in returns.items()}
            report["cross_task"].append(row)
            summary["cross_task"].append({"checkpoint": name, **{t: v["mean"] for t, v in row["returns"].items()}})
            table.append([name, *(f"{show(v, 1)} {'*' if t == own else ' '}" for t, v in row["returns"].items())])
        print_table(table)
        lap("cross_task")

    if data:
        shift = state_shift(data, args.seed, device, args.shift_states)
        lap("shift")
        report["shift"] = {"a": Path(args.shift[0]).name, "b": Path(args.shift[1]).name, **shift}
        print("shift between A = {a} and B = {b} (± standard error over held-out episodes):".format(**report["shift"]))
        print(f"JS {show(shift['js_bits'])} bits, AUC {shift['auc']:.3f}, accuracy {shift['accuracy']:.3f}")
        for name, text in (("kl_ab", "KL(A||B)"), ("kl_ba", "KL(B||A)")):
            note = f" (above ln(test states) = {shift['kl_limit']:.1f}: large, but the value is not reliable)"
            print(f"{text} {show(shift[name])} nats{note if name in shift['beyond_limit'] else ''}")
        summary["shift"] = {name: number(shift[name]["value"], 3) for name in ("js_bits", "kl_ab", "kl_ba")}

    report["seconds"] = seconds
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomic(run_dir / "measure.json", lambda file: file.write(text.encode()))
    files = [str(run_dir / name) for name in outputs]
    summary |= {"files": files, "run_dir": str(run_dir), "seconds": round(time.time() - clock)}
    print("RESULT", json.dumps(summary))


if __name__ == "__main__":
    main()
