"""examples/convert.py and docs/datasets.md, on files in the layouts that the projects write.

What d3rlpy and Minari write themselves is tested where they are installed
(tests/requirements-bridges.txt).
"""

import importlib.util
import json
import re
import shlex
import sys
from itertools import pairwise

import numpy as np
import pytest
from dm_control import suite

import mop_distill
import mop_ds
import mop_pbrl_teacher
from conftest import ROOT, make_arrays, write_dataset

PAGE = (ROOT / "docs/datasets.md").read_text()
TINY = ["--hidden", 8, "--batch-size", 16, "--eval-episodes", 1, "--final-eval-episodes", 1]
TINY += ["--gradient-steps", 10, "--eval-every", 10]


def load_example():
    spec = importlib.util.spec_from_file_location("convert", ROOT / "examples/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = load_example()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(words): convert.py with this command line in tmp_path -> its output or error text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        capsys.readouterr()
        try:
            convert.main()
        except SystemExit as end:
            text = str(end.code) + capsys.readouterr().err
            return text.removeprefix("convert.py: error: ")
        return capsys.readouterr().out

    return run


def page_command(name: str) -> list[str]:
    """The words after `convert.py` in the page's line for a format."""
    [line] = re.findall(rf"^python examples/convert\.py ({name} .*)$", PAGE, re.MULTILINE)
    return shlex.split(line)


def load(path, task="walker-walk") -> dict:
    """A converted file, through the check that every script makes, and its metadata."""
    arrays = mop_ds.load_dataset(path, task, "medium", 24, 6)
    with np.load(path) as file:
        metadata = json.loads(str(file["metadata"]))
    return arrays | {"metadata": metadata}


def assert_equal_arrays(found: dict, expected: dict):
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def walker_episode(task: str, num_steps: int, seed: int) -> dict:
    """Steps of dm_control itself with random actions; T + 1 rows, the first one is the reset."""
    env = suite.load("walker", task, {"random": seed}, {"flat_observation": True})
    rng = np.random.default_rng(seed)
    time_step = env.reset()
    episode = {
        "observation": [time_step.observation["observations"]],
        "action": [np.zeros(6)],
        "reward": [[0.0]],
        "discount": [[1.0]],
        "physics": [env.physics.get_state()],
    }
    for _ in range(num_steps):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        time_step = env.step(action)
        episode["observation"].append(time_step.observation["observations"])
        episode["action"].append(action)
        episode["reward"].append([time_step.reward])
        episode["discount"].append([time_step.discount])
        episode["physics"].append(env.physics.get_state())
    types = dict.fromkeys(episode, np.float32) | {"physics": np.float64}
    return {key: np.array(rows, types[key]) for key, rows in episode.items()}


def write_exorl(folder, episodes, without=()):
    """As ExORL's storage does: episode_<number>_<steps>.npz, compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, episode in enumerate(episodes):
        num_steps = len(episode["action"]) - 1
        kept = {key: array for key, array in episode.items() if key not in without}
        np.savez_compressed(folder / f"episode_{i:06d}_{num_steps}.npz", **kept)


def tiny_episode(num_steps=2) -> dict:
    """An episode that costs nothing to make, in ExORL's layout."""
    return {
        "observation": np.zeros((num_steps + 1, 24), np.float32),
        "action": np.zeros((num_steps + 1, 6), np.float32),
        "reward": np.full((num_steps + 1, 1), 0.5, np.float32),
        "discount": np.ones((num_steps + 1, 1), np.float32),
        "physics": np.zeros((num_steps + 1, 18)),
    }


# ------------------------------------------------------------------------------------------ ExORL
def test_exorl(run, run_main, tmp_path):
    """Rewards are those of --task, whatever task the episodes were collected for."""
    collected = [walker_episode("stand", num_steps, num_steps) for num_steps in (30, 1, 40)]
    write_exorl(tmp_path / "datasets/walker/proto/buffer", collected)
    assert "wrote data/walk-exorl.npz: 71 transitions, 3 episodes" in run(*page_command("exorl"))
    found = load(tmp_path / "data/walk-exorl.npz")
    row = 0
    for episode in collected:
        for t in range(1, len(episode["action"])):
            np.testing.assert_array_equal(found["observations"][row], episode["observation"][t - 1])
            np.testing.assert_array_equal(
                found["next_observations"][row], episode["observation"][t]
            )
            np.testing.assert_array_equal(found["actions"][row], episode["action"][t])
            np.testing.assert_array_equal(found["physics"][row], episode["physics"][t])
            assert found["timeouts"][row] == (t == len(episode["action"]) - 1)
            row += 1
    assert row == 71
    assert not found["terminals"].any()
    walks = [walker_episode("walk", num_steps, num_steps) for num_steps in (30, 1, 40)]
    rewards = np.concatenate([walk["reward"][1:, 0] for walk in walks])
    np.testing.assert_allclose(found["rewards"], rewards, rtol=1e-5, atol=1e-6)
    assert np.abs(rewards - np.concatenate([e["reward"][1:, 0] for e in collected])).max() > 0.1
    returns = [walk["reward"][1:].sum() for walk in walks]
    np.testing.assert_allclose(found["metadata"]["episode_returns"], returns, rtol=1e-5)

    options = ["--task", "walker-walk", "--data", "data/walk-exorl.npz"]
    assert "wrote" in run_main(mop_pbrl_teacher, *TINY, *options)


def test_exorl_closes_each_file(run, tmp_path):
    """More files than a process may have open (ulimit -n 256)."""
    resource = pytest.importorskip("resource")
    write_exorl(tmp_path / "many", [tiny_episode()] * 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        text = run("exorl", "--data", "many", "--task", "walker-walk", "--output", "out.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "600 transitions, 300 episodes" in text
    assert len(load("out.npz")["rewards"]) == 600


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "text": lambda path: path.write_text("<html>404</html>"),
    "pickle": lambda path: np.savez(path, observation=np.array([None])),
    "no action": lambda path: np.savez(path, **{**tiny_episode(), "action": 0}),
    "lengths": lambda path: np.savez(path, **{**tiny_episode(3), "action": np.zeros((3, 6))}),
    "sizes": lambda path: np.savez(path, **{**tiny_episode(), "observation": np.zeros((3, 17))}),
    "physics": lambda path: np.savez(path, **{**tiny_episode(), "physics": np.zeros((3, 4))}),
    "NaN": lambda path: np.savez(path, **{**tiny_episode(), "reward": np.full((3, 1), np.nan)}),
    "actions": lambda path: np.savez(path, **{**tiny_episode(), "action": np.full((3, 6), 1.5)}),
    "no steps": lambda path: np.savez(path, **tiny_episode(0)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_episode_is_named(run, tmp_path, damage):
    write_exorl(tmp_path / "many", [tiny_episode()] * 12)
    DAMAGES[damage](tmp_path / "many/episode_000007_2.npz")
    text = run("exorl", "--data", "many", "--task", "walker-walk", "--output", "out.npz")
    assert text.startswith("many/episode_000007_2.npz: ")
    assert not (tmp_path / "out.npz").exists()


def test_a_changed_byte_is_noticed(tmp_path):
    """Every third byte of a file in turn: refused, a key that is missing, or without effect.

    Without effect is a date in a zip header, for example. A missing key is named later.
    """
    path = tmp_path / "episode_000007_2.npz"
    np.savez_compressed(path, **walker_episode("walk", 2, 1))
    content = path.read_bytes()
    expected = convert.read_npz(path)
    refused = 0
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            found = convert.read_npz(path)
        except SystemExit as end:
            assert f"{path}: cannot be read" in str(end.code)
            refused += 1
            continue
        kept = {key: array for key, array in expected.items() if key in found}
        assert len(found) == len(kept), position
        assert_equal_arrays(found, kept)
    assert refused > len(content) / 6


def test_urlb_has_no_physics(run, run_main, tmp_path):
    """Named; with the stored rewards teachers learn from it, and nothing relabels it."""
    episodes = [walker_episode("walk", 20, 1), walker_episode("walk", 20, 2)]
    write_exorl(tmp_path / "urlb", episodes, without=["physics"])
    command = ["exorl", "--data", "urlb", "--task", "walker-walk", "--output", "out.npz"]
    text = run(*command)
    assert text.startswith("urlb/episode_000000_20.npz: no physics")
    assert "--rewards stored" in text
    assert "wrote" in run(*command, "--rewards", "stored")
    found = load("out.npz")
    rewards = np.concatenate([episode["reward"][1:, 0] for episode in episodes])
    np.testing.assert_array_equal(found["rewards"], rewards)
    np.testing.assert_array_equal(found["physics"], np.zeros((40, 1)))
    options = ["--data", "out.npz"]
    assert "wrote" in run_main(mop_pbrl_teacher, *TINY, *options, "--task", "walker-walk")
    assert "wrote" in run_main(mop_distill, *TINY, *options, "--tasks", "walker-walk")
    options += ["--task", "walker-stand", "--sources", "walker-walk"]
    assert "out.npz: expected physics states" in run_main(mop_ds, *TINY, *options)[1]


def test_a_goal_that_is_not_in_the_physics(run, tmp_path):
    """Reacher draws its target at each reset: no rewards from physics, the file's own are kept."""
    rng = np.random.default_rng(0)
    episode = {
        "observation": np.zeros((201, 6), np.float32),
        "action": np.zeros((201, 2), np.float32),
        "reward": rng.integers(0, 2, (201, 1)).astype(np.float32),
        "discount": np.ones((201, 1), np.float32),
        "physics": rng.uniform(-3, 3, (201, 4)),
    }
    write_exorl(tmp_path / "reacher", [episode])
    command = ["exorl", "--data", "reacher", "--task", "reacher-easy", "--output", "out.npz"]
    assert run(*command).startswith("task reacher-easy: ")
    assert not (tmp_path / "out.npz").exists()
    assert "wrote" in run(*command, "--rewards", "stored")
    found = mop_ds.load_dataset("out.npz", "reacher-easy", "medium", 6, 2)
    np.testing.assert_array_equal(found["rewards"], episode["reward"][1:, 0])


def test_physics_in_some_files_only(run, tmp_path):
    write_exorl(tmp_path / "many", [tiny_episode()] * 12)
    without = {key: array for key, array in tiny_episode().items() if key != "physics"}
    np.savez(tmp_path / "many/episode_000007_2.npz", **without)
    command = ["exorl", "--data", "many", "--task", "walker-walk", "--output", "out.npz"]
    for options in ([], ["--rewards", "stored"]):
        assert run(*command, *options).startswith("many/episode_000007_2.npz: ")


def test_discount_zero_is_a_terminal(run, tmp_path):
    episodes = [tiny_episode(3), tiny_episode(4)]
    episodes[0]["discount"][-1] = 0
    write_exorl(tmp_path / "ends", episodes)
    run("exorl", "--data", "ends", "--task", "walker-walk", "--output", "out.npz")
    found = load("out.npz")
    assert found["terminals"].tolist() == [False, False, True, False, False, False, False]
    assert found["timeouts"].tolist() == [False, False, False, False, False, False, True]


# ------------------------------------------------------------------------------------------- D4RL
def d4rl_arrays(num_rows: int) -> dict:
    """Rows that are all distinct, without next observations and physics."""
    arrays = make_arrays(num_rows)
    return {key: arrays[key] for key in ("observations", "actions", "rewards")}


def write_hdf5(path, arrays: dict):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file["infos/qpos"] = np.zeros((3, 9))  # a group, as in D4RL's files
        file["metadata/algorithm"] = "SAC"


def rows_that_stay(terminals, timeouts) -> list[tuple]:
    """Plain loop: (row, row of its next state, terminal, timeout); a terminal's is its own."""
    episodes = [[]]
    for row in range(len(terminals)):
        episodes[-1].append(row)
        if terminals[row] or timeouts[row]:
            episodes.append([])
    rows = []
    for episode in episodes:
        if episode and terminals[episode[-1]]:
            rows += [(row, next_row, False, False) for row, next_row in pairwise(episode)]
            rows.append((episode[-1], episode[-1], True, False))
        else:
            kept = list(pairwise(episode))
            rows += [(row, next_row, False, row == kept[-1][0]) for row, next_row in kept]
    return rows


def assert_rows(found: dict, arrays: dict, rows: list):
    index = [row[0] for row in rows]
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(found[key], arrays[key].astype(np.float32)[index])
    next_index = [row[1] for row in rows]
    np.testing.assert_array_equal(found["next_observations"], arrays["observations"][next_index])
    assert found["terminals"].tolist() == [row[2] for row in rows]
    assert found["timeouts"].tolist() == [row[3] for row in rows]


@pytest.mark.parametrize("with_timeouts", [True, False])
@pytest.mark.parametrize("shape", [(300,), (300, 1)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32"])
def test_d4rl_flags(run, tmp_path, dtype, shape, with_timeouts):
    """An integer array as an index would give 300 rows, two of them distinct."""
    arrays = d4rl_arrays(300)
    terminals = np.zeros(300, bool)
    timeouts = np.arange(1, 301) % 100 == 0
    file = {
        key: array.reshape(shape) if array.ndim == 1 else array for key, array in arrays.items()
    }
    file["terminals"] = terminals.reshape(shape).astype(dtype)
    command = page_command("d4rl")
    if with_timeouts:
        file["timeouts"] = timeouts.reshape(shape).astype(dtype)
    else:
        command += ["--episode-length", "100"]
    write_hdf5(tmp_path / "walker.hdf5", file)
    assert "297 transitions, 3 episodes" in run(*command)
    found = load("data/walk-d4rl.npz")
    assert len(np.unique(found["observations"], axis=0)) == 297
    assert_rows(found, arrays, rows_that_stay(terminals, timeouts))


def test_d4rl_keeps_terminal_rows(run, tmp_path):
    """The file's last row too. Episodes: 500 steps, 1000 by time, 500 by time (counted), 1000."""
    arrays = d4rl_arrays(3000)
    terminals = np.isin(np.arange(3000), [499, 1499, 2999])
    command = ["d4rl", "--data", "d4rl.hdf5", "--task", "walker-walk", "--output"]
    write_hdf5(tmp_path / "d4rl.hdf5", {**arrays, "terminals": terminals})
    run(*command, "a.npz", "--episode-length", "1000")
    timeouts = np.arange(3000) == 2499  # 1499 is the 1000th step of its episode, and a terminal
    found = load("a.npz")
    assert found["terminals"].sum() == 3
    assert found["terminals"][-1]
    assert_rows(found, arrays, rows_that_stay(terminals, timeouts))
    no_timeouts = {**arrays, "terminals": terminals, "timeouts": np.zeros(3000, bool)}
    write_hdf5(tmp_path / "d4rl.hdf5", no_timeouts)
    run(*command, "b.npz")
    found = load("b.npz")
    assert len(found["rewards"]) == 3000
    assert found["terminals"].sum() == 3
    assert not found["timeouts"].any()


@pytest.mark.parametrize("seed", range(5))
def test_d4rl_any_ends(run, tmp_path, seed):
    """Episodes of one step, ends of both kinds side by side, a last episode that is cut."""
    rng = np.random.default_rng(seed)
    arrays = d4rl_arrays(60)
    terminals = rng.random(60) < 0.3
    timeouts = (rng.random(60) < 0.3) & ~terminals
    flags = {"terminals": terminals, "timeouts": timeouts}
    write_hdf5(tmp_path / "walker.hdf5", {**arrays, **flags})
    run(*page_command("d4rl"))
    assert_rows(load("data/walk-d4rl.npz"), arrays, rows_that_stay(terminals, timeouts))


def test_d4rl_with_next_observations_keeps_every_row(run, tmp_path):
    arrays = make_arrays(300)
    del arrays["physics"]
    arrays["terminals"][149] = True
    write_hdf5(tmp_path / "walker.hdf5", arrays)
    run(*page_command("d4rl"))
    found = load("data/walk-d4rl.npz")
    assert_equal_arrays(found, arrays)
    assert len(found["metadata"]["episode_returns"]) == 4


def test_d4rl_refused(run, tmp_path):
    """Each with the file's name and what is wrong; nothing is written."""
    good = {**d4rl_arrays(30), "terminals": np.zeros(30), "timeouts": np.zeros(30)}
    halves = {"terminals": np.full(30, 0.5)}
    two = {"timeouts": np.zeros((30, 2))}
    other = {"observations": np.zeros((30, 17))}
    short = {"timeouts": np.zeros(29)}
    cases = [
        (halves, "0 or 1"),
        (two, "(N,) or (N, 1)"),
        (other, "expected (30, 24)"),
        (short, "timeouts: expected (30,)"),
    ]
    for changed, message in cases:
        write_hdf5(tmp_path / "walker.hdf5", {**good, **changed})
        text = run(*page_command("d4rl"))
        assert text.startswith("walker.hdf5: "), message
        assert message in text
    for missing, message in (("timeouts", "--episode-length"), ("terminals", "no terminals")):
        kept = {key: array for key, array in good.items() if key != missing}
        write_hdf5(tmp_path / "walker.hdf5", kept)
        text = run(*page_command("d4rl"))
        assert text.startswith("walker.hdf5: "), message
        assert message in text
    (tmp_path / "walker.hdf5").write_bytes((tmp_path / "walker.hdf5").read_bytes()[:3000])
    assert run(*page_command("d4rl")).startswith("walker.hdf5: cannot be read")
    assert not (tmp_path / "data").exists()


def test_output(run, tmp_path):
    """An output that exists is kept; a name without .npz would not be found again."""
    write_hdf5(tmp_path / "walker.hdf5", {**make_arrays(30)})
    command = page_command("d4rl")
    assert "wrote" in run(*command)
    before = (tmp_path / "data/walk-d4rl.npz").read_bytes()
    assert "data/walk-d4rl.npz: exists" in run(*command)
    assert (tmp_path / "data/walk-d4rl.npz").read_bytes() == before
    command[command.index("--output") + 1] = "data/walk"
    assert "ends in .npz" in run(*command)
    command[command.index("--task") + 1 :] = ["walker-fly", "--output", "data/fly.npz"]
    assert "walker-fly: not one of the dm_control suite" in run(*command)


# ----------------------------------------------------------------------------------------- d3rlpy
def d3rlpy_episodes() -> list[dict]:
    """One that terminates, one by time."""
    episodes = []
    for seed, terminated in enumerate([True, False]):
        arrays = make_arrays(20 + seed, seed=seed)
        episode = {
            "observations": arrays["observations"],
            "actions": arrays["actions"],
            "rewards": arrays["rewards"][:, None],
            "terminated": terminated,
        }
        episodes.append(episode)
    return episodes


def check_d3rlpy(found, episodes):
    arrays = {}
    for key in ("observations", "actions", "rewards"):
        arrays[key] = np.concatenate([episode[key] for episode in episodes])
    arrays["rewards"] = arrays["rewards"][:, 0]
    rows = rows_that_stay(np.arange(41) == 19, np.arange(41) == 40)
    assert len(rows) == 40
    assert_rows(found, arrays, rows)


def test_d3rlpy(run, tmp_path):
    episodes = d3rlpy_episodes()
    file = {"columns": list(episodes[0]), "num_episodes": 2, "version": "2.1"}
    for i, episode in enumerate(episodes):
        for key, array in episode.items():
            file[f"{key}_{i}"] = array
    write_hdf5(tmp_path / "walker.h5", file)
    assert "40 transitions, 2 episodes" in run(*page_command("d3rlpy"))
    check_d3rlpy(load("data/walk-d3rlpy.npz"), episodes)
    command = page_command("d3rlpy")
    command[-1] = "data/again.npz"
    file["observations_1"] = file["observations_1"][:-1]
    write_hdf5(tmp_path / "walker.h5", file)
    assert run(*command).startswith("walker.h5, episode 1: observations")
    del file["rewards_1"]
    write_hdf5(tmp_path / "walker.h5", file)
    assert run(*command).startswith("walker.h5: no rewards_1")
    write_hdf5(tmp_path / "walker.h5", {"observations": np.zeros((9, 24))})  # as version 1 writes
    assert run(*command).startswith("walker.h5: no num_episodes")


def test_d3rlpy_as_it_writes_itself(run, tmp_path):
    d3rlpy = pytest.importorskip("d3rlpy")
    episodes = d3rlpy_episodes()
    parts = {}
    for key in ("observations", "actions", "rewards"):
        parts[key] = np.concatenate([episode[key] for episode in episodes])
    dataset = d3rlpy.dataset.MDPDataset(
        **parts, terminals=np.arange(41) == 19, timeouts=np.arange(41) == 40
    )
    with open(tmp_path / "walker.h5", "w+b") as file:
        dataset.dump(file)
    run(*page_command("d3rlpy"))
    check_d3rlpy(load("data/walk-d3rlpy.npz"), episodes)


def test_to_d3rlpy(tmp_path, monkeypatch):
    """The page's code, on the bundled dataset."""
    pytest.importorskip("d3rlpy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "docs/datasets.md", "exec"), names)
    dataset = names["dataset"]
    ours = dict(np.load(ROOT / "pretrained/walker-walk-medium.npz"))
    assert len(dataset.episodes) == ours["timeouts"].sum()
    assert dataset.transition_count == len(dataset.episodes) * 999
    for key in ("observations", "actions", "rewards"):
        found = np.concatenate([getattr(episode, key) for episode in dataset.episodes])
        np.testing.assert_array_equal(found.reshape(ours[key].shape), ours[key])
    assert not any(episode.terminated for episode in dataset.episodes)
    step = dataset.transition_picker(dataset.episodes[3], 500)
    np.testing.assert_array_equal(step.next_observation, ours["next_observations"][3500])
    assert names["algorithm"].grad_step == 50
    actions = names["algorithm"].predict(ours["observations"][:9])
    assert np.abs(actions).max() <= 1  # not so of NaN


# ----------------------------------------------------------------------------------------- Minari
DOMAINS = ["walker-stand", "hopper-hop", "cheetah-run", "fish-swim", "finger-spin"]
DOMAINS += ["humanoid-walk", "cartpole-balance", "manipulator-bring_ball"]


@pytest.mark.parametrize("task", DOMAINS)
def test_dict_observations_in_the_order_of_dm_control(task):
    """Against dm_control's own flat observations; the dict comes in the alphabet's order."""
    domain, name = task.split("-")
    flat_env = suite.load(domain, name, {"random": 1}, {"flat_observation": True})
    dict_env = suite.load(domain, name, {"random": 1})
    flat = [env_step["observations"] for env_step in observations_of(flat_env)]
    steps = observations_of(dict_env)
    stacked = {key: np.array([step[key] for step in steps]) for key in sorted(steps[0])}
    np.testing.assert_array_equal(convert.flatten("name", stacked, task), flat)


def observations_of(env) -> list:
    time_steps = [env.reset()]
    action = np.zeros(env.action_spec().shape)
    for _ in range(3):
        time_steps.append(env.step(action))
    return [time_step.observation for time_step in time_steps]


def test_other_observations_are_refused():
    walker = {
        "height": np.zeros(4),
        "orientations": np.zeros((4, 14)),
        "velocity": np.zeros((4, 9)),
    }
    assert convert.flatten("name", walker, "walker-walk").shape == (4, 24)
    goal = {"observation": np.zeros((4, 20)), "desired_goal": np.zeros((4, 4))}
    missing = {key: array for key, array in walker.items() if key != "height"}
    more = {**walker, "time": np.zeros(4)}
    wider = {**walker, "velocity": np.zeros((4, 10))}
    for observations in (goal, missing, more, wider, (np.zeros((4, 24)),)):
        with pytest.raises(SystemExit, match="my-data, episode 3: "):
            convert.flatten("my-data, episode 3", observations, "walker-walk")


def write_minari(name: str, episodes: list[dict], observation_space):
    """Episodes of 3 or more steps as Minari writes them; the arguments are EpisodeBuffer's."""
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    minari.create_dataset_from_buffers(
        name,
        [EpisodeBuffer(**episode) for episode in episodes],
        observation_space=observation_space,
        action_space=Box(-1, 1, (6,), np.float32),
    )


def minari_episode(num_steps: int, seed: int) -> dict:
    arrays = make_arrays(num_steps + 1, seed=seed)
    return {
        "observations": arrays["observations"],
        "actions": arrays["actions"][:-1],
        "rewards": arrays["rewards"][:-1],
        "terminations": np.zeros(num_steps, bool),
        "truncations": np.zeros(num_steps, bool),
    }


def test_minari_ends(run, tmp_path):
    """By a termination, by a truncation, and without a flag: by time."""
    spaces = pytest.importorskip("gymnasium").spaces
    episodes = [minari_episode(num_steps, num_steps) for num_steps in (5, 6, 7)]
    episodes[0]["terminations"][-1] = True
    episodes[1]["truncations"][-1] = True
    write_minari("mop/walker-walk-v0", episodes, spaces.Box(-np.inf, np.inf, (24,), np.float32))
    assert "18 transitions, 3 episodes" in run(*page_command("minari"))
    found = load("data/walk-minari.npz")
    assert np.flatnonzero(found["terminals"]).tolist() == [4]
    assert np.flatnonzero(found["timeouts"]).tolist() == [10, 17]
    before = np.concatenate([episode["observations"][:-1] for episode in episodes])
    after = np.concatenate([episode["observations"][1:] for episode in episodes])
    np.testing.assert_array_equal(found["observations"], before)
    np.testing.assert_array_equal(found["next_observations"], after)
    for key in ("actions", "rewards"):
        np.testing.assert_array_equal(found[key], np.concatenate([e[key] for e in episodes]))
    np.testing.assert_array_equal(found["physics"], np.zeros((18, 1)))


def test_minari_there_and_back_without_physics(run, tmp_path):
    pytest.importorskip("minari")
    arrays = make_arrays(40)
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    arrays["physics"] = np.zeros((40, 1))
    write_dataset(tmp_path / "d.npz", "walker-walk", arrays)
    run("to-minari", "--data", "d.npz", "--name", "mop/there-v0")
    run("minari", "--data", "mop/there-v0", "--task", "walker-walk", "--output", "back.npz")
    found = load("back.npz")
    for key in ("observations", "actions", "rewards", "physics"):
        np.testing.assert_array_equal(found[key], arrays[key])


def test_minari_dict_observations(run, tmp_path):
    spaces = pytest.importorskip("gymnasium").spaces
    episode = minari_episode(5, 1)
    flat = episode["observations"]
    episode["observations"] = {
        "height": flat[:, 14],
        "orientations": flat[:, :14],
        "velocity": flat[:, 15:],
    }
    shapes = {"height": (), "orientations": (14,), "velocity": (9,)}
    boxes = {key: spaces.Box(-np.inf, np.inf, shape, np.float32) for key, shape in shapes.items()}
    write_minari("mop/walker-walk-v0", [episode], spaces.Dict(boxes))
    run(*page_command("minari"))
    found = load("data/walk-minari.npz")
    np.testing.assert_array_equal(found["observations"], flat[:-1])
    np.testing.assert_array_equal(found["next_observations"], flat[1:])


def test_minari_refused(run, tmp_path):
    spaces = pytest.importorskip("gymnasium").spaces
    good = minari_episode(5, 1)
    short = {**minari_episode(5, 2), "observations": good["observations"][:-1]}
    box = spaces.Box(-np.inf, np.inf, (24,), np.float32)
    write_minari("mop/walker-walk-v0", [good, short], box)
    text = run(*page_command("minari"))
    assert text.startswith("mop/walker-walk-v0, episode 1: 5 observations of 5 steps")
    assert not (tmp_path / "data").exists()


def test_to_minari_and_back(run, tmp_path):
    """Physics states, too; the metadata are the description."""
    minari = pytest.importorskip("minari")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    ours = dict(np.load(ROOT / "pretrained/walker-walk-medium.npz"))
    run(*page_command("to-minari"))
    run(*page_command("minari"))
    dataset = minari.load_dataset("mop/walker-walk-v0")
    assert dataset.total_episodes == ours["timeouts"].sum()
    assert dataset.total_steps == len(ours["rewards"])
    assert dataset.storage.metadata["description"] == str(ours["metadata"])
    rows = slice(3000, 4000)
    observations = [*ours["observations"][rows], ours["next_observations"][3999]]
    np.testing.assert_array_equal(dataset[3].observations, observations)
    physics = [np.full(18, np.nan), *ours["physics"][rows]]
    np.testing.assert_array_equal(dataset[3].infos["physics"], physics)
    metadata = json.loads(str(ours.pop("metadata")))
    found = load("data/walk-minari.npz")
    assert_equal_arrays(found, ours)
    returns = found["metadata"]["episode_returns"]
    np.testing.assert_allclose(returns, metadata["episode_returns"], rtol=1e-6)


def test_to_minari_refuses_what_would_be_lost(run, tmp_path):
    """Random next observations are not the next rows'."""
    pytest.importorskip("minari")
    np.savez(tmp_path / "random.npz", **make_arrays(100), metadata=np.array("{}"))
    text = run("to-minari", "--data", "random.npz", "--name", "mop/random-v0")
    assert text.startswith("random.npz: next observations")
