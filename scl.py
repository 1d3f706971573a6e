"""Supervised contrastive loss for fine-tuning (Gunel et al., ICLR 2021, arXiv 2011.01403).

One file, PyTorch only, MIT licence: copy it. Beside cross-entropy, in any training loop:

    loss = ce_scl_loss(class_logits, features, labels, lam=0.9, temperature=0.3)

where `features` is what the encoder gives before the classifier, such as RoBERTa's last
hidden layer at the first token. The SCL term alone is `scl_loss(features, labels)`.

What its value means: `scl_bounds`. It never reaches 0, since the other positives always
share the denominator; log(N-1) says that all features point the same way.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scl_loss(features: Tensor, labels: Tensor, temperature: float = 0.3, *, reduction: str = "mean") -> Tensor:
    """Supervised contrastive loss: draws an anchor to its class in the batch, away from the rest.

    Eq. 3 of the paper, with z the l2-normalised features and P(i) the positives of anchor i,
    the other examples that carry its label:

        loss_i = -1/|P(i)| sum_{j in P(i)} log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )

    Args:
        features: (N, D), any floating dtype; normalised here, in float32 (float64 stays), also
            under autocast. A row of zeros has no direction: similarity 0 to all, gradient 0.
        labels: (N,), integer or bool, on the device of `features`.
        temperature: tau > 0, in units of cosine similarity; smaller looks harder at near neighbours.
        reduction: "mean" over the anchors that have a positive, so that lam in Eq. 1 weighs
            two means; "sum" is Eq. 3 as printed; "none" gives (N,).

    Returns:
        float32 (float64 for float64) scalar, or (N,) for "none". Per anchor,
        log|P(i)| <= loss_i <= log(N-1) + 2/tau. An anchor without a positive has loss 0 and
        weighs nothing; if there is no other (one example, all labels different, N = 0),
        the result is 0 with zero gradient. NaN in `features` gives NaN.

    Raises:
        ValueError: shape, temperature or reduction; TypeError: dtype.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> scl_loss(features, torch.tensor([0, 0, 1, 1]), temperature=0.5)
    tensor(0.2395)
    """
    _check_rows(features, "features", labels)
    _check_temperature(temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')

    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))  # (N, D)
        # The largest entry first: squares then neither overflow nor underflow. A row of zeros stays one.
        largest = features.detach().abs().amax(dim=1, keepdim=True)  # (N, 1)
        z = F.normalize(features / largest.masked_fill(largest == 0, math.inf), dim=1)
        logits = z @ z.T / temperature  # (N, N)

    self_mask = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive_mask = (labels[:, None] == labels) & ~self_mask
    num_positives = positive_mask.sum(dim=1)  # (N,)
    has_positive = num_positives > 0

    # The anchor itself leaves the denominator as -inf, before any maximum is taken. An anchor without
    # a positive keeps itself: its row stays finite even at N = 1, and it counts for nothing below.
    log_denominator = logits.masked_fill(self_mask & has_positive[:, None], -math.inf).logsumexp(dim=1)
    positive_mean = logits.where(positive_mask, 0).sum(dim=1) / num_positives.clamp(min=1)
    loss = (log_denominator - positive_mean) * has_positive  # (N,)

    if reduction == "none":
        return loss
    return loss.sum() / has_positive.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def ce_scl_loss(
    class_logits: Tensor, features: Tensor, labels: Tensor, *, lam: float = 0.9, temperature: float = 0.3
) -> Tensor:
    """The fine-tuning objective, Eq. 1: (1 - lam) * cross-entropy (Eq. 2) + lam * `scl_loss` (Eq. 3).

    Args:
        class_logits: (N, C), any floating dtype: the classifier's output, before any softmax.
        features, labels, temperature: as in `scl_loss`; labels count from 0 to C-1.
        lam: in [0, 1]. 0 is cross-entropy alone, exactly; 1 gives the classifier no gradient but zeros.

    Returns:
        Scalar, float32 (float64 for float64): both terms are means over the batch.

    Raises:
        ValueError: shape, lam or temperature; TypeError: dtype.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> ce_scl_loss(5 * features, features, torch.tensor([0, 0, 1, 1]), lam=0.9, temperature=0.5)
    tensor(0.2163)
    """
    _check_rows(class_logits, "class_logits", labels)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    with torch.autocast(class_logits.device.type, enabled=False):
        class_logits = class_logits.to(torch.promote_types(class_logits.dtype, torch.float32))
        ce = F.cross_entropy(class_logits, labels.long())
    return ce if lam == 0 else (1 - lam) * ce + lam * scl_loss(features, labels, temperature)


def scl_bounds(labels: Tensor, temperature: float = 0.3) -> tuple[Tensor, Tensor]:
    """What the value of `scl_loss(features, labels, temperature)` means: (lowest, collapsed).

    collapsed: all features equal, log(N-1). At random initialisation the loss is often near it;
    a loss that stays there has learned nothing.
    lowest: what no features can go below, with every positive at cosine 1 and every negative at
    -1/(K-1) for K classes of equal size (features need D >= K-1), at -1 otherwise:

        mean over anchors of log( |P(i)| + (N - 1 - |P(i)|) exp((negative - 1) / tau) )

    Exact for one class, for two, and for equal sizes. For three or more classes of unequal sizes
    it is a bound that nothing attains: three directions cannot all be opposite.

    Args:
        labels: (N,). temperature: tau > 0.

    Returns:
        Two float32 scalars, both 0 if no anchor has a positive.

    Raises:
        ValueError: shape or temperature.

    >>> scl_bounds(torch.tensor([0, 1] * 8), temperature=0.3)
    (tensor(1.9474), tensor(2.7081))
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    _check_temperature(temperature)
    n = len(labels)
    class_size = (labels[:, None] == labels).sum(dim=1)  # (N,), of each example's own class
    has_positive = class_size > 1
    equal_sizes = (class_size == class_size[:1]).all()
    gap = torch.where(equal_sizes, n / (n - class_size), 2.0)  # 1 - negative; K/(K-1) = n/(n - class_size)
    floor = torch.log(class_size - 1 + (n - class_size) * torch.exp(-gap / temperature))
    count = has_positive.sum().clamp(min=1)
    lowest = floor.where(has_positive, 0).sum() / count
    return lowest, has_positive.any() * math.log(max(n - 1, 1))


def _check_rows(rows: Tensor, name: str, labels: Tensor) -> None:
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {rows.dtype}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integer or bool, got {labels.dtype}")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, D) with D >= 1, got {tuple(rows.shape)}")
    if labels.shape != rows.shape[:1]:
        expected, got = (len(rows),), tuple(labels.shape)
        raise ValueError(f"labels must have shape {expected} to go with {name} {tuple(rows.shape)}, got {got}")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
