"""Draws what the loss does: `python results/loss.py` writes results/loss.png."""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from scl import scl_loss  # noqa: E402

TAUS = {0.1: "#0072B2", 0.3: "#D55E00", 0.5: "#009E73", 0.7: "#CC79A7"}  # the paper's grid; colours of Okabe and Ito


def at(cosines: torch.Tensor) -> torch.Tensor:
    """(N, 2): unit vectors with these cosines to (1, 0)."""
    return torch.stack([cosines, (1 - cosines**2).clamp(min=0).sqrt()], dim=1)


def two_classes(cosine: torch.Tensor, tau: float) -> float:
    """The loss of 8 + 8 examples, each class at one point, with this cosine between the two points."""
    labels = torch.tensor([0, 1] * 8)
    return scl_loss(at(torch.where(labels == 0, 1.0, cosine)), labels, tau).item()


def push(cosine: torch.Tensor, tau: float) -> float:
    """Of one anchor, the gradient of its loss in the cosine of one negative.

    The others of the batch are 7 positives at cosine 0.5 and 7 negatives at 0.
    """
    cosine.requires_grad_()
    cosines = torch.cat([torch.tensor([1.0] + 7 * [0.5] + 7 * [0.0]), cosine[None]])
    labels = torch.tensor(8 * [0] + 8 * [1])
    scl_loss(at(cosines), labels, tau, reduction="none")[0].backward()
    return cosine.grad.item()


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
cosines = torch.linspace(-0.999, 0.999, 201)
for panel, curve in ((left, two_classes), (right, push)):
    for tau, colour in TAUS.items():
        values = [curve(cosine.clone(), tau) for cosine in cosines]
        panel.plot(cosines, values, color=colour, label=f"temperature {tau}")
left.axhline(math.log(15), color="grey", linestyle=":")
left.text(-1, math.log(15) - 0.01, "collapsed: log(N - 1)", color="grey", va="top")
left.set(title="SCL of two classes, each at one point", xlabel="cosine between the classes", ylabel="scl_loss, N = 16")
right.set(title="How hard a negative is pushed away", xlabel="its cosine to the anchor", yscale="log", ylim=(1e-4, 20),
          ylabel="gradient of the anchor's loss in it")
left.legend(loc="center left")
figure.tight_layout()
figure.savefig(HERE / "loss.png", dpi=150)
