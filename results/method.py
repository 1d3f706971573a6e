"""Draws how the features of a small network change during training, without and with SCL.

`python results/method.py` takes about ten seconds and writes results/method.png.

The examples are three spiral arms in the plane, one class per arm. Both rows of the figure use the same network, the
same initial weights and the same batches. Only the loss differs. The figure shows new examples, not training examples.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from scl import ce_scl_loss, scl_bounds, scl_loss

HERE = Path(__file__).parent
LAM, TAU, STEPS, SEED = 0.9, 0.3, 400, 0
SHOWN = (0, 100, STEPS)  # the steps of the three columns
METHODS = {"CE": (0.0, "#666666"), "CE + SCL": (LAM, "#000000")}  # lam and line colour
LABEL_AT = {"CE": (150, 3.8), "CE + SCL": (12, 4.0)}  # position of the name of each curve
CLASSES = ("#0072B2", "#E69F00", "#CC79A7")  # colours of Okabe and Ito
PER_CLASS = 32


def draw_examples(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns points (N, 2) on three noisy spiral arms, and their labels (N,)."""
    labels = torch.arange(3).repeat(PER_CLASS)
    radius = 0.2 + 0.8 * torch.rand(len(labels), generator=generator)
    angle = 2 * torch.pi * (labels / 3 + 0.5 * radius) + 0.15 * torch.randn(len(labels), generator=generator)
    return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), labels


def train(lam: float) -> tuple[list[torch.Tensor], list[float], float]:
    """Returns normalised features and SCL after each step from step 0, and the final accuracy."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    encoder = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    classifier = nn.Linear(2, 3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *classifier.parameters()], lr=0.005)
    test_points, test_labels = draw_examples(generator)
    features, values = [], []
    for step in range(STEPS + 1):
        with torch.no_grad():
            features.append(F.normalize(encoder(test_points), dim=1))
            values.append(scl_loss(features[-1], test_labels, TAU).item())
        if step < STEPS:
            points, labels = draw_examples(generator)
            hidden = encoder(points)
            optimizer.zero_grad()
            ce_scl_loss(classifier(hidden), hidden, labels, lam=lam, temperature=TAU).backward()
            optimizer.step()
    correct = classifier(encoder(test_points)).argmax(dim=1) == test_labels
    return features, values, correct.float().mean().item()


def draw_circle(panel: plt.Axes, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Draws the features (N, 2) on the unit circle, coloured by class."""
    panel.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
    for label, colour in enumerate(CLASSES):
        x, y = features[labels == label].T
        panel.scatter(x, y, s=45, color=colour, alpha=0.6, linewidths=0, zorder=2, label=f"class {label + 1}")
    panel.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    panel.axis("off")


def main() -> None:
    labels = torch.arange(3).repeat(PER_CLASS)
    lowest, collapsed = (bound.item() for bound in scl_bounds(labels, TAU))
    figure = plt.figure(figsize=(8.3, 8.3))
    circles = figure.add_gridspec(2, 3, left=0.08, right=0.99, bottom=0.36, top=0.91, hspace=0.05, wspace=0.02)
    curves = figure.add_axes((0.1, 0.08, 0.87, 0.25))
    for row, (name, (lam, colour)) in enumerate(METHODS.items()):
        features, values, accuracy = train(lam)
        print(f"{name}: SCL {values[0]:.3f} at step 0, {values[-1]:.3f} at step {STEPS}, accuracy {accuracy:.3f}")
        for column, step in enumerate(SHOWN):
            panel = figure.add_subplot(circles[row, column])
            draw_circle(panel, features[step], labels)
            panel.text(0, 0, f"SCL {values[step]:.2f}", ha="center", va="center", fontsize=15)
            if row == 0:
                panel.set_title(f"step {step}", fontsize=15)
            if column == 0:
                title = f"{name}, λ = {lam}" if lam else name
                panel.text(-1.3, 0, title, rotation=90, ha="center", va="center", fontsize=14, weight="bold")
        curves.plot(values, color=colour, linewidth=2.5, linestyle="-" if lam else "--")
        curves.text(*LABEL_AT[name], name, color=colour, fontsize=14)
    print(f"bounds: collapsed {collapsed:.3f}, lowest {lowest:.3f}")
    for name, value, shift in (("collapsed: all features equal", collapsed, 0.06), ("lowest", lowest, -0.23)):
        curves.axhline(value, color="#D55E00", linestyle=":", linewidth=2)
        curves.text(STEPS, value + shift, f"{name}, {value:.2f}", color="#D55E00", ha="right", fontsize=14)
    curves.set_xlabel("training step", fontsize=14)
    curves.set_ylabel(f"SCL, τ = {TAU}", fontsize=14)
    curves.set(xlim=(0, STEPS), ylim=(lowest - 0.4, collapsed + 0.45))
    curves.tick_params(labelsize=13)
    curves.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), ncols=3, loc="upper center", frameon=False, fontsize=14)
    figure.savefig(HERE / "method.png", dpi=100)


main()
