"""Draws the value and the gradient of SCL over cosines. `python results/loss.py` writes results/loss.png."""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from scl import scl_loss

HERE = Path(__file__).parent
TAUS = {0.1: "#0072B2", 0.3: "#D55E00", 0.5: "#009E73", 0.7: "#CC79A7"}  # the paper's grid; colours of Okabe and Ito


def unit_vectors(cosines: torch.Tensor) -> torch.Tensor:
    """Returns unit vectors (N, 2) that have the given cosines (N,) with the vector (1, 0)."""
    return torch.stack([cosines, (1 - cosines**2).clamp(min=0).sqrt()], dim=1)


def two_classes(cosine: torch.Tensor, tau: float) -> float:
    """Returns the loss of two classes of 8 examples. All examples of a class have the same features.

    `cosine` is the cosine between the features of the two classes.
    """
    labels = torch.tensor([0, 1] * 8)
    return scl_loss(unit_vectors(torch.where(labels == 0, 1.0, cosine)), labels, tau).item()


def gradient(cosine: torch.Tensor, tau: float) -> float:
    """Returns the derivative of the loss of one anchor with respect to the cosine between the anchor and one negative.

    The batch also has 7 positives with cosine 0.5 to the anchor, and 7 other negatives with cosine 0.
    """
    cosine.requires_grad_()
    cosines = torch.cat([torch.tensor([1.0] + 7 * [0.5] + 7 * [0.0]), cosine[None]])
    labels = torch.tensor(8 * [0] + 8 * [1])
    scl_loss(unit_vectors(cosines), labels, tau, reduction="none")[0].backward()
    return cosine.grad.item()


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
cosines = torch.linspace(-0.999, 0.999, 201)
for panel, curve in ((left, two_classes), (right, gradient)):
    for tau, colour in TAUS.items():
        values = [curve(cosine.clone(), tau) for cosine in cosines]
        panel.plot(cosines, values, color=colour, label=f"τ = {tau}")
left.axhline(math.log(15), color="grey", linestyle=":")
left.text(-1, math.log(15) - 0.01, "collapsed: log(N - 1)", color="grey", va="top", fontsize=11)
left.set(title="Loss of a batch with two classes:\n8 examples each, equal within a class",
         xlabel="cosine between the two classes", ylabel="SCL, N = 16")
right.set(title="Gradient for one negative, next to 7 positives\n(cosine 0.5) and 7 other negatives (cosine 0)",
          xlabel="cosine between anchor and negative", yscale="log", ylim=(1e-4, 20),
          ylabel="derivative of the anchor's loss")
left.legend(loc="center left", fontsize=11)
for panel in (left, right):
    panel.title.set_fontsize(11.5)
    panel.xaxis.label.set_fontsize(12)
    panel.yaxis.label.set_fontsize(12)
figure.tight_layout()
figure.savefig(HERE / "loss.png", dpi=150)
