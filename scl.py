"""Supervised contrastive loss for fine-tuning (Gunel et al., ICLR 2021, arXiv 2011.01403).

One file, PyTorch only, MIT licence: copy it. In any training loop, with `features` what the encoder gives before the
classifier, such as RoBERTa's last hidden layer at the first token:

    loss = ce_scl_loss(class_logits=class_logits, features=features, labels=labels, lam=0.9, temperature=0.3)

How to read Eq. 3: it is the cross-entropy of a softmax over the other examples of the batch against a uniform target
over the positives, those of them that carry the anchor's label. As these share one softmax, it does not fall to 0.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min  # a logit that is as good as -inf to a softmax, but 0 times it is 0, not NaN


def scl_loss(features: Tensor, labels: Tensor, temperature: float = 0.3, *, reduction: str = "mean",
             chunk_size: int | None = None) -> Tensor:
    """Supervised contrastive loss: draws an anchor to its class in the batch, away from the rest. Eq. 3 of the paper:

        loss_i = -1/|P(i)| sum_{j in P(i)} log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )

    with z the l2-normalised features and P(i) the positives of anchor i, the other examples that carry its label.

    Args:
        features: (N, D), any floating dtype; normalised here, in float32 (float64 stays), also under autocast (but call
            `backward()` outside of it). A row of zeros has no direction: similarity 0 to all, gradient 0.
        labels: (N,), integer or bool, on the device of `features`.
        temperature: tau > 0; smaller looks harder at near neighbours. Below 0.001 float32 gradients lose digits.
        reduction: "mean" over the anchors that have a positive, "sum" (Eq. 3 as printed), or "none", which gives (N,).
        chunk_size: anchors at a time, by default all up to N = 1024, else 512. Fewer than N take O(N chunk_size)
            memory in eager mode, and differentiate once, by `backward()`. chunk_size=N does all that autograd can.

    Returns a float32 (float64 for float64) scalar, or (N,). Per anchor, log|P(i)| <= loss_i <= log(N-1) + 2/tau.
    An anchor without a positive has loss 0 and no weight; without any other (one example, all labels different, N = 0)
    the result is 0 with zero gradient. NaN gives NaN. Raises ValueError (shape, value) or TypeError (dtype, no tensor).

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> scl_loss(features, torch.tensor([0, 0, 1, 1]), temperature=0.5)
    tensor(0.2395)
    """
    _check(labels, temperature, features=features)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None, got {chunk_size}")

    with torch.autocast(features.device.type, enabled=False):
        z = _normalise(features.to(torch.promote_types(features.dtype, torch.float32)))  # (N, D)
        if z.shape[0] <= (chunk_size or 1024):
            self_mask = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)  # (N, N)
            logits = (z @ z.T / temperature).masked_fill(self_mask, LOWEST)  # (N, N), before any maximum is taken
            log_prob = logits.log_softmax(dim=1)  # (N, N)

            positives = (labels[:, None] == labels) & ~self_mask  # (N, N)
            num_positives = positives.sum(dim=1)  # (N,)
            losses = -(positives * log_prob).sum(dim=1) / num_positives.clamp(min=1)  # (N,), 0 without a positive
        else:
            losses, num_positives = _Blocks.apply(z / temperature**0.5, labels, chunk_size or 512)  # the same

        if reduction == "mean":
            return losses.sum() / (num_positives > 0).sum().clamp(min=1)
        return losses.sum() if reduction == "sum" else losses


def _normalise(features: Tensor) -> Tensor:
    """Rows of length 1, or 0. Divided by their largest entry first, so that squares neither overflow nor underflow."""
    largest = features.detach().abs().amax(dim=1, keepdim=True)  # (N, 1); z does not depend on it
    scaled = features / largest.masked_fill(largest == 0, math.inf)  # (N, D); zeros stay, with gradient 0
    return scaled * (scaled * scaled).sum(dim=1, keepdim=True).clamp(min=1).rsqrt()


class _Blocks(torch.autograd.Function):
    """Losses and numbers of positives, c anchors at a time. Nothing N x N is kept: the gradient is a closed form.

    With u = z / sqrt(tau), logits s_ij = u_i.u_j, l_i = log sum_{k != i} exp(s_ik), and g_i what comes in for loss_i:
        loss_i = l_i - mean_{j in P(i)} s_ij
        d loss_i / d s_ij = exp(s_ij - l_i) - [j in P(i)] / |P(i)|, the softmax minus the target.
    s_ij = s_ji is in loss_i and in loss_j. Their sum W is symmetric, so that row i of s is all that row i of W needs:
        W_ij = g_i exp(s_ij - l_i) + g_j exp(s_ij - l_j) - [j in P(i)] (g_i + g_j) / |P(i)|
        dL/du_i = sum_j W_ij u_j
    """

    @staticmethod
    def forward(ctx, u, labels, chunk_size):
        losses, num_positives, log_denominator = (u.new_empty(u.shape[0]) for _ in range(3))  # (N,)
        for rows, logits, positives in _blocks(u, labels, chunk_size):
            num_positives[rows] = positives.sum(dim=1)
            log_denominator[rows] = logits.logsumexp(dim=1)
            log_prob = logits - log_denominator[rows, None]
            losses[rows] = -(positives * log_prob).sum(dim=1) / num_positives[rows].clamp(min=1)
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(u, labels, num_positives, log_denominator)
        ctx.mark_non_differentiable(num_positives)
        return losses, num_positives

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            raise RuntimeError("scl_loss in blocks has no second derivative; with chunk_size=len(features) it has")
        u, labels, num_positives, log_denominator = ctx.saved_tensors
        grad = grad * (num_positives > 0)  # (N,); below, [rows, None] is of i and the rest of j
        share = grad / num_positives.clamp(min=1)
        grad_u = torch.empty_like(u)
        with torch.autocast(u.device.type, enabled=False):
            for rows, logits, positives in _blocks(u, labels, ctx.chunk_size):
                w = (logits - log_denominator[rows, None]).exp_() * grad[rows, None]
                w += (logits - log_denominator).exp_() * grad
                w -= positives * (share[rows, None] + share)
                grad_u[rows] = w @ u
        return grad_u, None, None


def _blocks(u, labels, chunk_size):
    """Rows, with their logits and their positives as ones, (c, N) each."""
    for start in range(0, u.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        logits = u[rows] @ u.T
        logits.diagonal(start).fill_(LOWEST)
        positives = (labels[rows, None] == labels).to(u.dtype)
        positives.diagonal(start).fill_(0)
        yield rows, logits, positives


def ce_scl_loss(class_logits: Tensor, features: Tensor, labels: Tensor, *, lam: float = 0.9,
                temperature: float = 0.3) -> Tensor:
    """The fine-tuning objective, Eq. 1: (1 - lam) * cross-entropy (Eq. 2) + lam * `scl_loss` (Eq. 3).

    class_logits: (N, C), any floating dtype: the classifier's output, before any softmax.
    features, labels, temperature: as in `scl_loss`; labels count from 0 to C-1, and none is ignored.
    lam: in [0, 1]. 0 is cross-entropy alone, exactly; 1 gives the classifier zero gradient.
    Returns a float32 scalar (float64 for float64) of two means: over the batch, and over its anchors with a positive;
    NaN for N = 0, as cross-entropy is. Raises as `scl_loss`; on a CPU also IndexError for a label below 0 or above C-1.

    >>> features, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1])
    >>> ce_scl_loss(class_logits=5 * features, features=features, labels=labels, lam=0.9, temperature=0.5)
    tensor(0.2163)
    """
    _check(labels, temperature, class_logits=class_logits, features=features)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    class_logits = class_logits.to(torch.promote_types(class_logits.dtype, torch.float32))
    ce = F.cross_entropy(class_logits, labels.long(), ignore_index=-(2**63))  # not -100, which SCL would contrast
    return ce if lam == 0 else (1 - lam) * ce + lam * scl_loss(features, labels, temperature)


def scl_bounds(labels: Tensor, temperature: float = 0.3) -> tuple[Tensor, Tensor]:
    """What the value of `scl_loss(features, labels, temperature)` means: (lowest, collapsed), two float32 scalars.

    collapsed: all features equal, log(N-1). At random initialisation the loss is often near it; a loss that stays
    there has learned nothing. lowest: what no features can go below, with every positive at cosine 1 and every
    negative at -1/(K-1) for K classes of equal size (features need D >= K-1), at -1 otherwise:

        mean over anchors of log( |P(i)| + (N - 1 - |P(i)|) exp((negative - 1) / tau) )

    Exact for one class, for two, for equal sizes, and if only one class has more than one example. Otherwise nothing
    attains it: three directions cannot all be opposite. Both are 0 without any positive. Arguments, errors: `scl_loss`.

    >>> scl_bounds(torch.tensor([0, 1] * 8), temperature=0.3)
    (tensor(1.9474), tensor(2.7081))
    """
    _check(labels, temperature)
    n, ordered = labels.shape[0], labels.long().sort().values  # not `unique`, whose shape depends on the labels
    class_size = (torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)).float()
    has_positive = class_size > 1
    # 1 - negative: 2, or for K classes of one size K/(K-1) = n/(n - class_size), which is inf for a single class
    gap = torch.where((class_size == class_size[:1]).all(), n / (n - class_size), 2)
    floor = torch.log(class_size - 1 + (n - class_size) * torch.exp(-gap / temperature))
    lowest = floor.where(has_positive, 0).sum() / has_positive.sum().clamp(min=1)
    return lowest, has_positive.any() * torch.full_like(lowest, math.log(max(n - 1, 1)))


def gather_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of all ranks, one after another, with gradient: what SCL contrasts is then the global batch.

    Give it all that the loss needs, so that every rank computes the same total, that of one process:

        class_logits, features, labels = gather_batch(class_logits, features, labels)

    Takes (N/R, ...) of any dtype that the backend moves, gives (N, ...); without a process group, the same tensors.
    A rank's rows get the gradient, once, of the sum of the ranks' losses. DDP, which averages over ranks, then gives
    parameters that of one process; without it, average yourself. Each rank receives N (C + D) numbers, sums as many in
    backward, and computes the whole O(N^2 D) loss. Raises ValueError on every rank: no tensor, or dtypes or shapes
    (compared first, a synchronisation) that differ between ranks, lengths too: DDP would weigh them unlike SCL's mean.
    """
    if not tensors:
        raise ValueError("gather_batch must have at least one tensor, got none")
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    kinds = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors).ljust(512)[:512]
    encoded = torch.tensor(list(kinds.encode()), dtype=torch.uint8, device=tensors[0].device)
    of_ranks = [bytes(row).decode().strip() for row in _Gather.apply(encoded).view(-1, 512).tolist()]
    if len(set(of_ranks)) > 1:
        raise ValueError(f"tensors must have the same dtypes and shapes on every rank, got by rank {of_ranks}")
    return tuple(_Gather.apply(tensor.contiguous()) for tensor in tensors)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _check(labels: Tensor, temperature: float, **rows: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be an integer or bool tensor, got {getattr(labels, 'dtype', type(labels))!r}")
    for name, x in rows.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x))!r}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must have shape (N, D) with D >= 1, got {tuple(x.shape)}")
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels must have shape ({len(x)},) to go with {name} {tuple(x.shape)}, "
                             f"got {tuple(labels.shape)}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    if isinstance(temperature, Tensor) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
