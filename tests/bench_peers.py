"""Shows inputs for which scl_loss and other implementations differ, and prints a markdown table.

Run this script by hand. It takes about ten seconds:

    pip install -r tests/requirements.txt && pip install --no-deps pytorch-metric-learning==2.8.1 setfit==1.2.0
    python tests/bench_peers.py

Every cell is measured. "right" means: value and gradient are within 0.5 % of the triple loop in test_scl.py, which
computes in float64. For a wrong value, the cell shows the value and, if known, its formula. A gradient is mentioned
only if it is wrong. For an exception, the cell shows its name. The column "expected" shows the right result.
Features are float32 and the temperature is 0.3 unless the case says otherwise. An orphan is an anchor without a
positive. "SupContrast's code" is the copy in setfit, which lacks the current handling of orphans in SupContrast.
"""

import functools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_scl import pml, saved, setfit
from test_scl import batch, oracle, reduce

from eval import print_table
from scl import scl_loss

IMPLEMENTATIONS = {  # each value takes temperature and options, and returns a function of features and labels
    "scl.py": lambda temperature, **options: functools.partial(scl_loss, temperature=temperature, **options),
    "SupContrast's code": setfit,
    "pytorch-metric-learning": pml,
}
TOLERANCE, ROUNDING = 0.005, 1e-7  # relative and absolute; float16 has steps of 6e-8


def triple_loop(features, labels, temperature=0.3):
    """Returns the loss, its gradient, and the mean over all anchors with 0 for orphans."""
    losses, gradient = oracle(features.double().tolist(), labels.tolist(), temperature)
    factor, loss = reduce(losses, labels.tolist(), "mean")
    return loss, factor * torch.tensor(gradient, dtype=torch.float64), sum(losses) / len(losses)


def first_match(actual, known, otherwise):
    """Returns the name of the first known number or tensor that equals `actual`, or `otherwise`."""
    for name, number in known.items():
        number = torch.as_tensor(number, dtype=torch.float64)
        if (actual - number).abs().max() <= TOLERANCE * number.abs().max() + ROUNDING:
            return name
    return otherwise


def verdict(loss, features, labels, temperature=0.3):
    """Returns in words how the value and gradient of `loss` compare with the triple loop."""
    right, right_gradient, over_all = triple_loop(features, labels, temperature)
    features = features.clone().requires_grad_()
    value = loss(features, labels)
    value.backward()

    number, orphans = f"{value:.3f}", not math.isclose(right, over_all)
    values = {
        "right: mean over anchors with a positive" if orphans else "right": right,
        f"{number}: mean over all N": over_all,
        f"{number} = log(N-1)": math.log(max(len(labels) - 1, 1)),
    }
    gradients = {"": right_gradient, ", gradient 0": torch.zeros_like(right_gradient)}
    wrong = ", gradient nan" if features.grad.isnan().any() else ", gradient wrong"
    return first_match(value.detach(), values, number) + first_match(features.grad, gradients, wrong)


def compared(features, labels, temperature=0.3):
    """Returns the expected loss as text, and a function that returns the verdict for an implementation."""
    right, *_ = triple_loop(features, labels, temperature)
    return f"{right:.3f}", lambda make: verdict(make(temperature), features, labels, temperature)


def accepted(loss, features, labels):
    return f"accepted: {loss(features, labels):.3f}"


def under_autocast(make):
    """Returns the largest relative error of the loss over ten batches, and the dtype of the loss."""
    errors = []
    for seed in range(10):
        features, labels = random_batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = make(0.3)(features, labels)
        right, *_ = triple_loop(features, labels)
        errors.append(abs(loss.item() / right - 1))
    return f"{max(errors):.0e}, {str(loss.dtype).removeprefix('torch.')}"


def after_another_batch(make):
    loss = make(0.3)
    loss(*random_batch(1))
    return verdict(loss, *random_batch(0))


def compiled(make):
    loss = make(0.3)
    if breaks := torch._dynamo.explain(loss)(*random_batch(0)).graph_break_count:
        return f"{breaks} graph breaks"
    return verdict(torch.compile(loss, fullgraph=True, backend="aot_eager"), *random_batch(0))


def random_batch(seed):
    """Returns a batch of 16 examples, as in the paper, with two classes."""
    return batch(n=16, width=64, classes=2, seed=seed, dtype=torch.float32)


def rows():
    """Returns for each case the expected result, and a function that returns the cell of an implementation."""
    features, labels = random_batch(0)
    one_class, pairs = torch.zeros(8, dtype=torch.long), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    with_nan = features.index_fill(1, torch.tensor(0), math.nan)
    near_zero = torch.eye(8, 16) + 0.01 * batch(n=8, width=16, dtype=torch.float32)[0]
    large = (3000 * batch(n=8, width=768)[0]).half()
    return {
        "random batch": compared(features, labels),
        "2 orphans of 8": compared(features[:8], torch.tensor([0, 0, 0, 1, 2, 2, 2, 3])),
        "all singletons": compared(features, torch.arange(16)),
        "one class, N=8": compared(features[:8], one_class),
        "N=1": compared(features[:1], labels[:1]),
        "N=2, same class": compared(features[:2], one_class[:2]),
        "tau=0.01, cosines near 0": compared(near_zero, pairs, 0.01),
        "float16, tau=0.05, cosines near 0": compared(near_zero.half(), pairs, 0.05),
        "float16 features x 3000, D=768, tau=0.05": compared(large, pairs, 0.05),
        "CPU autocast to bfloat16: error, dtype": ("below 1e-05, float32", under_autocast),
        "NaN in the features": ("nan, gradient nan", lambda make: verdict(make(0.3), with_nan, labels)),
        "tau=0": ("ValueError", lambda make: accepted(make(0), features, labels)),
        "tau=-0.3": ("ValueError", lambda make: accepted(make(-0.3), features, labels)),
        "labels (N, 1)": ("ValueError", lambda make: accepted(make(0.3), features, labels[:, None])),
        "labels (N-1,)": ("ValueError", lambda make: accepted(make(0.3), features, labels[1:])),
        "2 of 6 anchors converged, tau=0.05": compared(torch.eye(3)[[0, 0, 1, 1, 2, 0]], pairs[:6], 0.05),
        "second of two batches": ("right", after_another_batch),
        "torch.compile(fullgraph=True)": ("right", compiled),
        "saved for backward, in N x N float32": ("at most 2", lambda make: f"{saved(make(0.3), 512):.2f}"),
        "saved for backward with chunk_size=16": ("near 0", lambda make: f"{saved(make(0.3, chunk_size=16), 512):.2f}"),
    }


def cell(answer, make):
    try:
        return answer(make)
    except Exception as error:
        return type(error).__name__


def main():
    print(f"PyTorch {torch.__version__}\n")
    print_table(["case", *IMPLEMENTATIONS, "expected"], [
        [case, *(cell(answer, make) for make in IMPLEMENTATIONS.values()), expected]
        for case, (expected, answer) in rows().items()])


if __name__ == "__main__":
    main()
