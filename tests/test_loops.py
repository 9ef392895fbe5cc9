"""Every default, and every training loop against a plain one.

The plain loops write every update out. They share networks and ranking losses with the scripts,
which other tests hold to plain forms, and draw the same random numbers in the same order: a few
updates by a script's own main() must end with the same weights up to rounding. World stands in for
dm_control.
"""

import csv
import sys
import zlib
from copy import deepcopy
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import naive_multitask_pbrl as naive
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.optim import Adam

import mop_distill as distill
import mop_ds as ds
import mop_measure as measure
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, write_dataset, write_teacher

TRAINING = {"td3": td3, "pbrl": pbrl, "distill": distill, "ds": ds, "oqs": oqs, "naive": naive}

# ----------------------------------------------------------------------- defaults: the thesis's
# fmt: off
DEFAULTS = {  # of every flag, unless the script has its own below
    "tasks": ("walker-stand", "walker-walk"), "task": "walker-walk", "level": ("medium",),
    "seed": 1, "common_seed": False, "scale": "thesis", "states": "offline",
    "data": (), "teachers": (), "output": None, "run_dir": None, "resume": None, "overwrite": False,
    "eval_every": 10_000, "eval_episodes": 10, "final_eval_episodes": 100,
    "loss": "mse", "regularizer": "none", "reg_lambda": 100.0, "task_encoding": "number",
    "gradient_steps": 500_000, "learning_rate": 1e-4, "batch_size": 1024, "hidden": 256,
    "gamma": 0.99, "tau": 0.005, "actor_tau": 0.005,
    "policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2,
    "num_critics": 5, "num_ood": 3, "ood_noise": 0.01, "beta_in": 0.001,
    "beta_ood": 3.0, "beta_ood_min": 0.1, "beta_ood_decay": 0.99995,
    "anneal": 0.0, "bc_coef": 0.0, "bc_temperature": 0.05,
    "device": "cuda" if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads(),
    "matmul_precision": "highest", "cuda_graph": False,
}
OWN_DEFAULTS = {
    "td3": {
        "policy": None, "mix": "online", "num_transitions": 1_000_000,
        "datasets": ("medium", "expert", "medium-replay"),
        "medium_step": 1_000_000, "medium_return": None, "total_timesteps": 2_000_000,
        "hidden": 1024, "tau": 0.01, "policy_noise": 0.3, "noise_clip": 0.3,
        "exploration_noise": 0.2, "learning_starts": 4_000,
    },
    "pbrl": {
        "level": "medium", "data": None, "actor": "deterministic", "gradient_steps": 1_000_000,
    },
    "ds": {"level": "medium", "sources": ("walker-stand", "walker-walk"),
        "gradient_steps": 1_000_000,
    },
    "distill": {},
    "oqs": {},
    "naive": {"actor": "deterministic", "gradient_steps": 1_000_000},
    "measure": {
        "student": None, "episodes": 1000, "cross_episodes": 100, "shift": None,
        "num_states": 100_000,
    },
}
LAPTOP_TEACHER = {
    "gradient_steps": 15_000, "batch_size": 256, "learning_rate": 1e-3, "policy_frequency": 1,
    "num_ood": 1, "tau": 0.02, "actor_tau": 0.02, "policy_noise": 0.05,
    "beta_ood_decay": 0.9997, "anneal": 0.5, "bc_coef": 10.0, "matmul_precision": "medium",
}
LAPTOP_STUDENT = {"gradient_steps": 20_000, "learning_rate": 1e-3}
LAPTOP = {
    "td3": {
        "hidden": 256, "batch_size": 128, "learning_rate": 3e-4,
        "total_timesteps": 240_000, "medium_step": 120_000,
    },
    "pbrl": LAPTOP_TEACHER,
    "ds": LAPTOP_TEACHER,
    "naive": LAPTOP_TEACHER,
    "distill": LAPTOP_STUDENT,
    "oqs": LAPTOP_STUDENT,
}

# settings of the short runs below, all unlike the defaults and unlike each other
RUN = {"eval_episodes": 2, "final_eval_episodes": 3, "device": "cpu", "run_dir": "run"}
TD3 = {
    "learning_rate": 3e-3, "batch_size": 16, "hidden": 8, "gamma": 0.9, "tau": 0.1,
    "policy_noise": 0.5, "noise_clip": 0.4, "exploration_noise": 0.35, "policy_frequency": 3,
    "learning_starts": 46, "total_timesteps": 60, "medium_step": 40, "eval_every": 20,
    "num_transitions": 50,
}
PBRL = {
    "gamma": 0.9, "tau": 0.1, "actor_tau": 0.25, "policy_noise": 0.4, "noise_clip": 0.35,
    "policy_frequency": 3, "num_critics": 4, "num_ood": 2, "ood_noise": 0.2, "beta_in": 0.3,
    "beta_ood": 2.0, "beta_ood_min": 0.5, "beta_ood_decay": 0.7, "anneal": 0.0,
    "bc_coef": 0.0,
}
STEPS = {
    "gradient_steps": 8, "learning_rate": 3e-3, "batch_size": 16, "hidden": 8, "eval_every": 5,
}
CLONING = {"bc_coef": 0.7, "bc_temperature": 0.4, "anneal": 0.6}
# fmt: on


def flags(settings: dict) -> list:
    """{"batch_size": 8, "common_seed": True} -> ["--batch-size", 8, "--common-seed"]."""
    argv = []
    for name, value in settings.items():
        argv.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            argv.extend(value)
        elif value is not True:
            argv.append(value)
    return argv


def parsed(monkeypatch, name, *argv) -> dict:
    """The arguments that a script finds on a command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    return vars(TRAINING[name].parse_args()[0])


def defaults(name) -> dict:
    expected = DEFAULTS | OWN_DEFAULTS[name]
    fields = vars(TRAINING.get(name, measure).Args())
    return {field: expected[field] for field in fields}


@pytest.mark.parametrize("name", OWN_DEFAULTS)
def test_defaults(name):
    assert vars(TRAINING.get(name, measure).Args()) == defaults(name)


def test_constants():
    gaussians = {"gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}
    assert pbrl.LOG_STD == naive.LOG_STD == {"deterministic": None} | gaussians
    assert td3.PLAIN_ONE_IN == {"online": 1, "noise": 10, "random90": 10, "random99": 100}
    for module in [*TRAINING.values(), measure]:
        assert range(2**31, 2**32) == module.EVAL_SEEDS


@pytest.mark.parametrize("name", TRAINING)
def test_laptop_wins_over_defaults_and_flags_win_over_both(name, monkeypatch):
    plain = defaults(name)
    laptop = plain | LAPTOP[name] | {"scale": "laptop"}
    assert parsed(monkeypatch, name) == plain
    assert parsed(monkeypatch, name, "--scale", "laptop") == laptop
    given = {"seed": 9, "hidden": 5}
    for field in LAPTOP[name]:
        given[field] = plain[field]  # a flag that repeats the thesis's default wins, too
    assert parsed(monkeypatch, name, "--scale", "laptop", *flags(given)) == laptop | given
    assert parsed(monkeypatch, name, *flags(given), "--scale", "laptop") == laptop | given


@pytest.mark.parametrize("name", TRAINING)
def test_threads_and_precision_are_set(name, monkeypatch):
    parsed(monkeypatch, name, "--threads", 2, "--matmul-precision", "medium")
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("name", TRAINING)
def test_resumed_arguments_are_defaults_and_flags_win_over_them(name, monkeypatch, tmp_path):
    stored = parsed(monkeypatch, name, "--scale", "laptop", "--seed", 7, "--run-dir", "elsewhere")
    kind = f"resume point of {TRAINING[name].__name__}.py"
    torch.save({"kind": kind, "args": stored}, tmp_path / "resume.pt")
    given = {"resume": str(tmp_path), "hidden": 5}
    assert parsed(monkeypatch, name, *flags(given)) == stored | given


# ---------------------------------------------------------------------------------- the world
SLOPES = {"toy-up": 2.0, "toy-down": -2.0, "toy-out": 0.5}
LEVELS = {"toy-up": "medium", "toy-down": "expert", "toy-out": "medium-replay"}
TASKS = ("toy-up", "toy-down")
NUMBERS = [(0.0,), (1.0,)]  # task codes
FLAGS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


class World:
    """A small made-up world with dm_control's interface: environment, task and physics in one."""

    _step_limit = 19.5  # the first step beyond ends the episode: 20 steps

    def __init__(self, name):
        self.name = name
        self.random = np.random.RandomState(0)
        self.task = self
        self.physics = self
        self.state = np.zeros(3)
        self.control = np.zeros(2)
        place = np.zeros(3)
        limits = np.array([[-1.0, 1.0]])
        self.model = SimpleNamespace(
            body_pos=place, geom_pos=place, site_pos=place, actuator_ctrlrange=limits
        )

    def reset(self):
        self.state = self.random.uniform(-1, 1, 3)
        self.control = np.zeros(2)
        self.time = 0
        return self.time_step()

    def step(self, action):
        self.control = np.asarray(action, np.float64)
        force = np.array([action[0], action[1], action[0] * self.state[1]])
        self.state = 0.8 * np.roll(self.state, 1) + 0.3 * force
        self.time += 1
        return self.time_step()

    def get_reward(self, physics):
        here = 1 / (1 + np.exp(SLOPES[self.name] * physics.state[0]))
        return 0.9 * here + 0.1 * physics.control[0] ** 2

    def time_step(self):
        is_last = self.time >= self._step_limit
        return SimpleNamespace(
            observation={"observations": self.state},
            reward=self.get_reward(self),
            last=lambda: is_last,
        )

    def observation_spec(self):
        return {"observations": SimpleNamespace(shape=(3,))}

    def action_spec(self):
        return SimpleNamespace(shape=(2,))

    def get_state(self):
        return self.state.copy()

    def set_state(self, state):
        self.state = state

    def set_control(self, control):
        self.control = control

    def forward(self):
        pass


def use_world(monkeypatch):
    """World in place of dm_control, in every script."""
    for module in TRAINING.values():
        monkeypatch.setattr(module, "make_env", cache(World))


@pytest.fixture
def world(monkeypatch, run_main):
    """Runs a script in World; what it printed."""
    use_world(monkeypatch)

    def run(module, *args):
        printed = run_main(module, *args)
        assert isinstance(printed, str), printed
        return printed

    return run


def observed(time_step):
    return torch.from_numpy(time_step.observation["observations"]).float()


def rewards_of(task, arrays) -> np.ndarray:
    """The rewards of a task for the stored physics states and actions."""
    env = World(task)
    rewards = []
    for state, action in zip(arrays["physics"], arrays["actions"], strict=True):
        env.state = state
        env.control = action
        rewards.append(env.get_reward(env))
    return np.array(rewards, np.float32)


def write_data(tasks, levels=LEVELS) -> dict:
    """A dataset per task, each of another size, with short episodes -> {task: arrays}."""
    datasets = {}
    for i, task in enumerate(tasks):
        n = 50 + 30 * i
        arrays = make_arrays(n, 3, 2, 3, seed=i)
        ends = np.random.default_rng(i).random(n)
        arrays["terminals"] = ends < 0.1
        arrays["timeouts"] |= ends > 0.8
        arrays["timeouts"][-1] = True
        arrays["rewards"] = rewards_of(task, arrays)
        path = Path(f"data/{task}-{levels[task]}.npz")
        write_dataset(path, task, arrays, level=levels[task])
        datasets[task] = arrays
    return datasets


def write_toy_teacher(name, task, seed=0, log_std=None, **changes) -> Path:
    """A teacher that was not trained."""
    path = Path(f"checkpoints/{name}.pt")
    return write_teacher(path, task, "teacher", 3, 2, 8, seed, log_std, **changes)


def write_inputs(tasks) -> dict:
    """What a student learns from: a dataset and a teacher per task -> {task: arrays}."""
    for i, task in enumerate(tasks):
        write_toy_teacher(f"{task}-{LEVELS[task]}-teacher", task, seed=i)
    return write_data(tasks)


# ------------------------------------------------------------------------------- parts of a loop
def seed_of(text):
    return zlib.crc32(text.encode())


def coded(obs, code):
    return torch.cat([obs, torch.tensor([code] * len(obs))], dim=1)


def noise(like, std, bound):
    return (std * torch.randn(like.shape)).clamp(-bound, bound)


def minimise(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


def follow(target, network, rate):
    for old, new in zip(target.parameters(), network.parameters(), strict=True):
        old.data = (1 - rate) * old.data + rate * new.data


def row_squares(x):
    return (x**2).sum(dim=1)


# ----------------------------------------------------------------------------- what a run wrote
def load(path):
    return torch.load(path, weights_only=True)


def read_csv(path) -> list:
    with open(path) as file:
        return list(csv.reader(file))[1:]


def losses_at(step) -> dict:
    """{metric: value} of a step in losses.csv."""
    return {row[1]: float(row[2]) for row in read_csv("run/losses.csv") if row[0] == str(step)}


def assert_close(weights, network, atol=1e-6):
    torch.testing.assert_close(dict(weights), dict(network.state_dict()), atol=atol, rtol=0)


def assert_resume_point(networks, atol=1e-6):
    """The plain loop, which ran last, has the run's weights and drew as many random numbers."""
    resume_point = load("run/resume.pt")
    for name, network in networks.items():
        assert_close(resume_point[name], network, atol)
    assert torch.equal(resume_point["random_states"][0], torch.get_rng_state())


def assert_returns(checkpoint, policy, task, code=()):
    """Those of three episodes from the fixed initial states; test_env.py is about episodes."""
    episodes = pbrl.run_episodes(policy, task, range(2**31, 2**31 + 3), workers=1, code=code)
    returns = [episode["rewards"].sum() for episode in episodes]
    assert checkpoint["returns"][task] == pytest.approx(returns, abs=1e-4)


# ----------------------------------------------------------------------------------------- TD3
def plain_td3(task, a):
    """a.total_timesteps steps -> networks, transitions, actors at every step, last metrics."""
    torch.manual_seed(seed_of(f"{a.seed} behavior {task}"))
    actor = td3.Actor(3, 2, a.hidden, layer_norm=True)
    critics = td3.Critics(3, 2, a.hidden)
    target_actor = deepcopy(actor)
    target_critics = deepcopy(critics)
    actor_adam = Adam(actor.parameters(), a.learning_rate)
    critic_adam = Adam(critics.parameters(), a.learning_rate)
    env = World(task)
    transitions = []
    actors = {}
    metrics = {}
    for step in range(1, a.total_timesteps + 1):
        if step % 20 == 1:
            env.random.seed(seed_of(f"{a.seed} {task} {step // 20}") % 2**31)
            obs = observed(env.reset())
            metrics["return/training"] = 0.0

        if step <= a.learning_starts:
            action = torch.rand(2) * 2 - 1
        else:
            action = actor(obs[None])[0].detach() + a.exploration_noise * torch.randn(2)
            action = action.clamp(-1, 1)

        if step > a.learning_starts and transitions:
            rows = [transitions[k] for k in torch.randint(len(transitions), (a.batch_size,))]
            s, b, r, s2, _ = map(torch.stack, zip(*rows, strict=True))
            with torch.no_grad():
                b2 = (target_actor(s2) + noise(b, a.policy_noise, a.noise_clip)).clamp(-1, 1)
                y = r + a.gamma * torch.minimum(*target_critics(s2, b2))
            q1, q2 = critics(s, b)
            loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
            metrics["loss/critics"] = loss.item()
            minimise(critic_adam, loss)
            if step % a.policy_frequency == 0:
                loss = -critics(s, actor(s))[0].mean()
                metrics["loss/actor"] = loss.item()
                minimise(actor_adam, loss)
                follow(target_actor, actor, a.tau)
                follow(target_critics, critics, a.tau)

        time_step = env.step(action.numpy())
        next_obs = observed(time_step)
        reward = torch.tensor(time_step.reward).float()
        transitions.append((obs, action, reward, next_obs, torch.from_numpy(env.get_state())))
        metrics["return/training"] += time_step.reward
        obs = next_obs
        actors[step] = deepcopy(actor)
    networks = {
        "actor": actor,
        "critics": critics,
        "target_actor": target_actor,
        "target_critics": target_critics,
    }
    return networks, transitions, actors, metrics


MORE = {"medium_step": 60, "learning_starts": 8, "policy_frequency": 2, "seed": 5}
MORE["exploration_noise"] = 1.5  # takes actions beyond their bounds


@pytest.mark.parametrize("more", [{"seed": 1, "eval_every": 40}, MORE, {"learning_starts": 0}])
def test_td3_equals_a_plain_loop(world, more):
    a = SimpleNamespace(**RUN | TD3 | {"seed": 1} | more)
    world(td3, "--task", "toy-up", *flags(vars(a)))
    networks, transitions, actors, metrics = plain_td3("toy-up", a)
    assert_resume_point(networks, atol=5e-6)
    assert losses_at(60) == pytest.approx(metrics, abs=1e-4)
    returns = {}  # of two episodes per evaluation, the last step's among them
    for step, _, _, value in read_csv("run/returns.csv"):
        returns.setdefault(int(step), []).append(float(value))
    assert list(returns) == sorted({*range(a.eval_every, 61, a.eval_every), 60})
    for step, values in returns.items():
        episodes = td3.run_episodes(actors[step], "toy-up", [2**31, 2**31 + 1], workers=1)
        expected = [episode["rewards"].sum() for episode in episodes]
        assert values == pytest.approx(expected, abs=1e-4)
    for level, step in (("medium", a.medium_step), ("expert", 60)):
        actor = actors[step]
        checkpoint = load(f"checkpoints/toy-up-{level}-behavior.pt")
        assert_close(checkpoint["actor"], actor, atol=5e-6)
        assert checkpoint["level"] == level and checkpoint["step"] == step
        assert_returns(checkpoint, actor, "toy-up")
        with np.load(f"data/toy-up-{level}.npz") as data:  # by this policy, without noise
            actions = actor(torch.from_numpy(data["observations"])).detach()
            np.testing.assert_allclose(data["actions"], actions, atol=1e-4)
    names = ["observations", "actions", "rewards", "next_observations", "physics"]
    columns = map(torch.stack, zip(*transitions[: a.medium_step], strict=True))
    with np.load("data/toy-up-medium-replay.npz") as data:
        for name, column in zip(names, columns, strict=True):
            np.testing.assert_allclose(data[name], column, atol=1e-5)
        assert np.flatnonzero(data["timeouts"]).tolist() == list(range(19, a.medium_step, 20))


# ---------------------------------------------------------------------------------------- PBRL
def plain_cloning_weights(arrays, temperature):
    """Row by row: the better an episode, the more each of its transitions weighs."""
    episodes = [[]]  # rows of each
    for row in range(len(arrays["rewards"])):
        episodes[-1].append(row)
        if arrays["terminals"][row] or arrays["timeouts"][row]:
            episodes.append([])
    episodes.pop()  # the last row ends an episode
    returns = [sum(arrays["rewards"][rows].tolist()) for rows in episodes]
    best = np.quantile(returns, 0.9)
    weights = np.empty(len(arrays["rewards"]))
    for rows, value in zip(episodes, returns, strict=True):
        weights[rows] = np.exp((min(value, best) - best) / (temperature * abs(best)))
    return torch.from_numpy(weights / weights.mean()).float()


def plain_pbrl(tables, seed, a, log_std=None, codes=((),)):
    """a.gradient_steps steps -> all networks, and the last metrics of every table.

    tables: datasets of tasks that share the actor, which reads a task's code behind the state; one
    of them and an empty code for a plain teacher.
    """
    torch.manual_seed(seed)
    actor = pbrl.Actor(3 + len(codes[0]), 4 if log_std else 2, a.hidden)
    critics = [pbrl.Critics(a.num_critics, 3, 2, a.hidden) for _ in tables]
    target_actor = deepcopy(actor)
    target_critics = deepcopy(critics)
    actor_adam = Adam(actor.parameters(), a.learning_rate)
    critic_adams = [Adam(network.parameters(), a.learning_rate) for network in critics]

    def act(network, obs, code):
        out = network(coded(obs, code))
        if log_std is None:
            return out
        low, high = log_std
        std = (low + (high - low) * (out[:, 2:] + 1) / 2).exp()
        return (out[:, :2] + std * torch.randn(len(obs), 2)).clamp(-1, 1)

    def near(action, std):
        return (action + noise(action, std, a.noise_clip)).clamp(-1, 1)

    for step in range(1, a.gradient_steps + 1):
        steps_left = a.gradient_steps - step + 1
        if steps_left < a.anneal * a.gradient_steps:
            share = steps_left / (a.anneal * a.gradient_steps)
            for adam in [actor_adam, *critic_adams]:
                adam.param_groups[0]["lr"] = a.learning_rate * share
        beta_ood = max(a.beta_ood * a.beta_ood_decay**step, a.beta_ood_min)
        metrics = []
        for i, table in enumerate(tables):
            index = torch.randint(len(table["rewards"]), (a.batch_size,)).numpy()
            s = torch.from_numpy(table["observations"][index])
            b = torch.from_numpy(table["actions"][index])
            r = torch.from_numpy(table["rewards"][index])
            s2 = torch.from_numpy(table["next_observations"][index])
            not_done = torch.from_numpy(1.0 - table["terminals"][index]).float()
            with torch.no_grad():
                q2 = target_critics[i](s2, near(act(target_actor, s2, codes[i]), a.policy_noise))
                y = r + a.gamma * not_done * (q2 - a.beta_in * q2.std(dim=0))
                states = torch.cat([s, s2])
                centre = act(actor, states, codes[i])
                ood_actions = [near(centre, a.ood_noise) for _ in range(a.num_ood)]
            q = critics[i](s, b)
            ood_q = torch.cat([critics[i](states, action) for action in ood_actions], dim=1)
            u = ood_q.std(dim=0).detach()
            ood_y = (ood_q.detach() - beta_ood * u).clamp(min=0)
            in_loss = sum(((q[k] - y[k]) ** 2).mean() for k in range(a.num_critics))
            ood_loss = sum(((ood_q[k] - ood_y[k]) ** 2).mean() for k in range(a.num_critics))
            minimise(critic_adams[i], in_loss + ood_loss)
            if step % a.policy_frequency == 0:
                action = act(actor, s, codes[i])
                lowest = critics[i](s, action).min(dim=0).values
                loss = -lowest.mean()
                if a.bc_coef:
                    weight = plain_cloning_weights(table, a.bc_temperature)[index]
                    cloning = (weight * row_squares(action - b)).mean()
                    loss = loss / lowest.abs().mean().item() + a.bc_coef * cloning
                actor_loss = loss.item()
                minimise(actor_adam, loss)
            follow(target_critics[i], critics[i], a.tau)
            table_metrics = {
                "loss/in_distribution": in_loss.item(),
                "loss/ood": ood_loss.item(),
                "value/q_data": q.mean().item(),
                "value/q_ood": ood_q.mean().item(),
                "uncertainty/data": q.std(dim=0).mean().item(),
                "uncertainty/ood": u.mean().item(),
                "beta_ood": beta_ood,
            }
            if step % a.policy_frequency == 0:
                table_metrics["loss/actor"] = actor_loss
            metrics.append(table_metrics)
        follow(target_actor, actor, a.actor_tau)
    networks = {"actor": actor, "target_actor": target_actor}
    for i in range(len(tables)):
        end = f"_{i}" if len(tables) > 1 else ""
        networks[f"critics{end}"] = critics[i]
        networks[f"target_critics{end}"] = target_critics[i]
    return networks, metrics


def union(datasets, task, sources) -> dict:
    """The data of the sources with the rewards of a task."""
    parts = []
    for source in sources:
        parts.append(datasets[source] | {"rewards": rewards_of(task, datasets[source])})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


PBRL_CASES = {
    "deterministic": {},
    "gaussian": {"actor": "gaussian"},
    "gaussian-tanh": {"actor": "gaussian-tanh"},
    "cloning, annealed": CLONING | {"policy_frequency": 2},  # the last step moves the actor
    "common seed": {"common_seed": True},
    "data sharing": {"sources": tuple(SLOPES)} | CLONING,
    "data of another task": {"sources": ("toy-down",)},
    "data sharing, common seed": {"sources": ("toy-down", "toy-up"), "common_seed": True},
}


@pytest.mark.parametrize("case", PBRL_CASES)
def test_pbrl_equals_a_plain_loop(world, case):
    """Of mop_pbrl_teacher.py, and with sources of mop_ds.py."""
    a = SimpleNamespace(**RUN | PBRL | STEPS | {"seed": 3} | PBRL_CASES[case])
    datasets = write_data(SLOPES, dict.fromkeys(SLOPES, "medium"))
    module = ds if "sources" in PBRL_CASES[case] else pbrl
    sources = PBRL_CASES[case].get("sources", ("toy-up",))
    printed = world(module, "--task", "toy-up", *flags(vars(a)))
    if module is pbrl:
        own = datasets["toy-up"]
        mean_return = own["rewards"].sum() / np.count_nonzero(own["terminals"] | own["timeouts"])
        assert f": 50 transitions, return {mean_return:.1f}\n" in printed
    stream = f" teacher toy-up from {'+'.join(sorted(sources))}"
    if "common_seed" in PBRL_CASES[case]:
        stream = ""
    log_std = pbrl.LOG_STD.get(case)
    table = union(datasets, "toy-up", sources)
    networks, metrics = plain_pbrl([table], seed_of(f"3{stream}"), a, log_std)
    assert_resume_point(networks)
    name = "toy-up-medium-teacher"
    if log_std:
        name = f"toy-up-medium-teacher-{case}"
    elif module is ds:
        name = "toy-up-medium-ds-teacher"
        if len(sources) == 1:
            name = "toy-up-from-toy-down-medium-teacher"
    checkpoint = load(f"checkpoints/{name}.pt")
    assert checkpoint["tasks"] == ["toy-up"] and checkpoint["data_tasks"] == list(sources)
    assert_close(checkpoint["actor"], networks["actor"])
    assert_close(checkpoint["critics"], networks["critics"])
    assert checkpoint["sizes"]["log_std"] == log_std
    assert_returns(checkpoint, networks["actor"], "toy-up")
    assert losses_at(8) == pytest.approx(metrics[0], abs=2e-5)
    assert [row[0] for row in read_csv("run/returns.csv")] == ["5"] * 2 + ["8"] * 3


@pytest.mark.parametrize("more", [{"actor": "gaussian"}, CLONING | {"policy_frequency": 2}])
def test_naive_multitask_pbrl_equals_a_plain_loop(world, more):
    a = SimpleNamespace(**RUN | PBRL | STEPS | {"seed": 3} | more)
    datasets = write_data(TASKS)
    world(naive, "--tasks", *TASKS, "--level", "medium", "expert", *flags(vars(a)))
    stream = " teacher toy-up+toy-down from toy-up+toy-down"
    log_std = (-5.0, 0.0) if "actor" in more else None
    tables = list(datasets.values())
    networks, metrics = plain_pbrl(tables, seed_of(f"3{stream}"), a, log_std, NUMBERS)
    assert_resume_point(networks)
    suffix = "naive-gaussian" if "actor" in more else "naive"
    checkpoint = load(f"checkpoints/toy-up+toy-down-medium+expert-{suffix}.pt")
    assert_close(checkpoint["actor"], networks["actor"])
    expected = {"beta_ood": metrics[0].pop("beta_ood")}
    for i, task in enumerate(TASKS):
        assert_close(checkpoint["critics"][i], networks[f"critics_{i}"])
        assert_returns(checkpoint, networks["actor"], task, NUMBERS[i])
        for name in metrics[0]:
            expected[f"{name}/{task}"] = metrics[i][name]
    assert losses_at(8) == pytest.approx(expected, abs=2e-5)


# -------------------------------------------------------------------------------- distillation
def plain_critics(weights):
    """The teacher's two critics, as the networks that they were trained as."""
    critics = pbrl.Critics(2, 3, 2, 8)
    critics.load_state_dict(weights)
    return critics


def plain_student(tasks, codes, states, labels, a, loss):
    """a.gradient_steps updates -> student, last metrics.

    loss(student, i, states, labels) of a batch of task i: {metric: (its weight, value per row)}.
    """
    torch.manual_seed(seed_of(f"{a.seed} student"))
    student = distill.Actor(3 + len(codes[0]), labels[0].shape[1], a.hidden)
    adam = Adam(student.parameters(), a.learning_rate)
    for _ in range(a.gradient_steps):
        total = 0.0
        metrics = {}
        for i in range(len(tasks)):
            index = torch.randint(len(states[i]), (a.batch_size,))
            parts = loss(student, i, states[i][index], labels[i][index])
            for name, (weight, rows) in parts.items():
                total = total + weight * rows.mean() / len(tasks)
                metrics[name] = rows.mean().item()
        metrics["loss/total"] = total.item()
        minimise(adam, total)
    return student, metrics


def normal(out):
    return Normal(out[:, :2], (-5 + 2.5 * (out[:, 2:] + 1)).exp())


def assert_student(student, metrics, tasks, codes) -> dict:
    """The plain loop's student is that of the run -> the checkpoint."""
    assert_resume_point({"student": student})
    checkpoint = load("run/student.pt")
    assert_close(checkpoint["actor"], student)
    assert losses_at(8) == pytest.approx(metrics, abs=2e-5)
    for i, task in enumerate(tasks):
        assert_returns(checkpoint, student, task, codes[i])
    steps = [row[0] for row in read_csv("run/returns.csv")]
    assert steps == ["5"] * 2 * len(tasks) + ["8"] * 3 * len(tasks)
    return checkpoint


DISTILL_CASES = {
    "mse": {},
    "means of Gaussian teachers": {},
    "shared": {"states": "shared"},
    "q": {"loss": "q"},
    "kl": {"loss": "kl"},
    "ndcg": {"regularizer": "ndcg"},
    "pairwise": {"regularizer": "pairwise"},
    "listwise": {"regularizer": "listwise", "task_encoding": "onehot"},  # of three tasks
}


@pytest.mark.parametrize("case", DISTILL_CASES)
def test_distillation_equals_a_plain_loop(world, case):
    tasks = TASKS
    codes = NUMBERS
    if case == "listwise":
        tasks = tuple(SLOPES)
        codes = FLAGS
    datasets = write_data(tasks)
    critics = []
    states = []
    labels = []
    for i, task in enumerate(tasks):
        kind = {"kl": "teacher-gaussian", "shared": "ds-teacher"}.get(case, "teacher")
        log_std = (-5.0, 0.0) if case in ("kl", "means of Gaussian teachers") else None
        teacher = load(write_toy_teacher(f"{task}-{LEVELS[task]}-{kind}", task, i, log_std))
        critics.append(plain_critics(teacher["critics"]))
        states.append(torch.from_numpy(datasets[task]["observations"]))
        if case == "shared":
            states[i] = torch.cat([torch.from_numpy(x["observations"]) for x in datasets.values()])
        label = distill.load_actor(teacher)(states[i])
        labels.append(label if case == "kl" else label[:, :2])
    a = SimpleNamespace(**RUN | STEPS | {"seed": 4, "reg_lambda": 0.3} | DISTILL_CASES[case])
    levels = [LEVELS[task] for task in tasks]
    printed = world(distill, "--tasks", *tasks, "--level", *levels, *flags(vars(a)))
    assert printed.count("return 150.0") == printed.count("(teacher 150.0)") / 2 == len(tasks)

    def loss(student, i, obs, label):
        x = coded(obs, codes[i])
        if case == "q":
            q = critics[i](obs, student(x)).min(dim=0).values
            return {f"loss/q/{tasks[i]}": (1.0, -q)}
        if case == "kl":
            kl = kl_divergence(normal(student(x)), normal(label))
            return {f"loss/kl/{tasks[i]}": (1.0, kl.sum(dim=1))}
        parts = {f"loss/mse/{tasks[i]}": (1.0, row_squares(student(x) - label))}
        for j, other_task in enumerate(tasks):
            if "regularizer" in DISTILL_CASES[case] and j != i:
                h1, h2 = distill.hidden_layers(student, x)
                other_h1, other_h2 = distill.hidden_layers(student, coded(obs, codes[j]))
                rank = distill.RANKING_LOSSES[case]
                rows = rank(h1, other_h1) + rank(h2, other_h2)
                parts[f"loss/{case}/{tasks[i]}/{other_task}"] = (0.3 / (len(tasks) - 1), rows)
        return parts

    student, metrics = plain_student(tasks, codes, states, labels, a, loss)
    assert_student(student, metrics, tasks, codes)


# ------------------------------------------------------------------------------------- Q-switch
OQS_CASES = {
    "two tasks": (TASKS, NUMBERS, "number"),
    "three tasks": (tuple(SLOPES)[::-1], FLAGS, "onehot"),
}


@pytest.mark.parametrize("case", OQS_CASES)
def test_q_switch_equals_a_plain_loop(world, monkeypatch, case):
    tasks, codes, encoding = OQS_CASES[case]
    a = SimpleNamespace(**RUN | STEPS | {"seed": 6, "task_encoding": encoding})
    datasets = write_data(tasks)
    teachers = {task: [] for task in tasks}
    for seed, (task, source) in enumerate(product(tasks, tasks)):
        name = f"{task}-from-{source}-{LEVELS[source]}-teacher"
        if task == source:
            name = f"{task}-{LEVELS[task]}-teacher"
        path = write_toy_teacher(name, task, seed, data_tasks=[source])
        teacher = load(path)
        teacher["critics"]["w3"] *= 10  # values that differ more between states than teachers
        torch.save(teacher, path)
        teachers[task].append(teacher)
    monkeypatch.setattr(oqs, "q_switch", partial(oqs.q_switch, chunk_size=7))  # in parts
    levels = [LEVELS[task] for task in tasks]
    printed = world(oqs, "--tasks", *tasks, "--level", *levels, *flags(vars(a)))
    assert printed.count("return 150.0") == len(tasks) ** 2

    states = torch.cat([torch.from_numpy(datasets[task]["observations"]) for task in tasks])
    labels = []
    winners = {}
    for task in tasks:
        actions = torch.stack([oqs.load_actor(teacher)(states) for teacher in teachers[task]])
        lowest = []
        for teacher, action in zip(teachers[task], actions, strict=True):
            values = plain_critics(teacher["critics"])(states, action)
            lowest.append(values.min(dim=0).values)
        winners[task] = [row.index(max(row)) for row in torch.stack(lowest, dim=1).tolist()]
        labels.append(actions[winners[task], range(len(states))])

    def loss(student, i, obs, label):
        rows = row_squares(student(coded(obs, codes[i])) - label)
        return {f"loss/mse/{tasks[i]}": (1.0, rows)}

    student, metrics = plain_student(tasks, codes, [states] * len(tasks), labels, a, loss)
    checkpoint = assert_student(student, metrics, tasks, codes)

    # whose actions were taken, on which task's states
    start = 0
    for source in tasks:
        end = start + len(datasets[source]["rewards"])
        for task, (j, other) in product(tasks, enumerate(tasks)):
            share = winners[task][start:end].count(j) / (end - start)
            assert checkpoint["switch"][task][source][f"from {other}"] == pytest.approx(share)
        start = end
    assert any(len(set(rows)) > 1 for rows in winners.values())
