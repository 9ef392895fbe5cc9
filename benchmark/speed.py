"""Times the scripts' own loops, evaluation, collection and loading beside the floor of their matrix products.

  python benchmark/speed.py                        # everything; table, and JSON in benchmark/results/
  python benchmark/speed.py --works pbrl distill   # some of it
  python benchmark/speed.py --peer peer.py:make    # another implementation in the same run
  python benchmark/speed.py --matmul-precision medium         # the loops and their floors in bfloat16 products
  python benchmark/speed.py --device cuda --cuda-graph --matmul-precision high

A training script is run through its own main() on a made-up dataset, with its progress bar replaced by a clock, so that
nothing of the loop is left out or copied. The floor of a step is the time of its matrix products alone, each shape at
the rate that this machine reaches for it, measured between the rounds of the loop; on a GPU, where that is more, the
time to move the products' operands at the bandwidth of a copy (a CUDA graph may pass below it: each product is waited
for). Figures are medians over rounds. Shares are those of a whole run: of a step, plus one evaluation of every task per
10,000 steps and one log per 1000.

peer.py:make is called as make(work, device) and returns a function to time, one step of pbrl, distill or td3 or one
evaluation of 10 episodes, or None where it has none. Its rounds take turns with ours.
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
from itertools import pairwise
from pathlib import Path
from typing import Literal
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "disable")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import numpy as np
import torch
import tyro

import mop_distill
import mop_pbrl_teacher
import mop_td3_collect

OBS, ACT = 24, 6  # the walker's
Work = Literal["pbrl", "distill", "td3", "evaluation", "collect", "load", "memory"]


@dataclass
class Args:
    works: tuple[Work, ...] = ("pbrl", "distill", "td3", "evaluation", "collect", "load", "memory")
    """what to time, and the memory of a run"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the training loops run"""
    threads: int = 0
    """CPU threads; 0: all cores"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """the scripts' flag"""
    cuda_graph: bool = False
    """the scripts' flag"""
    rounds: int = 5
    """rounds of a loop and its floor, after one to warm up"""
    steps: int = 20
    """steps of a loop per round"""
    transitions: int = 1_000_000
    """rows of the collection and of the loaded dataset; the times of a smaller number are scaled up to 1M"""
    peer: str | None = None
    """FILE.py:FUNCTION that makes another implementation's functions"""
    output: str | None = None
    """JSON to write; default: benchmark/results/<device>-<threads>-threads[-<precision>][-<works, if not all>].json"""


# -------------------------------------------------------------------------------------------------------------- floors
def forward_products(rows: int, *sizes: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product (m, k) @ (k, n) in the forward pass of an MLP."""
    return [(rows, a, b) for a, b in pairwise(sizes)]


def backward_products(rows: int, *sizes: int, weights: bool = True, inputs: bool = False) -> list:
    """The same of its backward pass: gradients of the weights, of the activations, and (inputs) of the input."""
    layers = list(pairwise(sizes))
    return [(a, rows, b) for a, b in layers if weights] + [(rows, b, a) for a, b in (layers if inputs else layers[1:])]


def pbrl_products(batch: int = 1024, hidden: int = 256, k: int = 5, num_ood: int = 3) -> list:
    """(count, products) of one update of PBRL; the actor's is made in every second."""
    critic, actor = (OBS + ACT, hidden, hidden, 1), (OBS, hidden, hidden, ACT)
    rows = batch * (1 + 2 * num_ood)
    return [
        (k, forward_products(rows, *critic) + backward_products(rows, *critic) + forward_products(batch, *critic)),
        (1, forward_products(batch, *actor) + forward_products(2 * batch, *actor)),
        (0.5, forward_products(batch, *actor) + backward_products(batch, *actor)),
        (0.5 * k, forward_products(batch, *critic) + backward_products(batch, *critic, weights=False, inputs=True)),
    ]


def distill_products(batch: int = 1024, hidden: int = 256, m: int = 2) -> list:
    sizes = OBS + 1, hidden, hidden, ACT
    return [(1, forward_products(m * batch, *sizes) + backward_products(m * batch, *sizes))]


def td3_products(batch: int = 1024, hidden: int = 1024) -> list:
    """The actor's update, in every second step, goes through one critic (TD3 paper)."""
    critic, actor = (OBS + ACT, hidden, hidden, 1), (OBS, hidden, hidden, ACT)
    return [
        (2, 2 * forward_products(batch, *critic) + backward_products(batch, *critic)),
        (1, forward_products(batch, *actor) + forward_products(1, *actor)),
        (0.5, forward_products(batch, *actor) + backward_products(batch, *actor)),
        (0.5, forward_products(batch, *critic) + backward_products(batch, *critic, weights=False, inputs=True)),
    ]


def median_time(function, repeats: int, device: str = "cpu") -> float:
    """Median seconds of one call, after a warm-up; the clock waits for the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floor(products: list, device: str) -> float:
    """Seconds of the products alone, each shape at the rate it reaches now; on a GPU at least those of their bytes."""
    seconds, least = {}, operand_bytes(products) / bandwidth() if device == "cuda" else 0.0
    for m, k, n in {shape for _, shapes in products for shape in shapes}:
        a, b, out = (torch.randn(*shape, device=device) for shape in ((m, k), (k, n), (m, n)))
        seconds[m, k, n] = median_time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 9, device)
    return max(least, sum(count * seconds[shape] for count, shapes in products for shape in shapes))


def bandwidth() -> float:
    """Bytes per second of a copy on the GPU, read and written."""
    a, b = (torch.empty(2**28, device="cuda") for _ in range(2))
    return 2 * a.numel() * a.element_size() / median_time(lambda: b.copy_(a), 9, "cuda")


def operand_bytes(products: list) -> float:
    """Bytes of the products' operands and results, each moved once."""
    return sum(count * 4 * (m * k + k * n + m * n) for count, shapes in products for m, k, n in shapes)


def operations(products: list) -> float:
    """Floating-point operations of the products."""
    return sum(count * 2 * m * k * n for count, shapes in products for m, k, n in shapes)


# ------------------------------------------------------------------------------------------------------------ our loops
class Enough(Exception):
    """Raised by on_round to end a script's loop."""


class Clock:
    """Stands in for a script's tqdm: calls on_round(seconds per step) after every `steps` updates of the loop."""

    steps, on_round, device = 1, None, "cpu"

    def __init__(self, loop, **kwargs):
        self.loop = loop

    def __iter__(self):
        start = time.perf_counter()
        for count, step in enumerate(self.loop, start=1):
            yield step
            if count % Clock.steps == 0:
                if Clock.device == "cuda":
                    torch.cuda.synchronize()
                Clock.on_round((time.perf_counter() - start) / Clock.steps)
                start = time.perf_counter()  # what on_round did is not the loop's

    def write(self, *args):
        pass


@torch.no_grad()
def one_state(policy, env, device) -> list[float]:
    """In place of a script's evaluate: one call of the policy, no episodes."""
    n = env.n if hasattr(env, "n") else len(env)  # a LockstepEnv or a list of environments
    policy(torch.zeros(n, OBS, device=device))
    return [0.0] * n


def run_loop(module, argv: list, on_round, steps: int, device: str) -> None:
    """The script's main() with a Clock; evaluations are left out, they are timed on their own."""
    Clock.steps, Clock.on_round, Clock.device = steps, on_round, device
    originals = module.tqdm, module.evaluate, sys.argv
    module.tqdm, module.evaluate = Clock, one_state
    sys.argv = [module.__name__, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
            module.main()
    finally:
        module.tqdm, module.evaluate, sys.argv = originals


def shares(profile, device: str) -> dict:
    """Share of each part in the time of some steps, from their profile."""
    seconds = dict.fromkeys(("sampling", "backward", "optimiser", "targets"), 0.0)
    parts = dict.fromkeys(("aten::randint", "aten::randn", "aten::rand", "aten::index"), "sampling")
    parts |= {"aten::_foreach_lerp_": "targets", "Optimizer.step#Adam.step": "optimiser"}
    rows = profile.key_averages()
    total = sum(row.self_device_time_total if device == "cuda" else row.self_cpu_time_total for row in rows)
    for row in rows:
        spent = row.device_time_total if device == "cuda" else row.cpu_time_total
        if row.key.startswith("autograd::engine::evaluate_function"):
            seconds["backward"] += spent
        elif row.key in parts:
            seconds[parts[row.key]] += spent
    found = {name: value / total for name, value in seconds.items()}
    rest = 1 - sum(found.values())
    return {"sampling": found.pop("sampling"), "forward and the rest": rest, **found}


def overheads(folder: Path) -> tuple[float, float]:
    """Seconds of one evaluation (10 episodes) and of one log (8 scalars read from tensors and written)."""
    actor, envs = mop_distill.Actor(OBS, ACT, 256), mop_distill.make_envs("walker-walk", 10)
    evaluation = median_time(lambda: mop_distill.evaluate(actor, envs, torch.device("cpu")), 3)
    writer, values = mop_distill.SummaryWriter(folder / "log"), torch.rand(8)
    log = median_time(lambda: [writer.add_scalar(f"log/{i}", v.item(), 0) for i, v in enumerate(values)], 50)
    writer.close()
    return evaluation, log


def time_loop(module, argv: list, products: list, args, tasks: int, overhead: tuple, peer=None) -> dict:
    """Rounds of a script's loop, of its floor and of the peer in turn, then a profiled round of the eager loop."""
    cuda, flags = args.device == "cuda", ["--matmul-precision", args.matmul_precision]
    loop, floors, peers = [], [], []
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    profiler, name = torch.profiler.profile(activities=activities), module.__name__

    def on_round(seconds):
        loop.append(seconds)
        floors.append(floor(products, args.device))
        if peer:
            peers.append(median_time(peer, args.steps, args.device))
        if len(loop) == args.rounds + 1:  # the first is a warm-up
            raise Enough

    rounds = iter(("warm-up", "profiled"))

    def on_profiled_round(seconds):
        if next(rounds) == "warm-up":
            profiler.start()
        else:
            profiler.stop()
            raise Enough

    timed = [*argv, *flags, *(["--cuda-graph"] if args.cuda_graph else []), "--run-dir", f"{name}-timed"]
    run_loop(module, timed, on_round, args.steps, args.device)
    run_loop(module, [*argv, *flags, "--run-dir", f"{name}-profiled"], on_profiled_round, args.steps, args.device)
    ours, least = statistics.median(loop[1:]), statistics.median(floors)
    ratio = statistics.median(a / b for a, b in zip(loop[1:], floors[:-1], strict=True))  # the floor right before
    parts = {name: share * ours for name, share in shares(profiler, args.device).items()}
    parts |= {"evaluation": tasks * overhead[0] / 10_000, "logging": overhead[1] / 1000}
    total = sum(parts.values())
    row = {"seconds": ours, "rounds": loop[1:], "floor": least, "ratio": ratio}
    row |= {"gflops_of_floor": operations(products) / least / 1e9}
    row |= {"peer": statistics.median(peers)} if peers else {}
    return {**row, "shares": {name: value / total for name, value in parts.items()}}


def made_up_dataset(path: Path, task: str, n: int) -> Path:
    """A dataset file in the scripts' format, random rows."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.standard_normal((n, OBS), np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "rewards": rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": rng.standard_normal((n, OBS), np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 1000 == 0,
        "physics": rng.standard_normal((n, 18)),
    }
    metadata = {"schema_version": 1, "task": task, "level": "medium", "episode_returns": [0.0]}
    np.savez(path, **arrays, metadata=np.array(json.dumps(metadata)))
    return path


PEAK = """
import contextlib, runpy, sys
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(folder: Path, task: str, transitions: int, threads: int) -> dict:
    """Peak GiB of a PBRL teacher's process: before it reads its data (its imports) and in all."""
    path = made_up_dataset(folder / "memory.npz", task, transitions)
    script, peaks = ROOT / "mop_pbrl_teacher.py", []
    argv = ["--task", task, "--data", path, "--output", folder / "m.pt", "--run-dir", folder / "memory"]
    argv += ["--device", "cpu", "--threads", threads, "--eval-episodes", 1, "--final-eval-episodes", 1]
    for flags in (["--help"], [*argv, "--gradient-steps", 10]):
        code = f"import sys; sys.argv = {[str(script), *map(str, flags)]}\n{PEAK}"
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        peaks.append(round(int(out.split()[-1]) / 2**20, 2))
    return {"gib": peaks[1], "gib_imports": peaks[0], "gib_file": round(path.stat().st_size / 2**30, 2)}


def load_peer(args):
    """make(work, device) of --peer, or a function that makes nothing."""
    if not args.peer:
        return lambda work, device: None
    file, _, name = args.peer.partition(":")
    spec = importlib.util.spec_from_file_location("peer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def time_works(args, folder: Path, peer) -> dict:
    """One entry per work: seconds, and floor, ratio, shares and the peer's seconds where there are such."""
    results, total = {}, (args.rounds + 2) * args.steps * 1000  # more than are made
    tasks, cpu = ("walker-stand", "walker-walk"), torch.device("cpu")
    common = ["--device", args.device, "--threads", args.threads, "--eval-episodes", 1, "--final-eval-episodes", 1]
    loop = [*common, "--eval-every", total, "--gradient-steps", total]
    data = [made_up_dataset(folder / f"{task}.npz", task, 100_000) for task in tasks]
    loops = {"pbrl", "distill", "td3"} & set(args.works)
    overhead = overheads(folder) if loops else None
    if {"pbrl", "distill"} & set(args.works):
        tiny = [*common, "--eval-every", 10**9, "--gradient-steps", 1, "--batch-size", 8]
        teachers = [folder / f"{task}.pt" for task in tasks]
        for task, path, teacher in zip(tasks, data, teachers, strict=True):
            run_loop(
                mop_pbrl_teacher,
                [*tiny, "--task", task, "--data", path, "--output", teacher, "--run-dir", folder / f"tiny-{task}"],
                lambda seconds: None,
                1,
                args.device,
            )
    for work in args.works:
        print(f"timing {work} ...", flush=True)
        other = peer(work, args.device)
        if work == "pbrl":
            argv = ["--task", tasks[0], "--data", data[0], "--output", folder / "t.pt", *loop]
            results[work] = time_loop(mop_pbrl_teacher, argv, pbrl_products(), args, 1, overhead, other)
        elif work == "distill":
            argv = ["--data", *data, "--teachers", *teachers, *loop]
            results[work] = time_loop(mop_distill, argv, distill_products(), args, 2, overhead, other)
        elif work == "td3":
            argv = ["--task", tasks[1], "--total-timesteps", total, "--learning-starts", 0, "--datasets", "expert"]
            argv += ["--num-transitions", 1000, "--eval-every", total, *common]
            results[work] = time_loop(mop_td3_collect, argv, td3_products(), args, 1, overhead, other)
        elif work == "evaluation":
            actor, envs = mop_distill.Actor(OBS, ACT, 256), mop_distill.make_envs(tasks[1], 10)
            ours, peers = [], []
            for _ in range(args.rounds):
                ours.append(median_time(lambda actor=actor, envs=envs: mop_distill.evaluate(actor, envs, cpu), 1))
                peers += [median_time(other, 1)] if other else []
            results[work] = {"seconds": statistics.median(ours), "rounds": ours}
            results[work] |= {"peer": statistics.median(peers)} if peers else {}
        elif work == "collect":
            actor = mop_distill.Actor(OBS, ACT, 256)
            start = time.perf_counter()
            episodes = -(-args.transitions // 1000)
            n = min(episodes, mop_td3_collect.Args.num_envs)
            env = mop_td3_collect.LockstepEnv(tasks[1], n, args.threads)
            mop_td3_collect.collect(actor, env, np.arange(episodes), episodes, "online", None, cpu)
            results[work] = {"seconds": (time.perf_counter() - start) * 1e3 / episodes}
        elif work == "load":
            path = made_up_dataset(folder / "large.npz", tasks[0], args.transitions)
            seconds = median_time(lambda path=path: mop_distill.load_dataset(path, tasks[0], (24, 6)), 3)
            results[work] = {"seconds": seconds * 1e6 / args.transitions}
        else:
            results[work] = memory(folder, tasks[0], args.transitions, args.threads)
    return results


def hardware(device: str) -> dict:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu}


def versions() -> dict:
    return {**mop_distill.VERSIONS, "cuda": torch.version.cuda}


def main():
    args = tyro.cli(Args, description=__doc__)
    file, _, name = (args.peer or "").partition(":")
    if args.peer and not (Path(file).is_file() and name):
        raise SystemExit(f"speed.py: error: --peer {args.peer}: expected FILE.py:FUNCTION, an existing file")
    options = ["--device", args.device, "--threads", str(args.threads), "--matmul-precision", args.matmul_precision]
    with mock.patch.object(sys, "argv", ["mop_distill.py", *options]):  # torch's settings, as in the scripts
        mop_distill.parse_args(mop_distill.Args, mop_distill.LAPTOP)
    peer = load_peer(args)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the scripts write to runs/ and data/
        results = time_works(args, Path(folder), peer)
    settings = {**vars(args), "peer": args.peer and Path(file).name, "output": None}
    machine = hardware(args.device)
    report = {"hardware": machine, "versions": versions(), "args": settings, "results": results}

    print(f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} CPU threads, torch {torch.__version__}")
    print(f"{'work':12}{'ms':>10}{'floor':>10}{'ratio':>8}{'peer':>10}{'times':>8}   shares of a run")
    for work, row in results.items():
        if work == "memory":
            continue
        columns = [f"{1e3 * row['seconds']:10.5g}", f"{1e3 * row['floor']:10.4g}" if "floor" in row else " " * 10]
        columns += [f"{row['ratio']:8.2f}" if "ratio" in row else " " * 8]
        columns += [f"{1e3 * row['peer']:10.5g}{row['peer'] / row['seconds']:8.1f}" if "peer" in row else " " * 18]
        text = ", ".join(f"{name} {100 * share:.1f}%" for name, share in row.get("shares", {}).items())
        print(f"{work:12}{''.join(columns)}   {text}")
    if "memory" in results:
        sizes = "{gib} GiB at its peak, {gib_imports} of them imports; the dataset file has {gib_file}"
        print(f"memory of a PBRL run on {args.transitions} transitions: {sizes.format(**results['memory'])}")
    name = [f"{args.device}-{machine['threads']}-threads", *(args.works if args.works != Args.works else ())]
    name = "-".join(name[:1] + [args.matmul_precision] * (args.matmul_precision != "highest") + name[1:])
    path = Path(args.output or ROOT / f"benchmark/results/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    mop_distill.write_atomic(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    print("RESULT", json.dumps({"results": results, "file": str(path)}))


if __name__ == "__main__":
    main()
