"""--cuda-graph: against the eager loop on a GPU; on a CPU with a recorder for torch.cuda.CUDAGraph
below tensordict's CudaGraphModule.

The recorder keeps every operation of an update with the tensors it read and wrote, refuses those
that a CUDA graph cannot hold (values read back to Python, tensors made from its numbers), and a
replay repeats them on the same tensors. So what a graph would freeze by mistake (a step's number,
a batch, a coefficient) shows as other weights.
"""

import contextlib

import naive_multitask_pbrl as naive
import pytest
import torch
from tensordict.nn import CudaGraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mop_distill as distill
import mop_ds as ds
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from test_loops import TASKS, load, use_world, write_inputs, write_toy_teacher

FORBIDDEN = ["_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal"]
TINY = ["--eval-episodes", 1, "--final-eval-episodes", 1, "--hidden", 8, "--batch-size", 16]
STEPS = ["--gradient-steps", 20, "--eval-every", 10]
TEACHER = ["--task", "toy-up", "--bc-coef", 1, *STEPS]
STUDENT = ["--tasks", *TASKS, "--level", "medium", "expert", *STEPS]
TD3 = ["--task", "toy-up", "--total-timesteps", 60, "--eval-every", 60, "--medium-step", 60]
TD3 += ["--learning-starts", 40, "--datasets", "medium-replay"]
CASES = {
    "teacher": (pbrl, [*TEACHER, "--anneal", 0.5]),
    "Gaussian teacher": (pbrl, [*TEACHER, "--actor", "gaussian"]),
    "student": (distill, STUDENT),
    "onehot ndcg": (distill, [*STUDENT, "--task-encoding", "onehot", "--regularizer", "ndcg"]),
    "q pairwise": (distill, [*STUDENT, "--loss", "q", "--regularizer", "pairwise"]),
    "ds": (ds, [*TEACHER, "--sources", "toy-up"]),
    "oqs": (oqs, STUDENT),
    "naive": (naive, [*STUDENT, "--anneal", 0.5]),
    "td3": (td3, TD3),
}
GRAPHS = {distill: 1, pbrl: 3, ds: 3, oqs: 1, naive: 2 + 2 + 1, td3: 2}


def tensors(values) -> list:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """A CUDAGraph: recording changes no tensor, replay() repeats the operations on them."""

    recorded = 0  # graphs

    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = {}  # address -> tensor that was written, and its values before

    def __enter__(self):
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in FORBIDDEN, f"{name}: a CUDA graph cannot hold it"
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    address = tensor.untyped_storage().data_ptr()
                    self.before.setdefault(address, (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        Recorder.recorded += 1
        torch.set_rng_state(self.random_state)
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


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def recorder(monkeypatch):
    """CudaGraphModule as on CUDA, with a Recorder for a graph and streams that do nothing."""
    monkeypatch.setattr(Recorder, "recorded", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(CudaGraphModule, "_check_device_and_clone", CudaGraphModule._clone)
    check = pbrl.check

    def check_all_else(condition, message):
        if message != "--cuda-graph: expected --device cuda":
            check(condition, message)

    for module in GRAPHS:
        monkeypatch.setattr(module, "check", check_all_else)


@pytest.fixture
def end_of_run(run_main, monkeypatch):
    """Runs a script in World: its weights and Adam's moments, all tensors of its resume point."""
    use_world(monkeypatch)
    write_inputs(TASKS)
    for name, task, source in (
        ("toy-up-from-toy-down-expert-teacher", "toy-up", "toy-down"),
        ("toy-down-from-toy-up-medium-teacher", "toy-down", "toy-up"),
    ):
        write_toy_teacher(name, task, data_tasks=[source])

    def run(module, run_dir, *flags):
        outcome = run_main(module, *flags, "--run-dir", run_dir, "--overwrite")
        assert isinstance(outcome, str), outcome
        resume_point = load(f"{run_dir}/resume.pt")
        del resume_point["args"]
        return tensors(resume_point)

    return run


@pytest.mark.parametrize("name", CASES)
def test_replayed_updates_give_the_weights_of_the_eager_loop(name, end_of_run, request):
    module, flags = CASES[name]
    flags = [*flags, *TINY, "--device", "cpu"]
    expected = end_of_run(module, "eager", *flags)
    request.getfixturevalue("recorder")
    found = end_of_run(module, "recorded", *flags, "--cuda-graph")
    assert Recorder.recorded == GRAPHS[module]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Gaussian teacher", "student"])
def test_a_resumed_run_replays_on(name, end_of_run, request):
    """beta_ood's step and the random numbers go on where the resume point left them."""
    module, flags = CASES[name]
    flags = [*flags, *TINY, "--device", "cpu"]
    expected = end_of_run(module, "whole", *flags)
    request.getfixturevalue("recorder")
    end_of_run(module, "half", *flags, "--cuda-graph", "--gradient-steps", 10)
    found = end_of_run(module, "half", "--resume", "half", "--gradient-steps", 20)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_recorder_finds_a_frozen_number(recorder):
    """A number from Python stays what it was while recording: the tests above would see it."""
    number = 0.0
    total = torch.zeros(())

    def update():
        nonlocal number
        number += 1
        return total.add_(number)

    updates = CudaGraphModule(update)
    values = [updates().item() for _ in range(5)]
    assert values == [1, 3, 6, 9, 12]  # and not 10, 15


@pytest.mark.parametrize("wrong", [lambda: torch.ones(()).item(), lambda: torch.tensor(3.0)])
def test_the_recorder_refuses_what_a_graph_cannot_hold(recorder, wrong):
    updates = CudaGraphModule(wrong)
    updates()
    with pytest.raises(AssertionError, match="cannot hold"):
        updates()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph_equals_eager_on_a_gpu(name, end_of_run):
    module, flags = CASES[name]
    flags = [*flags, *TINY, "--device", "cuda"]
    expected = end_of_run(module, "eager", *flags)
    found = end_of_run(module, "graph", *flags, "--cuda-graph")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
