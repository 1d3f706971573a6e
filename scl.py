"""Supervised contrastive loss for fine-tuning (Gunel et al., ICLR 2021, arXiv 2011.01403).

One file, PyTorch only, MIT licence: copy it. Beside cross-entropy, in any training loop:

    loss = ce_scl_loss(class_logits, features, labels, lam=0.9, temperature=0.3)

`features` is what the encoder gives before the classifier, such as RoBERTa's last hidden layer at
the first token. The SCL term alone is `scl_loss(features, labels)`. On several ranks, before either:

    class_logits, features, labels = gather_batch(class_logits, features, labels)

Large N needs no care: beyond N = 4096 memory grows with N, not N^2 (`chunk_size`; in eager `backward()`).

What the value means: it falls from about log(N-1), where all features point the same way, to a
lowest value that the labels set (`scl_bounds`). That is not 0, since the other positives always
share the denominator. Awkward cases (an anchor without a positive, a row of zeros, half precision,
NaN) are decided in the docstring of `scl_loss`.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def scl_loss(features: Tensor, labels: Tensor, temperature: float = 0.3, *, reduction: str = "mean",
             chunk_size: int | None = None) -> Tensor:  # fmt: skip
    """Supervised contrastive loss: draws an anchor to its class in the batch, away from the rest.

    Eq. 3 of the paper, with z the l2-normalised features and P(i) the positives of anchor i,
    the other examples that carry its label:

        loss_i = -1/|P(i)| sum_{j in P(i)} log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )

    Args:
        features: (N, D), any floating dtype; normalised here, in float32 (float64 stays), also
            under autocast. A row of zeros has no direction: similarity 0 to all, gradient 0.
        labels: (N,), integer or bool, on the device of `features`.
        temperature: tau > 0, in units of cosine similarity; smaller looks harder at near neighbours.
            Below 0.001 float32 gradients lose digits.
        reduction: "mean" over the anchors that have a positive, so that lam in Eq. 1 weighs
            two means; "sum" is Eq. 3 as printed; "none" gives (N,).
        chunk_size: anchors at a time. Fewer than N take O(N chunk_size) memory, nothing N x N is kept
            for backward, and one more matrix product is paid. None: all up to N = 4096, then 512.

    Returns:
        float32 (float64 for float64) scalar, or (N,) for "none". Per anchor,
        log|P(i)| <= loss_i <= log(N-1) + 2/tau. An anchor without a positive has loss 0 and
        weighs nothing; if there is no other (one example, all labels different, N = 0),
        the result is 0 with zero gradient. NaN in `features` gives NaN. Reverse mode differentiates it any
        number of times in eager mode; torch.func.grad, a vmap, export and torch.compile (once) take it, too.

    Raises:
        ValueError: shape, temperature, reduction or chunk_size; TypeError: dtype.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> scl_loss(features, torch.tensor([0, 0, 1, 1]), temperature=0.5)
    tensor(0.2395)
    """
    _check(labels, temperature, features=features)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None, got {chunk_size}")
    chunk_size = chunk_size or (4096 if labels.shape[0] <= 4096 else 512)
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        loss, num_positives, *_ = _SCL.apply(features, labels, temperature, chunk_size)  # (N,), (N, 1)
        weight = num_positives[:, 0].clamp(max=1)  # an anchor without a positive does not count
        if reduction == "mean":
            weight = weight / weight.sum().clamp(min=1)
        return loss * weight if reduction == "none" else loss @ weight


class _SCL(torch.autograd.Function):
    """The loss per anchor, in blocks of c rows of the N x N logits, with its gradient in closed form.

    Let u_i = z_i / sqrt(tau), so that the logits are u u^T, and l_i = log sum_{k != i} exp(u_i.u_k). Then
        loss_i = l_i - mean_{j in P(i)} u_i.u_j.
    With g_i the incoming gradient, that of logit ij is g_i (exp(u_i.u_j - l_i) - [j in P(i)] / |P(i)|). Since
    logit ji is the same number, both meet in a symmetric W, whose row i needs row i of the logits alone:
        W_ij = g_i exp(u_i.u_j - l_i) + g_j exp(u_i.u_j - l_j) - [j in P(i)] (g_i + g_j) / |P(i)|
        dL/du_i = sum_j W_ij u_j, of which normalising lets through the part at right angles to u_i, over the length.
    So two matrix products do it all; where the logits are not kept, a third makes them again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features, labels, temperature, chunk_size):
        # u = features / length, in two divisions, so that squares neither overflow nor underflow
        largest = features.abs().amax(dim=1, keepdim=True)  # (N, 1)
        largest = largest.masked_fill(largest == 0, math.inf)  # a row of zeros stays one, with gradient 0
        u = features / largest  # (N, D)
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=1) * temperature**0.5  # (N, 1)
        u, length = u / length, length * largest

        starts, buffer = _starts(u.shape[0], chunk_size), None
        if len(starts) > 1:  # results that lie between the blocks would fragment the memory
            buffer = (u[:, :1] + labels[:, None]).repeat(1, 3)  # (N, 3); of both, so that vmap batches it with either
        for start in starts:
            logits, positives = _block(u, labels, temperature, start, chunk_size)  # (c, N) each
            num_positives = positives.sum(dim=1, keepdim=True)  # (c, 1)
            log_denominator = logits.logsumexp(dim=1, keepdim=True)
            positive_mean = (positives * logits).sum(dim=1, keepdim=True) / num_positives.clamp(min=1)
            results = log_denominator - positive_mean, num_positives, log_denominator
            if buffer is not None:
                buffer[start : start + chunk_size] = torch.cat(results, dim=1)
        loss, num_positives, log_denominator = results if buffer is None else buffer.split(1, dim=1)  # (N, 1)
        # The loss, and what backward needs beside the inputs.
        return loss[:, 0], num_positives, log_denominator, u, length, logits if buffer is None else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, labels, *ctx.settings = inputs
        ctx.save_for_backward(features, labels, *output[1:])
        ctx.mark_non_differentiable(*filter(torch.is_tensor, output[1:]))
        ctx.set_materialize_grads(False)  # those get none, and nothing N x N is made of zeros

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None, None
        (features, labels, *saved), (temperature, chunk_size) = ctx.saved_tensors, ctx.settings
        with torch.autocast(features.device.type, enabled=False):
            if torch.is_grad_enabled():  # to be differentiated once more, hence as functions of the features
                _, *saved = _SCL.forward(features, labels, temperature, chunk_size)
            num_positives, log_denominator, u, length, kept_logits = saved
            grad = grad[:, None]  # (N, 1): a column is of i, its transpose of j
            share = -grad / num_positives.clamp(min=1)

            starts = _starts(u.shape[0], chunk_size)
            buffer = u + grad if len(starts) > 1 else None  # (N, D), again overwritten block by block
            for start in starts:
                rows = slice(start, start + chunk_size)
                logits, positives = _block(u, labels, temperature, start, chunk_size, kept_logits)  # (c, N) each
                w = (logits - log_denominator[rows]).exp_() * grad[rows]
                w.addcmul_((logits - log_denominator.T).exp_(), grad.T)
                w.addcmul_(positives, share[rows] + share.T).div_(length[rows])
                along_u = (w * logits).sum(dim=1, keepdim=True)  # (c, 1), of d/du_i and u_i: W_ii is 0
                result = (w @ u).addcmul_(u[rows], along_u, value=-temperature)  # (c, D); |u_i|^2 is 1/temperature
                if buffer is not None:
                    buffer[rows] = result
            return result if buffer is None else buffer, None, None, None


def _starts(n, chunk_size):
    """The first rows of the blocks. A single one without a loop over N, so that a compiled graph serves every N."""
    return range(0, n, chunk_size) if chunk_size < n else [0]


def _block(u, labels, temperature, start, size, logits=None):
    """Rows of the N x N logits (made, unless they are here) and of the positives as ones, both (c, N)."""
    rows = slice(start, start + size)
    if logits is None:
        logits = u[rows] @ u.T
        # The anchor leaves the denominator before any maximum is taken, as -inf would do: exp(this - l_i) is 0 even
        # in float64, since l_i >= -1/tau. But N = 1 and second derivatives stay finite.
        logits.diagonal(start).fill_(-2 / temperature - 1000)
    positives = (labels[rows, None] == labels).to(u.dtype)  # multiplying is faster than torch.where
    positives.diagonal(start).fill_(0)
    return logits, positives


def ce_scl_loss(class_logits: Tensor, features: Tensor, labels: Tensor, *, lam: float = 0.9,
                temperature: float = 0.3) -> Tensor:  # fmt: skip
    """The fine-tuning objective, Eq. 1: (1 - lam) * cross-entropy (Eq. 2) + lam * `scl_loss` (Eq. 3).

    Args:
        class_logits: (N, C), any floating dtype: the classifier's output, before any softmax.
        features, labels, temperature: as in `scl_loss`; labels count from 0 to C-1, and none is ignored.
        lam: in [0, 1]. 0 is cross-entropy alone, exactly; 1 gives the classifier zero gradient.

    Returns:
        Scalar, float32 (float64 for float64), of two means: over the batch, and over its anchors with a positive.
        NaN for N = 0, as cross-entropy is.

    Raises:
        ValueError: shape, lam or temperature; TypeError: dtype; IndexError (on a CPU): a label below 0 or above C-1.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> ce_scl_loss(5 * features, features, torch.tensor([0, 0, 1, 1]), lam=0.9, temperature=0.5)
    tensor(0.2163)
    """
    _check(labels, temperature, class_logits=class_logits)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    class_logits = class_logits.to(torch.promote_types(class_logits.dtype, torch.float32))
    ce = F.cross_entropy(class_logits, labels.long(), ignore_index=-(2**63))  # not -100, which SCL would contrast
    return ce if lam == 0 else (1 - lam) * ce + lam * scl_loss(features, labels, temperature)


def scl_bounds(labels: Tensor, temperature: float = 0.3) -> tuple[Tensor, Tensor]:
    """What the value of `scl_loss(features, labels, temperature)` means: (lowest, collapsed).

    collapsed: all features equal, log(N-1). At random initialisation the loss is often near it;
    a loss that stays there has learned nothing.
    lowest: what no features can go below, with every positive at cosine 1 and every negative at
    -1/(K-1) for K classes of equal size (features need D >= K-1), at -1 otherwise:

        mean over anchors of log( |P(i)| + (N - 1 - |P(i)|) exp((negative - 1) / tau) )

    Exact for one class, for two, for equal sizes, and if only one class has more than one example.
    Otherwise it is a bound that nothing attains: three directions cannot all be opposite.

    Args:
        labels: (N,), integer or bool. temperature: tau > 0.

    Returns:
        Two float32 scalars, both 0 if no anchor has a positive.

    Raises:
        ValueError: shape or temperature; TypeError: dtype.

    >>> scl_bounds(torch.tensor([0, 1] * 8), temperature=0.3)
    (tensor(1.9474), tensor(2.7081))
    """
    _check(labels, temperature)
    n, ordered = len(labels), labels.long().sort().values
    class_size = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)  # (N,)
    has_positive = class_size > 1
    all_equal = (class_size == class_size[:1]).all()
    gap = torch.where(all_equal, n / (n - class_size), 2.0)  # 1 - negative; K/(K-1) = n/(n - class_size), inf for one
    floor = torch.log(class_size - 1 + (n - class_size) * torch.exp(-gap / temperature))
    lowest = floor.where(has_positive, 0).sum() / has_positive.sum().clamp(min=1)
    return lowest, has_positive.any() * math.log(max(n - 1, 1))


def gather_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of all ranks, one after another, with gradient: what SCL contrasts is then the global batch.

    Give it all that the loss needs, so that every rank computes the same total, that of one process:

        loss = ce_scl_loss(*gather_batch(class_logits, features, labels))

    The gradient of a rank's rows is summed over the ranks' losses and, as DistributedDataParallel averages
    over ranks, the parameters get what one process would give them. Without it, average them over ranks yourself.

    Cost, for R ranks of N/R rows: every rank receives N (C + D) numbers, sums as many in backward, and computes
    the whole O(N^2 D) loss. The lengths are read once, a synchronisation.

    Args:
        tensors: (N/R, ...) on every rank, of equal length; any dtype that the backend moves. Differentiable once.

    Returns:
        (N, ...) each; the tensors as they are without a process group.

    Raises:
        ValueError, on every rank: a length differs between ranks. SCL's mean over anchors would weigh them unlike DDP.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    of_ranks = _Gather.apply(lengths).view(-1, len(tensors)).tolist()
    if of_ranks != of_ranks[:1] * len(of_ranks):
        raise ValueError(f"tensors must have the same length on every rank, got by rank {of_ranks}")
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
    for name, x in rows.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must have shape (N, D) with D >= 1, got {tuple(x.shape)}")
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels must have shape ({len(x)},) to go with {name} {tuple(x.shape)}, "
                             f"got {tuple(labels.shape)}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integer or bool, got {labels.dtype}")
    if isinstance(temperature, Tensor) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
