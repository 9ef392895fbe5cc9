"""Times the scripts' own loops, episodes and loading beside the floor of their matrix products.

  python benchmark/speed.py                       # a table, and JSON in benchmark/results/
  python benchmark/speed.py --works pbrl distill   # some of it
  python benchmark/speed.py --works td3 --peer benchmark/plain_td3.py:make
  python benchmark/speed.py --matmul-precision medium
  python benchmark/speed.py --device cuda --cuda-graph --matmul-precision high

A training script is run through its own main() on a made-up dataset, with its progress bar replaced
by a clock, so that nothing of the loop is left out or copied. The floor of a step is the time of
its matrix products alone, each shape at the rate that this machine reaches for it, measured between
the rounds of the loop; on a GPU, where that is more, the time to move the products' operands at the
bandwidth of a copy (a CUDA graph may pass below it: each product is waited for). Figures are
medians over rounds. Shares are those of a whole run: of a step, plus one evaluation of every task
per 10,000 steps and one log per 1000.

--peer FILE.py:FUNCTION times another implementation in turn with ours. The function is called with
(work, device) and returns a function to time, one step of pbrl, distill or td3 or one evaluation of
10 episodes, or None where it has none.
"""

import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import numpy as np
import torch
import tyro

import mop_distill
import mop_pbrl_teacher
import mop_td3_collect

OBS = 24  # of the walker
ACT = 6
TASKS = ("walker-stand", "walker-walk")
Work = Literal["pbrl", "distill", "td3", "evaluation", "collect", "load", "memory"]


@dataclass
class Args:
    works: tuple[Work, ...] = ("pbrl", "distill", "td3", "evaluation", "collect", "load", "memory")
    """what to time, and the memory of a run"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the training loops run"""
    threads: int = torch.get_num_threads()
    """CPU threads, and processes that run episodes"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """the scripts' flag"""
    cuda_graph: bool = False
    """the scripts' flag"""
    rounds: int = 5
    """rounds of a loop and its floor, after one to warm up"""
    steps: int = 20
    """steps of a loop per round"""
    transitions: int = 1_000_000
    """of the collection and of the loaded dataset; times of a smaller number are scaled up to 1M"""
    peer: str | None = None
    """FILE.py:FUNCTION that makes another implementation's functions"""
    output: str | None = None
    """JSON to write; default: benchmark/results/<device>-<threads>-threads[-..].json"""


# --------------------------------------------------------------------------------------- floors
def forward_products(rows: int, *sizes: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product (m, k) @ (k, n) in the forward pass of an MLP."""
    return [(rows, n_in, n_out) for n_in, n_out in pairwise(sizes)]


def backward_products(rows: int, *sizes: int, weights: bool = True, inputs: bool = False) -> list:
    """The same of its backward pass.

    Gradients of the activations and, if asked for, of the weights and of the MLP's input.
    """
    products = []
    for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
        if weights:
            products.append((n_in, rows, n_out))
        if inputs or layer > 0:
            products.append((rows, n_out, n_in))
    return products


def pbrl_products(batch: int = 1024, hidden: int = 256, k: int = 5, num_ood: int = 3) -> list:
    """(count, products) of one update of PBRL; the actor's is made in every second."""
    critic = (OBS + ACT, hidden, hidden, 1)
    actor = (OBS, hidden, hidden, ACT)
    rows = batch * (1 + 2 * num_ood)
    through_critic = backward_products(batch, *critic, weights=False, inputs=True)
    return [
        (k, forward_products(rows, *critic)),
        (k, backward_products(rows, *critic)),
        (k, forward_products(batch, *critic)),  # targets
        (1, forward_products(batch, *actor)),  # next actions
        (1, forward_products(2 * batch, *actor)),  # OOD actions
        (0.5, forward_products(batch, *actor)),
        (0.5, backward_products(batch, *actor)),
        (0.5 * k, forward_products(batch, *critic)),
        (0.5 * k, through_critic),
    ]


def distill_products(batch: int = 1024, hidden: int = 256, m: int = 2) -> list:
    """(count, products) of one update of a student of m tasks."""
    sizes = (OBS + 1, hidden, hidden, ACT)
    return [
        (m, forward_products(batch, *sizes)),
        (m, backward_products(batch, *sizes)),
    ]


def td3_products(batch: int = 1024, hidden: int = 1024) -> list:
    """The same of TD3; the actor's update, in every second step, goes through one critic."""
    critic = (OBS + ACT, hidden, hidden, 1)
    actor = (OBS, hidden, hidden, ACT)
    through_critic = backward_products(batch, *critic, weights=False, inputs=True)
    return [
        (4, forward_products(batch, *critic)),  # two critics and their targets
        (2, backward_products(batch, *critic)),
        (1, forward_products(batch, *actor)),  # next actions
        (1, forward_products(1, *actor)),  # the action
        (0.5, forward_products(batch, *actor)),
        (0.5, backward_products(batch, *actor)),
        (0.5, forward_products(batch, *critic)),
        (0.5, through_critic),
    ]


def median_time(function, repeats: int, device: str = "cpu") -> float:
    """Median seconds of one call, after a warm-up; the clock waits for the device."""
    function()
    times = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def floor(products: list, device: str) -> float:
    """Seconds of the products alone, each shape at the rate it reaches now.

    On a GPU at least the time to move their bytes.
    """
    seconds = {}  # shape -> of one product
    total = 0.0
    for count, shapes in products:
        for m, k, n in shapes:
            if (m, k, n) not in seconds:
                a = torch.randn(m, k, device=device)
                b = torch.randn(k, n, device=device)
                out = torch.empty(m, n, device=device)
                product = partial(torch.mm, a, b, out=out)
                seconds[m, k, n] = median_time(product, 9, device)
            total += count * seconds[m, k, n]
    if device == "cuda":
        return max(total, operand_bytes(products) / bandwidth())
    return total


def bandwidth() -> float:
    """Bytes per second of a copy on the GPU, read and written."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_time(partial(target.copy_, source), 9, "cuda")


def operand_bytes(products: list) -> float:
    """Bytes of the products' operands and results, each moved once."""
    total = 0
    for count, shapes in products:
        for m, k, n in shapes:
            total += count * 4 * (m * k + k * n + m * n)
    return total


def operations(products: list) -> float:
    """Floating-point operations of the products."""
    total = 0
    for count, shapes in products:
        for m, k, n in shapes:
            total += count * 2 * m * k * n
    return total


# ------------------------------------------------------------------------------------ our loops
class Enough(Exception):
    """Raised by on_round to end a script's loop."""


class Clock:
    """A script's progress bar: calls on_round(seconds per step) after every `steps` steps."""

    steps = 1
    on_round = None
    device = "cpu"

    def __init__(self, loop, **options):
        self.loop = loop

    def __iter__(self):
        start = time.perf_counter()
        for count, step in enumerate(self.loop, start=1):
            yield step
            if count % Clock.steps == 0:
                wait_for(Clock.device)
                Clock.on_round((time.perf_counter() - start) / Clock.steps)
                start = time.perf_counter()  # what on_round did is not the loop's


def run_loop(module, argv: list, on_round, steps: int, device: str) -> None:
    """The script's main() with a Clock, which ends it before its first evaluation."""
    Clock.steps = steps
    Clock.on_round = on_round
    Clock.device = device
    argv = [f"{module.__name__}.py", "--device", device, *map(str, argv)]
    with (
        mock.patch.object(module, "tqdm", Clock),
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Enough),
    ):
        module.main()


PARTS = {  # operation -> part of a step
    "aten::randint": "sampling",
    "aten::randn": "sampling",
    "aten::randn_like": "sampling",
    "aten::index": "sampling",
    "aten::lerp_": "targets",
    "Optimizer.step#Adam.step": "optimiser",
}


def shares(profile, device: str) -> dict:
    """Share of each part in the time of some steps, from their profile."""
    seconds = {"sampling": 0.0, "backward": 0.0, "optimiser": 0.0, "targets": 0.0}
    total = 0.0
    for row in profile.key_averages():
        cuda = device == "cuda"
        total += row.self_device_time_total if cuda else row.self_cpu_time_total
        spent = row.device_time_total if cuda else row.cpu_time_total  # with what it calls
        if row.key.startswith("autograd::engine::evaluate_function"):
            seconds["backward"] += spent
        elif row.key in PARTS:
            seconds[PARTS[row.key]] += spent
    rest = total - sum(seconds.values())
    return {
        "sampling": seconds["sampling"] / total,
        "forward and the rest": rest / total,
        "backward": seconds["backward"] / total,
        "optimiser": seconds["optimiser"] / total,
        "targets": seconds["targets"] / total,
    }


def overheads(folder: Path, threads: int) -> tuple[float, float]:
    """Seconds of one evaluation (10 episodes), and of one log (8 numbers read from tensors)."""
    actor = mop_distill.Actor(OBS, ACT, 256)
    ten_episodes = partial(mop_distill.run_episodes, actor, TASKS[1], range(10), threads)
    writer = mop_distill.SummaryWriter(folder / "log")
    metrics = {f"log/{i}": torch.rand(()) for i in range(8)}
    log = partial(mop_distill.log, writer, [], 0, metrics)
    seconds = (median_time(ten_episodes, 3), median_time(log, 50))
    writer.close()
    return seconds


def time_loop(module, argv: list, products: list, args, tasks: int, overhead, peer=None) -> dict:
    """Rounds of a script's loop, of its floor and of the peer in turn, then a profiled round.

    tasks: evaluated; overhead: seconds of an evaluation and of a log.
    """
    loop = []
    floors = []
    peers = []

    def on_round(seconds):
        loop.append(seconds)
        floors.append(floor(products, args.device))
        if peer:
            peers.append(median_time(peer, args.steps, args.device))
        if len(loop) == args.rounds + 1:  # the first is a warm-up
            raise Enough

    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiled_rounds = []

    def on_profiled_round(seconds):
        profiled_rounds.append(seconds)
        if len(profiled_rounds) == 1:  # a warm-up
            profiler.start()
        else:
            profiler.stop()
            raise Enough

    name = module.__name__
    argv = [*argv, "--threads", args.threads, "--matmul-precision", args.matmul_precision]
    graph = ["--cuda-graph"] if args.cuda_graph else []  # the profiled round is eager
    timed = [*argv, *graph, "--run-dir", f"{name}-timed"]
    run_loop(module, timed, on_round, args.steps, args.device)
    profiled = [*argv, "--run-dir", f"{name}-profiled"]
    run_loop(module, profiled, on_profiled_round, args.steps, args.device)

    seconds = statistics.median(loop[1:])
    ratios = []
    for of_loop, of_floor in zip(loop[1:], floors[:-1], strict=True):  # the floor right before
        ratios.append(of_loop / of_floor)
    parts = {}
    for part, share in shares(profiler, args.device).items():
        parts[part] = share * seconds
    parts["evaluation"] = tasks * overhead[0] / 10_000
    parts["logging"] = overhead[1] / 1000
    total = sum(parts.values())
    result = {
        "seconds": seconds,
        "rounds": loop[1:],
        "floor": statistics.median(floors),
        "ratio": statistics.median(ratios),
        "gflops_of_floor": operations(products) / statistics.median(floors) / 1e9,
        "shares": {part: spent / total for part, spent in parts.items()},
    }
    if peers:
        result["peer"] = statistics.median(peers)
    return result


# ----------------------------------------------------------------------------- files, one per work
def made_up_dataset(path: Path, task: str, n: int) -> Path:
    """A dataset file in the scripts' format, random rows."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((n + 1, OBS), np.float32)
    arrays = {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "rewards": rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": obs[1:],
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 1000 == 0,
        "physics": rng.standard_normal((n, 18)),
    }
    metadata = {
        "schema_version": 1,
        "task": task,
        "level": "medium",
        "episode_returns": [0.0],
    }
    np.savez(path, **arrays, metadata=np.array(json.dumps(metadata)))
    return path


def made_up_teacher(path: Path, task: str) -> Path:
    """A checkpoint of an untrained teacher without critics, in the scripts' format."""
    checkpoint = {
        "schema_version": 1,
        "kind": "teacher",
        "tasks": [task],
        "level": "medium",
        "step": 0,
        "sizes": {
            "in_dim": OBS,
            "obs_dim": OBS,
            "action_dim": ACT,
            "hidden": 256,
            "log_std": None,
            "layer_norm": False,
        },
        "returns": {task: [0.0]},
        "actor": mop_distill.Actor(OBS, ACT, 256).state_dict(),
    }
    torch.save(checkpoint, path)
    return path


PEAK = """
import contextlib, runpy, sys
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def peak_gib(script: str, flags: list) -> float:
    """Peak GiB of a script's process."""
    argv = [str(ROOT / script), *map(str, flags)]
    command = [sys.executable, "-c", f"import sys; sys.argv = {argv}\n{PEAK}"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(int(process.stdout.split()[-1]) / 2**20, 2)


def memory(folder: Path, transitions: int) -> dict:
    """Peak GiB of a PBRL teacher's process, its episodes in itself: in all, and of its imports."""
    data = made_up_dataset(folder / "memory.npz", TASKS[0], transitions)
    flags = ["--task", TASKS[0], "--data", data, "--output", folder / "memory.pt"]
    flags += ["--run-dir", folder / "memory", "--device", "cpu", "--threads", 1]
    flags += ["--gradient-steps", 10, "--eval-episodes", 1, "--final-eval-episodes", 1]
    return {
        "gib": peak_gib("mop_pbrl_teacher.py", flags),
        "gib_imports": peak_gib("mop_pbrl_teacher.py", ["--help"]),
        "gib_file": round(data.stat().st_size / 2**30, 2),
    }


def load_peer(name: str | None):
    """The function FILE.py:FUNCTION, or one that makes nothing."""
    if name is None:
        return lambda work, device: None
    file, _, function = name.partition(":")
    if not (Path(file).is_file() and function):
        expected = "expected FILE.py:FUNCTION, an existing file"
        raise SystemExit(f"speed.py: error: --peer {name}: {expected}")
    spec = importlib.util.spec_from_file_location("peer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def time_work(work: str, args, folder: Path, data: list, overhead, peer) -> dict:
    """Seconds, and floor, ratio, shares and the peer's seconds where there are such."""
    total = 1000 * args.steps * (args.rounds + 2)  # more steps than are made
    actor = mop_distill.Actor(OBS, ACT, 256)
    if work == "pbrl":
        argv = ["--task", TASKS[0], "--data", data[0], "--output", folder / "out.pt"]
        argv += ["--gradient-steps", total, "--eval-every", total]
        return time_loop(mop_pbrl_teacher, argv, pbrl_products(), args, 1, overhead, peer)
    if work == "distill":
        teachers = [made_up_teacher(folder / f"{task}.pt", task) for task in TASKS]
        argv = ["--data", *data, "--teachers", *teachers]
        argv += ["--gradient-steps", total, "--eval-every", total]
        return time_loop(mop_distill, argv, distill_products(), args, 2, overhead, peer)
    if work == "td3":
        argv = ["--task", TASKS[1], "--learning-starts", 0, "--total-timesteps", total]
        argv += ["--eval-every", total, "--medium-step", total]
        return time_loop(mop_td3_collect, argv, td3_products(), args, 1, overhead, peer)
    if work == "evaluation":
        ten_episodes = partial(mop_distill.run_episodes, actor, TASKS[1], range(10), args.threads)
        ours = []
        peers = []
        for _ in range(args.rounds):
            ours.append(median_time(ten_episodes, 1))
            if peer:
                peers.append(median_time(peer, 1))
        result = {"seconds": statistics.median(ours), "rounds": ours}
        if peers:
            result["peer"] = statistics.median(peers)
        return result
    if work == "collect":
        num_episodes = -(-args.transitions // 1000)
        run_episodes = mop_td3_collect.run_episodes
        run_episodes(actor, TASKS[1], range(2 * args.threads), args.threads)  # workers start
        start = time.perf_counter()
        run_episodes(actor, TASKS[1], range(num_episodes), args.threads)
        return {"seconds": (time.perf_counter() - start) * 1000 / num_episodes}
    if work == "load":
        path = made_up_dataset(folder / "large.npz", TASKS[0], args.transitions)
        load = partial(mop_pbrl_teacher.load_dataset, path, TASKS[0], "medium", OBS, ACT)
        return {"seconds": median_time(load, 3) * 1e6 / args.transitions}
    return memory(folder, args.transitions)


def hardware(device: str) -> dict:
    """What the figures were measured on."""
    machine = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                machine["cpu"] = line.split(":")[1].strip()
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def versions() -> dict:
    return mop_distill.VERSIONS | {"cuda": torch.version.cuda}


def set_up(args) -> None:
    """torch's settings as in the scripts."""
    argv = ["mop_distill.py", "--device", args.device, "--threads", str(args.threads)]
    with mock.patch.object(sys, "argv", argv):
        mop_distill.parse_args()


def print_table(results: dict, transitions: int) -> None:
    print(
        f"{'work':12}{'ms':>10}{'floor':>10}{'ratio':>8}{'peer':>10}{'times':>8}   shares of a run"
    )
    for work, row in results.items():
        if work == "memory":
            continue
        line = f"{work:12}{1e3 * row['seconds']:10.5g}"
        line += f"{1e3 * row['floor']:10.4g}{row['ratio']:8.2f}" if "floor" in row else " " * 18
        if "peer" in row:
            line += f"{1e3 * row['peer']:10.5g}{row['peer'] / row['seconds']:8.2f}"
        else:
            line += " " * 18
        shares = [f"{part} {100 * share:.1f}%" for part, share in row.get("shares", {}).items()]
        print(f"{line}   {', '.join(shares)}")
    if "memory" in results:
        sizes = results["memory"]
        print(
            f"memory of a PBRL run on {transitions} transitions: {sizes['gib']} GiB at its peak,"
            f" {sizes['gib_imports']} of them imports; the dataset file has {sizes['gib_file']}"
        )


def main():
    args = tyro.cli(Args, description=__doc__)
    peer = load_peer(args.peer)
    set_up(args)
    torch.set_float32_matmul_precision(args.matmul_precision)  # of the floors
    results = {}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):  # the scripts write here
        folder = Path(name)
        data = [made_up_dataset(folder / f"{task}.npz", task, 100_000) for task in TASKS]
        has_loops = {"pbrl", "distill", "td3"} & set(args.works)
        overhead = overheads(folder, args.threads) if has_loops else None
        for work in args.works:
            print(f"timing {work} ...", flush=True)
            function = peer(work, args.device)
            results[work] = time_work(work, args, folder, data, overhead, function)
    machine = hardware(args.device)
    settings = vars(args) | {"output": None}
    if args.peer:
        settings["peer"] = Path(args.peer.partition(":")[0]).name
    report = {
        "hardware": machine,
        "versions": versions(),
        "args": settings,
        "results": results,
    }
    print(f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} CPU threads")
    print_table(results, args.transitions)
    name = f"{args.device}-{machine['threads']}-threads"
    if args.matmul_precision != "highest":
        name += f"-{args.matmul_precision}"
    if args.works != Args.works:
        name += f"-{'-'.join(args.works)}"
    path = Path(args.output or ROOT / f"benchmark/results/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
