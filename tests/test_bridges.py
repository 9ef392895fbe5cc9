"""The code of docs/datasets.md, with the real libraries (tests/requirements-bridges.txt)."""

import json
import re

import numpy as np
import pytest

import mop_distill
import mop_ds
import mop_pbrl_teacher
from conftest import ROOT

TINY = ["--hidden", 8, "--batch-size", 16, "--eval-episodes", 1, "--final-eval-episodes", 1]
TINY += ["--gradient-steps", 10, "--eval-every", 10]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page(heading, ...): run the Python under these headings -> the names it defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    text = (ROOT / "docs/datasets.md").read_text()

    def run(*headings):
        names = {}
        for heading in headings:
            section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
            for block in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
                exec(compile(block, heading, "exec"), names)
        return names

    return run


@pytest.fixture(scope="module")
def ours():
    with np.load(ROOT / "pretrained/walker-stand-medium.npz") as data:
        return dict(data)


def assert_equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_d3rlpy_opens_ours_and_trains(page, ours):
    pytest.importorskip("d3rlpy")
    names = page("To d3rlpy")
    dataset = names["dataset"]
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
    assert actions.shape == (9, 6)
    assert np.abs(actions).max() <= 1  # not so of NaN


def test_minari_and_back_without_loss(page, ours, tmp_path):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    page("To Minari", "From Minari")
    dataset = minari.load_dataset("mop/walker-stand-medium-v0")
    assert dataset.total_episodes == ours["timeouts"].sum()
    assert dataset.total_steps == len(ours["rewards"])
    rows = slice(3000, 4000)
    observations = [*ours["observations"][rows], ours["next_observations"][3999]]
    np.testing.assert_array_equal(dataset[3].observations, observations)
    physics = [np.full(18, np.nan), *ours["physics"][rows]]
    np.testing.assert_array_equal(dataset[3].infos["physics"], physics)
    assert_equal_arrays(dict(np.load(tmp_path / "from-minari.npz")), ours)


def test_a_file_in_d4rl_layout(page, ours, tmp_path, run_main):
    """Without next observations and physics: teachers and students learn, nothing is relabelled."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = ours[key]
    page("Into MOP", "From D4RL's layout")
    found = dict(np.load(tmp_path / "from-d4rl.npz"))
    metadata = json.loads(str(found.pop("metadata")))
    keep = ~ours["timeouts"]  # a row less per episode
    expected = {key: array[keep] for key, array in ours.items() if key != "metadata"}
    expected["timeouts"] = np.arange(keep.sum()) % 999 == 998
    expected["physics"] = np.zeros((keep.sum(), 1))
    assert_equal_arrays(found, expected)
    sums = ours["rewards"].reshape(-1, 1000)[:, :-1].sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(metadata["episode_returns"], sums, rtol=1e-12)

    options = ["--data", "from-d4rl.npz"]
    assert "wrote" in run_main(mop_pbrl_teacher, *TINY, *options, "--task", "walker-stand")
    assert "wrote" in run_main(mop_distill, *TINY, *options, "--tasks", "walker-stand")
    options += ["pretrained/walker-walk-medium.npz"]
    assert "from-d4rl.npz: expected physics states" in run_main(mop_ds, *TINY, *options)[1]


def test_files_in_exorl_layout(page, ours, tmp_path, run_main):
    """Rewards come from the physics states; the bundled ones are rounded, to seven digits."""
    (tmp_path / "exorl").mkdir()
    for e in range(2):
        rows = slice(1000 * e, 1000 * (e + 1))
        np.savez(
            tmp_path / f"exorl/episode_{e:06d}_1000.npz",
            observation=[ours["observations"][rows][0], *ours["next_observations"][rows]],
            action=[np.zeros(6, np.float32), *ours["actions"][rows]],
            reward=np.zeros((1001, 1), np.float32),
            physics=[np.zeros(18), *ours["physics"][rows]],
            discount=np.ones((1001, 1), np.float32),
        )
    page("Into MOP", "From ExORL's layout")
    found = dict(np.load(tmp_path / "from-exorl.npz"))
    returns = json.loads(str(found.pop("metadata")))["episode_returns"]
    np.testing.assert_allclose(found.pop("rewards"), ours["rewards"][:2000], rtol=1e-6)
    assert_equal_arrays(found, {key: ours[key][:2000] for key in found})
    expected = json.loads(str(ours["metadata"]))["episode_returns"][:2]
    np.testing.assert_allclose(returns, expected, rtol=1e-6)
    options = ["--task", "walker-stand", "--data", "from-exorl.npz"]
    assert "wrote" in run_main(mop_pbrl_teacher, *TINY, *options)
