"""gather_batch on several ranks (gloo, one CPU process each) against one process, and parts/ranks.py."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parts import ranks
from parts.errors import UserError
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


def on_each_rank(rank, work, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(rank, world_size), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def spawn(work, world_size, tmp_path):
    """Returns what work(rank, world_size) returns in each process."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "transformers"])  # imports them once for all processes
    torch.multiprocessing.start_processes(on_each_rank, (work, world_size, tmp_path), nprocs=world_size,
                                          start_method="forkserver")
    return [torch.load(tmp_path / str(rank)) for rank in range(world_size)]


def one_step(rank, world_size):
    model = nn.parallel.DistributedDataParallel(Model())
    x, labels = (part.chunk(world_size)[rank] for part in whole_batch())
    class_logits, features = model(x)
    loss = ce_scl_loss(*gather_batch(class_logits, features, labels))
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_and_gradients_are_those_of_one_process(world_size, tmp_path):
    model, (x, labels) = Model(), whole_batch()
    expected = ce_scl_loss(*model(x), labels)
    expected.backward()
    for loss, gradients in spawn(one_step, world_size, tmp_path):
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6)


def own_anchors(rank, world_size):
    """Computes a loss that differs between the ranks."""
    own = torch.arange(6.0).reshape(3, 2).mul(rank + 1).requires_grad_()
    (everything,) = gather_batch(own.T)  # not contiguous
    (everything * (rank + 1)).square().sum().backward()
    return everything.detach(), own.grad


def plain_sum(rank, world_size):
    """The gradient of a sum is one number in memory, expanded. A collective must not write into that memory."""
    own = torch.ones(3, 2, requires_grad=True)
    gather_batch(own)[0].sum().backward()
    return own.grad


def test_the_gradient_of_a_sum(tmp_path):
    for gradient in spawn(plain_sum, 2, tmp_path):
        assert torch.equal(gradient, torch.full((3, 2), 2.0))


def differentiate_twice(rank, world_size):
    own = torch.ones(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(gather_batch(own)[0].square().sum(), own, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_a_second_derivative_is_rejected(tmp_path):
    for message in spawn(differentiate_twice, 2, tmp_path):
        assert "once_differentiable" in message


def test_gradients_are_summed_over_the_losses_of_the_ranks(tmp_path):
    results = spawn(own_anchors, 2, tmp_path)
    expected = torch.cat([torch.arange(6.0).reshape(3, 2).T * (rank + 1) for rank in range(2)])
    for rank, (everything, gradient) in enumerate(results):
        assert torch.equal(everything, expected)
        assert torch.equal(gradient, 2 * (1 + 4) * torch.arange(6.0).reshape(3, 2) * (rank + 1))


def unequal(rank, world_size):
    """Gathers tensors that differ between the ranks: in length, width, dimensions, dtype and number."""
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


def test_unequal_tensors_are_rejected_on_every_rank(tmp_path):
    feature, label = "torch.float32 (3, 2)", "torch.int64 (3,)"
    of_ranks = [
        [f"{feature}, {label}", f"{feature}, torch.int64 (4,)"],
        [f"{feature}, {label}", f"{feature}, torch.int64 (2,)"],
        [f"{feature}, {label}", f"torch.float32 (3, 3), {label}"],
        [f"{feature}, {label}", f"torch.float32 (3, 2, 2), {label}"],
        [f"{feature}, {label}", f"torch.float64 (3, 2), {label}"],
        [f"{feature}, {label}", label],
    ]
    message = "tensors must have the same dtypes and shapes on every rank, got per rank: "
    assert spawn(unequal, 2, tmp_path) == 2 * [[message + str(kinds) for kinds in of_ranks]]


def test_gather_batch_needs_a_tensor():
    with pytest.raises(ValueError, match="gather_batch must have at least one tensor, got none"):
        gather_batch()


def test_gather_batch_returns_its_tensors_in_a_single_process():
    x, labels = whole_batch()
    gathered = gather_batch(x, labels)
    assert gathered[0] is x and gathered[1] is labels


# ------------------------------------------------------------ parts/ranks.py


def different_run(rank, world_size):
    """Returns the message for equal names, and the message for names that differ between the ranks."""
    messages = []
    for name in ("a", f"run{rank}"):
        try:
            messages.append(ranks.check_same_run(name))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_ranks_with_different_runs_are_rejected_on_every_rank(tmp_path):
    message = ("the processes have different data or flags (runs run0, run1); give every process the same files and "
               "flags, then repeat the command")
    assert spawn(different_run, 2, tmp_path) == 2 * [[None, message]]


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_without_torchrun_are_rejected(monkeypatch, no_torchrun):
    """Otherwise each process would train alone."""
    cpu = torch.device("cpu")
    for processes in (None, "1"):
        if processes:
            monkeypatch.setenv("WORLD_SIZE", processes)
        ranks.join_ranks(cpu)
        assert (ranks.rank(), ranks.world_size()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="the environment has WORLD_SIZE=2, but torchrun did not start this process"):
        ranks.join_ranks(cpu)
    assert not dist.is_initialized()


def some_rank(rank, world_size):
    return [any(ranks.from_all_ranks(flag)) for flag in (False, rank == 1, True)]


def test_a_value_from_all_ranks(tmp_path, no_torchrun):
    assert spawn(some_rank, 2, tmp_path) == 2 * [[False, True, True]]
    assert [ranks.from_all_ranks(flag) for flag in (False, True)] == [[False], [True]]


@pytest.mark.parametrize("capability, precision, warned", [
    ("AVX2", "bf16", True), ("AVX512, bfloat16", "bf16", False), ("AVX2", "fp32", False), ("AVX2", "fp16", False)])
def test_bfloat16_without_cpu_instructions_is_warned_of(monkeypatch, capsys, capability, precision, warned):
    monkeypatch.setattr(ranks, "cpu_capability", lambda: capability)
    ranks.warn_if_slow(torch.device("cpu"), precision)
    assert ("may be much slower than fp32" in capsys.readouterr().err) == warned
