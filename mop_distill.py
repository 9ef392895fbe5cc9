"""Distil one teacher per task into one multi-task student, offline: stage 3 of MOP (van Lith 2024, section 5.1.3).

  python mop_distill.py --loss mse --hidden 64

Student pi^S(s, i): an MLP that reads the state and the task id. Teachers pi_i^T are frozen, so their actions over the
datasets are computed once. Per step one batch of every task, in one forward pass:

  mse:  L = mean over tasks i and states s of D_i of  || pi_i^T(s) - pi^S(s, i) ||_2^2

In:  per task data/<task>-<level>.npz and checkpoints/<task>-<level>-teacher.pt, else the bundled ones in pretrained/.
Out: student.pt, returns.csv, learning_curve.png and TensorBoard logs in the run's folder under runs/.
"""

import dataclasses
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered here
import mujoco
import numpy as np
import torch
import torch.nn as nn
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
RESUMABLE = {"device", "threads", "gradient_steps", "eval_episodes", "final_eval_episodes"}


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
    """teacher checkpoints, one per task; default: checkpoints/<task>-<level>-teacher.pt, else the bundled one"""
    output: str | None = None
    """file to write instead of the default one"""
    overwrite: bool = False
    """replace output files that exist"""
    # algorithm
    loss: Literal["mse"] = "mse"
    """distillation loss"""
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


def select_device(device: str, threads: int) -> torch.device:
    """Set torch's CPU threads (0: all cores) and return the device; fail where cuda is asked for and there is none."""
    torch.set_num_threads(threads or os.cpu_count())
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device was found; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


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
        xmat = self.arrays["xmat"].reshape(self.n, -1, 9)  # (n, bodies, 3 x 3); body 0 is the world, body 1 the torso
        height = self.arrays["xpos"].reshape(self.n, -1, 3)[:, 1, 2]
        orientations = xmat[:, 1:, [0, 2]].reshape(self.n, -1)  # xx, xz
        observations = np.concatenate([orientations, height[:, None], self.arrays["qvel"]], axis=1)
        # PlanarWalker.get_reward of dm_control.suite.walker, on arrays
        standing = rewards.tolerance(height, bounds=(1.2, np.inf), margin=0.6)
        reward = (3 * standing + (1 + xmat[:, 1, 8]) / 2) / 4
        if speed := WALKER_SPEED[self.task]:
            velocity = self.arrays["sensordata"].reshape(self.n, -1)[:, 0]
            bounds = {"bounds": (speed, np.inf), "margin": speed / 2}
            move = rewards.tolerance(velocity, **bounds, value_at_margin=0.5, sigmoid="linear")
            reward = reward * (5 * move + 1) / 6
        return observations.astype(np.float32), reward.astype(np.float32)

    def physics_state(self) -> np.ndarray:
        """physics.get_state() of every environment, (n, state) f64."""
        if self.batch:
            return np.concatenate([self.arrays["qpos"], self.arrays["qvel"]], axis=1)
        return np.stack([env.physics.get_state() for env in self.envs])


@torch.no_grad()
def evaluate(policy, env: LockstepEnv, device: torch.device) -> list[float]:
    """Episode returns of env.n whole episodes from the fixed initial states; policy: (n, obs) -> (n, act) tensors."""
    observations, returns = env.reset(EVAL_SEED + np.arange(env.n)), np.zeros(env.n)
    for _ in range(env.episode_length):
        actions = policy(torch.from_numpy(observations).to(device)).cpu().numpy()
        observations, reward = env.step(actions)
        returns += reward
    return returns.tolist()


# ----------------------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Deterministic policy, (B, in_dim) -> (B, action_dim); layer_norm: the first layer is Linear-LayerNorm-Tanh."""

    def __init__(self, in_dim: int, action_dim: int, hidden: int, layer_norm: bool = False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden),
            *([nn.LayerNorm(hidden), nn.Tanh()] if layer_norm else [nn.ReLU()]),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, action_dim),
            nn.Tanh(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


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
    return checkpoint


def load_actor(checkpoint: dict, path) -> Actor:
    """The frozen policy of a checkpoint."""
    sizes = checkpoint["sizes"]
    try:
        actor = Actor(sizes["in_dim"], sizes["action_dim"], sizes["hidden"], sizes["layer_norm"])
        actor.load_state_dict(checkpoint["actor"])
    except (KeyError, RuntimeError, TypeError) as error:
        fail(f"{path}: weights and sizes do not fit together ({str(error).splitlines()[0]})")
    return actor.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- algorithm
def student_input(obs: torch.Tensor, task_id: int) -> torch.Tensor:
    """States with the task id as one more number: (B, obs_dim) -> (B, obs_dim + 1)."""
    return torch.cat([obs, obs.new_full((len(obs), 1), task_id)], dim=1)


def mse_loss(student, x, teacher_action) -> torch.Tensor:
    """Mean over rows of || pi^T(s) - pi^S(s, i) ||^2, summed over action dimensions (thesis 5.1.3).

    x: (m * B, obs_dim + 1), as many rows of each of the m tasks, so that the mean over rows is the mean over tasks.
    """
    return (teacher_action - student(x)).square().sum(dim=1).mean()


@torch.no_grad()
def teacher_actions(teacher: Actor, obs: torch.Tensor, chunk: int = 65_536) -> torch.Tensor:
    """The teacher's actions over a whole dataset, (N, obs_dim) -> (N, action_dim)."""
    return torch.cat([teacher(part) for part in obs.split(chunk)])


def main():
    args, point = parse_args(Args)

    # validate before anything is written
    positive = ["eval_every", "eval_episodes", "final_eval_episodes", "gradient_steps", "learning_rate", "batch_size"]
    check_numbers(args, *positive, "hidden")
    tasks, m = args.tasks, len(args.tasks)
    for name in ("data", "teachers"):
        if len(getattr(args, name)) not in (0, m):
            fail(f"--{name}: expected one file per task ({m}: {', '.join(tasks)}), found {len(getattr(args, name))}")
    if m < 1 or len(set(tasks)) < m or len(args.level) not in (1, m):
        fail(f"--tasks, --level: expected distinct tasks, and one level or one per task, found {tasks}, {args.level}")
    levels = args.level * m if len(args.level) == 1 else args.level
    device = select_device(args.device, args.threads)
    eval_envs = [LockstepEnv(task, args.eval_episodes, args.threads) for task in tasks]
    obs_dim, action_dim = eval_envs[0].obs_dim, eval_envs[0].action_dim
    for env in eval_envs:
        if (env.obs_dim, env.action_dim) != (obs_dim, action_dim):
            fail(f"--tasks: {env.task} has other observation or action sizes than {tasks[0]}; expected equal ones")

    # teachers and states: one table row (s, i, teacher's action) per state, all tasks below one another, on the device
    tables, references = [], {}
    for i, (task, level) in enumerate(zip(tasks, levels, strict=True)):
        hint = f"python mop_td3_collect.py --task {task}"
        data_path = args.data[i] if args.data else find_file("data", f"{task}-{level}.npz", hint)
        hint = f"python mop_pbrl_teacher.py --task {task} --level {level}"
        name = f"{task}-{level}-teacher.pt"
        teacher_path = args.teachers[i] if args.teachers else find_file("checkpoints", name, hint)
        checkpoint = load_checkpoint(teacher_path, ("teacher",), task)
        teacher = load_actor(checkpoint, teacher_path).to(device)
        data, _ = load_dataset(data_path, task)
        if data["observations"].shape[1] != checkpoint["sizes"]["in_dim"] or checkpoint["sizes"]["in_dim"] != obs_dim:
            found = f"{data['observations'].shape[1]} in {data_path}, {checkpoint['sizes']['in_dim']} in {teacher_path}"
            fail(f"{task}: expected observations of {obs_dim} values, found {found}")
        obs = torch.from_numpy(data["observations"].astype(np.float32, copy=False)).to(device)
        tables.append(torch.cat([student_input(obs, i), teacher_actions(teacher, obs)], dim=1))
        references[task] = {"teacher": float(np.mean(checkpoint["returns"][task]))}
        print(f"task {i}: {task}, {len(obs)} states, teacher's return {references[task]['teacher']:.1f}")
    sizes, table = [len(part) for part in tables], torch.cat(tables)
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    del tables, data, obs

    name = f"{Path(__file__).stem}-{args.loss}-{args.hidden}-{'+'.join(dict.fromkeys(levels))}-seed{args.seed}"
    run_dir = prepare_outputs(args, name, [Path(args.output)] if args.output else [])
    output = Path(args.output or run_dir / "student.pt")

    # network
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    student = Actor(obs_dim + 1, action_dim, args.hidden).to(device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, fused=True)

    # resume
    start, rows = 0, []
    if point is not None:
        start, rows = point["step"], point["rows"]
        student.load_state_dict(point["student"])
        optimizer.load_state_dict(point["optimizer"])
        generator.set_state(point["generator"])

    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else None)
    writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in vars(args).items()))
    progress = tqdm(total=args.gradient_steps, initial=start, desc="distill", unit="step", disable=None)
    clock = time.time()
    for step in range(start, args.gradient_steps):
        # sample a batch of every task
        shape, keywords = (args.batch_size,), {"generator": generator, "device": device}
        index = [torch.randint(o, o + n, shape, **keywords) for o, n in zip(offsets, sizes, strict=True)]
        x, teacher_action = table[torch.cat(index)].split([obs_dim + 1, action_dim], dim=1)

        # student
        loss = mse_loss(student, x, teacher_action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log, evaluate, save
        progress.update()
        now = step + 1
        if now % 1000 == 0:
            writer.add_scalar("loss/distillation", loss.item(), now)
            writer.add_scalar("speed/steps_per_second", (now - start) / (time.time() - clock), now)
        if now % args.eval_every == 0 or now == args.gradient_steps:
            means = {}
            for i, env in enumerate(eval_envs):
                returns = evaluate(lambda obs: student(student_input(obs, i)), env, device)
                rows.append([now, env.task, returns])
                means[env.task] = float(np.mean(returns))
                writer.add_scalar(f"return/{env.task}", means[env.task], now)
            progress.set_postfix({task: f"{mean:.0f}" for task, mean in means.items()})
            text = ", ".join(f"{task} {v:.1f} (teacher {references[task]['teacher']:.1f})" for task, v in means.items())
            progress.write(f"step {now}: {text}, loss {loss.item():.2g}")
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "args": vars(args)}
            state |= {"step": now, "rows": rows, "generator": generator.get_state()}
            write_returns(run_dir, rows, references)
            write_atomic(run_dir / "resume.pt", partial(torch.save, state))
    progress.close()
    writer.close()

    # final evaluation, checkpoint
    returns = {}
    for i, task in enumerate(tasks):
        env = LockstepEnv(task, args.final_eval_episodes, args.threads)
        returns[task] = evaluate(lambda obs: student(student_input(obs, i)), env, device)
    sizes = {"in_dim": obs_dim + 1, "obs_dim": obs_dim, "action_dim": action_dim, "hidden": args.hidden}
    sizes |= {"layer_norm": False, "task_encoding": "number"}
    checkpoint = {"schema_version": SCHEMA_VERSION, "kind": "student", "tasks": list(tasks), "level": list(levels)}
    checkpoint |= {"args": vars(args), "step": args.gradient_steps, "sizes": sizes, "versions": VERSIONS}
    checkpoint |= {"actor": student.cpu().state_dict(), "returns": returns}
    write_atomic(output, partial(torch.save, checkpoint))
    summary = {task: {**summarize(v), "teacher": round(references[task]["teacher"], 1)} for task, v in returns.items()}
    files = [str(output), str(run_dir / "returns.csv"), str(run_dir / "learning_curve.png")]
    result = {"returns": summary, "files": files}
    print("RESULT", json.dumps({**result, "run_dir": str(run_dir), "seconds": round(time.time() - clock)}))


if __name__ == "__main__":
    main()
