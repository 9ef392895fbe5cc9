"""Bad input: one clear line that names the file or flag, exit code not zero, nothing written or overwritten."""

import io
import pickle
import resource
import subprocess
import sys
import zipfile
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
from conftest import ROOT, make_arrays, own_rewards, script, write_dataset, write_teacher


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
    "missing rewards": ({k: v for k, v in make_arrays().items() if k != "rewards"}, ["KeyError", "rewards"]),
    "integer actions": (change(actions=np.zeros((200, 6), int)), ["actions", "int64"]),
    "object rewards": (change(rewards=np.array([None] * 200)), [".npz"]),
    "float terminals": (change(terminals=np.zeros(200)), ["terminals", "float64"]),
    "flat observations": (change(observations=np.zeros(200, np.float32)), ["observations", "(200,)"]),
    "short rewards": (change(rewards=np.zeros(199, np.float32)), ["(200, 24)", "rewards: 199 rows"]),
    "empty": ({k: v[:0] for k, v in make_arrays().items()}, ["(0, 24)"]),
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
    assert_refused(
        run_main(pbrl, *base, "none.npz"), "none.npz", "FileNotFoundError", "mop_td3_collect.py --task walker-stand"
    )
    for content in (good[: len(good) // 2], b"", b"PK\x03\x04 nonsense", pickle.dumps({"a": Payload()})):
        path = write_bytes(tmp_path / "broken.npz", content)
        assert_refused(run_main(pbrl, *base, path), "broken.npz", "expected a dataset .npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert_refused(run_main(pbrl, *base, tmp_path / "array.npy"), "array.npy", "expected a dataset .npz")
    np.savez(tmp_path / "objects.npz", **make_arrays(), metadata=np.array([Payload()], dtype=object))
    assert_refused(run_main(pbrl, *base, tmp_path / "objects.npz"), "objects.npz", "pickled")
    assert not (tmp_path / "executed").exists()
    np.savez(tmp_path / "bare.npz", **make_arrays(), metadata=np.array("{"))
    assert_refused(run_main(pbrl, *base, tmp_path / "bare.npz"), "bare.npz", "metadata")
    path = write_dataset(tmp_path / "schema.npz", schema_version=99)
    assert_refused(run_main(pbrl, *base, path), "schema.npz", "schema version 99")
    path = write_dataset(tmp_path / "other.npz", task="walker-walk")
    assert_refused(run_main(pbrl, *base, path), "other.npz", "data of walker-walk, not of walker-stand")
    assert_refused(run_main(pbrl, "--task", "walker-run"), "data/walker-run-medium.npz", "mop_td3_collect.py")


CHECKPOINTS = {
    "kind": ({"kind": "behavior"}, ["kind behavior, not teacher"]),
    "schema": ({"schema_version": 7}, ["schema version 7, not 1"]),
    "task": ({"tasks": ["walker-walk"]}, ["walker-walk, not walker-stand"]),
    "no returns": ({"returns": {}}, ["KeyError", "walker-stand"]),
    "no weights": ({"actor": {}}, ["expected weights and sizes that fit together", "net.0.weight"]),
    "sizes": (
        {"sizes": {"in_dim": 24, "action_dim": 6, "hidden": 9, "layer_norm": False}},
        ["expected weights and sizes that fit together", "[9, 24]"],
    ),
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
    assert_refused(run_main(distill, *options, "none.pt"), "none.pt", "FileNotFoundError")
    for content in (good[: len(good) // 2], b"", b"text", pickle.dumps(Payload())):
        path = write_bytes(tmp_path / "broken.pt", content)
        assert_refused(run_main(distill, *options, path), "broken.pt", "expected a readable checkpoint")
    torch.save({"schema_version": 1, "kind": "teacher", "payload": Payload()}, tmp_path / "payload.pt")
    assert_refused(
        run_main(distill, *options, tmp_path / "payload.pt"), "payload.pt", "pickled objects (those are refused)"
    )
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(run_main(distill, *options, tmp_path / "list.pt"), "list.pt", "expected a readable checkpoint")
    torch.save({"schema_version": 1, "kind": "teacher"}, tmp_path / "part.pt")
    assert_refused(run_main(distill, *options, tmp_path / "part.pt"), "part.pt", "KeyError: 'tasks'")
    assert_refused(run_main(td3, "--policy", tmp_path / "part.pt"), "part.pt", "KeyError: 'tasks'")


def test_teacher_of_another_observation_size(run_main, tmp_path):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz")]
    outcome = run_main(distill, *options, "--teachers", write_teacher(tmp_path / "t.pt", obs_dim=17))
    assert_refused(outcome, "expected a teacher of 24 observations, found 17", "t.pt")


@pytest.mark.parametrize(
    "module, options, words",
    [
        (td3, ["--task", "walker-fly"], ["walker-fly", "walker-stand, walker-walk, walker-run"]),
        (td3, ["--hidden", -1], ["--hidden", "-1"]),
        (td3, ["--batch-size", 0], ["--batch-size", "0"]),
        (distill, ["--batch-size", 2_000_000_000], ["--batch-size", "to 65536, found 2000000000"]),
        (pbrl, ["--num-critics", 2_000_000_000], ["--num-critics", "to 1024, found 2000000000"]),
        (td3, ["--total-timesteps", 1500], ["--total-timesteps", "multiple of 1000"]),
        (td3, ["--eval-every", 1], ["--eval-every", "multiple of 1000"]),
        (td3, ["--total-timesteps", 20000], ["--medium-step", "1000000"]),
        (td3, ["--threads", -2], ["--threads", "-2"]),
        (td3, ["--num-envs", 0], ["--num-envs"]),
        (td3, ["--policy", "none.pt", "--num-transitions", -4], ["--num-transitions", "-4"]),
        (td3, ["--seed", -3], ["--seed", "-3"]),
        (td3, ["--tau", 1.5], ["--tau", "to 1, found 1.5"]),
        (pbrl, ["--policy-noise", -0.1], ["--policy-noise", "-0.1"]),
        (pbrl, ["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (td3, ["--resume", "nowhere"], ["--resume nowhere"]),
        (pbrl, ["--task", "nodash"], ["nodash"]),
        (pbrl, ["--gradient-steps", -5], ["--gradient-steps", "-5"]),
        (pbrl, ["--num-critics", 1], ["--num-critics", "2"]),
        (pbrl, ["--learning-rate", 0], ["--learning-rate"]),
        (pbrl, ["--level", "medium", "expert"], ["--level"]),
        (distill, ["--tasks", "walker-stand", "walker-stand"], ["distinct"]),
        (distill, ["--data", "a.npz"], ["--data", "one per task"]),
        (distill, ["--hidden", 0], ["--hidden"]),
        (distill, ["--states", "a.npz"], ["--states", "one file per task"]),
        (distill, ["--states", "a.npz", "b.npz", "--data", "c.npz", "d.npz"], ["--states", "without --data"]),
        (distill, ["--states", "online", "--data", "c.npz", "d.npz"], ["--states", "without --data"]),
        (distill, ["--states", "a.npz", "b.npz"], ["a.npz", "FileNotFoundError"]),
        (distill, ["--tasks", "walker-stand", "--regularizer", "ndcg"], ["--regularizer", "two or more"]),
        (
            distill,
            ["--loss", "kl", "--level", "expert"],
            ["walker-stand-expert-teacher-gaussian.pt", "--actor gaussian"],
        ),
        (distill, ["--reg-lambda", -1], ["--reg-lambda", "-1"]),
        (pbrl, ["--tasks", "walker-stand"], ["--tasks", "two or more", "--task"]),
        (pbrl, ["--tasks", "walker-stand", "walker-stand"], ["--tasks", "distinct"]),
        (pbrl, ["--tasks", "walker-stand", "walker-walk", "--data", "a.npz"], ["--level, --data", "walker-walk"]),
        (pbrl, ["--tasks", "walker-stand", "cartpole-balance"], ["cartpole-balance"]),
        (distill, ["--tasks", "walker-stand", "cheetah-run"], ["cheetah-run", "one domain"]),
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
    assert_refused(run_main(pbrl, *base, "--run-dir", "run"), "run", "expected an empty folder")
    policy = write_teacher(tmp_path / "walker-stand-medium-behavior.pt", kind="behavior")
    outcome = run_main(td3, "--policy", policy, "--num-transitions", 1000)
    assert_refused(outcome, "data/walker-stand-medium.npz", "--overwrite")
    assert old.read_bytes() == b"precious" and sorted(p.name for p in (tmp_path / "run").iterdir()) == ["note.txt"]


def test_folders_that_cannot_be_written(run_main, tmp_path):
    data = write_dataset(tmp_path / "d.npz")
    write_bytes(tmp_path / "file", b"")
    base = ["--task", "walker-stand", "--data", data]
    assert_refused(run_main(pbrl, *base, "--run-dir", "file/run"), "file/run", "expected a folder that can be made")
    assert_refused(run_main(pbrl, *base, "--output", "file/teacher.pt"), "file", "expected a folder that can be made")
    policy = write_teacher(tmp_path / "p-behavior.pt", kind="behavior")
    outcome = run_main(td3, "--policy", policy, "--num-transitions", 10, "--output", "file/d.npz")
    assert_refused(outcome, "file", "expected a folder that can be made")
    with pytest.raises(
        SystemExit, match=r"file/d\.npz: expected free space and a folder you may write to"
    ):  # as when a folder vanishes during a run
        td3.write_atomic("file/d.npz", lambda file: file.write(b"x"))


def test_resuming_with_another_network_is_refused(run_main, tmp_path):
    options = ["--task", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--run-dir", "run"]
    options += ["--gradient-steps", 2, "--hidden", 8, "--batch-size", 4, "--eval-episodes", 1]
    run_main(pbrl, *options, "--final-eval-episodes", 1)
    assert_refused(run_main(pbrl, "--resume", "run", "--hidden", 16), "size mismatch", "[16, 24]")
    write_bytes(tmp_path / "run/resume.pt", b"cut")
    assert_refused(run_main(pbrl, "--resume", "run"), "--resume run", "expected a run folder with a resume point")


def test_resuming_with_a_damaged_replay_buffer_is_refused(run_main, tmp_path):
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
    point = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    for replay in (point["replay"][:-1], point["replay"][:, :-1], None):
        torch.save(point | {"replay": replay}, tmp_path / "run/resume.pt")
        outcome = run_main(td3, "--resume", "run", "--total-timesteps", 2000)
        assert_refused(outcome, "--resume", "expected a resume point with all its parts")
    torch.save(point, tmp_path / "run/resume.pt")
    outcome = run_main(td3, "--resume", "run", "--total-timesteps", 2000, "--task", "walker-walk")
    assert_refused(outcome, "--resume run", "expected a run of walker-walk")


def test_as_a_user_sees_it(tmp_path):
    """In a process of its own: one line on standard error, nothing else, no traceback."""
    process = script("mop_pbrl_teacher", "--task", "walker-stand", "--data", "none.npz", cwd=tmp_path)
    assert process.returncode == 1 and process.stdout == ""
    expected = "a dataset .npz with metadata as in docs/formats.md, no pickled objects"
    expected += " (made by python mop_td3_collect.py --task walker-stand)"
    found = "FileNotFoundError: [Errno 2] No such file or directory: 'none.npz'"
    assert process.stderr == f"mop_pbrl_teacher.py: error: none.npz: expected {expected}; found {found}\n"


def test_kl_needs_gaussian_teachers_of_one_kind(run_main, tmp_path):
    options = ["--loss", "kl", "--data", *(write_dataset(tmp_path / f"{t}.npz", t) for t in distill.Args.tasks)]
    kinds = {"plain": None, "bounded": (-5.0, 0.0), "tanh": (-1.0, 1.0)}
    path = {
        (i, kind): write_teacher(tmp_path / f"{kind}{i}.pt", task, log_std=log_std)
        for i, task in enumerate(distill.Args.tasks)
        for kind, log_std in kinds.items()
    }
    outcome = run_main(distill, *options, "--teachers", path[0, "bounded"], path[1, "plain"])
    assert_refused(outcome, "plain1.pt", "found log std None", "--actor gaussian")
    outcome = run_main(distill, *options, "--teachers", path[0, "bounded"], path[1, "tanh"])
    assert_refused(outcome, "tanh1.pt", "of one kind", "(-1.0, 1.0)")


# what must not be accepted in silence


def tiny(tmp_path, *more):
    """The flags of a PBRL run of a few updates."""
    data = write_dataset(tmp_path / "d.npz")
    sizes = ["--hidden", 8, "--batch-size", 4, "--eval-episodes", 1, "--final-eval-episodes", 1, "--threads", 1]
    return ["--task", "walker-stand", "--data", data, "--run-dir", "run", *sizes, *more]


def test_a_run_that_diverges_stops_and_keeps_its_last_resume_point(run_main, tmp_path):
    run_main(pbrl, *tiny(tmp_path, "--gradient-steps", 2, "--output", "a.pt"))
    before = (tmp_path / "run/resume.pt").read_bytes()
    options = ["--resume", "run", "--learning-rate", "1e9", "--gradient-steps", 40, "--output", "b.pt"]
    assert_refused(run_main(pbrl, *options), "step 40", "nan", "resume point")
    assert (tmp_path / "run/resume.pt").read_bytes() == before and not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
    "module, options",
    [
        (pbrl, ["--beta-in", "inf"]),
        (pbrl, ["--bc-coef", "inf"]),
        (pbrl, ["--learning-rate", "inf"]),
        (distill, ["--reg-lambda", "inf"]),
        (distill, ["--learning-rate", "inf"]),
        (td3, ["--exploration-noise", "nan"]),
        (pbrl, ["--seed", 2**64]),
        (distill, ["--threads", 10**6]),
        (td3, ["--hidden", 2**40]),
    ],
)
def test_numbers_that_are_not_finite_or_absurd(run_main, tmp_path, module, options):
    assert_refused(run_main(module, *options), options[0], "expected a number from")
    assert not list(tmp_path.iterdir())


def changed_weights(path, value):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["actor"]["net.2.weight"][0, 0] = value
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(run_main, tmp_path, value):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz")]
    path = changed_weights(write_teacher(tmp_path / "t.pt"), value)
    assert_refused(run_main(distill, *options, "--teachers", path), "t.pt", "beyond a million")
    assert_refused(run_main(td3, "--policy", path, "--num-transitions", 1000), "t.pt", "beyond a million")
    assert not list((tmp_path / "data").glob("*.npz"))


def test_flipped_bits_in_a_checkpoint(run_main, tmp_path):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--teachers"]
    good = bytearray(write_teacher(tmp_path / "t.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    good[entry.header_offset + 200 + entry.file_size // 2] ^= 0x40
    write_bytes(tmp_path / "t.pt", bytes(good))
    assert_refused(run_main(distill, *options, tmp_path / "t.pt"), "t.pt", "damaged bytes")


def test_absurd_sizes_in_a_checkpoint(run_main, tmp_path):
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--teachers"]
    sizes = torch.load(write_teacher(tmp_path / "t.pt"), weights_only=True)["sizes"]
    for change_ in ({"hidden": 10**9}, {"in_dim": 10**9}, {"hidden": "wide"}, {"action_dim": None}):
        path = write_teacher(tmp_path / "t.pt", sizes=sizes | change_)
        assert_refused(run_main(distill, *options, path), "t.pt", "fit together")
    for returns in ({"walker-stand": "many"}, {"walker-stand": [float("nan")]}, None, 3):
        path = write_teacher(tmp_path / "t.pt", returns=returns)
        assert_refused(run_main(distill, *options, path), "t.pt")


def test_numbers_that_float32_cannot_hold(run_main, tmp_path):
    rewards = np.zeros(200)
    rewards[9] = 1e200
    path = write_dataset(tmp_path / "d.npz", arrays=change(rewards=rewards))
    assert_refused(run_main(pbrl, "--task", "walker-stand", "--data", path), "d.npz", "rewards", "row 9")


def test_other_byte_orders_and_precisions_are_converted(run_main, tmp_path):
    plain = pbrl.load_dataset(write_dataset(tmp_path / "a.npz", arrays=make_arrays()), None, (24, 6))[0]
    odd = {k: v.astype(">f8") if v.dtype.kind == "f" else v for k, v in make_arrays().items()}
    for name, array in pbrl.load_dataset(write_dataset(tmp_path / "b.npz", arrays=odd), None, (24, 6))[0].items():
        assert array.dtype == plain[name].dtype
        np.testing.assert_array_equal(array, plain[name])


@pytest.mark.parametrize("text", ["[" * 5000, "[]", '{"schema_version": 1}', "NaN"])
def test_odd_metadata(run_main, tmp_path, text):
    np.savez(tmp_path / "d.npz", **make_arrays(), metadata=np.array(text))
    assert_refused(run_main(pbrl, "--task", "walker-stand", "--data", tmp_path / "d.npz"), "d.npz")


def test_outputs_that_are_no_files_or_inputs(run_main, tmp_path):
    options = tiny(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("folder", "/dev/null", tmp_path / "d.npz"):
        outcome = run_main(pbrl, *options, "--output", path, "--overwrite")
        assert_refused(outcome, str(path), "expected a file to write")
    policy = write_teacher(tmp_path / "t.pt")
    outcome = run_main(td3, "--policy", policy, "--num-transitions", 1000, "--output", policy, "--overwrite")
    assert_refused(outcome, "t.pt", "expected a file to write")
    torch.load(policy, weights_only=True)


def test_resume_points_that_do_not_fit(run_main, tmp_path):
    run_main(pbrl, *tiny(tmp_path, "--gradient-steps", 4, "--output", "a.pt"))
    resume = ["--resume", "run", "--gradient-steps", 6]
    other = write_dataset(tmp_path / "other.npz", arrays=make_arrays(seed=1))
    assert_refused(run_main(pbrl, *resume, "--data", other), "--resume", "other data")
    assert_refused(run_main(pbrl, "--resume", "run", "--gradient-steps", 3), "--resume", "4 steps done of 3")
    assert_refused(run_main(distill, "--resume", "run"), "--resume run", "one of mop_pbrl_teacher.py")
    (tmp_path / "b").mkdir()
    write_bytes(tmp_path / "b/resume.pt", b"of another run")  # a run goes on in its own folder, whatever is said
    assert run_main(pbrl, "--resume", "run", "--run-dir", "b", "--gradient-steps", 5)["run_dir"] == "run"
    assert (tmp_path / "b/resume.pt").read_bytes() == b"of another run" and len([*(tmp_path / "b").iterdir()]) == 1
    good = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    for change_ in (
        {"step": -5},
        {"step": "x"},
        {"step": 2.5},
        {"rows": None},
        {"argv": 3},
        {"generator": torch.zeros(3)},
        {"actor": {}},
    ):
        torch.save(good | change_, tmp_path / "run/resume.pt")
        assert_refused(run_main(pbrl, *resume), "--resume")
    torch.save(good | {"argv": [*good["argv"], "--hidden", 2.5]}, tmp_path / "run/resume.pt")
    code, text = run_main(pbrl, *resume)  # tyro's text
    assert code == 2 and "--hidden" in text and "2.5" in text
    adam = torch.load(io.BytesIO(save_to_bytes(good)), weights_only=True)
    adam["actor_optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(adam, tmp_path / "run/resume.pt")
    assert_refused(run_main(pbrl, *resume), "--resume", "other shapes in actor_optimizer")
    torch.save(good, tmp_path / "run/resume.pt")
    assert isinstance(run_main(pbrl, *resume, "--overwrite"), dict)  # flags that the run did not have are taken


def save_to_bytes(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def test_a_symlinked_script_finds_the_bundled_files(tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / "mop_distill.py")
    options = ["--hidden", "8", "--gradient-steps", "1", "--eval-episodes", "1", "--final-eval-episodes", "1"]
    command = [sys.executable, str(tmp_path / "link.py"), *options, "--threads", "1"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and "using the bundled pretrained/walker-stand-medium.npz" in process.stdout


def test_weights_that_give_no_finite_actions_are_refused(run_main, tmp_path):
    """NaN, infinite, so large that a product overflows, or complex: by every script that reads a policy."""
    data = write_dataset(tmp_path / "d.npz")
    for number, change in enumerate((lambda w: w * torch.nan, lambda w: w * 1e38, lambda w: w.to(torch.complex64))):
        path = write_teacher(tmp_path / f"{number}.pt")
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["actor"] = {name: change(w) for name, w in checkpoint["actor"].items()}
        torch.save(checkpoint, path)
        said = f"{number}.pt", "beyond a million"
        assert_refused(run_main(td3, "--policy", path, "--num-transitions", 1000, "--output", "out.npz"), *said)
        assert_refused(run_main(measure, "--teachers", path, "--no-gif"), *said)
        options = ["--tasks", "walker-stand", "--data", data, "--teachers", path]
        assert_refused(run_main(distill, *options), *said)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("module", [distill, ds, oqs])
def test_no_task(run_main, module):
    assert_refused(run_main(module, "--tasks"), "--tasks", "expected one task or more")


def test_shift_of_values_beyond_a_million(run_main, tmp_path):
    huge = write_dataset(tmp_path / "huge.npz", arrays=change(observations=np.full((200, 24), 3e38, np.float32)))
    good = write_dataset(tmp_path / "good.npz")
    assert_refused(run_main(measure, "--shift", good, huge), "huge.npz", "beyond a million")


def test_checkpoints_without_level_or_step_or_with_odd_bounds(run_main, tmp_path):
    for key in ("level", "step"):
        path = write_teacher(tmp_path / "t.pt")
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint[key]
        torch.save(checkpoint, path)
        assert_refused(run_main(td3, "--policy", path, "--output", "out.npz"), "t.pt", key)
    path = write_teacher(tmp_path / "g.pt", log_std=5.0)
    options = ["--tasks", "walker-stand", "--data", write_dataset(tmp_path / "d.npz"), "--loss", "kl"]
    assert_refused(run_main(distill, *options, "--teachers", path), "g.pt", "expected weights and sizes that fit")


@pytest.mark.parametrize("module", [ds, oqs])
def test_physics_states_that_do_not_give_the_rewards(run_main, tmp_path, module):
    """Of the states before the actions, say, or of another model: relabelling would invent rewards."""
    arrays = own_rewards(make_arrays(), "walker-stand")
    for physics in (np.roll(arrays["physics"], 1, axis=0), arrays["physics"][:, :1]):
        data = write_dataset(tmp_path / "stand.npz", arrays=arrays | {"physics": physics})
        other = write_dataset(tmp_path / "walk.npz", "walker-walk")
        options = ["--teachers", *["train"] * 4] if module is oqs else []
        outcome = run_main(module, "--data", data, other, "--run-dir", f"run{physics.shape[1]}", *options)
        assert_refused(outcome, "stand.npz", "expected physics states after the actions, which give the rewards")


def test_only_finite_resume_points_are_written_and_read(tmp_path, monkeypatch):
    weight = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(weight.parameters())
    weight(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    modules, generator = {"actor": weight, "optimizer": optimizer}, torch.Generator()
    save = lambda: pbrl.save_point(tmp_path, 7, modules, generator, [], [])  # noqa: E731
    save()
    good = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert pbrl.restore(good, 9, modules, generator, []) == (7, [])
    optimizer.state[weight.weight]["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(SystemExit, match="step 7: weights or Adam's states are not finite"):
        save()
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == 7
    with pytest.raises(SystemExit, match="not finite"):
        pbrl.restore(good | {"optimizer": optimizer.state_dict()}, 9, modules, generator, [])


@pytest.mark.parametrize("output", ["run", "run/resume.pt", "other/../run/returns.csv"])
def test_the_files_of_the_run_are_no_outputs(run_main, tmp_path, output):
    data = write_dataset(tmp_path / "d.npz")
    outcome = run_main(pbrl, "--task", "walker-stand", "--data", data, "--run-dir", "run", "--output", output)
    assert_refused(outcome, f"{output}: expected a file to write, found an input, a part of run")
    assert not (tmp_path / "run").exists()


def test_a_huge_member_that_nobody_needs_is_not_read(tmp_path):
    """Of 512 MB, compressed to 0.5 MB: np.load reads a member when it is asked for."""
    path = write_dataset(tmp_path / "d.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file, file.open("pixels.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**29,)})
        for _ in range(2**5):
            member.write(bytes(2**24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    distill.load_dataset(path, "walker-stand", (24, 6))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_resume_points_need_disk_space(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(td3.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert_refused(run_main(td3, "--hidden", 8, "--run-dir", "run"), "expected 2.2 GiB of disk space, found 0.9")
