"""gather_batch on several ranks (gloo, one CPU process each) against one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scl import ce_scl_loss, gather_batch

N, WIDTH, CLASSES = 12, 8, 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.classifier = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh()), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        features = self.encoder(x)
        return self.classifier(features), features


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def on_each_rank(rank, work, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(work(rank, ranks), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def spawn(work, ranks, tmp_path):
    """What work(rank, ranks) returns on each of so many processes."""
    torch.multiprocessing.spawn(on_each_rank, (work, ranks, tmp_path), nprocs=ranks)
    return [torch.load(tmp_path / str(rank)) for rank in range(ranks)]


def a_step(rank, ranks):
    model = nn.parallel.DistributedDataParallel(Model())
    x, labels = (part.chunk(ranks)[rank] for part in whole_batch())
    class_logits, features = model(x)
    loss = ce_scl_loss(*gather_batch(class_logits, features, labels))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_gradients_are_those_of_one_process(ranks, tmp_path):
    model, (x, labels) = Model(), whole_batch()
    expected = ce_scl_loss(*model(x), labels)
    expected.backward()
    for loss, gradients in spawn(a_step, ranks, tmp_path):
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6)


def own_anchors(rank, ranks):
    """A loss that differs between the ranks: each contrasts its own rows with all."""
    own = torch.arange(6.0).reshape(3, 2).mul(rank + 1).requires_grad_()
    (everything,) = gather_batch(own.T)  # not contiguous
    (everything * (rank + 1)).square().sum().backward()
    return everything.detach(), own.grad


def plain_sum(rank, ranks):
    """Its gradient is one number, seen as many: a collective that wrote into it would break the memory."""
    own = torch.ones(3, 2, requires_grad=True)
    gather_batch(own)[0].sum().backward()
    return own.grad


def test_the_gradient_of_a_sum(tmp_path):
    for gradient in spawn(plain_sum, 2, tmp_path):
        assert torch.equal(gradient, torch.full((3, 2), 2.0))


def twice(rank, ranks):
    own = torch.ones(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_batch(own)[0].square().sum(), own, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_a_second_derivative_is_refused(tmp_path):
    for message in spawn(twice, 2, tmp_path):
        assert "once_differentiable" in message


def test_gradients_are_summed_over_the_losses_of_the_ranks(tmp_path):
    results = spawn(own_anchors, 2, tmp_path)
    expected = torch.cat([torch.arange(6.0).reshape(3, 2).T * (rank + 1) for rank in range(2)])
    for rank, (everything, gradient) in enumerate(results):
        assert torch.equal(everything, expected)
        assert torch.equal(gradient, 2 * (1 + 4) * torch.arange(6.0).reshape(3, 2) * (rank + 1))


def unequal(rank, ranks):
    """One after another: another length, on the larger or the smaller rank; another width, dtype, number of tensors."""
    features, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    messages = []
    for tensors in (
        (features, labels.new_zeros(3 + rank)),
        (features, labels.new_zeros(3 - rank)),
        (features.new_zeros(3, 2 + rank), labels),
        (features.new_zeros(3, *[2] * (1 + rank)), labels),
        (features.to([torch.float32, torch.float64][rank]), labels),
        (features, labels)[rank:],
    ):
        try:
            gather_batch(*tensors)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_unequal_tensors_are_refused_on_every_rank(tmp_path):
    feature, label = "torch.float32 (3, 2)", "torch.int64 (3,)"
    of_ranks = [
        [f"{feature}, {label}", f"{feature}, torch.int64 (4,)"],
        [f"{feature}, {label}", f"{feature}, torch.int64 (2,)"],
        [f"{feature}, {label}", f"torch.float32 (3, 3), {label}"],
        [f"{feature}, {label}", f"torch.float32 (3, 2, 2), {label}"],
        [f"{feature}, {label}", f"torch.float64 (3, 2), {label}"],
        [f"{feature}, {label}", label],
    ]
    message = "tensors must have the same dtypes and shapes on every rank, got by rank "
    assert spawn(unequal, 2, tmp_path) == 2 * [[message + str(kinds) for kinds in of_ranks]]


def test_nothing_to_gather():
    with pytest.raises(ValueError, match="gather_batch must have at least one tensor, got none"):
        gather_batch()


def test_without_a_process_group_nothing_changes():
    x, labels = whole_batch()
    gathered = gather_batch(x, labels)
    assert gathered[0] is x and gathered[1] is labels
