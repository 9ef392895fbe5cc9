"""The path of --cuda-graph. On a GPU against the eager loop; on a CPU with a recorder in place of torch.cuda.CUDAGraph.

The recorder keeps every operation that an update makes, with the tensors it read and wrote, refuses those that a CUDA
graph cannot hold (values read back to Python, tensors made from its numbers), and a replay repeats them on the same
tensors. So what a graph would freeze by mistake (a step's number, a batch, a coefficient) shows as other weights.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mop_distill as distill
import mop_ds as ds
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, own_rewards, write_dataset, write_teacher

FORBIDDEN = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Stands in for a CUDAGraph: recording changes nothing, replay() repeats the operations on the same tensors."""

    recorded = 0

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def register_generator_state(self, generator):
        self.generator = generator

    def __enter__(self):
        self.state = self.generator.get_state()
        return super().__enter__()

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        name = function._schema.name
        assert name not in FORBIDDEN, f"{name}: a CUDA graph cannot hold it"
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    self.before.setdefault(tensor.untyped_storage().data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        Recorder.recorded += 1
        self.generator.set_state(self.state)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded_instead(monkeypatch, module):
    """in_cuda_graph as on CUDA, with a Recorder for a graph and nothing for the streams."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)

    class CudaGenerator:  # the CPU's, which says that it is CUDA's
        def __init__(self, generator):
            self.device, self.get_state = torch.device("cuda"), generator.get_state
            self.set_state = generator.set_state

    original = module.in_cuda_graph
    monkeypatch.setattr(module, "in_cuda_graph", lambda update, on, g: original(update, on, CudaGenerator(g)))


COMMON = ["--eval-episodes", 1, "--final-eval-episodes", 1, "--hidden", 8, "--batch-size", 16, "--overwrite"]
TASKS = "walker-stand", "walker-walk"
LONG = ["--gradient-steps", 20, "--eval-every", 10]
CASES = {
    "pbrl": (pbrl, ["--task", TASKS[0], "--data", "stand.npz", *LONG]),
    "pbrl gaussian": (pbrl, ["--task", TASKS[0], "--data", "stand.npz", "--actor", "gaussian", *LONG]),
    "pbrl naive": (pbrl, ["--tasks", *TASKS, "--data", "stand.npz", "walk.npz", *LONG]),
    "distill": (distill, ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG]),
    "distill onehot ndcg": (
        distill,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG]
        + ["--task-encoding", "onehot", "--regularizer", "ndcg"],
    ),
    "distill q pairwise": (
        distill,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG]
        + ["--loss", "q", "--regularizer", "pairwise"],
    ),
    "ds": (ds, ["--data", "stand.npz", "walk.npz", "--teacher-steps", 10, "--teacher-hidden", 8, *LONG]),
    "oqs": (
        oqs,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", "--teacher-steps", 10]
        + ["--teacher-hidden", 8, *LONG],
    ),
    "td3": (
        td3,
        ["--task", TASKS[1], "--total-timesteps", 1000, "--eval-every", 1000, "--learning-starts", 980]
        + ["--datasets", "expert", "--num-transitions", 1000, "--num-envs", 1],
    ),
}


def weights(path) -> list:
    checkpoint = torch.load(path, weights_only=True)
    return [checkpoint[name] for name in ("actor", "critics") if name in checkpoint]


def run_case(run_main, name, *more, device="cpu"):
    module, argv = CASES[name]
    result = run_main(module, *argv, *COMMON, "--device", device, *more)
    assert isinstance(result, dict), result
    return [weights(path) for path in result["files"] if path.endswith(".pt")]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Datasets and teachers, and no episodes: they take most of the time and change no weight."""

    def evaluate(policy, envs, device):
        policy(torch.zeros(2, 24, device=device))
        return [0.0]

    for module in (pbrl, distill, ds, oqs, td3):
        monkeypatch.setattr(module, "evaluate", evaluate)
    for seed, task in enumerate(TASKS):
        name = task.partition("-")[2]
        write_dataset(tmp_path / f"{name}.npz", task, own_rewards(make_arrays(n=60, seed=seed), task))
        write_teacher(tmp_path / f"{name}.pt", task, seed=seed)


@pytest.mark.parametrize("name", CASES)
def test_replayed_updates_give_the_weights_of_the_eager_loop(name, run_main, files, monkeypatch):
    module = CASES[name][0]
    expected = run_case(run_main, name, "--run-dir", "eager")
    recorded_instead(monkeypatch, module)
    before = Recorder.recorded
    found = run_case(run_main, name, "--run-dir", "recorded", "--cuda-graph")
    assert Recorder.recorded > before
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pbrl", "distill"])
def test_a_resumed_run_replays_on(name, run_main, files, monkeypatch):
    """beta_ood's step and the generator go on where the resume point left them."""
    module = CASES[name][0]
    expected = run_case(run_main, name, "--run-dir", "whole")
    recorded_instead(monkeypatch, module)
    before = Recorder.recorded
    run_case(run_main, name, "--run-dir", "half", "--cuda-graph", "--gradient-steps", 10)
    result = run_main(module, "--resume", "half", "--gradient-steps", 20)
    assert Recorder.recorded == before + (4 if module is pbrl else 2)  # PBRL: with the actor and without
    torch.testing.assert_close([weights(result["files"][0])], expected, rtol=0, atol=0)


def test_the_recorder_finds_a_frozen_number(monkeypatch):
    """A number from Python stays what it was while recording: the check above would see it."""
    recorded_instead(monkeypatch, pbrl)
    for frozen in (False, True):
        number, count, total = -1, torch.zeros(()), torch.zeros(())

        def update(frozen=frozen, count=count, total=total):
            nonlocal number
            number += 1
            total.add_(float(number) if frozen else count)
            count.add_(1)
            return total

        updates = pbrl.in_cuda_graph(update, True, torch.Generator())
        values = [updates().item() for _ in range(6)]
        assert (values == [0, 1, 3, 6, 10, 15]) is not frozen, values


def test_the_recorder_refuses_what_a_graph_cannot_hold(monkeypatch):
    recorded_instead(monkeypatch, pbrl)
    for wrong in (lambda: torch.ones(()).item(), lambda: torch.tensor(3.0)):
        updates = pbrl.in_cuda_graph(wrong, True, torch.Generator())
        for _ in range(3):
            updates()
        with pytest.raises(AssertionError, match="cannot hold"):
            updates()


def test_without_the_flag_or_without_cuda_the_update_itself_is_called():
    def update():
        return {}

    assert all(pbrl.in_cuda_graph(update, on, torch.Generator()) is update for on in (False, True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph_equals_eager_on_a_gpu(name, run_main, files):
    expected = run_case(run_main, name, "--run-dir", "eager", device="cuda")
    found = run_case(run_main, name, "--run-dir", "graph", "--cuda-graph", device="cuda")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
