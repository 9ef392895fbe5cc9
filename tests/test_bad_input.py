"""Bad input: one clear line that names the file or flag, exit code not zero, nothing written or overwritten."""

import pickle

import numpy as np
import pytest
import torch

import mop_distill as distill
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, script, write_dataset, write_teacher


def assert_refused(outcome, *words):
    code, text = outcome
    assert code not in (0, None)
    for word in words:
        assert word in text, text
    assert "Traceback" not in text and len(text.strip().splitlines()) <= 2  # the line, and the exit's repetition of it


class Payload:
    """Unpickling this creates a file named executed."""

    def __reduce__(self):
        return open, ("executed", "w")


def change(**arrays):
    return {**make_arrays(), **arrays}


NAN = make_arrays()["observations"].copy()
NAN[17, 3] = np.nan
INFINITE = make_arrays()["rewards"].copy()
INFINITE[5] = np.inf
BROKEN_ARRAYS = {
    "missing rewards": ({k: v for k, v in make_arrays().items() if k != "rewards"}, ["missing rewards"]),
    "integer actions": (change(actions=np.zeros((200, 6), int)), ["actions", "int64"]),
    "object rewards": (change(rewards=np.array([None] * 200)), [".npz"]),
    "float terminals": (change(terminals=np.zeros(200)), ["terminals", "float64"]),
    "flat observations": (change(observations=np.zeros(200, np.float32)), ["observations", "(200,)"]),
    "short rewards": (change(rewards=np.zeros(199, np.float32)), ["rewards", "expected 200 rows", "199"]),
    "empty": ({k: v[:0] for k, v in make_arrays().items()}, ["more than 0"]),
    "nan": (change(observations=NAN), ["observations", "NaN", "row 17"]),
    "infinite": (change(rewards=INFINITE), ["rewards", "infinite", "row 5"]),
    "actions outside": (change(actions=np.full((200, 6), 1.5, np.float32)), ["actions", "[-1, 1]", "1.5"]),
    "other observation size": (make_arrays(obs_dim=17), ["24", "17"]),
    "next observations": (change(next_observations=np.zeros((200, 23), np.float32)), ["next_observations"]),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
@pytest.mark.parametrize("module", [pbrl, distill])
def test_datasets(run_main, tmp_path, module, case):
    arrays, words = BROKEN_ARRAYS[case]
    path = write_dataset(tmp_path / "bad.npz", arrays=arrays)
    options = ["--task", "walker-stand"]
    if module is distill:
        options = ["--tasks", "walker-stand", "--teachers", write_teacher(tmp_path / "t.pt")]
    assert_refused(run_main(module, *options, "--data", path), "bad.npz", *words)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "checkpoints").exists()


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def test_dataset_files(run_main, tmp_path):
    good = write_dataset(tmp_path / "good.npz").read_bytes()
    base = ["--task", "walker-stand", "--data"]
    assert_refused(run_main(pbrl, *base, "none.npz"), "none.npz", "no such dataset", "mop_td3_collect.py")
    for content in (good[: len(good) // 2], b"", b"PK\x03\x04 nonsense", pickle.dumps({"a": Payload()})):
        path = write_bytes(tmp_path / "broken.npz", content)
        assert_refused(run_main(pbrl, *base, path), "broken.npz", "not a readable .npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert_refused(run_main(pbrl, *base, tmp_path / "array.npy"), "array.npy", "not a readable .npz")
    np.savez(tmp_path / "objects.npz", **make_arrays(), metadata=np.array([Payload()], dtype=object))
    assert_refused(run_main(pbrl, *base, tmp_path / "objects.npz"), "objects.npz", "pickled")
    assert not (tmp_path / "executed").exists()
    np.savez(tmp_path / "bare.npz", **make_arrays(), metadata=np.array("{"))
    assert_refused(run_main(pbrl, *base, tmp_path / "bare.npz"), "bare.npz", "metadata")
    path = write_dataset(tmp_path / "schema.npz", schema_version=99)
    assert_refused(run_main(pbrl, *base, path), "schema.npz", "expected schema version 1, found 99")
    path = write_dataset(tmp_path / "other.npz", task="walker-walk")
    assert_refused(run_main(pbrl, *base, path), "other.npz", "expected data of walker-stand, found walker-walk")
    assert_refused(run_main(pbrl, "--task", "walker-run"), "data/walker-run-medium.npz", "mop_td3_collect.py")


CHECKPOINTS = {
    "kind": ({"kind": "behavior"}, ["expected a checkpoint of kind teacher, found behavior"]),
    "schema": ({"schema_version": 7}, ["expected schema version 1, found 7"]),
    "task": ({"tasks": ["walker-walk"]}, ["expected a checkpoint for walker-stand, found walker-walk"]),
    "no returns": ({"returns": {}}, ["without the returns of walker-stand"]),
    "no weights": ({"actor": {}}, ["weights and sizes do not fit together"]),
    "sizes": ({"sizes": {"in_dim": 24, "action_dim": 6, "hidden": 9, "layer_norm": False}}, ["do not fit together"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(run_main, tmp_path, case):
    changes, words = CHECKPOINTS[case]
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz")]
    path = write_teacher(tmp_path / "bad.pt", **changes)
    assert_refused(run_main(distill, *options, "--teachers", path), "bad.pt", *words)


def test_checkpoint_files(run_main, tmp_path):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--teachers"]
    good = write_teacher(tmp_path / "good.pt").read_bytes()
    assert_refused(run_main(distill, *options, "none.pt"), "none.pt", "no such checkpoint")
    for content in (good[: len(good) // 2], b"", b"text", pickle.dumps(Payload())):
        path = write_bytes(tmp_path / "broken.pt", content)
        assert_refused(run_main(distill, *options, path), "broken.pt", "not a readable checkpoint")
    torch.save({"schema_version": 1, "kind": "teacher", "payload": Payload()}, tmp_path / "payload.pt")
    assert_refused(run_main(distill, *options, tmp_path / "payload.pt"), "payload.pt", "pickled objects (refused)")
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(run_main(distill, *options, tmp_path / "list.pt"), "list.pt", "not a checkpoint")
    torch.save({"schema_version": 1, "kind": "teacher"}, tmp_path / "part.pt")
    assert_refused(run_main(distill, *options, tmp_path / "part.pt"), "part.pt", "incomplete")
    assert_refused(run_main(td3, "--policy", tmp_path / "part.pt"), "part.pt", "incomplete")


def test_teacher_of_another_observation_size(run_main, tmp_path):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz")]
    outcome = run_main(distill, *options, "--teachers", write_teacher(tmp_path / "t.pt", obs_dim=17))
    assert_refused(outcome, "24 values", "17 in", "t.pt")


@pytest.mark.parametrize(
    "module, options, words",
    [
        (td3, ["--task", "walker-fly"], ["walker-fly", "run, stand, walk"]),
        (td3, ["--hidden", -1], ["--hidden", "-1"]),
        (td3, ["--batch-size", 0], ["--batch-size", "0"]),
        (td3, ["--total-timesteps", 1500], ["--total-timesteps", "multiple of 1000"]),
        (td3, ["--eval-every", 1], ["--eval-every", "multiple of 1000"]),
        (td3, ["--total-timesteps", 20000], ["--medium-step", "1000000"]),
        (td3, ["--threads", -2], ["--threads", "-2"]),
        (td3, ["--num-envs", 0], ["--num-envs"]),
        (td3, ["--policy", "none.pt", "--num-transitions", -4], ["--num-transitions", "-4"]),
        (td3, ["--seed", -3], ["--seed", "-3"]),
        (td3, ["--tau", 1.5], ["--tau", "at most 1"]),
        (pbrl, ["--policy-noise", -0.1], ["--policy-noise", "-0.1"]),
        (pbrl, ["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (td3, ["--resume", "nowhere"], ["--resume nowhere"]),
        (pbrl, ["--task", "nodash"], ["nodash"]),
        (pbrl, ["--gradient-steps", -5], ["--gradient-steps", "-5"]),
        (pbrl, ["--num-critics", 1], ["--num-critics", "2"]),
        (pbrl, ["--learning-rate", 0], ["--learning-rate"]),
        (pbrl, ["--level", "medium", "expert"], ["--level"]),
        (distill, ["--tasks", "walker-stand", "walker-stand"], ["distinct"]),
        (distill, ["--data", "a.npz"], ["--data", "one file per task"]),
        (distill, ["--hidden", 0], ["--hidden"]),
        (distill, ["--states", "a.npz"], ["--states", "one file per task"]),
        (distill, ["--states", "a.npz", "b.npz", "--data", "c.npz", "d.npz"], ["--states", "no --data"]),
        (distill, ["--states", "online", "--data", "c.npz", "d.npz"], ["--states online", "--data"]),
        (distill, ["--states", "a.npz", "b.npz"], ["a.npz: no such dataset"]),
        (distill, ["--tasks", "walker-stand", "--regularizer", "ndcg"], ["--regularizer", "two or more"]),
        (distill, ["--loss", "kl"], ["walker-stand-medium-teacher-gaussian.pt", "--actor gaussian"]),
        (distill, ["--reg-lambda", -1], ["--reg-lambda", "-1"]),
        (pbrl, ["--tasks", "walker-stand"], ["--tasks", "two or more", "--task"]),
        (pbrl, ["--tasks", "walker-stand", "walker-stand"], ["--tasks", "distinct"]),
        (pbrl, ["--tasks", "walker-stand", "walker-walk", "--data", "a.npz"], ["--level, --data", "walker-walk"]),
        (pbrl, ["--tasks", "walker-stand", "cartpole-balance"], ["cartpole-balance"]),
        (distill, ["--tasks", "walker-stand", "cheetah-run"], ["cheetah-run", "equal"]),
    ],
)
def test_flags(run_main, tmp_path, module, options, words):
    assert_refused(run_main(module, *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(run_main):
    assert_refused(run_main(td3, "--device", "cuda"), "--device cuda", "--device cpu")


@pytest.mark.parametrize("value", ["1e6", "fast", "1.5"])
def test_flags_of_the_wrong_type(run_main, value):
    code, text = run_main(pbrl, "--gradient-steps", value)
    assert code == 2 and "gradient-steps" in text


def test_outputs_are_never_overwritten(run_main, tmp_path):
    data = write_dataset(tmp_path / "data/walker-stand-medium.npz")
    old = write_bytes(tmp_path / "teacher.pt", b"precious")
    base = ["--task", "walker-stand", "--data", data]
    assert_refused(run_main(pbrl, *base, "--output", old), "teacher.pt", "--overwrite")
    (tmp_path / "run").mkdir()
    write_bytes(tmp_path / "run/note.txt", b"mine")
    assert_refused(run_main(pbrl, *base, "--run-dir", "run"), "run", "not empty", "--resume")
    policy = write_teacher(tmp_path / "walker-stand-medium-behavior.pt", kind="behavior")
    outcome = run_main(td3, "--policy", policy, "--num-transitions", 1000)
    assert_refused(outcome, "data/walker-stand-medium.npz", "--overwrite")
    assert old.read_bytes() == b"precious" and sorted(p.name for p in (tmp_path / "run").iterdir()) == ["note.txt"]


def test_folders_that_cannot_be_written(run_main, tmp_path):
    data = write_dataset(tmp_path / "d.npz")
    write_bytes(tmp_path / "file", b"")
    base = ["--task", "walker-stand", "--data", data]
    assert_refused(run_main(pbrl, *base, "--run-dir", "file/run"), "file/run", "cannot be created")
    assert_refused(run_main(pbrl, *base, "--output", "file/teacher.pt"), "file", "cannot be created")
    policy = write_teacher(tmp_path / "p-behavior.pt", kind="behavior")
    outcome = run_main(td3, "--policy", policy, "--num-transitions", 10, "--output", "file/d.npz")
    assert_refused(outcome, "file", "cannot be created")
    with pytest.raises(SystemExit, match=r"file/d\.npz: cannot be written"):  # as when a folder vanishes during a run
        td3.write_atomic("file/d.npz", lambda file: file.write(b"x"))


def test_resuming_with_another_network_is_refused(run_main, tmp_path):
    options = ["--task", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--run-dir", "run"]
    options += ["--gradient-steps", 2, "--hidden", 8, "--batch-size", 4, "--eval-episodes", 1]
    run_main(pbrl, *options, "--final-eval-episodes", 1)
    assert_refused(run_main(pbrl, "--resume", "run", "--hidden", 16), "--hidden", "started with 8")
    write_bytes(tmp_path / "run/resume.pt", b"cut")
    assert_refused(run_main(pbrl, "--resume", "run"), "resume.pt", "not a resume point")


def test_resuming_without_the_replay_buffer_is_refused(run_main, tmp_path):
    options = [
        "--total-timesteps",
        1000,
        "--eval-every",
        1000,
        "--learning-starts",
        990,
        "--hidden",
        8,
        "--run-dir",
        "run",
    ]
    options += ["--batch-size", 4, "--eval-episodes", 1, "--final-eval-episodes", 1, "--datasets", "expert"]
    run_main(td3, "--task", "walker-stand", *options, "--num-transitions", 1000)
    replay = tmp_path / "run/replay.f32"
    replay.write_bytes(replay.read_bytes()[:-8])
    assert_refused(run_main(td3, "--resume", "run", "--total-timesteps", 2000), "replay.f32", "1000 steps")
    assert_refused(run_main(td3, "--resume", "run", "--run-dir", "other"), "--run-dir", "--resume cannot change")


def test_as_a_user_sees_it(tmp_path):
    """In a process of its own: one line on standard error, nothing else, no traceback."""
    process = script("mop_pbrl_teacher", "--task", "walker-stand", "--data", "none.npz", cwd=tmp_path)
    assert process.returncode == 1 and process.stdout == ""
    expected = "none.npz: no such dataset; collect one with: python mop_td3_collect.py --task walker-stand"
    assert process.stderr == f"mop_pbrl_teacher.py: error: {expected}\n"


def test_kl_needs_gaussian_teachers_of_one_kind(run_main, tmp_path):
    options = ["--loss", "kl", "--data", *(write_dataset(tmp_path / f"{t}.npz", t) for t in distill.Args.tasks)]
    kinds = {"plain": None, "bounded": (-5.0, 0.0), "tanh": (-1.0, 1.0)}
    path = {
        (i, kind): write_teacher(tmp_path / f"{kind}{i}.pt", task, log_std=log_std)
        for i, task in enumerate(distill.Args.tasks)
        for kind, log_std in kinds.items()
    }
    outcome = run_main(distill, *options, "--teachers", path[0, "bounded"], path[1, "plain"])
    assert_refused(outcome, "plain1.pt", "a deterministic one", "--actor gaussian")
    outcome = run_main(distill, *options, "--teachers", path[0, "bounded"], path[1, "tanh"])
    assert_refused(outcome, "tanh1.pt", "of one kind", "(-1.0, 1.0)")
