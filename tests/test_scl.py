"""scl.py against a triple loop written from Eq. 3 in plain Python floats, and against what must hold for any batch.

By hand, and long: more examples for the properties, and mutants of scl.py (in a copy, since it is rewritten in place):

    SCL_EXAMPLES=20000 python -m pytest tests/test_scl.py -k property
    pip install cosmic-ray && cosmic-ray init tests/mutation.toml mutants.sqlite
    cosmic-ray exec tests/mutation.toml mutants.sqlite && cr-report mutants.sqlite --show-pending
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from scl import ce_scl_loss, gather_batch, scl_bounds, scl_loss

examples = int(os.environ.get("SCL_EXAMPLES", settings.default.max_examples))  # on CI the default repeats them
settings.register_profile("scl", settings.default, deadline=None, max_examples=examples)
settings.load_profile("scl")


def oracle(features, labels, temperature):
    """Loss per anchor, and the gradient of their sum over `features`, for lists of floats and of labels."""
    n, width = len(labels), len(features[0]) if features else 0
    norms = [math.sqrt(sum(x * x for x in row)) for row in features]
    z = [[x / norm if norm else 0.0 for x in row] for row, norm in zip(features, norms, strict=True)]
    losses, grad_z = [], [[0.0] * width for _ in range(n)]
    for i in range(n):
        positives = [j for j in range(n) if j != i and labels[j] == labels[i]]
        if not positives:
            losses.append(0.0)
            continue
        others = [k for k in range(n) if k != i]
        similarity = {k: sum(z[i][d] * z[k][d] for d in range(width)) / temperature for k in others}
        top = max(similarity.values())
        denominator = sum(math.exp(similarity[k] - top) for k in others)
        losses.append(
            -sum(similarity[j] - top - math.log(denominator) for j in positives) / len(positives)
        )
        for k in others:
            slope = math.exp(similarity[k] - top) / denominator - (k in positives) / len(positives)
            for d in range(width):
                grad_z[i][d] += slope * z[k][d] / temperature
                grad_z[k][d] += slope * z[i][d] / temperature
    grad = []
    for i in range(n):
        along = sum(g * x for g, x in zip(grad_z[i], z[i], strict=True))
        grad.append([(grad_z[i][d] - along * z[i][d]) / norms[i] if norms[i] else 0.0 for d in range(width)])
    return losses, grad


def reduce(losses, labels, reduction):
    """The factor of the sum, and the reduced loss, by definition."""
    anchors = sum(labels.count(label) > 1 for label in labels)
    factor = 1 / max(anchors, 1) if reduction == "mean" else 1.0
    return factor, factor * sum(losses)


def compare(features, labels, temperature, tolerance, reduction="mean", chunk_size=None):
    """Value and gradient of scl_loss on these very numbers; tolerance is relative to the size of the oracle's."""
    features = features.detach().clone().requires_grad_()
    loss = scl_loss(features, labels, temperature, reduction=reduction, chunk_size=chunk_size)
    loss.backward()
    losses, grad = oracle(features.double().tolist(), labels.tolist(), temperature)
    factor, expected = reduce(losses, labels.tolist(), reduction)
    expected_grad = factor * torch.tensor(grad, dtype=torch.float64)
    assert abs(loss.item() - expected) <= tolerance * max(1, abs(expected))
    rounding = 2 * torch.finfo(features.dtype).eps  # the gradient comes back in the dtype of the features
    error = (features.grad.double() - expected_grad).abs().max()
    assert error <= (tolerance + rounding) * max(expected_grad.abs().max(), 1e-3)
    return loss


CHUNK_SIZES = [None, 1, 3, 100]  # plain where it is at least N, else in blocks


def batch(n=12, width=5, classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    return features, torch.randint(classes, (n,), generator=generator)


# ------------------------------------------------------------ the oracle


@pytest.mark.parametrize("chunk_size", [None, 5, 12])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_triple_loop(dtype, temperature, reduction, chunk_size):
    tolerance = 1e-9 if dtype == torch.float64 else 3e-5 / temperature
    for seed in range(5):
        compare(*batch(seed=seed, dtype=dtype), temperature, tolerance, reduction, chunk_size)


def test_equals_the_triple_loop_with_orphans():
    features, _ = batch(n=8)
    compare(features, torch.tensor([0, 0, 1, 2, 2, 2, 3, 0]), 0.3, 1e-9)  # 1 and 3 have no positive


def test_reduction_none_is_the_loss_per_anchor():
    features, labels = batch()
    losses, _ = oracle(features.tolist(), labels.tolist(), 0.3)
    assert torch.allclose(scl_loss(features, labels, reduction="none"), torch.tensor(losses, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient(reduction, chunk_size):
    features, labels = batch(n=7)
    loss = functools.partial(scl_loss, labels=labels, reduction=reduction, chunk_size=chunk_size)
    assert torch.autograd.gradcheck(loss, features.requires_grad_(), check_forward_ad=chunk_size in (None, 100))


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 0, 2], [0, 0, 1, 2, 2, 2, 3], [5, 5], [0, 1], [0]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradient_of_second_order(reduction, labels, chunk_size):
    features, labels = batch(n=len(labels))[0], torch.tensor(labels)
    loss = functools.partial(scl_loss, labels=labels, reduction=reduction, chunk_size=chunk_size)
    assert torch.autograd.gradgradcheck(loss, features.requires_grad_(), check_fwd_over_rev=True)


def test_a_row_of_zeros_has_finite_second_derivatives():
    features, labels = batch(n=6, classes=2)
    features[2] = 0
    hessian = torch.func.hessian(scl_loss)(features, labels)  # (N, D, N, D)
    assert hessian.isfinite().all()
    assert hessian[2].eq(0).all() and hessian[:, :, 2].eq(0).all()
    assert hessian[0].ne(0).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_blocks_a_second_derivative_is_refused_and_never_wrong(reduction):
    """Also where nothing that comes in asks for a gradient, which once_differentiable would let pass."""
    features, labels = batch(n=7)
    loss = scl_loss(features.requires_grad_(), labels, reduction=reduction, chunk_size=3).sum()
    with pytest.raises(RuntimeError, match="chunk_size must be at least 7 for a second derivative, got 3"):
        torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="chunk_size must be at least 7 for a second derivative"):
        torch.autograd.functional.hessian(functools.partial(scl_loss, labels=labels, chunk_size=3), features.detach())
    in_blocks = functools.partial(scl_loss, labels=labels, chunk_size=3)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
            transform(in_blocks)(features.detach())
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.func.vmap(in_blocks)(features.detach()[None])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_second_order_along_large_vectors(n):
    """Scaling the features by s scales the gradient by 1/s: the Hessian takes the features to minus the gradient."""
    features, labels = batch(n=n, classes=2)
    (gradient,) = torch.autograd.grad(scl_loss(features.requires_grad_(), labels), features, create_graph=True)
    hessian = [torch.autograd.grad(gradient, features, v, retain_graph=True)[0] for v in (features, 1e3 * features)]
    torch.testing.assert_close(hessian[0], -gradient)
    torch.testing.assert_close(hessian[1], -1e3 * gradient)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_losses_may_be_changed_in_place(chunk_size):
    features, labels = batch()
    gradients = []
    for weigh in (lambda losses: losses.mul_(2), lambda losses: losses * 2):
        losses = scl_loss(features.requires_grad_(), labels, reduction="none", chunk_size=chunk_size)
        gradients += torch.autograd.grad(weigh(losses).sum(), features)
    assert torch.equal(*gradients)


def test_upstream_gradient_and_layout():
    features, labels = batch(n=9)
    wide = features.repeat_interleave(2, dim=1)[:, ::2].requires_grad_()  # not contiguous
    plain = features.clone().requires_grad_()
    (3 * scl_loss(wide, labels)).backward()
    scl_loss(plain, labels).backward()
    assert torch.allclose(wide.grad, 3 * plain.grad)


# ------------------------------------------------------------ values by hand


def test_two_pairs_at_right_angles():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    expected = math.log(math.exp(2) + 2) - 2  # positive at cosine 1, two negatives at 0, tau 0.5
    assert scl_loss(features, torch.tensor([0, 0, 1, 1]), 0.5).item() == pytest.approx(expected)


def test_three_angles():
    """Anchors at 0 and 60 degrees are positives, 180 degrees is alone: cosines 1/2, -1 and -1/2."""
    angles = torch.tensor([0.0, 60.0, 180.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    first = math.log(math.exp(0.5) + math.exp(-1)) - 0.5
    second = math.log(math.exp(0.5) + math.exp(-0.5)) - 0.5
    loss = scl_loss(features, torch.tensor([4, 4, 7]), 1.0, reduction="none")
    assert loss.tolist() == pytest.approx([first, second, 0.0])
    assert scl_loss(features, torch.tensor([4, 4, 7]), 1.0).item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_one_class_with_equal_features_is_collapsed(n):
    assert scl_loss(torch.ones(n, 3), torch.zeros(n, dtype=torch.long)).item() == pytest.approx(math.log(n - 1))


# ------------------------------------------------------------ where other implementations fail


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("labels", [[], [3], [0, 1, 2, 3]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_positive_anywhere_is_zero_with_zero_gradient(labels, reduction, chunk_size):
    features = torch.randn(len(labels), 4, requires_grad=True)
    loss = scl_loss(features, torch.tensor(labels, dtype=torch.long), reduction=reduction, chunk_size=chunk_size)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.eq(0).all()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_reduction_none_of_few(n):
    loss = scl_loss(torch.randn(n, 4), torch.arange(n), reduction="none")
    assert loss.tolist() == [0] * n


def test_two_of_one_class_is_zero():
    assert scl_loss(torch.randn(2, 4), torch.zeros(2, dtype=torch.long)).item() == pytest.approx(0, abs=1e-6)


def test_an_orphan_weighs_nothing_but_counts_as_a_negative():
    features, labels = batch(n=6, classes=2)
    with_orphan = torch.cat([features, torch.randn(1, 5, dtype=torch.float64)])
    per_anchor = scl_loss(with_orphan, torch.cat([labels, torch.tensor([9])]), reduction="none")
    assert per_anchor[-1] == 0
    assert (per_anchor[:-1] > scl_loss(features, labels, reduction="none")).all()
    mean = scl_loss(with_orphan, torch.cat([labels, torch.tensor([9])]))
    assert mean.item() == pytest.approx(per_anchor[:-1].mean().item())


@pytest.mark.parametrize("dtype, temperature", [(torch.float32, 0.01), (torch.float16, 0.05)])
def test_low_temperature_with_cosines_near_zero(dtype, temperature):
    features = torch.eye(8, 16).to(dtype) + 0.01 * batch(n=8, width=16, dtype=dtype)[0]
    compare(features, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), temperature, 3e-5 / temperature)


def test_opposite_positives_at_low_temperature():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    compare(features, torch.tensor([0, 0, 1, 1]), 0.01, 3e-3)


def test_the_anchor_stays_out_of_its_denominator_at_any_temperature():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # the only logit is -1/tau
    assert scl_loss(features, torch.tensor([0, 0]), 0.001).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("scale, dtype", [(3000, torch.float16), (1e30, torch.float32), (1e-30, torch.float32)])
def test_large_and_small_features_do_not_vanish(scale, dtype):
    features, labels = batch(n=8, width=768)
    loss = scl_loss((features * scale).to(dtype), labels)
    assert loss.item() == pytest.approx(scl_loss(features, labels).item(), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_autocast_changes_nothing(dtype, chunk_size):
    features, labels = batch(n=16, width=64, dtype=dtype)
    inside, outside = (features.clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = scl_loss(inside, labels, chunk_size=chunk_size)
        total = ce_scl_loss(features[:, :3], features, labels)
    loss.backward()
    scl_loss(outside, labels, chunk_size=chunk_size).backward()
    assert loss.dtype == total.dtype == torch.float32
    assert loss == scl_loss(features, labels, chunk_size=chunk_size)
    assert torch.equal(inside.grad, outside.grad)
    assert total == ce_scl_loss(features[:, :3], features, labels)


@pytest.mark.parametrize("chunk_size, tolerance", [(None, 0.02), (4, 0)])
def test_backward_called_inside_autocast(chunk_size, tolerance):
    """What PyTorch advises against: plain autograd then multiplies in bfloat16. In blocks nothing changes."""
    features, labels = batch(n=16, width=64, dtype=torch.float32)
    inside, outside = (features.clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        scl_loss(inside, labels, chunk_size=chunk_size).backward()
    scl_loss(outside, labels, chunk_size=chunk_size).backward()
    assert (inside.grad - outside.grad).abs().max() <= tolerance * outside.grad.abs().max()


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_not_hidden(labels, row, bad, chunk_size):
    features = torch.randn(4, 3)
    features[row, 1] = bad
    loss = scl_loss(features.requires_grad_(), torch.tensor(labels), chunk_size=chunk_size)
    loss.backward()
    assert loss.isnan()
    assert features.grad[row].isnan().all()


def test_converged_anchors_count():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.5, -1.0]])
    compare(features.double(), torch.tensor([0, 0, 1, 1, 2, 2]), 0.05, 1e-9)


def test_a_row_of_zeros_has_similarity_zero_and_no_gradient():
    features, labels = batch(n=6, classes=2)
    features[2] = 0
    compare(features, labels, 0.3, 1e-9)
    features.requires_grad_()
    scl_loss(features, labels).backward()
    assert features.grad[2].eq(0).all()


def test_two_batches_in_a_row_do_not_meet():
    first, second = batch(seed=1), batch(seed=2)
    expected = scl_loss(*second)
    scl_loss(*first)
    assert scl_loss(*second) == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_labels_of_any_integer_dtype(dtype):
    features, labels = batch(classes=2)
    assert scl_loss(features, labels.to(dtype)) == scl_loss(features, labels)


def test_dtypes_of_the_result():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert scl_loss(*batch(dtype=dtype)).dtype == expected
        assert ce_scl_loss(batch(dtype=dtype)[0], *batch(dtype=dtype)).dtype == expected


# ------------------------------------------------------------ composes, scales


def stacked(function, *batches):
    return torch.stack([function(*row) for row in zip(*batches, strict=True)])


@pytest.mark.parametrize("chunk_size", [None, 12])
def test_torch_func(chunk_size):
    loss = functools.partial(scl_loss, chunk_size=chunk_size)
    features, labels = (torch.stack(parts) for parts in zip(*(batch(seed=seed) for seed in range(3)), strict=True))
    vmap, grad = torch.func.vmap, torch.func.grad
    same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    same(vmap(loss)(features, labels), stacked(loss, features, labels))
    same(vmap(loss, (0, None))(features, labels[0]), stacked(loss, features, labels[:1].expand(3, -1)))
    same(vmap(loss, (None, 0))(features[0], labels), stacked(loss, features[:1].expand(3, -1, -1), labels))
    for y in (labels, labels[:1].expand(3, -1)):
        expected = stacked(lambda x, y: torch.autograd.grad(loss(x.requires_grad_(), y), x)[0], features.clone(), y)
        same(vmap(grad(loss))(features, y), expected)
    same(vmap(grad(loss), (0, None))(features, labels[0]), expected)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        of_each = jacobian(functools.partial(loss, reduction="none"))(features[0], labels[0])  # (N, N, D)
        same(of_each.sum(dim=0), grad(functools.partial(loss, reduction="sum"))(features[0], labels[0]))
    reverse_twice = torch.func.jacrev(torch.func.jacrev(loss))(features[0], labels[0])  # (N, D, N, D)
    same(torch.func.hessian(loss)(features[0], labels[0]), reverse_twice)
    same(vmap(torch.func.hessian(loss))(features, labels)[0], reverse_twice)


@pytest.mark.parametrize("chunk_size, lengths, compilations", [(None, (12, 12, 13, 7, 40), 2), (4, (12, 12), 1)])
def test_one_graph_for_the_first_length_and_one_for_all_others(chunk_size, lengths, compilations):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    loss = functools.partial(ce_scl_loss, lam=0.9) if chunk_size is None else lambda _, x, y: scl_loss(
        x, y, chunk_size=chunk_size)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for seed, length in enumerate(lengths):
        features, labels = batch(length, seed=seed)
        mine, plain = features.clone().requires_grad_(), features.requires_grad_()
        compiled(mine[:, :3], mine, labels).backward()
        loss(plain[:, :3], plain, labels).backward()
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-9, atol=1e-12)
    assert len(graphs) == compilations


def test_export_for_any_length():
    class Objective(torch.nn.Module):
        def forward(self, features, labels):
            return ce_scl_loss(features[:, :3], features, labels)

    n = torch.export.Dim("n", min=2, max=1024)  # beyond, it is another graph
    exported = torch.export.export(Objective(), batch(seed=1), dynamic_shapes=({0: n}, {0: n})).module()
    for length in (12, 30):
        torch.testing.assert_close(exported(*batch(length)), Objective()(*batch(length)))


def test_neither_values_nor_shapes_wait_for_the_data():
    """A fake tensor has no data: .item(), a branch on a value or a shape that depends on one would fail."""
    with FakeTensorMode() as mode:
        features, labels = (mode.from_tensor(part) for part in batch())
        with pytest.raises(DataDependentOutputException):
            labels.sum().item()
        features.requires_grad_()
        for chunk_size in (None, 4):
            scl_loss(features, labels, chunk_size=chunk_size).backward()
        ce_scl_loss(features[:, :3], features, labels).backward()
        scl_bounds(labels)
    assert features.grad.shape == (12, 5)


@pytest.mark.parametrize("chunk_size, least, most", [(None, 1, 1.6), (16, 0, 0.1)])
def test_what_is_saved_for_backward(chunk_size, least, most):
    """In units of N x N float32; by storage, since two views of one hold it once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    features = torch.randn(600, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scl_loss(features, torch.arange(600) % 2, chunk_size=chunk_size)
    assert least * 4 * 600**2 <= sum(saved.values()) <= most * 4 * 600**2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_grows_with_n_when_chunked():
    """N = 16,384: one N x N matrix would take 1 GiB. The peak of a process of its own, above what it starts with."""
    code = """if True:
        import torch, scl
        from pathlib import Path
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        features, labels = torch.randn(16384, 256, requires_grad=True), torch.arange(16384) % 2
        scl.scl_loss(features[:9], labels[:9], chunk_size=4).backward()
        start = peak()
        scl.scl_loss(features, labels, chunk_size=256).backward()
        print(peak() - start)
    """
    root = Path(scl_loss.__code__.co_filename).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert 16 < float(done.stdout) < 512, done.stderr  # a block alone takes 16


def test_above_1024_it_is_in_blocks_unless_told():
    features, labels = torch.randn(1025, 2, requires_grad=True), torch.arange(1025) % 2
    loss = {chunk_size: scl_loss(features, labels, chunk_size=chunk_size) for chunk_size in (None, 1024, 1025)}
    gradient = {chunk_size: torch.autograd.grad(loss[chunk_size], features)[0] for chunk_size in loss}
    for chunk_size in loss:
        torch.testing.assert_close(loss[chunk_size], loss[1025])
        torch.testing.assert_close(gradient[chunk_size], gradient[1025], rtol=1e-4, atol=1e-7)

    def largest(n, chunk_size=None):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            scl_loss(features[:n], labels[:n], chunk_size=chunk_size)
        return max(sizes)

    assert largest(1024) == 1024**2 and largest(1025, 1025) == 1025**2
    assert largest(1025) == largest(1025, 1024) == 1025 * 2


# ------------------------------------------------------------ what holds for any batch


@st.composite
def batches(draw, dtype=np.float64):
    n, width = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    numbers = st.floats(-4, 4, width=32)
    features = draw(arrays(dtype, (n, width), elements=numbers))
    assume((np.linalg.norm(features, axis=1) > 1e-3).all())
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 3)))
    return torch.from_numpy(features), torch.from_numpy(labels)


temperatures = st.floats(0.01, 2)


@given(batches(), temperatures, st.sampled_from(["mean", "sum"]), st.none() | st.integers(1, 9))
def test_property_oracle(data, temperature, reduction, chunk_size):
    compare(*data, temperature, 1e-9 * (1 + 1 / temperature), reduction, chunk_size)


@given(batches(), temperatures, st.randoms(use_true_random=False))
def test_property_order_of_rows_and_names_of_classes(data, temperature, random):
    features, labels = data
    order = list(range(len(labels)))
    random.shuffle(order)
    names = torch.tensor(random.sample(range(-9, 9), 4))
    shuffled = scl_loss(features[order], names[labels[order]], temperature, reduction="none")
    assert torch.allclose(shuffled, scl_loss(features, labels, temperature, reduction="none")[order])


@given(batches(), temperatures, st.data())
def test_property_positive_scaling_of_rows(data, temperature, draw):
    features, labels = data
    scales = draw.draw(arrays(np.float64, len(labels), elements=st.floats(1e-6, 1e6)))
    scaled = scl_loss(features * torch.from_numpy(scales)[:, None], labels, temperature)
    assert torch.allclose(scaled, scl_loss(features, labels, temperature))


@given(batches(), temperatures)
def test_property_bounds(data, temperature):
    features, labels = data
    n, slack = len(labels), 1e-9 * (1 + 1 / temperature)
    positives = (labels[:, None] == labels).sum(dim=1).double() - 1
    loss = scl_loss(features, labels, temperature, reduction="none")[positives > 0]
    assert (loss >= positives[positives > 0].log() - slack).all()
    assert (loss <= math.log(max(n - 1, 1)) + 2 / temperature + slack).all()
    assert scl_loss(features, labels, temperature) >= scl_bounds(labels, temperature)[0] - 1e-5


@given(batches(), temperatures)
def test_property_another_class_never_lowers_a_loss(data, temperature):
    features, labels = data
    more = torch.cat([features, features[:1].flip(1)]), torch.cat([labels, torch.tensor([99])])
    before = scl_loss(features, labels, temperature, reduction="none")
    assert (scl_loss(*more, temperature, reduction="none")[:-1] >= before - 1e-9 * (1 + 1 / temperature)).all()


@given(batches(np.float32), temperatures)
def test_property_finite_and_orthogonal_gradient(data, temperature):
    features, labels = data
    features.requires_grad_()
    loss = scl_loss(features, labels, temperature)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    radial = (features * features.grad).sum(dim=1).abs()  # scaling a row changes nothing
    assert (radial <= 1e-5 / temperature).all()


# ------------------------------------------------------------ Eq. 1 and the bounds


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9, 1.0])
def test_eq_1(lam):
    features, labels = batch()
    class_logits = batch(width=3, seed=1)[0]
    expected = (1 - lam) * F.cross_entropy(class_logits, labels) + lam * scl_loss(features, labels, 0.5)
    assert torch.allclose(ce_scl_loss(class_logits, features, labels, lam=lam, temperature=0.5), expected)


def test_lam_0_is_cross_entropy_exactly():
    features, labels = batch()
    class_logits = batch(width=3, seed=1)[0]
    features[0] = math.nan  # which SCL would not hide
    assert ce_scl_loss(class_logits, features, labels, lam=0) == F.cross_entropy(class_logits, labels)


def test_defaults_are_those_of_the_paper_s_best():
    features, labels = batch()
    assert scl_loss(features, labels) == scl_loss(features, labels, 0.3, reduction="mean")
    assert scl_bounds(labels) == scl_bounds(labels, 0.3)
    eq_1 = ce_scl_loss(features[:, :3], features, labels)
    assert eq_1 == ce_scl_loss(features[:, :3], features, labels, lam=0.9, temperature=0.3)


def test_bool_labels_in_eq_1():
    features, labels = batch(classes=2)
    assert ce_scl_loss(features[:, :2], features, labels.bool()) == ce_scl_loss(features[:, :2], features, labels)


def simplex(classes, each):
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return corners.repeat_interleave(each, dim=0), torch.arange(classes).repeat_interleave(each)


@pytest.mark.parametrize("classes, each", [(1, 5), (2, 8), (3, 4), (5, 2)])
@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_lowest_is_attained_by_a_simplex(classes, each, temperature):
    features, labels = simplex(classes, each)
    features = features if classes > 1 else torch.ones(each, 3, dtype=torch.float64)
    lowest, collapsed = scl_bounds(labels, temperature)
    assert lowest.item() == pytest.approx(scl_loss(features, labels, temperature).item(), abs=1e-5)
    assert collapsed.item() == pytest.approx(math.log(classes * each - 1))


@pytest.mark.parametrize("sizes", [(5, 2), (2, 5)])
def test_lowest_is_attained_by_two_classes_of_any_sizes(sizes):
    labels = torch.tensor([0, 1]).repeat_interleave(torch.tensor(sizes))
    features = torch.where(labels[:, None] == 0, 1.0, -1.0).double()
    assert scl_bounds(labels)[0].item() == pytest.approx(scl_loss(features, labels).item(), abs=1e-5)


def test_lowest_is_attained_if_one_class_alone_has_positives():
    labels = torch.tensor([0, 0, 0, 1, 2])
    features = torch.where(labels[:, None] == 0, 1.0, -1.0).double()
    assert scl_bounds(labels)[0].item() == pytest.approx(scl_loss(features, labels).item(), abs=1e-5)


def test_lowest_of_unequal_classes_is_below_what_training_reaches():
    labels = torch.tensor([0] * 4 + [1] * 2 + [2] * 3)
    features = batch(n=9, width=6)[0].requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = scl_loss(features, labels)
        loss.backward()
        optimizer.step()
    assert scl_bounds(labels)[0] < loss.item() < scl_bounds(labels)[1]


def test_bounds_of_the_paper_s_batch():
    """16 examples, 8 a class, tau 0.3: log 15 down to log(7 + 8 exp(-2 / 0.3))."""
    lowest, collapsed = scl_bounds(torch.tensor([0, 1] * 8), 0.3)
    assert lowest.item() == pytest.approx(math.log(7 + 8 * math.exp(-2 / 0.3)))
    assert collapsed.item() == pytest.approx(math.log(15))


def test_bounds_of_many_labels_and_of_any_integer_dtype():
    labels = torch.arange(65536) % 2  # a matrix of all pairs would take 4 GiB
    assert scl_bounds(labels)[1].item() == pytest.approx(math.log(65535))
    for dtype in (torch.bool, torch.uint8, torch.int32):
        assert scl_bounds(labels[:16].to(dtype)) == scl_bounds(labels[:16])


def test_the_default_dtype_plays_no_part():
    features, labels = batch(dtype=torch.float32)
    expected = scl_loss(features, labels), scl_loss(features, labels, chunk_size=3), *scl_bounds(labels)
    torch.set_default_dtype(torch.float64)
    try:
        actual = scl_loss(features, labels), scl_loss(features, labels, chunk_size=3), *scl_bounds(labels)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == torch.float32 and x == y


def test_bounds_of_two_of_one_class_are_zero():
    assert [bound.item() for bound in scl_bounds(torch.tensor([7, 7]))] == [0, 0]


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2]])
def test_bounds_without_positives_are_zero(labels):
    assert [bound.item() for bound in scl_bounds(torch.tensor(labels, dtype=torch.long))] == [0, 0]


# ------------------------------------------------------------ errors


@pytest.mark.parametrize("temperature", [0, -0.3, math.nan, math.inf, float("inf")])
def test_bad_temperature(temperature):
    features, labels = batch()
    for call in (lambda: scl_loss(features, labels, temperature), lambda: scl_bounds(labels, temperature)):
        with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, got {temperature}"):
            call()


@pytest.mark.parametrize("shape", [(12, 1), (11,), ()])
def test_labels_of_another_shape_are_named_with_both_shapes(shape):
    features, _ = batch()
    with pytest.raises(ValueError, match=r"labels must have shape \(12,\) for features \(12, 5\), got \("):
        scl_loss(features, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"class_logits \(12, 5\)"):
        ce_scl_loss(features, features, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(12,), (12, 5, 2), (12, 0)])
def test_features_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"features must have shape \(N, D\) with D >= 1, got "):
        scl_loss(torch.zeros(shape), torch.zeros(12, dtype=torch.long))


def test_bounds_need_a_row_of_labels():
    with pytest.raises(ValueError, match=r"labels must have shape \(N,\), got \(4, 1\)"):
        scl_bounds(torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must have shape \(N,\), got \(\)"):
        scl_bounds(torch.tensor(3))


@pytest.mark.parametrize("make", [list, np.array])
def test_no_tensor(make):
    features, labels = batch()
    untensored, row = make(features.tolist()), make(labels.tolist())
    of_rows, of_row = ("<class 'list'>",) * 2 if make is list else (r"dtype\('float64'\)", r"dtype\('int64'\)")
    with pytest.raises(TypeError, match=f"class_logits must be a floating point tensor, got {of_rows}"):
        ce_scl_loss(class_logits=untensored, features=features, labels=labels)
    for lam in (0, 0.9):
        with pytest.raises(TypeError, match=f"features must be a floating point tensor, got {of_rows}"):
            ce_scl_loss(class_logits=features, features=untensored, labels=labels, lam=lam)
    with pytest.raises(TypeError, match=f"features must be a floating point tensor, got {of_rows}"):
        scl_loss(untensored, labels)
    for call in (scl_bounds, functools.partial(scl_loss, features), functools.partial(ce_scl_loss, features, features)):
        with pytest.raises(TypeError, match=f"labels must be an integer or bool tensor, got {of_row}"):
            call(row)


def test_bad_dtypes():
    features, labels = batch()
    with pytest.raises(TypeError, match=r"labels must be an integer or bool tensor, got torch\.float32"):
        scl_loss(features, labels.float())
    with pytest.raises(TypeError, match=r"features must be a floating point tensor, got torch\.int64"):
        scl_loss(labels[:, None], labels)
    with pytest.raises(TypeError, match=r"labels must be an integer or bool tensor, got torch\.complex64"):
        scl_loss(features, labels.to(torch.complex64))


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_bad_lam(lam):
    features, labels = batch()
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got"):
        ce_scl_loss(features, features, labels, lam=lam)


@pytest.mark.parametrize("temperature", [torch.tensor(0.3, requires_grad=True), np.array(0.3), "0.3", None])
def test_a_temperature_that_is_not_a_number_is_rejected(temperature):
    message = f"temperature must be a finite number above 0, got {temperature!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        scl_loss(*batch(), temperature)


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_a_numpy_scalar_is_a_temperature(number):
    features, labels = batch()
    assert scl_loss(features, labels, number(0.5)) == scl_loss(features, labels, 0.5)


@pytest.mark.parametrize("wrap", [list, np.array])
def test_gather_batch_rejects_an_argument_that_is_not_a_tensor(wrap):
    tensors = wrap([torch.zeros(2), torch.zeros(2)])
    with pytest.raises(TypeError, match=r"tensors must be Tensor arguments, as in gather_batch\(a, b\), got <class '"):
        gather_batch(torch.zeros(2), tensors)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1 or None, got {chunk_size}"):
        scl_loss(*batch(), chunk_size=chunk_size)


@pytest.mark.parametrize("label", [-126, -100, -65, -63, -61, -2, -1, 3, 61])
def test_no_label_outside_the_classes(label):
    features, labels = batch()
    class_logits, labels = torch.zeros(len(labels), 3), torch.full_like(labels, 1)
    labels[0] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        ce_scl_loss(class_logits, features, labels)


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduction must be \"mean\", \"sum\" or \"none\", got 'max'"):
        scl_loss(*batch(), reduction="max")
