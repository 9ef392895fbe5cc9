"""Datasets of other libraries into ours, and ours into Minari's.

  python examples/convert.py exorl --data exorl/walker/proto/buffer --task walker-walk \\
      --output data/walker-walk-exorl.npz

One subcommand per format: exorl, d4rl, minari, d3rlpy, to-minari. Each says below how the files of
its format look; what our arrays mean says docs/formats.md. A file that does not fit is named, and
nothing is written then. What works without physics states, and what does not: docs/datasets.md.
"""

import json
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

if __name__ == "__main__":
    os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are
from dm_control import suite

import mop_ds
from mop_ds import check


def from_exorl(
    data: Path, task: str, output: Path, rewards: Literal["computed", "stored"] = "computed"
) -> None:
    """ExORL's folder of episodes, one .npz each; URLB's, which has no physics, too.

    An episode of T steps has T + 1 rows: observation, action, reward (T + 1, 1), discount
    (T + 1, 1), physics. Row 0 is the reset; row t holds the action of step t and what came of it:
    observation, reward and physics state. ExORL collected without a task, so the rewards are
    computed from the physics states; --rewards stored takes those of the files.
    """
    check_output(output)
    paths = sorted(data.glob("*.npz"))
    check(paths, f"{data}: expected a folder of .npz files, one per episode")
    episodes = []
    for path in tqdm(paths, desc="episodes", leave=False, disable=None):
        file = read_npz(path)
        keys = ["observation", "action", "reward", "discount"]
        check_keys(path, file, keys)
        if rewards == "computed":
            hint = "URLB's files have none; --rewards stored takes the file's rewards"
            check("physics" in file, f"{path}: no physics to compute rewards from; {hint}")
        if "physics" in file:
            keys.append("physics")
        check_lengths(path, file, keys)
        ended = column(path, file["discount"])[1:] == 0  # the task itself ended the episode
        episode = {
            "observations": file["observation"][:-1],
            "actions": file["action"][1:],
            "rewards": column(path, file["reward"])[1:],
            "next_observations": file["observation"][1:],
            "terminals": ended,
            "timeouts": last_row(len(ended)) & ~ended,
        }
        if "physics" in file:
            episode["physics"] = file["physics"][1:]
        add_episode(episodes, path, episode, task)
    arrays = concatenate(episodes)
    if rewards == "computed":
        text = "its reward reads sensors that a physics state does not decide"
        check(not task.startswith("dog-"), f"--task {task}: {text}; use --rewards stored")
        arrays["rewards"] = mop_ds.compute_rewards(task, arrays["physics"], arrays["actions"])
    save(output, task, f"exorl, {rewards} rewards", arrays)


def from_d4rl(data: Path, task: str, output: Path, episode_length: int | None = None) -> None:
    """D4RL's .hdf5, one file of whole episodes, one after the other.

    observations, actions, rewards, terminals, in newer files also timeouts and next_observations.
    Flags are of any type, flags and rewards (N,) or (N, 1). A file without timeouts needs
    --episode-length, after which D4RL counts an episode as ended by time. Without
    next_observations, the last row of an episode that ended by time is left out.
    """
    check_output(output)
    file = read_hdf5(data)
    check_keys(data, file, ["observations", "actions", "rewards", "terminals"])
    arrays = {
        "observations": file["observations"],
        "actions": file["actions"],
        "rewards": column(data, file["rewards"]),
        "terminals": flags(data, file["terminals"]),
    }
    if "timeouts" in file:
        arrays["timeouts"] = flags(data, file["timeouts"])
    else:
        check(episode_length, f"{data}: no timeouts; say --episode-length, in steps")
        arrays["timeouts"] = count_timeouts(arrays["terminals"], episode_length)
    if "next_observations" in file:
        arrays["next_observations"] = file["next_observations"]
        arrays = check_arrays(data, arrays, task)
    else:
        arrays = add_next_observations(check_arrays(data, arrays, task))
    save(output, task, "d4rl", arrays)


def from_minari(data: str, task: str, output: Path) -> None:
    """Minari's dataset of that name (--data), as `minari list local` shows it.

    An episode of T steps has T + 1 observations, an array or one per name, which are put in
    dm_control's order, and T actions, rewards, terminations and truncations. An episode without
    an end flag ends by time. infos may hold physics, T + 1 states (as to-minari writes them).
    """
    check_output(output)
    try:
        import minari
    except ImportError:
        check(False, "Minari's datasets need: pip install 'minari[hdf5]'")
    episodes = []
    for episode in minari.load_dataset(data).iterate_episodes():
        name = f"{data}, episode {episode.id}"
        observations = flatten(name, episode.observations, task)
        num_steps = len(episode.rewards)
        found = len(observations)
        check(found == num_steps + 1, f"{name}: {found} observations of {num_steps} steps")
        terminals = flags(name, episode.terminations)
        timeouts = flags(name, episode.truncations)
        if not terminals[-1]:
            timeouts[-1] = True
        arrays = {
            "observations": observations[:-1],
            "actions": episode.actions,
            "rewards": column(name, episode.rewards),
            "next_observations": observations[1:],
            "terminals": terminals,
            "timeouts": timeouts,
        }
        if "physics" in (episode.infos or {}):
            arrays["physics"] = episode.infos["physics"][1:]
        add_episode(episodes, name, arrays, task)
    check(episodes, f"{data}: no episodes")
    save(output, task, f"minari, {data}", concatenate(episodes))


def from_d3rlpy(data: Path, task: str, output: Path) -> None:
    """d3rlpy's .h5 (version 2), as the dump of a ReplayBuffer or an MDPDataset writes it.

    num_episodes, and of episode i observations_<i>, actions_<i>, rewards_<i> (T, 1) and
    terminated_<i>, one flag. There is no observation after the last action, so an episode that
    ended by time loses its last row.
    """
    check_output(output)
    file = read_hdf5(data)
    check_keys(data, file, ["num_episodes"])
    episodes = []
    for i in range(int(file["num_episodes"])):
        keys = [f"observations_{i}", f"actions_{i}", f"rewards_{i}", f"terminated_{i}"]
        check_keys(data, file, keys)
        name = f"{data}, episode {i}"
        rewards = column(name, file[f"rewards_{i}"])
        last = last_row(len(rewards))
        terminated = bool(file[f"terminated_{i}"])
        arrays = {
            "observations": file[f"observations_{i}"],
            "actions": file[f"actions_{i}"],
            "rewards": rewards,
            "terminals": last & terminated,
            "timeouts": last & (not terminated),
        }
        add_episode(episodes, name, arrays, task)
    check(episodes, f"{data}: no episodes")
    save(output, task, "d3rlpy", add_next_observations(concatenate(episodes)))


def to_minari(data: Path, name: str) -> None:
    """A dataset of ours (--data) as Minari's of that name, such as mop/walker-stand-medium-v0.

    Its infos begin at the reset, whose physics state our files do not have: that row is NaN.
    Our metadata become the description.
    """
    try:
        import minari
        from gymnasium.spaces import Box
        from minari.data_collector import EpisodeBuffer
    except ImportError:
        check(False, "Minari's datasets need: pip install 'minari[create,hdf5]'")
    file = read_npz(data)
    check_keys(data, file, [*mop_ds.DATASET, "metadata"])
    ends = file["terminals"] | file["timeouts"]
    same = np.all(file["next_observations"][:-1] == file["observations"][1:], axis=1)
    keeps = np.all(same | ends[:-1])
    check(keeps, f"{data}: next observations that are not the next rows', so they would be lost")
    with_physics = file["physics"].shape[1] > 1  # else a column of zeros, see save
    episodes = []
    for rows in np.split(np.arange(len(ends)), np.flatnonzero(ends[:-1]) + 1):
        last_observation = file["next_observations"][rows[-1:]]
        physics = file["physics"][rows]
        unknown = np.full_like(physics[:1], np.nan)
        episode = EpisodeBuffer(
            observations=np.concatenate([file["observations"][rows], last_observation]),
            actions=file["actions"][rows],
            rewards=file["rewards"][rows],
            terminations=file["terminals"][rows],
            truncations=file["timeouts"][rows],
            infos={"physics": np.concatenate([unknown, physics])} if with_physics else None,
        )
        episodes.append(episode)
    minari.create_dataset_from_buffers(
        name,
        episodes,
        observation_space=Box(-np.inf, np.inf, file["observations"].shape[1:], np.float32),
        action_space=Box(-1, 1, file["actions"].shape[1:], np.float32),
        description=str(file["metadata"]),
    )
    print(f"wrote {name}: {len(ends)} transitions, {len(episodes)} episodes")


# ============================================================================ reading and checking
def read_npz(path) -> dict:
    """Every array of an .npz, read whole, so that the file is closed and its bytes are checked."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # np.load would not notice a changed shape
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        check(False, f"{path}: cannot be read: {error!r:.300}")
    check(damaged is None, f"{path}: damaged bytes in {damaged}")
    return arrays


def read_hdf5(path) -> dict:
    """Every array at the top of an HDF5 file."""
    try:
        import h5py
    except ImportError:
        check(False, "HDF5 files need h5py: pip install h5py")
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            for key, item in file.items():
                if isinstance(item, h5py.Dataset):
                    arrays[key] = item[()]
    except Exception as error:
        check(False, f"{path}: cannot be read: {error!r:.300}")
    return arrays


def check_keys(name, arrays: dict, keys: list) -> None:
    for key in keys:
        check(key in arrays, f"{name}: no {key}")


def check_lengths(name, arrays: dict, keys: list) -> None:
    lengths = {key: np.shape(arrays[key])[:1] for key in keys}
    check(len(set(lengths.values())) == 1, f"{name}: expected equal lengths, found {lengths}")


def column(name, array) -> np.ndarray:
    """(N,) or (N, 1) -> (N,)."""
    array = np.asarray(array)
    fits = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
    check(fits, f"{name}: expected flags and rewards as (N,) or (N, 1), found {array.shape}")
    return array.reshape(-1)


def flags(name, array) -> np.ndarray:
    """Flags of any type, (N,) or (N, 1) -> (N,) bool. An integer array would index rows."""
    values = column(name, array)
    check(np.isin(values, [0, 1]).all(), f"{name}: expected flags that are 0 or 1")
    return values == 1


def last_row(num_rows: int) -> np.ndarray:
    return np.arange(num_rows) == num_rows - 1


def count_timeouts(terminals: np.ndarray, episode_length: int) -> np.ndarray:
    """True where an episode that no terminal ended has lasted episode_length steps."""
    timeouts = np.zeros(len(terminals), bool)
    steps = 0
    for row in range(len(terminals)):
        steps += 1
        if terminals[row]:
            steps = 0
        elif steps == episode_length:
            timeouts[row] = True
            steps = 0
    return timeouts


def add_next_observations(arrays: dict) -> dict:
    """The next row's observation becomes the next observation.

    Where an episode ends by time, or the file ends, the next state is not in the file: that row
    is left out, and the episode ends a row earlier. A terminal row stays, with its own observation
    as the next one: no value is bootstrapped from it, and the next row is another episode's.
    """
    terminals = arrays["terminals"]
    timeouts = arrays["timeouts"]
    left_out = ~terminals & (timeouts | last_row(len(terminals)))
    becomes_last = np.append(left_out[1:], False) & ~terminals & ~timeouts
    next_observations = np.roll(arrays["observations"], -1, axis=0)
    next_observations[terminals] = arrays["observations"][terminals]
    changed = {
        **arrays,
        "next_observations": next_observations,
        "timeouts": timeouts | becomes_last,
    }
    return {key: array[~left_out] for key, array in changed.items()}


def flatten(name, observations, task: str) -> np.ndarray:
    """(T + 1, obs) of an array, or of a dict of arrays in dm_control's order (not the alphabet's).

    dm_control's own flat observation has this order, in which teachers and students are evaluated.
    """
    if isinstance(observations, np.ndarray):
        return observations
    sizes = observation_sizes(task)
    fits = isinstance(observations, dict) and observations.keys() == sizes.keys()
    found = list(observations) if isinstance(observations, dict) else type(observations).__name__
    check(fits, f"{name}: expected observations {list(sizes)} of {task}, found {found}")
    parts = []
    for key, size in sizes.items():
        part = np.reshape(observations[key], (len(observations[key]), -1))
        check(part.shape[1] == size, f"{name}: {key}: expected {size} values, found {part.shape}")
        parts.append(part)
    return np.concatenate(parts, axis=1)


def observation_sizes(task: str) -> dict:
    """Name -> number of values, in the order of dm_control's flat observation."""
    mop_ds.make_env(task)  # stops where there is no such task
    observation = suite.load(*task.split("-", 1)).reset().observation
    keys = list(observation) if isinstance(observation, OrderedDict) else sorted(observation)
    return {key: np.size(observation[key]) for key in keys}


def check_arrays(name, arrays: dict, task: str) -> dict:
    """The arrays in our types, after a check of shapes and values: what the scripts refuse."""
    obs_dim, action_dim = mop_ds.task_sizes(task)
    num_rows = len(arrays["rewards"])
    check(num_rows > 0, f"{name}: no steps")
    shapes = {
        "observations": (num_rows, obs_dim),
        "actions": (num_rows, action_dim),
        "next_observations": (num_rows, obs_dim),
        "physics": (num_rows, len(mop_ds.make_env(task).physics.get_state())),
    }
    checked = {}
    for key, array in arrays.items():
        shape = shapes.get(key, (num_rows,))
        found = np.shape(array)
        check(found == shape, f"{name}: {key}: expected {shape} for {task}, found {found}")
        checked[key] = np.asarray(array).astype(mop_ds.DATASET[key])
        check(np.isfinite(checked[key]).all(), f"{name}: {key}: found NaN or infinite values")
    within = np.abs(checked["actions"]).max() <= 1
    check(within, f"{name}: expected actions in [-1, 1], found others")
    return checked


def add_episode(episodes: list, name, arrays: dict, task: str) -> None:
    """Check an episode and append it; all have the same keys, so all have physics, or none."""
    if episodes:
        expected = list(episodes[0])
        same = list(arrays) == expected
        check(same, f"{name}: expected {expected} as in the others, found {list(arrays)}")
    episodes.append(check_arrays(name, arrays, task))


# ========================================================================================= writing
def check_output(output: Path) -> None:
    check(output.suffix == ".npz", f"--output {output}: expected a name that ends in .npz")
    check(not output.exists(), f"--output {output}: exists; delete it, or take another name")


def concatenate(episodes: list) -> dict:
    """Episodes, dicts of arrays with the same keys, one after the other."""
    arrays = {}
    for key in episodes[0]:
        arrays[key] = np.concatenate([episode[key] for episode in episodes])
    return arrays


def save(output: Path, task: str, source: str, arrays: dict) -> None:
    """A file as in docs/formats.md, which appears whole.

    Without physics states the key holds a column of zeros, which no task takes for a state.
    """
    num_rows = len(arrays["rewards"])
    check(num_rows > 0, "no rows are left: no next state is in the file")
    arrays.setdefault("physics", np.zeros((num_rows, 1)))
    ends = arrays["terminals"] | arrays["timeouts"]
    starts = np.flatnonzero(np.append(True, ends[:-1]))
    returns = np.add.reduceat(arrays["rewards"], starts, dtype=np.float64).tolist()
    metadata = {
        "schema_version": mop_ds.SCHEMA_VERSION,
        "task": task,
        "source": source,
        "episode_returns": returns,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays, metadata=np.array(json.dumps(metadata)))
    os.replace(temporary, output)
    episodes = f"{len(returns)} episodes, return {np.mean(returns):.1f}"
    print(f"wrote {output}: {num_rows} transitions, {episodes}")


FORMATS = {
    "exorl": from_exorl,
    "d4rl": from_d4rl,
    "minari": from_minari,
    "d3rlpy": from_d3rlpy,
    "to-minari": to_minari,
}


def main():
    tyro.extras.subcommand_cli_from_dict(FORMATS, description=__doc__)


if __name__ == "__main__":
    main()
