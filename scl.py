"""Computes the supervised contrastive loss (SCL) of Gunel et al. for fine-tuning (ICLR 2021, arXiv 2011.01403).

Copy this file into your project. The file needs only PyTorch and has the MIT licence. Call `ce_scl_loss` in training:

    loss = ce_scl_loss(class_logits=class_logits, features=features, labels=labels, lam=0.9, temperature=0.3)

`features` is the output of the encoder, for example RoBERTa's last hidden layer at the first token. The positives of an
example (the anchor) are the other examples of its class. SCL (Eq. 3) is a cross-entropy: a softmax over the other
examples predicts the positives. The target is uniform over the positives. With several positives, SCL is above 0.
"""

import math
import numbers

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min  # replaces -inf, because 0 * -inf would be NaN; exp(LOWEST) is 0


def scl_loss(features: Tensor, labels: Tensor, temperature: float = 0.3, *, reduction: str = "mean",
             chunk_size: int | None = None) -> Tensor:
    """Computes SCL (Eq. 3), which pulls examples of the same class together and pushes different classes apart:

        loss_i = -1/|P(i)| sum_{j in P(i)} log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) ).

    Here, z_i is the L2-normalised feature vector of anchor i. The positives P(i) are other examples of the same class.

    Args:
        features: (N, D), any floating dtype. Each row is normalised; a row of zeros has similarity 0 and gradient 0.
            Under autocast, the loss is still in float32 or float64. Call `backward()` outside autocast.
        labels: (N,), integer or bool, on the device of `features`.
        temperature: tau > 0. A small tau focuses on the nearest negatives. Float32 is imprecise for tau < 0.001.
        reduction: "mean" averages over the anchors with a positive, "sum" is exactly Eq. 3, "none" keeps all losses.
        chunk_size: number of anchors that are computed at once (default: all if N <= 1024, else 512). The memory grows
            with N * chunk_size; torch.compile needs more. Second derivatives and torch.func need chunk_size >= N.

    Returns a float32 tensor (float64 for float64 features): a scalar, or one loss per anchor (N,) for "none". The loss
    of an anchor with positives lies between log|P(i)| and log(N-1) + 2/tau. Loss and gradient are 0 for an anchor or
    batch without positives. NaN features give a NaN loss. Raises ValueError or TypeError for a wrong argument.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> scl_loss(features, torch.tensor([0, 0, 1, 1]), temperature=0.5)
    tensor(0.2395)
    """
    _check(labels, temperature, features=features)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")

    with torch.autocast(features.device.type, enabled=False):
        z = _normalise(features.to(torch.promote_types(features.dtype, torch.float32)))  # (N, D)
        if z.shape[0] <= (chunk_size or 1024):
            self_mask = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)  # (N, N)
            logits = (z @ z.T / temperature).masked_fill(self_mask, LOWEST)  # (N, N)
            log_prob = logits.log_softmax(dim=1)  # (N, N)

            positives = (labels[:, None] == labels) & ~self_mask  # (N, N)
            num_positives = positives.sum(dim=1)  # (N,)
            losses = -(positives * log_prob).sum(dim=1) / num_positives.clamp(min=1)  # (N,), 0 without positives
        else:
            losses, num_positives = _Blocks.apply(z / temperature**0.5, labels, chunk_size or 512)  # less memory

        if reduction == "mean":
            return losses.sum() / (num_positives > 0).sum().clamp(min=1)
        return losses.sum() if reduction == "sum" else losses


def _normalise(features: Tensor) -> Tensor:
    """Scales each row of the features to length 1. A row of zeros stays zero and gets gradient 0."""
    largest = features.detach().abs().amax(dim=1, keepdim=True)  # (N, 1), detached, because z does not depend on it
    scaled = features / largest.masked_fill(largest == 0, math.inf)  # (N, D), |entries| <= 1, so squares are finite
    return scaled * (scaled * scaled).sum(dim=1, keepdim=True).clamp(min=1).rsqrt()


class _Blocks(torch.autograd.Function):
    """Computes the losses and the numbers of positives in blocks of anchors, without storing an N x N matrix.

    Notation: u = z / sqrt(tau), s_ij = u_i.u_j, l_i = log sum_{k != i} exp(s_ik), g_i = dL/d loss_i for a total loss L.
    The loss of anchor i is l_i - mean_{j in P(i)} s_ij.
    The derivative of loss_i with respect to s_ij is softmax minus target: exp(s_ij - l_i) - [j in P(i)] / |P(i)|.
    Both loss_i and loss_j depend on s_ij = s_ji. So W_ij = dL/ds_ij = g_i dloss_i/ds_ij + g_j dloss_j/ds_ij, which is
        g_i exp(s_ij - l_i) + g_j exp(s_ij - l_j) - [j in P(i)] (g_i / |P(i)| + g_j / |P(j)|).
    Row i of W needs only row i of s. The gradient dL/du_i is sum_j W_ij u_j.
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
            raise RuntimeError(f"chunk_size must be at least {len(grad)} for a second derivative, got {ctx.chunk_size}")
        u, labels, num_positives, log_denominator = ctx.saved_tensors
        grad = grad * (num_positives > 0)  # (N,): g_i, but 0 if i has no positive
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
    """Yields for each block of c anchors: `rows` (a slice), `logits` (c, N) and `positives` (c, N; each 1 or 0)."""
    for start in range(0, u.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        logits = u[rows] @ u.T
        logits.diagonal(start).fill_(LOWEST)
        positives = (labels[rows, None] == labels).to(u.dtype)
        positives.diagonal(start).fill_(0)
        yield rows, logits, positives


def ce_scl_loss(class_logits: Tensor, features: Tensor, labels: Tensor, *, lam: float = 0.9,
                temperature: float = 0.3) -> Tensor:
    """Computes Eq. 1, the fine-tuning objective: (1 - lam) * cross-entropy (Eq. 2) + lam * `scl_loss` (Eq. 3).

    class_logits: (N, C), any floating dtype: the output of the classifier before softmax.
    lam: from 0 to 1. With lam = 0, the loss is exactly cross-entropy. With lam = 1, the classifier gets gradient 0.
    See `scl_loss` for the other arguments and the errors. Labels are from 0 to C - 1; the label -100 is not ignored.
    Returns a float32 scalar (float64 for float64 inputs). Cross-entropy averages over the batch, and SCL averages over
    the anchors with a positive. An empty batch gives NaN. On a CPU, a label outside 0 to C - 1 raises IndexError.

    >>> features, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1])
    >>> ce_scl_loss(class_logits=5 * features, features=features, labels=labels, lam=0.9, temperature=0.5)
    tensor(0.2163)
    """
    _check(labels, temperature, class_logits=class_logits, features=features)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    class_logits = class_logits.to(torch.promote_types(class_logits.dtype, torch.float32))
    ce = F.cross_entropy(class_logits, labels.long(), ignore_index=-(2**63))  # so that label -100 is not ignored
    return ce if lam == 0 else (1 - lam) * ce + lam * scl_loss(features, labels, temperature)


def scl_bounds(labels: Tensor, temperature: float = 0.3) -> tuple[Tensor, Tensor]:
    """Returns two float32 scalars, `lowest` and `collapsed`, to compare with `scl_loss(features, labels, temperature)`.

    The scalar `collapsed` is log(N - 1), the loss if all features are equal. If the loss stays near `collapsed`, the
    encoder learns nothing from SCL. The scalar `lowest` is a lower bound: the mean, over the anchors with positives, of

        log( |P(i)| + (N - 1 - |P(i)|) exp((c - 1) / tau) ).

    The bound assumes cosine 1 to positives and cosine c to negatives: c = -1/(K-1) for K classes of equal size, c = -1
    otherwise. The loss can reach `lowest` if K <= 2, if only one class has more than one example, or if class sizes are
    equal and D >= K - 1; otherwise it cannot. Without positives, both scalars are 0. Raises errors as `scl_loss` does.

    >>> scl_bounds(torch.tensor([0, 1] * 8), temperature=0.3)
    (tensor(1.9474), tensor(2.7081))
    """
    _check(labels, temperature)
    n, ordered = labels.shape[0], labels.long().sort().values  # not `unique`, whose shape depends on the data
    class_size = (torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)).float()
    has_positive = class_size > 1
    # gap = 1 - c. For equal class sizes, gap = K/(K-1) = n/(n - class_size), inf for K = 1. For other sizes, gap = 2.
    gap = torch.where((class_size == class_size[:1]).all(), n / (n - class_size), 2)
    floor = torch.log(class_size - 1 + (n - class_size) * torch.exp(-gap / temperature))
    lowest = floor.where(has_positive, 0).sum() / has_positive.sum().clamp(min=1)
    return lowest, has_positive.any() * torch.full_like(lowest, math.log(max(n - 1, 1)))


def gather_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenates the tensors of all ranks and keeps gradients, so that SCL contrasts the examples of all ranks.

    Use a single call for all tensors that the loss needs. Then compute the loss from the tensors of the global batch.

        class_logits, features, labels = gather_batch(class_logits, features, labels)

    With R ranks, a tensor of shape (N/R, ...) becomes (N, ...). Without a process group, the tensors stay unchanged.
    Backward sums the gradients of all ranks; each rank keeps the part for its own examples. DistributedDataParallel
    averages the gradients of the parameters over the ranks. The averaged gradients equal those of a single process.
    Without DistributedDataParallel, average the gradients of the parameters yourself. Each rank exchanges N (C + D)
    numbers in forward and in backward, and computes the loss in O(N^2 D). Raises TypeError for an argument that is not
    a tensor, and ValueError without tensors, or on all ranks if dtypes or shapes differ. All ranks wait for this check.
    """
    if not tensors:
        raise ValueError("gather_batch must have at least one tensor, got none")
    if others := [type(x) for x in tensors if not isinstance(x, Tensor)]:
        raise TypeError(f"tensors must be Tensor arguments, as in gather_batch(a, b), got {others[0]!r}")
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    kinds = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors).ljust(512)[:512]
    encoded = torch.tensor(list(kinds.encode()), dtype=torch.uint8, device=tensors[0].device)
    of_ranks = [bytes(row).decode().strip() for row in _Gather.apply(encoded).view(-1, 512).tolist()]
    if len(set(of_ranks)) > 1:
        raise ValueError(f"tensors must have the same dtypes and shapes on every rank, got per rank: {of_ranks}")
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
            raise ValueError(f"labels must have shape ({len(x)},) for {name} {(*x.shape,)}, got {(*labels.shape,)}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
