"""Every default, every random stream, and every training loop against the same loop written out in plain torch.

The plain loops share no code with the scripts: networks are dicts of tensors, gradients come from torch.autograd.grad,
Adam is its formula. They draw from a generator of the same seed in the same order, so that a few updates through a
script's own main() have to end with the same weights up to rounding. World stands in for dm_control.
"""

import json
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import mop_distill as distill
import mop_ds as ds
import mop_measure as measure
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, write_dataset, write_teacher

TRAINING = {"td3": td3, "pbrl": pbrl, "distill": distill, "ds": ds, "oqs": oqs}

# ------------------------------------------------------------------------------- defaults: the thesis's (shared spec)
RUN = {"seed": 1, "scale": "thesis", "run_dir": None, "resume": None, "overwrite": False, "eval_every": 10_000}
RUN |= {"eval_episodes": 10, "final_eval_episodes": 100, "device": "auto", "threads": 0, "output": None}
RUN |= {"matmul_precision": "highest", "cuda_graph": False}
PBRL = {"gamma": 0.99, "tau": 0.005, "actor_tau": 0.005, "policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2}
PBRL |= {"num_critics": 5, "num_ood": 3, "ood_noise": 0.01, "beta_in": 0.001, "beta_ood": 3.0, "beta_ood_min": 0.1}
PBRL |= {"beta_ood_decay": 0.99995, "bc_coef": 0.0, "common_seed": False}
STUDENT = {"tasks": ("walker-stand", "walker-walk"), "level": ("medium",), "data": (), "teachers": ()}
STUDENT |= {"gradient_steps": 500_000, "learning_rate": 1e-4, "batch_size": 1024, "hidden": 256}
STUDENT |= {"task_encoding": "number"}
TEACHERS = {"teacher_steps": 1_000_000, "teacher_learning_rate": 1e-4, "teacher_batch_size": 1024}
TEACHERS |= {"teacher_hidden": 256}
DEFAULTS = {
    "td3": {
        **RUN,
        **{"task": "walker-walk", "policy": None, "mix": "online", "datasets": ("medium", "expert", "medium-replay")},
        **{"num_transitions": 1_000_000, "num_envs": 100, "medium_step": 1_000_000},
        **{"medium_return": None, "total_timesteps": 2_000_000, "learning_rate": 1e-4, "batch_size": 1024},
        **{"hidden": 1024, "gamma": 0.99, "tau": 0.01, "policy_noise": 0.3, "noise_clip": 0.3},
        **{"exploration_noise": 0.2, "policy_frequency": 2, "learning_starts": 4_000},
    },
    "pbrl": {
        **RUN,
        **PBRL,
        **{"task": "walker-walk", "tasks": (), "level": ("medium",), "data": (), "actor": "deterministic"},
        **{"gradient_steps": 1_000_000, "learning_rate": 1e-4, "batch_size": 1024, "hidden": 256},
    },
    "distill": {
        **RUN,
        **STUDENT,
        **{"states": ("offline",), "loss": "mse", "regularizer": "none", "reg_lambda": 100.0},
    },
    "ds": RUN | STUDENT | TEACHERS | PBRL,
    "oqs": RUN | STUDENT | TEACHERS | PBRL,
}
LAPTOP_PBRL = {
    "num_ood": 1,
    "tau": 0.02,
    "actor_tau": 0.02,
    "policy_noise": 0.05,
    "beta_ood_decay": 0.9997,
    "bc_coef": 1.0,
    "matmul_precision": "medium",
}
LAPTOP_STUDENT = {"gradient_steps": 20_000, "learning_rate": 1e-3}
LAPTOP_TEACHERS = {"teacher_steps": 30_000, "teacher_batch_size": 256, "teacher_learning_rate": 3e-4}
LAPTOP = {
    "td3": {"hidden": 256, "batch_size": 128, "learning_rate": 3e-4, "total_timesteps": 250_000},
    "pbrl": LAPTOP_PBRL | {"gradient_steps": 30_000, "batch_size": 256, "learning_rate": 3e-4},
    "distill": LAPTOP_STUDENT,
    "ds": LAPTOP_STUDENT | LAPTOP_TEACHERS | LAPTOP_PBRL,
    "oqs": LAPTOP_STUDENT | LAPTOP_TEACHERS | LAPTOP_PBRL,
}


def parsed(monkeypatch, name, *argv):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    module = TRAINING[name]
    return vars(module.parse_args(module.Args, module.LAPTOP)[0])


@pytest.mark.parametrize("name", TRAINING)
def test_defaults(name, monkeypatch):
    assert vars(TRAINING[name].Args()) == DEFAULTS[name]
    assert parsed(monkeypatch, name) == DEFAULTS[name]


def test_defaults_of_measure():
    assert vars(measure.Args()) == {
        **{"student": None, "episodes": 1000, "teachers": (), "tasks": ("walker-stand", "walker-walk")},
        **{"cross_episodes": 100, "shift": (), "seed": 1, "run_dir": None, "overwrite": False, "gif": True},
        **{"gif_fps": 10, "tau_states": 100_000, "cka_states": 100_000, "shift_states": 100_000},
        **{"device": "auto", "threads": 0},
    }


def test_constants():
    assert pbrl.LOG_STD == {"deterministic": None, "gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}
    assert td3.PLAIN_ONE_IN == {"online": 1, "noise": 10, "random90": 10, "random99": 100}
    assert {module.EVAL_SEED for module in (*TRAINING.values(), measure)} == {2**31}


@pytest.mark.parametrize("name", TRAINING)
def test_laptop_wins_over_defaults_and_flags_win_over_both(name, monkeypatch, capsys):
    assert parsed(monkeypatch, name, "--scale", "laptop") == DEFAULTS[name] | LAPTOP[name] | {"scale": "laptop"}
    assert capsys.readouterr().out.startswith("--scale laptop: --")
    mine = {key: {int: 3, float: 0.25, str: "high"}[type(value)] for key, value in LAPTOP[name].items()} | {"seed": 9}
    expected = DEFAULTS[name] | mine | {"scale": "laptop"}
    for scale_first in (True, False):
        argv = ["--scale", "laptop"], flags(mine)
        assert parsed(monkeypatch, name, *argv[1 - scale_first], *argv[scale_first]) == expected
    # a flag that repeats the thesis's default wins, too
    thesis = {key: DEFAULTS[name][key] for key in LAPTOP[name]}
    assert parsed(monkeypatch, name, *flags(thesis), "--scale", "laptop") == DEFAULTS[name] | {"scale": "laptop"}


@pytest.mark.parametrize("name", TRAINING)
def test_resumed_arguments_win_over_defaults_and_flags_win_over_them(name, monkeypatch, tmp_path):
    steps = "total_timesteps" if name == "td3" else "gradient_steps"
    argv = ["--run-dir", "elsewhere", "--scale", "laptop", *flags({"hidden": 5, steps: 44})]
    torch.save({"script": TRAINING[name].__name__, "argv": list(map(str, argv))}, tmp_path / "resume.pt")
    found = parsed(monkeypatch, name, "--resume", tmp_path, *flags({steps: 55}))
    stored = DEFAULTS[name] | LAPTOP[name] | {"scale": "laptop", "hidden": 5}
    assert found == stored | {"resume": str(tmp_path), "run_dir": str(tmp_path), steps: 55}


# ---------------------------------------------------------------------------------------------------------- the world
class World:
    """dm_control's interface (environment, task and physics in one) to a small made-up world with short episodes."""

    obs_dim, action_dim, _step_limit = 3, 2, 20

    def __init__(self, name):
        self.name, self.random, self.task, self.physics = name, np.random.RandomState(0), self, self
        self.state, self.control = np.zeros(self.obs_dim), np.zeros(self.action_dim)

    @classmethod
    def make(cls, task, n):
        return [cls(task) for _ in range(n)]

    def start(self):
        return self.random.uniform(-1, 1, self.obs_dim)

    def move(self, s, action):
        return 0.8 * np.roll(s, 1) + 0.3 * np.array([action[0], action[1], action[0] * s[1]])

    def get_reward(self, physics):
        here = 1 / (1 + np.exp({"toy-up": 2, "toy-down": -2, "toy-out": 0.5}[self.name] * physics.state[0]))
        return 0.9 * here + 0.1 * physics.control[0] ** 2

    def reset(self):
        self.state, self.control, self.time = self.start(), np.zeros(self.action_dim), 0
        return self.now()

    def step(self, action):
        self.control = np.asarray(action, np.float64)
        self.state, self.time = self.move(self.state, self.control), self.time + 1
        return self.now()

    def now(self):
        end = self.time == self._step_limit
        return SimpleNamespace(observation={"observations": self.state}, reward=self.get_reward(self), last=lambda: end)

    def observation_spec(self):
        return {"observations": SimpleNamespace(shape=(self.obs_dim,))}

    def action_spec(self):
        return SimpleNamespace(shape=(self.action_dim,))

    def get_state(self):
        return self.state.copy()

    def set_state(self, state):
        self.state = state

    def set_control(self, control):
        self.control = control

    def forward(self):
        pass


TASKS = "toy-up", "toy-down"


@pytest.fixture
def world(monkeypatch, run_main):
    """run_main with World in place of dm_control."""
    for module in TRAINING.values():
        monkeypatch.setattr(module, "make_envs", World.make)
    return run_main


def made_up(n, seed=0):
    """Arrays of random transitions, a fifth of them terminal, in World's sizes."""
    arrays = make_arrays(n, 3, 2, 3, seed)
    return arrays | {"terminals": np.random.default_rng(seed + 100).random(n) < 0.2}


def relabelled(arrays, task):
    """The same with the rewards of another task."""
    env, rewards = World(task), []
    for state, action in zip(arrays["physics"], arrays["actions"], strict=True):
        env.state, env.control = state, action
        rewards.append(env.get_reward(env))
    return arrays | {"rewards": np.array(rewards, np.float32)}


def union(*parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plain_returns(policy, task, episodes):
    """Returns of episodes 0, 1, .. from their fixed initial states, one after the other."""
    returns = []
    for e in range(episodes):
        env = World(task)
        env.random.seed(2**31 + e)
        step, total = env.reset(), 0.0
        while not step.last():
            obs = torch.from_numpy(step.observation["observations"]).float()
            step = env.step(policy(obs[None])[0, :2].detach().numpy())
            total += step.reward
        returns.append(total)
    return returns


# ------------------------------------------------------------------------------------------------ networks and Adam
def make_policy(in_dim, out_dim, hidden, layer_norm=False):
    """Initial weights by torch's default, drawn in the order of the layers; names as in a checkpoint."""
    weights, place = {}, 0
    for j, (a, b) in enumerate([(in_dim, hidden), (hidden, hidden), (hidden, out_dim)]):
        layer = torch.nn.Linear(a, b)
        weights |= {f"net.{place}.weight": layer.weight, f"net.{place}.bias": layer.bias}
        if j == 0 and layer_norm:
            weights |= {"net.1.weight": torch.ones(hidden), "net.1.bias": torch.zeros(hidden)}
        place += 3 if j == 0 and layer_norm else 2
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def make_critics(k, obs_dim, action_dim, hidden, layer_norm=False):
    weights = {}
    for j, (a, b) in enumerate([(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)], start=1):
        layers = [torch.nn.Linear(a, b) for _ in range(k)]
        weights[f"w{j}"] = torch.stack([layer.weight.T for layer in layers])
        weights[f"b{j}"] = torch.stack([layer.bias[None] for layer in layers])
    if layer_norm:
        weights |= {"scale": torch.ones(k, 1, hidden), "shift": torch.zeros(k, 1, hidden)}
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def normalised(h):
    return (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def layers_of(w, x):
    """Hidden activations and output of a policy."""
    w = list(w.values())
    h1 = x @ w[0].T + w[1]
    h1 = (normalised(h1) * w[2] + w[3]).tanh() if len(w) == 8 else h1.relu()
    h2 = (h1 @ w[-4].T + w[-3]).relu()
    return h1, h2, (h2 @ w[-2].T + w[-1]).tanh()


def policy(w, x):
    return layers_of(w, x)[2]


def values(w, obs, action):
    """(K, B), one critic after the other."""
    rows = []
    for k in range(len(w["w1"])):
        h = torch.cat([obs, action], dim=1) @ w["w1"][k] + w["b1"][k]
        h = (normalised(h) * w["scale"][k] + w["shift"][k]).tanh() if "scale" in w else h.relu()
        h = (h @ w["w2"][k] + w["b2"][k]).relu()
        rows.append((h @ w["w3"][k] + w["b3"][k])[:, 0])
    return torch.stack(rows)


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, weights, rate):
        self.weights, self.rate, self.t = list(weights.values()), rate, 0
        self.m, self.v = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))

    def minimise(self, loss):
        self.t += 1
        for w, m, v, g in zip(self.weights, self.m, self.v, torch.autograd.grad(loss, self.weights), strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            step = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
            w.data -= self.rate * step


def copied(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def follow(target, online, rate):
    for name in target:
        target[name] = (1 - rate) * target[name] + rate * online[name].detach()


def assert_close(found, expected, atol=1e-6):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].detach(), atol=atol, rtol=0, msg=f"{{}}: {name}".format)


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(path):
    return torch.load(path, weights_only=True)


def flags(settings: dict) -> list:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]


def seed_of(text):
    return zlib.crc32(text.encode())


FILES = {"eval_episodes": 2, "final_eval_episodes": 3, "threads": 1, "device": "cpu"}

# ----------------------------------------------------------------------------------------------------------------- TD3
TD3 = {"learning_rate": 3e-3, "batch_size": 16, "hidden": 8, "gamma": 0.9, "tau": 0.1, "policy_noise": 0.5}
TD3 |= {"noise_clip": 0.4, "exploration_noise": 0.35, "policy_frequency": 3, "learning_starts": 46}
TD3 |= {"total_timesteps": 60, "medium_step": 40, "eval_every": 20, "num_transitions": 50, "num_envs": 2}


def plain_td3(task, seed, a):
    """(weights, replay rows, medium actor at step a.medium_step, last losses) after a.total_timesteps steps."""
    torch.manual_seed(seed_of(f"{seed} behavior {task}"))
    generator = torch.Generator().manual_seed(seed_of(f"{seed} behavior {task}"))
    actor, critics = make_policy(3, 2, a.hidden, True), make_critics(2, 3, 2, a.hidden, True)
    target_actor, target_critics = copied(actor), copied(critics)
    actor_adam, critic_adam = Adam(actor, a.learning_rate), Adam(critics, a.learning_rate)
    env, rows, losses, medium = World(task), [], {}, None
    for step in range(a.total_timesteps):
        if step % 20 == 0:
            env.random.seed(seed_of(f"{seed} {task} {step // 20}") % 2**31)
            obs = torch.from_numpy(env.reset().observation["observations"]).float()
        if step < a.learning_starts:
            action = torch.rand(1, 2, generator=generator)[0] * 2 - 1
        else:
            noise = a.exploration_noise * torch.randn(1, 2, generator=generator)[0]
            action = (policy(actor, obs[None])[0].detach() + noise).clamp(-1, 1)
        if step >= a.learning_starts:
            index = (torch.rand(a.batch_size, generator=generator, dtype=torch.float64) * len(rows)).long()
            s, b, r, s2 = (torch.stack([rows[i][part] for i in index]) for part in range(4))
            noise = torch.randn(a.batch_size, 2, generator=generator)
            with torch.no_grad():
                noise = (a.policy_noise * noise).clamp(-a.noise_clip, a.noise_clip)
                b2 = (policy(target_actor, s2) + noise).clamp(-1, 1)
                y = r + a.gamma * torch.minimum(*values(target_critics, s2, b2))
            q1, q2 = values(critics, s, b)
            loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
            losses["loss/critics"] = loss.item()
            critic_adam.minimise(loss)
            if step % a.policy_frequency == 0:
                mean_q = values(critics, s, policy(actor, s))[0].mean()
                losses["value/mean_q1"] = mean_q.item()
                actor_adam.minimise(-mean_q)
                follow(target_actor, actor, a.tau)
                follow(target_critics, critics, a.tau)
        now = env.step(action.numpy())
        after = torch.from_numpy(now.observation["observations"]).float()
        rows.append((obs, action, torch.tensor(now.reward).float(), after, torch.from_numpy(env.get_state())))
        obs = after
        if step + 1 == a.medium_step:
            medium = copied(actor)
    networks = {"actor": actor, "critics": critics, "target_actor": target_actor, "target_critics": target_critics}
    return networks, rows, medium, losses, generator


def recorded(monkeypatch, module):
    """What a script logs: [(step, metrics as numbers)]."""
    found, log = [], module.log

    def spy(writer, step, metrics):
        found.append((step, {name: float(value) for name, value in metrics.items()}))
        return log(writer, step, metrics)

    monkeypatch.setattr(module, "log", spy)
    return found


@pytest.mark.parametrize("more", [{}, {"medium_step": 60, "learning_starts": 8, "policy_frequency": 2, "seed": 5}])
def test_td3_equals_a_plain_loop(world, tmp_path, monkeypatch, more):
    settings = FILES | TD3 | more
    logged = recorded(monkeypatch, td3)
    world(td3, "--task", TASKS[0], *flags(settings), "--run-dir", "run")
    a = SimpleNamespace(**settings)
    networks, rows, medium, losses, generator = plain_td3(TASKS[0], settings.get("seed", 1), a)
    point = load(tmp_path / "run/resume.pt")
    for name, weights in networks.items():
        assert_close(point[name], weights, atol=5e-6)
    assert torch.equal(point["generator"], generator.get_state())
    step, metrics = logged[-1]
    assert step == 60 and losses.items() <= {k: pytest.approx(v, abs=1e-4) for k, v in metrics.items()}.items()
    final = {"expert": networks["actor"], "medium": medium}
    for level, weights in final.items():
        checkpoint = load(tmp_path / f"checkpoints/{TASKS[0]}-{level}-behavior.pt")
        assert_close(checkpoint["actor"], weights, atol=5e-6)
        assert (checkpoint["level"], checkpoint["step"]) == (level, a.medium_step if level == "medium" else 60)
        expected = plain_returns(lambda obs, w=weights: policy(w, obs), TASKS[0], 3)
        assert checkpoint["returns"][TASKS[0]] == pytest.approx(expected, abs=1e-3)
    rows = rows[: a.medium_step]
    with np.load(tmp_path / f"data/{TASKS[0]}-medium-replay.npz") as data:
        names = "observations", "actions", "rewards", "next_observations", "physics"
        for part, name in enumerate(names):
            np.testing.assert_allclose(data[name], torch.stack([row[part] for row in rows]).numpy(), atol=1e-5)
        assert np.flatnonzero(data["timeouts"]).tolist() == list(range(19, a.medium_step, 20))


def test_td3_datasets_are_rollouts_of_their_policy(world, tmp_path):
    """Deterministic, from initial states of a stream of their own."""
    world(td3, "--task", TASKS[0], *flags(FILES | TD3), "--run-dir", "run")
    starts = {}
    for level in ("medium", "expert"):
        weights = load(tmp_path / f"checkpoints/{TASKS[0]}-{level}-behavior.pt")["actor"]
        with np.load(tmp_path / f"data/{TASKS[0]}-{level}.npz") as data:
            arrays = {name: data[name] for name in data.files}
        expected = policy(weights, torch.from_numpy(arrays["observations"])).detach().numpy()
        np.testing.assert_allclose(arrays["actions"], expected, atol=1e-6)
        starts[level] = arrays["observations"][::20]
        generator = np.random.default_rng([1, seed_of(f"{TASKS[0]} {level} online")])
        for obs, seed in zip(starts[level], generator.integers(2**31, size=3), strict=True):
            env = World(TASKS[0])
            env.random.seed(int(seed))
            np.testing.assert_array_equal(obs, env.start().astype(np.float32))
        assert np.flatnonzero(arrays["timeouts"]).tolist() == [19, 39, 49] and len(arrays["rewards"]) == 50
        np.testing.assert_allclose(arrays["rewards"], relabelled(arrays, TASKS[0])["rewards"], atol=1e-6)
    assert not np.isin(starts["medium"], starts["expert"]).any()


def test_warm_up_and_exploration_noise_in_the_stored_data(world, tmp_path):
    """medium-replay: uniform actions for --learning-starts steps, then the policy's with N(0, --exploration-noise)."""
    settings = FILES | {"total_timesteps": 1600, "medium_step": 1600, "eval_every": 1600, "learning_starts": 812}
    settings |= {"exploration_noise": 0.08, "learning_rate": 1e-9, "batch_size": 1, "hidden": 8}
    world(td3, "--task", TASKS[0], *flags(settings), "--datasets", "medium-replay", "--run-dir", "run")
    weights = load(tmp_path / f"checkpoints/{TASKS[0]}-expert-behavior.pt")["actor"]
    with np.load(tmp_path / f"data/{TASKS[0]}-medium-replay.npz") as data:
        actions, obs = data["actions"], torch.from_numpy(data["observations"])
    residual = actions - policy(weights, obs).detach().numpy()
    inside = (np.abs(residual) < 0.08 * 5).all(axis=1)
    assert inside[812:].all() and not inside[811] and inside[:812].mean() < 0.3
    assert kstest(actions[:812].ravel(), "uniform", (-1, 2)).pvalue > 0.01
    assert kstest(residual[812:].ravel() / 0.08, "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(residual[812:].T)[0, 1]) < 0.1  # a number per action


# ---------------------------------------------------------------------------------------------------------------- PBRL
LOOP = {"gamma": 0.9, "tau": 0.1, "actor_tau": 0.25, "policy_noise": 0.4, "noise_clip": 0.3, "policy_frequency": 3}
LOOP |= {"num_critics": 3, "num_ood": 2, "ood_noise": 0.4, "beta_in": 0.5, "beta_ood": 2.0, "beta_ood_min": 0.5}
LOOP |= {"beta_ood_decay": 0.7}
TEACHER = {"gradient_steps": 8, "learning_rate": 3e-3, "batch_size": 16, "hidden": 8}
LOG_STD = {"gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}


def plain_pbrl(tables, seed, a, bounds=None, naive=False):
    """(weights of all networks, last metrics, generator) after a.gradient_steps updates on a list of datasets."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = 3 + naive, 4 if bounds else 2, a.hidden
    actor, _ = make_policy(*sizes), make_policy(*sizes)  # the target's are drawn, then replaced
    critics = [make_critics(a.num_critics, 3, 2, a.hidden) for _ in tables]
    target_actor, target_critics = copied(actor), [copied(c) for c in critics]
    actor_adam, critic_adams = Adam(actor, a.learning_rate), [Adam(c, a.learning_rate) for c in critics]
    clip, metrics = a.noise_clip, {}

    def act(weights, obs, i):
        out = policy(weights, torch.cat([obs, torch.full((len(obs), 1), float(i))], dim=1) if naive else obs)
        if bounds is None:
            return out
        std = (bounds[0] + (bounds[1] - bounds[0]) * (out[:, 2:] + 1) / 2).exp()
        return (out[:, :2] + std * torch.randn(len(obs), 2, generator=generator)).clamp(-1, 1)

    for step in range(a.gradient_steps):
        beta_ood = max(a.beta_ood * a.beta_ood_decay**step, a.beta_ood_min)
        for i, table in enumerate(tables):
            index = torch.randint(len(table["rewards"]), (a.batch_size,), generator=generator).numpy()
            names = "observations", "actions", "rewards", "next_observations", "terminals"
            s, b, r, s2, end = (torch.from_numpy(table[name][index]).float() for name in names)
            noise = torch.randn(a.batch_size, 2, generator=generator)
            ood_noise = torch.randn(a.num_ood, 2 * a.batch_size, 2, generator=generator)
            with torch.no_grad():
                b2 = (act(target_actor, s2, i) + (a.policy_noise * noise).clamp(-clip, clip)).clamp(-1, 1)
                q2 = values(target_critics[i], s2, b2)
                y = r + a.gamma * (1 - end) * (q2 - a.beta_in * q2.std(dim=0))
                states = torch.cat([s, s2])
                centre = act(actor, states, i)
                oods = [(centre + (a.ood_noise * eps).clamp(-clip, clip)).clamp(-1, 1) for eps in ood_noise]
            q = values(critics[i], s, b)
            ood_q = torch.cat([values(critics[i], states, ood) for ood in oods], dim=1)
            u = ood_q.std(dim=0).detach()
            ood_y = (ood_q.detach() - beta_ood * u).clamp(min=0)
            in_loss = sum(((q[k] - y[k]) ** 2).mean() for k in range(a.num_critics))
            ood_loss = sum(((ood_q[k] - ood_y[k]) ** 2).mean() for k in range(a.num_critics))
            critic_adams[i].minimise(in_loss + ood_loss)
            found = {"value/q_data": q.mean(), "value/q_ood": ood_q.mean(), "uncertainty/data": q.std(dim=0).mean()}
            found |= {"uncertainty/ood": u.mean(), "loss/in_distribution": in_loss, "loss/ood": ood_loss}
            metrics |= {f"{k}/{TASKS[i]}" if naive else k: v.item() for k, v in found.items()}
            if step % a.policy_frequency == 0:
                mine = act(actor, s, i)
                q = values(critics[i], s, mine).min(dim=0).values
                loss = -q.mean()
                if a.bc_coef:
                    clone = ((mine - b) ** 2).sum(dim=1).mean()
                    loss = loss / q.abs().mean().item() + a.bc_coef * clone
                actor_adam.minimise(loss)
            follow(target_critics[i], critics[i], a.tau)
        follow(target_actor, actor, a.actor_tau)
    networks = {"actor": actor, "target_actor": target_actor}
    for i in range(len(tables)):
        end = f"_{i}" if naive else ""
        networks |= {f"critics{end}": critics[i], f"target_critics{end}": target_critics[i]}
    return networks, metrics | {"beta_ood": beta_ood}, generator


KINDS = ["deterministic", "gaussian", "gaussian-tanh", "bc", "common", "naive", "naive gaussian"]


@pytest.mark.parametrize("kind", KINDS)
def test_pbrl_equals_a_plain_loop(world, tmp_path, monkeypatch, kind):
    naive, actor = kind.startswith("naive"), kind.removeprefix("naive ")
    tasks, bounds = TASKS[: 1 + naive], LOG_STD.get(actor)
    tables = [made_up(50 + 30 * i, seed=i) for i in range(len(tasks))]
    paths = [write_dataset(tmp_path / f"{i}.npz", task, tables[i]) for i, task in enumerate(tasks)]
    settings = FILES | LOOP | TEACHER | {"bc_coef": 0.7 if kind == "bc" else 0, "seed": 3, "eval_every": 5}
    logged = recorded(monkeypatch, pbrl)
    options = ["--tasks" if naive else "--task", *tasks, "--data", *paths, "--run-dir", "run", "--output", "out.pt"]
    options += ["--actor", actor] if bounds else ["--common-seed"] if kind == "common" else []
    world(pbrl, *options, *flags(settings))
    name = "+".join(tasks)
    seed = 3 if kind == "common" else seed_of(f"3 teacher {name} from {name}")
    networks, metrics, generator = plain_pbrl(tables, seed, SimpleNamespace(**settings), bounds, naive)
    point, checkpoint = load(tmp_path / "run/resume.pt"), load(tmp_path / "out.pt")
    for name, weights in networks.items():
        assert_close(point[name], weights)
    assert_close(checkpoint["actor"], networks["actor"])
    for i, found in enumerate(checkpoint["critics"] if naive else [checkpoint["critics"]]):
        assert_close(found, networks[f"critics_{i}" if naive else "critics"])
    assert torch.equal(point["generator"], generator.get_state())
    assert [step for step, _ in logged] == [5, 8]
    for key, value in metrics.items():
        assert logged[-1][1][key] == pytest.approx(value, abs=2e-5), key
    for i, task in enumerate(tasks):
        with_id = lambda obs, i=i: torch.cat([obs, torch.full((len(obs), 1), float(i))], dim=1) if naive else obs  # noqa: E731
        expected = plain_returns(lambda obs, f=with_id: policy(checkpoint["actor"], f(obs)), task, 3)
        assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------------------- distillation
SMALL = {"gradient_steps": 8, "learning_rate": 3e-3, "batch_size": 16, "hidden": 8}


def coded(obs, i, onehot=0):
    """States with the task id as a number, or as flags."""
    code = torch.nn.functional.one_hot(torch.full((len(obs),), i), onehot) if onehot else torch.full((len(obs), 1), i)
    return torch.cat([obs, code.float()], dim=1)


def plain_student(parts, seed, a, loss, out_dim=2):
    """(weights, last loss per task, generator) of a student; parts: per task its rows x and the teacher's labels."""
    torch.manual_seed(seed_of(f"{seed} student"))
    generator = torch.Generator().manual_seed(seed_of(f"{seed} student"))
    student = make_policy(parts[0][0].shape[1], out_dim, a.hidden)
    adam, first = Adam(student, a.learning_rate), np.cumsum([0] + [len(x) for x, _ in parts]).tolist()
    for _ in range(a.gradient_steps):
        shape, by_task = (a.batch_size,), []
        for i, (x, label) in enumerate(parts):
            index = torch.randint(first[i], first[i + 1], shape, generator=generator) - first[i]
            by_task.append(loss(student, i, x[index], label[index]).mean())
        adam.minimise(sum(by_task) / len(parts))
    return student, [value.item() for value in by_task], generator


def squared_error(student, i, x, label):
    return ((policy(student, x) - label) ** 2).sum(dim=1)


def ndcg(x, y):
    """Of one state: the scores y in the order of x, over those in their own order."""
    ranks = [1 / np.log2(place + 2) for place in range(len(x))]
    in_order = sum(y[j] * rank for j, rank in zip(x.argsort(descending=True, stable=True), ranks, strict=True))
    return -in_order / sum(value * rank for value, rank in zip(y.sort(descending=True).values, ranks, strict=True))


@pytest.mark.parametrize("kind", ["mse", "q", "kl", "ndcg", "pairwise", "listwise", "onehot"])
def test_distillation_equals_a_plain_loop(world, tmp_path, monkeypatch, kind):
    tasks = (*TASKS, "toy-out")[: 3 if kind == "onehot" else 2]
    m, bounds = len(tasks), (-5.0, 0.0) if kind == "kl" else None
    obs = [made_up(40 + 30 * i, seed=i)["observations"] for i in range(m)]
    data = [write_dataset(tmp_path / f"{i}.npz", t, made_up(40 + 30 * i, seed=i)) for i, t in enumerate(tasks)]
    sizes = {"obs_dim": 3, "action_dim": 2, "log_std": bounds}
    paths = [write_teacher(tmp_path / f"{i}.pt", t, seed=i, **sizes) for i, t in enumerate(tasks)]
    settings = FILES | SMALL | {"seed": 4, "reg_lambda": 0.3, "eval_every": 1000}
    options = ["--loss", kind] if kind in ("q", "kl") else []
    options += ["--regularizer", kind] if kind in ("ndcg", "pairwise", "listwise") else []
    options += ["--task-encoding", "onehot"] if kind == "onehot" else []
    logged = recorded(monkeypatch, distill)
    options += ["--tasks", *tasks, "--data", *data, "--teachers", *paths, "--run-dir", "run"]
    world(distill, *options, *flags(settings))

    teachers, onehot = [load(path) for path in paths], m if kind == "onehot" else 0
    rows = [torch.from_numpy(part) for part in obs]
    parts = [(coded(s, i, onehot), policy(teachers[i]["actor"], s)) for i, s in enumerate(rows)]

    def normal(out):
        return torch.distributions.Normal(out[:, :2], (-5 + 2.5 * (out[:, 2:] + 1)).exp())

    def ranked(x, y):
        if kind == "ndcg":
            return torch.stack([ndcg(*pair) for pair in zip(x, y, strict=True)])
        if kind == "listwise":
            return -(y.exp() / y.exp().sum(1, keepdim=True) * (x - x.exp().sum(1, keepdim=True).log())).sum(1)
        pairs = [(j, k) for j in range(8) for k in range(8)]
        return sum(torch.log(1 + torch.exp(-(x[:, j] - x[:, k]) * (y[:, j] - y[:, k]))) for j, k in pairs)

    def loss(student, i, x, label):
        if kind == "q":
            return -values(teachers[i]["critics"], x[:, :3], policy(student, x)).min(dim=0).values
        if kind == "kl":
            return torch.distributions.kl_divergence(normal(policy(student, x)), normal(label)).sum(dim=1)
        if kind in ("mse", "onehot"):
            return squared_error(student, i, x, label)
        own, other = layers_of(student, x)[:2], layers_of(student, coded(x[:, :3], 1 - i))[:2]
        rank_loss = sum(ranked(a, b) for a, b in zip(own, other, strict=True))
        return squared_error(student, i, x, label) + 0.3 * rank_loss

    student, by_task, generator = plain_student(parts, 4, SimpleNamespace(**settings), loss, 4 if bounds else 2)
    point, checkpoint = load(tmp_path / "run/resume.pt"), load(tmp_path / "run/student.pt")
    assert_close(point["student"], student)
    assert_close(checkpoint["actor"], student)
    assert torch.equal(point["generator"], generator.get_state())
    assert logged[-1][0] == 8 and logged[-1][1]["loss/total"] == pytest.approx(np.mean(by_task), abs=2e-5)
    if "--regularizer" not in options:
        for task, value in zip(tasks, by_task, strict=True):
            name = f"loss/{kind if kind in ('q', 'kl') else 'mse'}/{task}"
            assert logged[-1][1][name] == pytest.approx(value, abs=2e-5)
    for i, task in enumerate(tasks):
        expected = plain_returns(lambda obs, i=i: policy(student, coded(obs, i, onehot)), task, 3)
        assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------- data sharing and Q-switch
BOTH = {f"teacher_{name.replace('gradient_', '')}": value for name, value in TEACHER.items()}


def write_both(folder, tasks=TASKS):
    """Datasets of unequal sizes, whose states tell them apart; returns the arrays."""
    tables = [relabelled(made_up(50 + 30 * i, seed=i), task) for i, task in enumerate(tasks)]
    for i, table in enumerate(tables):
        table["observations"][:, 0] = np.abs(table["observations"][:, 0]) + 10 * i
        write_dataset(folder / f"data/{tasks[i]}-medium.npz", tasks[i], table)
    return tables


def trained(module, tasks=TASKS):
    """The options of a run that trains every teacher itself."""
    return ["--tasks", *tasks, *(["--teachers", *["train"] * len(tasks)] if module is oqs else []), "--run-dir", "run"]


def teacher_files(module, tasks=TASKS):
    """{(task, sources): checkpoint}, in the order of training."""
    if module is ds:
        return {(i, (0, 1)): f"checkpoints/{task}-medium-ds-teacher.pt" for i, task in enumerate(tasks)}
    pairs = [(i, j) for i in range(len(tasks)) for j in range(len(tasks))]
    return {(i, (j,)): f"checkpoints/{tasks[i]}-from-{tasks[j]}-medium-teacher.pt" for i, j in pairs}


def relabelled_union(tables, i, sources):
    return union(*(tables[j] if j == i else relabelled(tables[j], TASKS[i]) for j in sources))


def switched(teachers, obs):
    """Per state the action of the teacher with the highest min_k Q of its own action."""
    actions = [policy(t["actor"], obs) for t in teachers]
    worth = [values(t["critics"], obs, a).min(dim=0).values.tolist() for t, a in zip(teachers, actions, strict=True)]
    best = [max(range(len(teachers)), key=lambda j: worth[j][row]) for row in range(len(obs))]
    return torch.stack([actions[j][row] for row, j in enumerate(best)])


@pytest.mark.parametrize("module", [ds, oqs])
def test_teachers_and_student_equal_plain_loops(world, tmp_path, monkeypatch, module):
    """Data sharing and Q-switch: every teacher on its relabelled data, then the student on the union of the states."""
    tables = write_both(tmp_path)
    settings = FILES | LOOP | BOTH | SMALL | {"seed": 6, "eval_every": 5, "bc_coef": 0.7}
    logged = recorded(monkeypatch, module)
    world(module, *trained(module), *flags(settings))
    a = SimpleNamespace(**settings | TEACHER)
    teachers = []
    for (i, sources), path in teacher_files(module).items():
        names = "+".join(sorted(TASKS[j] for j in sources))
        seed = seed_of(f"6 teacher {TASKS[i]} from {names}")
        networks, metrics, _ = plain_pbrl([relabelled_union(tables, i, sources)], seed, a)
        teachers.append(load(tmp_path / path))
        assert_close(teachers[-1]["actor"], networks["actor"])
        assert_close(teachers[-1]["critics"], networks["critics"])
        assert teachers[-1]["step"] == 8 and teachers[-1]["data_tasks"] == [TASKS[j] for j in sources]
        label = "teacher" if module is ds else f"from {TASKS[sources[0]]}"
        prefix = f"{TASKS[i]} {label}/"
        (found,) = (found for step, found in logged if step == 8 and any(key.startswith(prefix) for key in found))
        for key, value in metrics.items():
            assert found[prefix + key] == pytest.approx(value, abs=2e-5), key
        expected = plain_returns(lambda obs, w=teachers[-1]["actor"]: policy(w, obs), TASKS[i], 3)
        assert teachers[-1]["returns"][TASKS[i]] == pytest.approx(expected, abs=1e-4)

    obs = torch.cat([torch.from_numpy(table["observations"]) for table in tables])
    groups = [[t] for t in teachers] if module is ds else [teachers[:2], teachers[2:]]
    parts = [(coded(obs, i), switched(group, obs)) for i, group in enumerate(groups)]
    student, by_task, generator = plain_student(parts, 6, SimpleNamespace(**settings), squared_error)
    point, checkpoint = load(tmp_path / "run/resume.pt"), load(tmp_path / "run/student.pt")
    assert_close(point["student"], student)
    assert_close(checkpoint["actor"], student)
    assert torch.equal(point["generator"], generator.get_state())
    for i, task in enumerate(TASKS):
        assert logged[-1][1][f"loss/mse/{task}"] == pytest.approx(by_task[i], abs=2e-5)
        expected = plain_returns(lambda obs, i=i: policy(student, coded(obs, i)), task, 3)
        assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("module", [ds, oqs])
def test_the_student_sees_the_states_of_every_dataset(world, tmp_path, monkeypatch, module):
    """Under every task id, each dataset's share of the batches is its share of the union."""
    tables, seen, mse_loss = write_both(tmp_path), [], module.mse_loss
    monkeypatch.setattr(module, "mse_loss", lambda student, x, a: (seen.append(x), mse_loss(student, x, a))[1])
    sizes = {"gradient_steps": 40, "batch_size": 64, "hidden": 8, "teacher_steps": 1, "teacher_hidden": 8}
    world(module, *trained(module), *flags(FILES | sizes))
    rows = torch.cat(seen)
    union = torch.cat([torch.from_numpy(table["observations"]) for table in tables])
    for i in range(2):
        states = rows[rows[:, 3] == i][:, :3]
        assert len(states) == 40 * 64 and len(states.unique(dim=0)) == len(union)  # every state of the union, no other
        assert set(map(tuple, states.tolist())) == set(map(tuple, union.tolist()))
        assert (states[:, 0] > 9).float().mean() == pytest.approx(80 / 130, abs=0.05)  # 5 standard errors


def run_pbrl(world, tmp_path, task, arrays, name, *options, settings):
    path = write_dataset(tmp_path / f"{name}.npz", task, arrays)
    files = ["--data", path, "--output", f"{name}.pt", "--run-dir", name]
    world(pbrl, "--task", task, *files, *options, *flags(settings))
    return load(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("module", [ds, oqs])
def test_train_teacher_is_mop_pbrl_teacher_bit_for_bit(world, tmp_path, module):
    tables = write_both(tmp_path)
    world(module, *trained(module), "--common-seed", *flags(FILES | LOOP | BOTH | SMALL))
    for (i, sources), path in teacher_files(module).items():
        arrays = relabelled_union(tables, i, sources)
        options = FILES | LOOP | TEACHER
        other = run_pbrl(world, tmp_path, TASKS[i], arrays, f"{i}{sources}", "--common-seed", settings=options)
        for part in ("actor", "critics"):
            assert_equal(load(tmp_path / path)[part], other[part])


# -------------------------------------------------------------------------------------------------------------- streams
START = {"num_critics": 2, "num_ood": 1}
START |= {"gradient_steps": 1, "learning_rate": 1e-12, "batch_size": 4, "hidden": 8}
START_BOTH = START | {"teacher_steps": 1, "teacher_learning_rate": 1e-12, "teacher_batch_size": 4, "teacher_hidden": 8}


def streams(world, tmp_path, *options):
    """Of both tasks' teachers: initial weights, state of the generator, after one update on the same data."""
    found = []
    for task in TASKS:
        name = f"{task}{len(list(tmp_path.iterdir()))}"
        checkpoint = run_pbrl(world, tmp_path, task, made_up(50), name, *options, settings=FILES | START)
        found.append((checkpoint["actor"], checkpoint["critics"], load(tmp_path / name / "resume.pt")["generator"]))
    return found


def distinct(a, b):
    """No random weight is the same."""
    return not any(np.isin(a[name].numpy(), b[name].numpy()).any() for name in a)


def test_every_teacher_has_its_own_stream(world, tmp_path):
    stand, walk = streams(world, tmp_path)
    assert distinct(stand[0], walk[0]) and distinct(stand[1], walk[1]) and not torch.equal(stand[2], walk[2])
    again, _ = streams(world, tmp_path, "--seed", 1)
    assert_equal(again[0], stand[0])
    other, _ = streams(world, tmp_path, "--seed", 2)
    assert distinct(other[0], stand[0]) and not torch.equal(other[2], stand[2])


def test_a_common_seed(world, tmp_path):
    stand, walk = streams(world, tmp_path, "--common-seed")
    assert_equal(stand[0], walk[0])
    assert_equal(stand[1], walk[1])
    assert torch.equal(stand[2], walk[2])


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("module", [ds, oqs])
def test_streams_of_several_teachers(world, tmp_path, module, common):
    write_both(tmp_path)
    world(module, *trained(module), *flags(FILES | START_BOTH), *(["--common-seed"] if common else []))
    actors = [load(tmp_path / path)["actor"] for path in teacher_files(module).values()]
    actors.append({k: v for k, v in load(tmp_path / "run/student.pt")["actor"].items() if k != "net.0.weight"})
    for k, actor in enumerate(actors):
        for other in actors[:k]:
            if common and k < len(actors) - 1:
                assert_equal(actor, other)
            else:
                assert distinct(actor, other)


def test_order_and_number_of_tasks_do_not_matter(world, tmp_path, monkeypatch):
    """A teacher's stream depends on its task and its data; teacher ii is the one that mop_pbrl_teacher.py trains."""
    three = *TASKS, "toy-out"
    settings, files = FILES | LOOP | BOTH | SMALL | {"teacher_steps": 3}, {}
    for name, tasks in (("two", TASKS), ("turned", TASKS[::-1]), ("three", three)):
        folder = tmp_path / name
        for i, task in enumerate(three):
            write_dataset(folder / f"data/{task}-medium.npz", task, relabelled(made_up(50, seed=i), task))
        monkeypatch.chdir(folder)
        world(oqs, *trained(oqs, tasks), *flags(settings))
        files[name] = {path.name: load(path) for path in (folder / "checkpoints").glob("*.pt")}
        assert len(files[name]) == len(tasks) ** 2
    for name, checkpoint in files["two"].items():
        for part in ("actor", "critics"):
            assert_equal(checkpoint[part], files["turned"][name][part])
            assert_equal(checkpoint[part], files["three"][name][part])
    monkeypatch.chdir(tmp_path)
    for i, task in enumerate(TASKS):
        arrays = relabelled(made_up(50, seed=i), task)
        alone = run_pbrl(world, tmp_path, task, arrays, task, settings=FILES | LOOP | TEACHER | {"gradient_steps": 3})
        assert_equal(alone["actor"], files["two"][f"{task}-from-{task}-medium-teacher.pt"]["actor"])


def test_order_of_tasks_does_not_matter_to_data_sharing(world, tmp_path, monkeypatch):
    actors = []
    for name, tasks in (("plain", TASKS), ("turned", TASKS[::-1])):
        write_both(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        world(ds, *trained(ds, tasks), *flags(FILES | START_BOTH))
        actors.append([load(tmp_path / name / f"checkpoints/{task}-medium-ds-teacher.pt")["actor"] for task in TASKS])
    for plain, turned in zip(*actors, strict=True):
        assert_equal(plain, turned)


def test_relabelled_file_is_read_by_the_other_script(world, tmp_path, monkeypatch):
    """What mop_ds.py has computed mop_oqs.py does not compute again."""
    write_both(tmp_path)
    world(ds, *trained(ds), *flags(FILES | START_BOTH))
    assert len(list((tmp_path / "data").glob("*.npy"))) == 2
    asked, compute = [], oqs.compute_rewards
    monkeypatch.setattr(oqs, "compute_rewards", lambda task, *arrays: (asked.append(task), compute(task, *arrays))[1])
    result = world(oqs, *trained(oqs)[:-2], *flags(FILES | START_BOTH), "--run-dir", "other")
    assert json.dumps(result["switch"]).count("from toy-up") == 4
    assert asked == list(TASKS)  # each for a few rows of its own data, to see that its physics states fit
