"""The code of docs/datasets.md, as written there, with the real libraries (tests/requirements-bridges.txt)."""

import json
import re

import numpy as np
import pytest

from conftest import ROOT

TINY = ["--hidden", 8, "--batch-size", 16, "--threads", 1, "--eval-episodes", 1, "--final-eval-episodes", 1]
TINY += ["--gradient-steps", 10, "--eval-every", 10]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page(heading, ...): run the Python under these headings in tmp_path -> the names it defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    sections = re.split(r"^## (.*)\n", (ROOT / "docs/datasets.md").read_text(), flags=re.MULTILINE)
    code = {
        k: re.findall(r"^```python\n(.*?)^```", v, re.M | re.S)
        for k, v in zip(sections[1::2], sections[2::2], strict=True)
    }

    def run(*headings):
        names = {}
        for heading in headings:
            for block in code[heading]:
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
    episodes, n = names["dataset"].episodes, ours["timeouts"].sum()
    assert len(episodes) == n and names["dataset"].transition_count == n * 999
    for key in ("observations", "actions", "rewards"):
        found = np.concatenate([getattr(episode, key) for episode in episodes])
        np.testing.assert_array_equal(found.reshape(ours[key].shape), ours[key])
    assert not any(episode.terminated for episode in episodes)
    step = names["dataset"].transition_picker(episodes[3], 500)
    np.testing.assert_array_equal(step.next_observation, ours["next_observations"][3500])
    assert names["algorithm"].grad_step == 50
    actions = names["algorithm"].predict(ours["observations"][:9])
    assert actions.shape == (9, 6) and np.isfinite(actions).all() and np.abs(actions).max() <= 1


def test_minari_and_back_without_loss(page, ours, tmp_path):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    page("To Minari", "From Minari")
    dataset = minari.load_dataset("mop/walker-stand-medium-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (ours["timeouts"].sum(), len(ours["rewards"]))
    episode = dataset[3]
    np.testing.assert_array_equal(
        episode.observations, [*ours["observations"][3000:4000], ours["next_observations"][3999]]
    )
    np.testing.assert_array_equal(episode.infos["physics"], [np.full(18, np.nan), *ours["physics"][3000:4000]])
    assert_equal_arrays(dict(np.load(tmp_path / "from-minari.npz")), ours)


def test_a_file_in_d4rl_layout(page, ours, tmp_path, run_main):
    """Without next observations and physics: a row less per episode; teachers learn from it, nothing is relabelled."""
    import mop_distill
    import mop_ds
    import mop_pbrl_teacher

    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = ours[key]
    page("Into MOP", "From D4RL's layout")
    found = dict(np.load(tmp_path / "from-d4rl.npz"))
    keep = ~ours["timeouts"]
    expected = {key: array[keep] for key, array in ours.items() if key != "metadata"}
    n = keep.sum()
    expected |= {"timeouts": np.arange(n) % 999 == 998, "physics": np.zeros((n, 1))}
    metadata = json.loads(str(found.pop("metadata")))
    assert_equal_arrays(found, expected)
    sums = ours["rewards"].reshape(-1, 1000)[:, :-1].sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(metadata["episode_returns"], sums, rtol=1e-12)
    assert run_main(mop_pbrl_teacher, *TINY, "--task", "walker-stand", "--data", "from-d4rl.npz")["returns"]
    assert run_main(mop_distill, *TINY, "--tasks", "walker-stand", "--data", "from-d4rl.npz")["returns"]
    with pytest.raises((ValueError, SystemExit), match="shape"):
        mop_ds.compute_rewards("walker-walk", expected["physics"], expected["actions"])


def test_files_in_exorl_layout(page, ours, tmp_path, run_main):
    """Rewards come from the physics states; the bundled ones are rounded, so the rewards agree to seven digits."""
    import mop_pbrl_teacher

    (tmp_path / "exorl").mkdir()
    for e in range(2):
        rows = slice(1000 * e, 1000 * (e + 1))
        episode = {"observation": [ours["observations"][rows][0], *ours["next_observations"][rows]]}
        episode |= {
            "action": [np.zeros(6, np.float32), *ours["actions"][rows]],
            "reward": np.zeros((1001, 1), np.float32),
        }
        episode |= {"physics": [np.zeros(18), *ours["physics"][rows]], "discount": np.ones((1001, 1), np.float32)}
        np.savez(tmp_path / f"exorl/episode_{e:06d}_1000.npz", **episode)
    page("Into MOP", "From ExORL's layout")
    found = dict(np.load(tmp_path / "from-exorl.npz"))
    metadata = json.loads(str(found.pop("metadata")))
    np.testing.assert_allclose(found.pop("rewards"), ours["rewards"][:2000], rtol=1e-6)
    assert_equal_arrays(found, {key: ours[key][:2000] for key in found})
    np.testing.assert_allclose(
        metadata["episode_returns"], json.loads(str(ours["metadata"]))["episode_returns"][:2], rtol=1e-6
    )
    assert run_main(mop_pbrl_teacher, *TINY, "--task", "walker-stand", "--data", "from-exorl.npz")["returns"]
