"""The path of --cuda-graph. On a GPU against the eager loop; on a CPU with a recorder in place of torch.cuda.CUDAGraph.

The recorder keeps every operation that an update makes, with the tensors it read and wrote, refuses those that a CUDA
graph cannot hold (values read back to Python, tensors made from its numbers), and a replay repeats them on the same
tensors. So what a graph would freeze by mistake (a step's number, a batch, a coefficient) shows as other weights.
"""

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mop_distill as distill
import mop_ds as ds
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import make_arrays, write_dataset, write_teacher

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
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)

    class CudaGenerator:  # the CPU's, which says that it is CUDA's
        def __init__(self, generator):
            self.device, self.get_state = torch.device("cuda"), generator.get_state
            self.set_state = generator.set_state

    original = module.in_cuda_graph
    monkeypatch.setattr(module, "in_cuda_graph", lambda update, n, g: original(update, n, CudaGenerator(g)))


COMMON = ["--eval-episodes", 1, "--final-eval-episodes", 1, "--hidden", 8, "--batch-size", 16, "--overwrite"]
TASKS = "walker-stand", "walker-walk"
LONG = ["--gradient-steps", 20, "--eval-every", 10]
CASES = {
    "pbrl": (pbrl, ["--task", TASKS[0], "--data", "stand.npz", *LONG], 2),
    "pbrl gaussian": (pbrl, ["--task", TASKS[0], "--data", "stand.npz", "--actor", "gaussian", *LONG], 2),
    "pbrl naive": (pbrl, ["--tasks", *TASKS, "--data", "stand.npz", "walk.npz", *LONG], 2),
    "distill": (distill, ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG], 5),
    "distill onehot ndcg": (
        distill,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG]
        + ["--task-encoding", "onehot", "--regularizer", "ndcg"],
        5,
    ),
    "distill q pairwise": (
        distill,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", *LONG]
        + ["--loss", "q", "--regularizer", "pairwise"],
        2,
    ),
    "ds": (ds, ["--data", "stand.npz", "walk.npz", "--teacher-steps", 10, "--teacher-hidden", 8, *LONG], 2),
    "oqs": (
        oqs,
        ["--data", "stand.npz", "walk.npz", "--teachers", "stand.pt", "walk.pt", "--teacher-steps", 10]
        + ["--teacher-hidden", 8, *LONG],
        2,
    ),
    "td3": (
        td3,
        ["--task", TASKS[1], "--total-timesteps", 1000, "--eval-every", 1000, "--learning-starts", 980]
        + ["--datasets", "expert", "--num-transitions", 1000, "--num-envs", 1],
        1,
    ),
}


def weights(path) -> list:
    checkpoint = torch.load(path, weights_only=True)
    return [checkpoint[name] for name in ("actor", "critics") if name in checkpoint]


def run_case(run_main, name, *more, device="cpu"):
    module, argv, _ = CASES[name]
    result = run_main(module, *argv, *COMMON, "--device", device, *more)
    assert isinstance(result, dict), result
    return [weights(path) for path in result["files"] if path.endswith(".pt")]


@pytest.fixture
def files(tmp_path):
    for seed, task in enumerate(TASKS):
        name = task.partition("-")[2]
        write_dataset(tmp_path / f"{name}.npz", task, make_arrays(n=60, seed=seed))
        write_teacher(tmp_path / f"{name}.pt", task, seed=seed)


@pytest.mark.parametrize("name", CASES)
def test_replayed_updates_give_the_weights_of_the_eager_loop(name, run_main, files, monkeypatch):
    module, _, n = CASES[name]
    expected = run_case(run_main, name, "--run-dir", "eager")
    in_blocks = run_case(run_main, name, "--run-dir", "blocks", "--cuda-graph", n)  # on a CPU: eager, n at a time
    torch.testing.assert_close(in_blocks, expected, rtol=0, atol=0)
    recorded_instead(monkeypatch, module)
    before = Recorder.recorded
    found = run_case(run_main, name, "--run-dir", "recorded", "--cuda-graph", n)
    assert Recorder.recorded > before
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pbrl", "distill"])
def test_a_resumed_run_replays_on(name, run_main, files, monkeypatch):
    """beta_ood's step and the generator go on where the resume point left them."""
    module = CASES[name][0]
    expected = run_case(run_main, name, "--run-dir", "whole")
    recorded_instead(monkeypatch, module)
    before = Recorder.recorded
    run_case(run_main, name, "--run-dir", "half", "--cuda-graph", 2, "--gradient-steps", 10)
    result = run_main(module, "--resume", "half", "--gradient-steps", 20)
    assert Recorder.recorded == before + 2
    torch.testing.assert_close([weights(result["files"][0])], expected, rtol=0, atol=0)


def test_the_recorder_finds_a_frozen_number(monkeypatch):
    """A number from Python stays what it was while recording: the check above would see it."""
    recorded_instead(monkeypatch, pbrl)
    for frozen in (False, True):
        count, total = torch.zeros(()), torch.zeros(())

        def update(step, frozen=frozen, count=count, total=total):
            total.add_(float(step) if frozen else count)
            count.add_(1)
            return total

        updates = pbrl.in_cuda_graph(update, 2, torch.Generator())
        values = [updates(step).item() for step in range(0, 12, 2)]
        assert (values == [1, 6, 15, 28, 45, 66]) is not frozen, values


def test_the_recorder_refuses_what_a_graph_cannot_hold(monkeypatch):
    recorded_instead(monkeypatch, pbrl)
    for wrong in (lambda step: torch.ones(()).item(), lambda step: torch.tensor(3.0)):
        updates = pbrl.in_cuda_graph(wrong, 1, torch.Generator())
        for step in range(3):
            updates(step)
        with pytest.raises(AssertionError, match="cannot hold"):
            updates(3)


@pytest.mark.parametrize("module", [pbrl, distill, ds, oqs])
def test_a_block_that_does_not_fit_the_loop(module, run_main, files, tmp_path):
    data = ["--data", "stand.npz"] if module is pbrl else ["--data", "stand.npz", "walk.npz"]
    task = ["--task", TASKS[0]] if module is pbrl else []
    code, text = run_main(module, *task, *data, *LONG, "--cuda-graph", 8)
    assert code and "--cuda-graph: expected a multiple of" in text and "found 8" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph_equals_eager_on_a_gpu(name, run_main, files):
    expected = run_case(run_main, name, "--run-dir", "eager", device="cuda")
    found = run_case(run_main, name, "--run-dir", "graph", "--cuda-graph", CASES[name][2], device="cuda")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
