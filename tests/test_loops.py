"""Every default, every stream of random numbers, and every training loop against a plain one.

The plain loops share no code with the scripts: networks are dicts of tensors, gradients come from
torch.autograd.grad, Adam is its formula. They draw the same random numbers in the same order, so a
few updates by a script's own main() must end with the same weights up to rounding. World stands in
for dm_control.
"""

import os
import sys
import zlib
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mop_distill as distill
import mop_ds as ds
import mop_measure as measure
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, write_dataset, write_teacher

TRAINING = {"td3": td3, "pbrl": pbrl, "distill": distill, "ds": ds, "oqs": oqs}

# ----------------------------------------------------------------------- defaults: the thesis's
# fmt: off
DEFAULTS = {  # of every flag, unless the script has its own below
    "tasks": ("walker-stand", "walker-walk"), "task": "walker-walk", "level": ("medium",),
    "seed": 1, "common_seed": False, "scale": "thesis", "states": "offline",
    "data": (), "teachers": (), "output": None,
    "run_dir": None, "resume": None, "overwrite": False,
    "eval_every": 10_000, "eval_episodes": 10, "final_eval_episodes": 100,
    "loss": "mse", "regularizer": "none", "reg_lambda": 100.0, "task_encoding": "number",
    "gradient_steps": 500_000, "learning_rate": 1e-4, "batch_size": 1024, "hidden": 256,
    "teacher_steps": 1_000_000, "teacher_learning_rate": 1e-4,
    "teacher_batch_size": 1024, "teacher_hidden": 256,
    "gamma": 0.99, "tau": 0.005, "actor_tau": 0.005,
    "policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2,
    "num_critics": 5, "num_ood": 3, "ood_noise": 0.01, "beta_in": 0.001,
    "beta_ood": 3.0, "beta_ood_min": 0.1, "beta_ood_decay": 0.99995, "bc_coef": 0.0,
    "device": "auto", "threads": 0, "matmul_precision": "highest", "cuda_graph": False,
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
    "distill": {},
    "ds": {},
    "oqs": {},
    "measure": {
        "student": None, "episodes": 1000, "cross_episodes": 100, "shift": None,
        "tau_states": 100_000, "cka_states": 100_000, "shift_states": 100_000,
        "gif": True,
    },
}
LAPTOP = {
    "td3": {
        "hidden": 256, "batch_size": 128, "learning_rate": 3e-4,
        "total_timesteps": 240_000, "medium_step": 120_000,
    },
    "pbrl": {
        "gradient_steps": 30_000, "batch_size": 256, "learning_rate": 3e-4,
        "num_ood": 1, "tau": 0.02, "actor_tau": 0.02, "policy_noise": 0.05,
        "beta_ood_decay": 0.9997, "bc_coef": 1.0, "matmul_precision": "medium",
    },
    "distill": {"gradient_steps": 20_000, "learning_rate": 1e-3},
    "ds": {
        "gradient_steps": 20_000, "learning_rate": 1e-3,
        "teacher_steps": 30_000, "teacher_batch_size": 256, "teacher_learning_rate": 3e-4,
        "num_ood": 1, "tau": 0.02, "actor_tau": 0.02, "policy_noise": 0.05,
        "beta_ood_decay": 0.9997, "bc_coef": 1.0, "matmul_precision": "medium",
    },
}
LAPTOP["oqs"] = LAPTOP["ds"]

# settings of the short runs below, all unlike the defaults
RUN = {"eval_episodes": 2, "final_eval_episodes": 3, "device": "cpu", "run_dir": "run"}
TD3 = {
    "learning_rate": 3e-3, "batch_size": 16, "hidden": 8, "gamma": 0.9, "tau": 0.1,
    "policy_noise": 0.5, "noise_clip": 0.4, "exploration_noise": 0.35, "policy_frequency": 3,
    "learning_starts": 46, "total_timesteps": 60, "medium_step": 40, "eval_every": 20,
    "num_transitions": 50,
}
PBRL = {
    "gamma": 0.9, "tau": 0.1, "actor_tau": 0.25, "policy_noise": 0.4, "noise_clip": 0.3,
    "policy_frequency": 3, "num_critics": 3, "num_ood": 2, "ood_noise": 0.4, "beta_in": 0.5,
    "beta_ood": 2.0, "beta_ood_min": 0.5, "beta_ood_decay": 0.7,
}
SMALL = {"gradient_steps": 8, "learning_rate": 3e-3, "batch_size": 16, "hidden": 8}
START = {  # one update that moves nothing
    "gradient_steps": 1, "learning_rate": 1e-12, "batch_size": 4, "hidden": 8,
}
START_TEACHERS = {
    "teacher_steps": 1, "teacher_learning_rate": 1e-12, "teacher_batch_size": 4,
    "teacher_hidden": 8,
}
TEACHERS = {
    "teacher_steps": 8, "teacher_learning_rate": 3e-3, "teacher_batch_size": 16,
    "teacher_hidden": 8,
}
# fmt: on


def flags(settings: dict) -> list:
    """{"batch_size": 8} -> ["--batch-size", 8]."""
    argv = []
    for name, value in settings.items():
        argv += [f"--{name.replace('_', '-')}", value]
    return argv


def parsed(monkeypatch, name, *argv) -> dict:
    """The arguments that a script finds on a command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    return vars(TRAINING[name].parse_args()[0])


def defaults(name) -> dict:
    """The expected defaults of a script, as parsed: the number of threads is known then."""
    own = OWN_DEFAULTS[name]
    expected = {}
    for field in vars(TRAINING[name].Args()):
        expected[field] = own[field] if field in own else DEFAULTS[field]
    return expected | {"threads": len(os.sched_getaffinity(0))}


@pytest.mark.parametrize("name", OWN_DEFAULTS)
def test_defaults(name):
    module = TRAINING.get(name, measure)
    own = OWN_DEFAULTS[name]
    found = vars(module.Args())
    for field, value in found.items():
        assert value == (own[field] if field in own else DEFAULTS[field]), field
    assert own.keys() <= found.keys()


@pytest.mark.parametrize("name", TRAINING)
def test_no_flags(name, monkeypatch):
    assert parsed(monkeypatch, name) == defaults(name)


def test_constants():
    assert pbrl.LOG_STD == {
        "deterministic": None,
        "gaussian": (-5.0, 0.0),
        "gaussian-tanh": (-1.0, 1.0),
    }
    assert td3.PLAIN_ONE_IN == {"online": 1, "noise": 10, "random90": 10, "random99": 100}
    for module in [*TRAINING.values(), measure]:
        assert module.EVAL_SEED == 2**31


@pytest.mark.parametrize("name", TRAINING)
def test_laptop_wins_over_defaults_and_flags_win_over_both(name, monkeypatch):
    laptop = defaults(name) | {"scale": "laptop"} | LAPTOP[name]
    assert parsed(monkeypatch, name, "--scale", "laptop") == laptop
    given = {"seed": 9, "hidden": 5}
    for field in LAPTOP[name]:
        given[field] = defaults(name)[field]  # a flag that repeats the thesis's default wins, too
    expected = defaults(name) | {"scale": "laptop"} | given
    assert parsed(monkeypatch, name, "--scale", "laptop", *flags(given)) == expected
    assert parsed(monkeypatch, name, *flags(given), "--scale", "laptop") == expected


@pytest.mark.parametrize("name", TRAINING)
def test_resumed_arguments_are_defaults_and_flags_win_over_them(name, monkeypatch, tmp_path):
    stored = parsed(monkeypatch, name, "--scale", "laptop", "--seed", 7, "--run-dir", "elsewhere")
    resume_point = {
        "kind": f"resume point of {TRAINING[name].__name__}.py",
        "args": stored,
        "device": "cpu",
    }
    torch.save(resume_point, tmp_path / "resume.pt")
    found = parsed(monkeypatch, name, "--device", "cpu", "--resume", tmp_path, "--hidden", 5)
    given = {"device": "cpu", "resume": str(tmp_path), "run_dir": str(tmp_path), "hidden": 5}
    assert found == stored | given
    assert found["seed"] == 7 and found["learning_rate"] == LAPTOP[name]["learning_rate"]


# ---------------------------------------------------------------------------------- the world
TASKS = ("toy-up", "toy-down")
SLOPES = {"toy-up": 2.0, "toy-down": -2.0, "toy-out": 0.5}


class World:
    """A small made-up world with dm_control's interface: environment, task and physics in one."""

    _step_limit = 20

    def __init__(self, name):
        self.name = name
        self.random = np.random.RandomState(0)
        self.task = self
        self.physics = self
        self.state = np.zeros(3)
        self.control = np.zeros(2)

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
        is_last = self.time == self._step_limit
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


@pytest.fixture
def world(monkeypatch, run_main):
    """run_main with World in place of dm_control."""
    for module in TRAINING.values():
        monkeypatch.setattr(module, "make_env", cache(World))
        if hasattr(module, "TAU_STATES"):
            monkeypatch.setattr(module, "TAU_STATES", 20)
    return run_main


def observed(time_step):
    return torch.from_numpy(time_step.observation["observations"]).float()


def made_up(n, seed=0) -> dict:
    """Arrays of random transitions of World, a fifth of them terminal."""
    arrays = make_arrays(n, 3, 2, 3, seed)
    arrays["terminals"] = np.random.default_rng(seed + 100).random(n) < 0.2
    return arrays


def rewards_of(task, arrays) -> np.ndarray:
    """The rewards of a task for the stored physics states and actions."""
    env = World(task)
    rewards = []
    for state, action in zip(arrays["physics"], arrays["actions"], strict=True):
        env.state = state
        env.control = action
        rewards.append(env.get_reward(env))
    return np.array(rewards, np.float32)


def plain_returns(weights, task, code=()) -> list:
    """Returns of three episodes from the fixed initial states."""
    returns = []
    for e in range(3):
        env = World(task)
        env.random.seed(2**31 + e)
        time_step = env.reset()
        total = 0.0
        while not time_step.last():
            x = torch.cat([observed(time_step), torch.tensor(code)])
            time_step = env.step(policy(weights, x[None])[0, :2].detach().numpy())
            total += time_step.reward
        returns.append(total)
    return returns


# ------------------------------------------------------------------------------ networks, Adam
def make_policy(in_dim, out_dim, hidden, layer_norm=False) -> dict:
    """Initial weights by torch's default, drawn layer by layer; names as in a checkpoint."""
    weights = {}
    place = 0
    for n_in, n_out in [(in_dim, hidden), (hidden, hidden), (hidden, out_dim)]:
        layer = torch.nn.Linear(n_in, n_out)
        weights[f"net.{place}.weight"] = layer.weight
        weights[f"net.{place}.bias"] = layer.bias
        place += 2
        if layer_norm and place == 2:
            weights["net.1.weight"] = torch.ones(hidden)
            weights["net.1.bias"] = torch.zeros(hidden)
            place = 3
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def make_critics(num_critics, hidden, layer_norm=False) -> dict:
    weights = {}
    for j, (n_in, n_out) in enumerate([(3 + 2, hidden), (hidden, hidden), (hidden, 1)], start=1):
        layers = [torch.nn.Linear(n_in, n_out) for _ in range(num_critics)]
        weights[f"w{j}"] = torch.stack([layer.weight.T for layer in layers])
        weights[f"b{j}"] = torch.stack([layer.bias[None] for layer in layers])
    if layer_norm:
        weights["scale"] = torch.ones(num_critics, 1, hidden)
        weights["shift"] = torch.zeros(num_critics, 1, hidden)
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def normalised(h):
    variance = h.var(1, unbiased=False, keepdim=True)
    return (h - h.mean(1, keepdim=True)) / (variance + 1e-5).sqrt()


def layers_of(weights, x):
    """Both hidden layers and the output of a policy."""
    w = list(weights.values())
    h1 = x @ w[0].T + w[1]
    h1 = h1.relu() if len(w) == 6 else (normalised(h1) * w[2] + w[3]).tanh()
    h2 = (h1 @ w[-4].T + w[-3]).relu()
    return h1, h2, (h2 @ w[-2].T + w[-1]).tanh()


def policy(weights, x):
    return layers_of(weights, x)[2]


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
        self.weights = list(weights.values())
        self.rate = rate
        self.t = 0
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]

    def minimise(self, loss):
        self.t += 1
        gradients = torch.autograd.grad(loss, self.weights)
        for w, m, v, g in zip(self.weights, self.m, self.v, gradients, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            m_hat = m / (1 - 0.9**self.t)
            v_hat = v / (1 - 0.999**self.t)
            w.data -= self.rate * m_hat / (v_hat.sqrt() + 1e-8)


def copied(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def follow(target, online, rate):
    for name in target:
        target[name] = (1 - rate) * target[name] + rate * online[name].detach()


def assert_close(found, expected, atol=1e-6):
    assert list(found) == list(expected)
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight.detach(), atol=atol, rtol=0, err_msg=name)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def load(path):
    return torch.load(path, weights_only=True)


def seed_of(text):
    return zlib.crc32(text.encode())


def losses_by_step(run_dir) -> dict:
    """{step: {metric: value}} of losses.csv."""
    by_step = {}
    for line in (run_dir / "losses.csv").read_text().splitlines()[1:]:
        step, name, value = line.split(",")
        by_step.setdefault(int(step), {})[name] = float(value)
    return by_step


# ----------------------------------------------------------------------------------------- TD3


def plain_td3(task, seed, a):
    """a.total_timesteps steps -> networks, transitions, actor at a.medium_step, last metrics."""
    torch.manual_seed(seed_of(f"{seed} behavior {task}"))
    actor = make_policy(3, 2, a.hidden, layer_norm=True)
    critics = make_critics(2, a.hidden, layer_norm=True)
    target_actor = copied(actor)
    target_critics = copied(critics)
    actor_adam = Adam(actor, a.learning_rate)
    critic_adam = Adam(critics, a.learning_rate)
    env = World(task)
    transitions = []
    metrics = {}
    for step in range(1, a.total_timesteps + 1):
        if step % 20 == 1:
            env.random.seed(seed_of(f"{seed} {task} {step // 20}") % 2**31)
            obs = observed(env.reset())
            metrics["return/training"] = 0.0

        if step <= a.learning_starts:
            action = torch.rand(2) * 2 - 1
        else:
            action = policy(actor, obs[None])[0].detach() + a.exploration_noise * torch.randn(2)
            action = action.clamp(-1, 1)

        if step > a.learning_starts:
            index = torch.randint(len(transitions), (a.batch_size,)).tolist()
            columns = zip(*[transitions[i] for i in index], strict=True)
            s, b, r, s2, _ = map(torch.stack, columns)
            noise = (a.policy_noise * torch.randn(a.batch_size, 2)).clamp(
                -a.noise_clip, a.noise_clip
            )
            with torch.no_grad():
                b2 = (policy(target_actor, s2) + noise).clamp(-1, 1)
                y = r + a.gamma * torch.minimum(*values(target_critics, s2, b2))
            q1, q2 = values(critics, s, b)
            loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
            metrics["loss/critics"] = loss.item()
            critic_adam.minimise(loss)
            if step % a.policy_frequency == 0:
                loss = -values(critics, s, policy(actor, s))[0].mean()
                metrics["loss/actor"] = loss.item()
                actor_adam.minimise(loss)
                follow(target_actor, actor, a.tau)
                follow(target_critics, critics, a.tau)

        time_step = env.step(action.numpy())
        next_obs = observed(time_step)
        reward = torch.tensor(time_step.reward).float()
        transitions.append((obs, action, reward, next_obs, torch.from_numpy(env.get_state())))
        metrics["return/training"] += time_step.reward
        obs = next_obs
        if step == a.medium_step:
            medium = copied(actor)
    networks = {
        "actor": actor,
        "critics": critics,
        "target_actor": target_actor,
        "target_critics": target_critics,
    }
    return networks, transitions, medium, metrics


MORE = {"medium_step": 60, "learning_starts": 8, "policy_frequency": 2, "seed": 5}


@pytest.mark.parametrize("more", [{"seed": 1}, MORE])
def test_td3_equals_a_plain_loop(world, tmp_path, more):
    settings = RUN | TD3 | more
    task = TASKS[0]
    world(td3, "--task", task, *flags(settings))
    a = SimpleNamespace(**settings)
    networks, transitions, medium, metrics = plain_td3(task, a.seed, a)
    resume_point = load(tmp_path / "run/resume.pt")
    for name, weights in networks.items():
        assert_close(resume_point[name], weights, atol=5e-6)
    assert torch.equal(resume_point["random_states"][0], torch.get_rng_state())
    by_step = losses_by_step(tmp_path / "run")
    assert list(by_step) == [20, 40, 60]
    assert by_step[60] == pytest.approx(metrics, abs=1e-4)

    for level, weights, step in (
        ("medium", medium, a.medium_step),
        ("expert", networks["actor"], 60),
    ):
        checkpoint = load(tmp_path / f"checkpoints/{task}-{level}-behavior.pt")
        assert_close(checkpoint["actor"], weights, atol=5e-6)
        assert checkpoint["level"] == level and checkpoint["step"] == step
        assert checkpoint["returns"][task] == pytest.approx(plain_returns(weights, task), abs=1e-3)
    names = ["observations", "actions", "rewards", "next_observations", "physics"]
    with np.load(tmp_path / f"data/{task}-medium-replay.npz") as data:
        for name, column in zip(
            names, zip(*transitions[: a.medium_step], strict=True), strict=True
        ):
            np.testing.assert_allclose(data[name], torch.stack(column), atol=1e-5)
        assert np.flatnonzero(data["timeouts"]).tolist() == list(range(19, a.medium_step, 20))


def test_td3_datasets_are_rollouts_of_their_policy(world, tmp_path):
    """Deterministic, from initial states of a stream of their own."""
    task = TASKS[0]
    world(td3, "--task", task, *flags(RUN | TD3))
    starts = {}
    for level in ("medium", "expert"):
        weights = load(tmp_path / f"checkpoints/{task}-{level}-behavior.pt")["actor"]
        with np.load(tmp_path / f"data/{task}-{level}.npz") as data:
            arrays = dict(data)
        expected = policy(weights, torch.from_numpy(arrays["observations"]))
        np.testing.assert_allclose(arrays["actions"], expected, atol=1e-6)
        starts[level] = arrays["observations"][::20]
        rng = np.random.default_rng([1, seed_of(f"{task} {level} online")])
        for obs, seed in zip(starts[level], rng.integers(2**31, size=3), strict=True):
            env = World(task)
            env.random.seed(int(seed))
            np.testing.assert_array_equal(obs, observed(env.reset()))
        assert np.flatnonzero(arrays["timeouts"]).tolist() == [19, 39, 49]
        assert len(arrays["rewards"]) == 50
        np.testing.assert_allclose(arrays["rewards"], rewards_of(task, arrays), atol=1e-6)
    assert not np.isin(starts["medium"], starts["expert"]).any()


# ---------------------------------------------------------------------------------------- PBRL
LOG_STD = {"gaussian": (-5.0, 0.0), "gaussian-tanh": (-1.0, 1.0)}


def plain_pbrl(arrays, seed, a, bounds=None):
    """a.gradient_steps updates on a dataset -> weights of all networks, last metrics."""
    torch.manual_seed(seed)
    actor = make_policy(3, 4 if bounds else 2, a.hidden)
    critics = make_critics(a.num_critics, a.hidden)
    target_actor = copied(actor)
    target_critics = copied(critics)
    actor_adam = Adam(actor, a.learning_rate)
    critic_adam = Adam(critics, a.learning_rate)

    def act(weights, obs):
        out = policy(weights, obs)
        if bounds is None:
            return out
        low, high = bounds
        std = (low + (high - low) * (out[:, 2:] + 1) / 2).exp()
        return (out[:, :2] + std * torch.randn(len(obs), 2)).clamp(-1, 1)

    def near(action, std):
        noise = (std * torch.randn(len(action), 2)).clamp(-a.noise_clip, a.noise_clip)
        return (action + noise).clamp(-1, 1)

    for step in range(1, a.gradient_steps + 1):
        beta_ood = max(a.beta_ood * a.beta_ood_decay**step, a.beta_ood_min)
        index = torch.randint(len(arrays["rewards"]), (a.batch_size,)).numpy()
        s = torch.from_numpy(arrays["observations"][index])
        b = torch.from_numpy(arrays["actions"][index])
        r = torch.from_numpy(arrays["rewards"][index])
        s2 = torch.from_numpy(arrays["next_observations"][index])
        not_done = torch.from_numpy(1.0 - arrays["terminals"][index]).float()
        with torch.no_grad():
            q2 = values(target_critics, s2, near(act(target_actor, s2), a.policy_noise))
            y = r + a.gamma * not_done * (q2 - a.beta_in * q2.std(dim=0))
            states = torch.cat([s, s2])
            centre = act(actor, states)
            ood_actions = [near(centre, a.ood_noise) for _ in range(a.num_ood)]
        q = values(critics, s, b)
        ood_q = torch.cat([values(critics, states, ood) for ood in ood_actions], dim=1)
        u = ood_q.std(dim=0).detach()
        ood_y = (ood_q.detach() - beta_ood * u).clamp(min=0)
        in_loss = sum(((q[k] - y[k]) ** 2).mean() for k in range(a.num_critics))
        ood_loss = sum(((ood_q[k] - ood_y[k]) ** 2).mean() for k in range(a.num_critics))
        critic_adam.minimise(in_loss + ood_loss)
        if step % a.policy_frequency == 0:
            action = act(actor, s)
            lowest = values(critics, s, action).min(dim=0).values
            loss = -lowest.mean()
            if a.bc_coef:
                cloning = ((action - b) ** 2).sum(dim=1).mean()
                loss = loss / lowest.abs().mean().item() + a.bc_coef * cloning
            actor_adam.minimise(loss)
        follow(target_critics, critics, a.tau)
        follow(target_actor, actor, a.actor_tau)
    networks = {
        "actor": actor,
        "critics": critics,
        "target_actor": target_actor,
        "target_critics": target_critics,
    }
    metrics = {
        "loss/in_distribution": in_loss.item(),
        "loss/ood": ood_loss.item(),
        "value/q_data": q.mean().item(),
        "value/q_ood": ood_q.mean().item(),
        "uncertainty/data": q.std(dim=0).mean().item(),
        "uncertainty/ood": u.mean().item(),
        "beta_ood": beta_ood,
    }
    return networks, metrics


def run_pbrl(world, folder, task, arrays, settings, *options) -> dict:
    """mop_pbrl_teacher.py on a dataset -> its checkpoint."""
    path = write_dataset(folder / "data.npz", task, arrays)
    files = ["--data", path, "--output", folder / "out.pt", "--run-dir", folder / "run"]
    world(pbrl, "--task", task, *flags(settings), *files, *options)
    return load(folder / "out.pt")


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "gaussian-tanh", "cloning"])
def test_pbrl_equals_a_plain_loop(world, tmp_path, kind):
    task = TASKS[0]
    bounds = LOG_STD.get(kind)
    settings = RUN | PBRL | SMALL | {"seed": 3, "eval_every": 5}
    settings["bc_coef"] = 0.7 if kind == "cloning" else 0.0
    options = ["--actor", kind] if bounds else []
    checkpoint = run_pbrl(world, tmp_path, task, made_up(50), settings, *options)
    seed = seed_of(f"3 teacher {task} from {task}")
    networks, metrics = plain_pbrl(made_up(50), seed, SimpleNamespace(**settings), bounds)
    resume_point = load(tmp_path / "run/resume.pt")
    for name, weights in networks.items():
        assert_close(resume_point[name], weights)
    assert torch.equal(resume_point["random_states"][0], torch.get_rng_state())
    assert_close(checkpoint["actor"], networks["actor"])
    assert_close(checkpoint["critics"], networks["critics"])
    by_step = losses_by_step(tmp_path / "run")
    assert list(by_step) == [5, 8]
    assert by_step[8] == pytest.approx(metrics, abs=2e-5)
    expected = plain_returns(networks["actor"], task)
    assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


# -------------------------------------------------------------------------------- distillation
def coded(obs, code):
    return torch.cat([obs, torch.tensor([code] * len(obs))], dim=1)


def plain_student(states, labels, codes, seed, a, loss):
    """a.gradient_steps updates -> weights, last loss per task.

    loss(student, i, obs, label): of every row of a batch of task i.
    """
    torch.manual_seed(seed_of(f"{seed} student"))
    student = make_policy(3 + len(codes[0]), labels[0].shape[1], a.hidden)
    adam = Adam(student, a.learning_rate)
    for _ in range(a.gradient_steps):
        losses = []
        for i, label in enumerate(labels):
            index = torch.randint(len(states[i]), (a.batch_size,))
            losses.append(loss(student, i, states[i][index], label[index]).mean())
        adam.minimise(sum(losses) / len(losses))
    return student, [value.item() for value in losses]


def squared_error(student, x, label):
    return ((policy(student, x) - label) ** 2).sum(dim=1)


def normal(out):
    return torch.distributions.Normal(out[:, :2], (-5 + 2.5 * (out[:, 2:] + 1)).exp())


def plain_ranking(name, x, y):
    """The ranking loss of every row, as the thesis writes it."""
    n = x.shape[1]
    losses = []
    for row_x, row_y in zip(x, y, strict=True):
        total = 0.0
        if name == "ndcg":
            order = row_x.argsort(descending=True, stable=True)
            best = row_y.sort(descending=True).values
            ideal = 0.0
            for rank in range(n):
                total = total - row_y[order[rank]] / np.log2(rank + 2)
                ideal = ideal + best[rank] / np.log2(rank + 2)
            total = total / ideal
        elif name == "listwise":
            p = row_x.exp() / row_x.exp().sum()
            q = row_y.exp() / row_y.exp().sum()
            total = -(q * p.log()).sum()
        else:
            for j in range(n):
                product = (row_x[j] - row_x) * (row_y[j] - row_y)
                total = total + torch.log(1 + torch.exp(-product)).sum()
        losses.append(total)
    return torch.stack(losses)


CASES = {
    "mse": [],
    "q": ["--loss", "q"],
    "kl": ["--loss", "kl"],
    "ndcg": ["--regularizer", "ndcg"],
    "pairwise": ["--regularizer", "pairwise"],
    "listwise": ["--regularizer", "listwise", "--task-encoding", "onehot"],
}


@pytest.mark.parametrize("case", CASES)
def test_distillation_equals_a_plain_loop(world, tmp_path, case):
    tasks = TASKS
    codes = [(0.0,), (1.0,)]
    if case == "listwise":
        tasks = ("toy-up", "toy-down", "toy-out")
        codes = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    data = []
    paths = []
    teachers = []
    states = []
    labels = []
    for i, task in enumerate(tasks):
        arrays = made_up(40 + 30 * i, seed=i)
        data.append(write_dataset(tmp_path / f"{i}.npz", task, arrays))
        log_std = (-5.0, 0.0) if case == "kl" else None
        paths.append(write_teacher(tmp_path / f"{i}.pt", task, "teacher", 3, 2, 8, i, log_std))
        teachers.append(load(paths[i]))
        states.append(torch.from_numpy(arrays["observations"]))
        labels.append(policy(teachers[i]["actor"], states[i]))
    settings = RUN | SMALL | {"seed": 4, "reg_lambda": 0.3, "eval_every": 5}
    files = ["--tasks", *tasks, "--data", *data, "--teachers", *paths]
    world(distill, *files, *CASES[case], *flags(settings))

    def loss(student, i, obs, label):
        x = coded(obs, codes[i])
        if case == "q":
            return -values(teachers[i]["critics"], obs, policy(student, x)).min(dim=0).values
        if case == "kl":
            student_normal = normal(policy(student, x))
            return torch.distributions.kl_divergence(student_normal, normal(label)).sum(dim=1)
        total = squared_error(student, x, label)
        for j in range(len(tasks)):
            if case != "mse" and j != i:
                own = layers_of(student, x)
                other = layers_of(student, coded(obs, codes[j]))
                ranking = plain_ranking(case, own[0], other[0])
                ranking = ranking + plain_ranking(case, own[1], other[1])
                total = total + 0.3 * ranking / (len(tasks) - 1)
        return total

    a = SimpleNamespace(**settings)
    student, losses = plain_student(states, labels, codes, 4, a, loss)
    resume_point = load(tmp_path / "run/resume.pt")
    checkpoint = load(tmp_path / "run/student.pt")
    assert_close(resume_point["student"], student)
    assert_close(checkpoint["actor"], student)
    assert torch.equal(resume_point["random_states"][0], torch.get_rng_state())
    by_step = losses_by_step(tmp_path / "run")
    assert list(by_step) == [5, 8]
    assert by_step[8]["loss/total"] == pytest.approx(np.mean(losses), abs=2e-5)
    for i, task in enumerate(tasks):
        logged = 0.0
        for name, value in by_step[8].items():
            if name.startswith((f"loss/mse/{task}", f"loss/q/{task}", f"loss/kl/{task}")):
                logged += value
            elif f"/{task}/" in name:
                logged += 0.3 * value / (len(tasks) - 1)
        assert logged == pytest.approx(losses[i], abs=2e-5)
        expected = plain_returns(student, task, codes[i])
        assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------ data sharing and Q-switch
def write_data(folder, tasks=TASKS) -> dict:
    """A dataset per task, each of another size -> {task: arrays}."""
    datasets = {}
    for task in tasks:
        i = list(SLOPES).index(task)
        datasets[task] = made_up(50 + 30 * i, seed=i)
        datasets[task]["rewards"] = rewards_of(task, datasets[task])
        write_dataset(folder / f"data/{task}-medium.npz", task, datasets[task])
    return datasets


def union(datasets, task, sources) -> dict:
    """The data of the sources with the rewards of a task."""
    parts = []
    for source in sources:
        parts.append(datasets[source] | {"rewards": rewards_of(task, datasets[source])})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def run_extension(world, module, settings, *options, tasks=TASKS) -> dict:
    """A run that trains all teachers -> {(task, sources of its data): checkpoint}."""
    if module is oqs:
        options = [*options, "--teachers", *["train"] * len(tasks)]
    world(module, "--tasks", *tasks, *flags(settings), *options)
    teachers = {}
    for task in tasks:
        if module is ds:
            teachers[task, tasks] = load(f"checkpoints/{task}-medium-ds-teacher.pt")
        else:
            for source in tasks:
                path = f"checkpoints/{task}-from-{source}-medium-teacher.pt"
                teachers[task, (source,)] = load(path)
    return teachers


def best_action(teachers, state):
    """The action of the teacher that values its own action most, state by state."""
    actions = [policy(teacher["actor"], state[None]) for teacher in teachers]
    lowest = []
    for teacher, action in zip(teachers, actions, strict=True):
        lowest.append(values(teacher["critics"], state[None], action).min().item())
    return actions[lowest.index(max(lowest))][0]


@pytest.mark.parametrize("module", [ds, oqs])
def test_teachers_and_student_equal_plain_loops(world, tmp_path, module):
    datasets = write_data(tmp_path)
    settings = RUN | PBRL | TEACHERS | SMALL | {"seed": 6, "eval_every": 5, "bc_coef": 0.7}
    teachers = run_extension(world, module, settings)
    random_state = torch.get_rng_state()
    a = SimpleNamespace(**settings)
    by_step = losses_by_step(tmp_path / "run")
    assert list(by_step) == [5, 8]
    for (task, sources), teacher in teachers.items():
        seed = seed_of(f"6 teacher {task} from {'+'.join(sorted(sources))}")
        networks, metrics = plain_pbrl(union(datasets, task, sources), seed, a)
        assert_close(teacher["actor"], networks["actor"])
        assert_close(teacher["critics"], networks["critics"])
        assert teacher["step"] == 8 and teacher["data_tasks"] == list(sources)
        label = "teacher" if module is ds else f"from {sources[0]}"
        for name, value in metrics.items():
            assert by_step[8][f"{task} {label}/{name}"] == pytest.approx(value, abs=2e-5), name
        expected = plain_returns(teacher["actor"], task)
        assert teacher["returns"][task] == pytest.approx(expected, abs=1e-4)

    states = torch.cat([torch.from_numpy(data["observations"]) for data in datasets.values()])
    labels = []
    for task in TASKS:
        candidates = [teacher for key, teacher in teachers.items() if key[0] == task]
        labels.append(torch.stack([best_action(candidates, state) for state in states]))
    codes = [(0.0,), (1.0,)]

    def loss(student, i, obs, label):
        return squared_error(student, coded(obs, codes[i]), label)

    student, losses = plain_student([states, states], labels, codes, 6, a, loss)
    assert torch.equal(random_state, torch.get_rng_state())
    checkpoint = load("run/student.pt")
    assert_close(checkpoint["actor"], student)
    assert by_step[8]["loss/total"] == pytest.approx(np.mean(losses), abs=2e-5)
    for i, task in enumerate(TASKS):
        assert by_step[8][f"loss/mse/{task}"] == pytest.approx(losses[i], abs=2e-5)
        expected = plain_returns(student, task, codes[i])
        assert checkpoint["returns"][task] == pytest.approx(expected, abs=1e-4)


def test_relabelled_rewards_are_read_by_the_other_script(world, tmp_path, monkeypatch):
    """What mop_ds.py has computed mop_oqs.py does not compute again."""
    write_data(tmp_path)
    settings = RUN | START | START_TEACHERS
    run_extension(world, ds, settings)
    assert len(list((tmp_path / "data").glob("*.npy"))) == 2
    asked = []
    compute = oqs.compute_rewards

    def record(task, physics, actions):
        asked.append(task)
        return compute(task, physics, actions)

    monkeypatch.setattr(oqs, "compute_rewards", record)
    run_extension(world, oqs, settings | {"run_dir": "other"})
    assert asked == list(TASKS)  # each for its own rows, to see that its physics states fit


# ------------------------------------------------------------------------------------- streams


def distinct(a, b):
    """No random weight of a is found in b."""
    return not any(np.isin(a[name], b[name]).any() for name in a)


def start_of(world, folder, task, *options):
    """A teacher's weights and random state after one update that moves nothing."""
    checkpoint = run_pbrl(world, folder, task, made_up(50), RUN | START, *options)
    random_state = load(folder / "run/resume.pt")["random_states"][0]
    return checkpoint["actor"], checkpoint["critics"], random_state


def test_every_teacher_has_its_own_stream(world, tmp_path):
    up = start_of(world, tmp_path / "up", "toy-up")
    down = start_of(world, tmp_path / "down", "toy-down")
    other_seed = start_of(world, tmp_path / "seed", "toy-up", "--seed", 2)
    for other in (down, other_seed):
        assert distinct(up[0], other[0]) and distinct(up[1], other[1])
        assert not torch.equal(up[2], other[2])
    again = start_of(world, tmp_path / "again", "toy-up", "--seed", 1)
    assert_equal(again[0], up[0])


def test_a_common_seed(world, tmp_path):
    up = start_of(world, tmp_path / "up", "toy-up", "--common-seed")
    down = start_of(world, tmp_path / "down", "toy-down", "--common-seed")
    assert_equal(up[0], down[0])
    assert_equal(up[1], down[1])
    assert torch.equal(up[2], down[2])


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("module", [ds, oqs])
def test_streams_of_several_teachers(world, tmp_path, module, common):
    write_data(tmp_path)
    options = ["--common-seed"] if common else []
    teachers = run_extension(world, module, RUN | START | START_TEACHERS, *options)
    actors = [teacher["actor"] for teacher in teachers.values()]
    student = load("run/student.pt")["actor"]
    del student["net.0.weight"]  # has another shape
    for k, actor in enumerate(actors):
        assert distinct(student, actor)
        for other in actors[:k]:
            if common:
                assert_equal(actor, other)
            else:
                assert distinct(actor, other)


def test_order_and_number_of_tasks_do_not_matter(world, tmp_path, monkeypatch):
    """A teacher depends on its task and data only; teacher ii is mop_pbrl_teacher.py's."""
    settings = RUN | PBRL | TEACHERS | START | {"teacher_steps": 3}
    found = {}
    for tasks in (TASKS, TASKS[::-1], tuple(SLOPES)):
        folder = tmp_path / "+".join(tasks)
        datasets = write_data(folder, tasks)
        monkeypatch.chdir(folder)
        found[tasks] = run_extension(world, oqs, settings, tasks=tasks)
        assert len(found[tasks]) == len(tasks) ** 2
        for key, teacher in found[TASKS].items():
            assert_equal(found[tasks][key]["actor"], teacher["actor"])
            assert_equal(found[tasks][key]["critics"], teacher["critics"])
    for task in TASKS:
        alone = RUN | PBRL | SMALL | {"gradient_steps": 3}
        checkpoint = run_pbrl(world, tmp_path / task, task, datasets[task], alone)
        assert_equal(checkpoint["actor"], found[TASKS][task, (task,)]["actor"])
