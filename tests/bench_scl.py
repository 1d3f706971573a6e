"""Measures time and memory of scl_loss and of other implementations, and prints markdown tables.

Run this script by hand on an idle machine. It takes about ten minutes:

    pip install --no-deps pytorch-metric-learning==2.8.1 setfit==1.2.0
    python tests/bench_scl.py

Each call normalises float32 features (N, 1024) with two classes, and computes forward and backward. All
implementations run in one process and take turns for 15 rounds, with several calls per turn. A time is the median per
call. A ratio is the median over the rounds, with its quartiles. "floor" is the time of two matrix products, Z Z^T and
G Z. "PML" is pytorch-metric-learning. "setfit" is SupContrast's code in the package setfit.
"saved" is what autograd stores for backward, in units of an N x N float32 matrix. "peak" is the memory that one step
adds, measured in a new process.
"""

import argparse
import importlib.util
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import print_table
from scl import scl_loss

WIDTH, TEMPERATURE, ROUNDS = 1024, 0.3, 15
PEERS = ("PML", "setfit")


def pml(temperature, **options):
    """Returns the loss of pytorch-metric-learning, a function of features and labels."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature, **options)


def setfit(temperature, **options):
    """Returns the loss of SupContrast in setfit, a function of features and labels. Its constant factor is set to 1."""
    # Loads this file only, because `import setfit` needs sentence-transformers.
    file = Path(importlib.util.find_spec("setfit").submodule_search_locations[0], "losses.py")
    spec = importlib.util.spec_from_file_location("setfit_losses", file)
    losses = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile needs the entry
    spec.loader.exec_module(losses)
    options["base_temperature"] = temperature or 1  # setfit multiplies by temperature / base_temperature
    loss = losses.SupConLoss(lambda x: {"sentence_embedding": x}, temperature, **options)
    return lambda features, labels: loss([features], labels)


def contestants(n):
    """Returns the implementations by name. Each is a function of features and labels, and "floor" is None."""
    return {
        "eager": lambda x, y: scl_loss(x, y, TEMPERATURE),
        "compiled": torch.compile(lambda x, y: scl_loss(x, y, TEMPERATURE), fullgraph=True, dynamic=False),
        "chunked": lambda x, y: scl_loss(x, y, TEMPERATURE, chunk_size=max(n // 8, 8)),
        "PML": pml(TEMPERATURE),
        "setfit": setfit(TEMPERATURE),
        "floor": None,
    }


def batch(n):
    torch.manual_seed(0)
    return torch.randn(n, WIDTH, requires_grad=True), torch.arange(n) % 2


def step(loss, features, labels):
    features.grad = None
    if loss is None:
        with torch.no_grad():
            (features @ features.T) @ features
    else:
        loss(features, labels).backward()


def times(n):
    """Returns for each name the seconds per call, one value per round."""
    (features, labels), seconds = batch(n), {}
    turns = contestants(n)
    for loss in turns.values():
        step(loss, features, labels)
    start = time.perf_counter()
    step(None, features, labels)
    burst = max(1, round(0.02 / (time.perf_counter() - start) / 8))
    for _ in range(ROUNDS):
        for name, loss in turns.items():
            step(loss, features, labels)
            start = time.perf_counter()
            for _ in range(burst):
                step(loss, features, labels)
            seconds.setdefault(name, []).append((time.perf_counter() - start) / burst)
    return seconds


def saved(loss, n):
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features, labels = torch.randn(n, 8, requires_grad=True), torch.arange(n) % 2  # D = 8 adds little to N x N
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss(features, labels)  # noqa: F841  # must stay alive for the sum below
    return sum(storages.values()) / (4 * n * n)


def high_water():
    """Returns the peak memory of this process in MiB. (ru_maxrss would include the peak of the parent process.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def peak(name, n, result):
    features, labels = batch(n)
    loss = contestants(n)[name]
    step(loss, features[:64].detach().requires_grad_(), labels[:64])
    before = high_water()
    step(loss, features, labels)
    result.put(high_water() - before)


def peak_alone(name, n):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=peak, args=(name, n, result))
    process.start()
    process.join()
    return result.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    sizes = parser.parse_args().n
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    names = ("eager", "compiled", "chunked")
    ratios, rows = {}, []
    for n in sizes:
        seconds = times(n)
        fastest = min(PEERS, key=lambda name: statistics.median(seconds[name]))
        cells = [f"{1e3 * statistics.median(values):.3g}" for values in seconds.values()]
        for name, other in [(name, fastest) for name in names] + [("eager", "floor")]:
            low, median, high = statistics.quantiles(
                [a / b for a, b in zip(seconds[name], seconds[other], strict=True)])
            cells.append(f"{median:.2f} [{low:.2f}, {high:.2f}]")
            ratios.setdefault((name, other == "floor"), []).append(median)
        rows.append([str(n), *cells])
    header = ["N", *(f"{name}, ms" for name in seconds), *(f"{name} / fastest peer" for name in names), "eager / floor"]
    print_table(header, rows)
    means = [math.prod(values) ** (1 / len(values)) for values in ratios.values()]
    print("\nGeometric means over N: " + ", ".join(
        f"{name} {mean:.2f}" for name, mean in zip(header[-4:], means, strict=True)) + "\n")

    named = ("eager", "chunked", *PEERS)
    header = ["N", *(f"{name}, {what}" for name in named for what in ("saved", "peak MiB"))]
    print_table(header, [[str(n), *(cell for name in named for cell in (
        f"{saved(contestants(n)[name], n):.2f}", f"{peak_alone(name, n):.0f}"))] for n in sizes if n >= 1024])


if __name__ == "__main__":
    main()
