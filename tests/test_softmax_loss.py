"""The cross entropy made in pieces is that of all logits at once: value and gradients."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from models import softmax_loss
from models.softmax_loss import softmax_cross_entropy, symbol_losses
from multint import MultintError

N, O, V = 23, 5, 11  # noqa: E741


def arguments(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((N, O), (V, O), (V,))
    tensors = [torch.randn(*size, dtype=dtype, generator=draw).requires_grad_() for size in sizes]
    return tensors, torch.randint(V, (N,), generator=draw)


@pytest.fixture(params=[1, 4, N - 1], ids=lambda rows: f"{rows}-rows")
def pieces(request, monkeypatch):
    """Pieces of so many rows; the last one is shorter."""
    monkeypatch.setattr(softmax_loss, "LOGITS_BYTES", 4 * V * request.param)


def both(tensors, targets):
    """The loss and all gradients, in pieces and at once."""
    results = []
    for loss_of in (
        softmax_cross_entropy,
        lambda o, W, b, wanted: functional.cross_entropy(functional.linear(o, W, b), wanted),
    ):
        loss = loss_of(*tensors, targets)
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, tensors)))
    return results


def test_pieces_equal_the_whole(pieces):
    ours, theirs = both(*arguments())
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_large_logits_do_not_overflow(pieces):
    tensors, targets = arguments()
    with torch.no_grad():
        tensors[0] *= 1e4
    ours, theirs = both(tensors, targets)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_pieces_under_autocast_are_as_exact_as_the_whole(pieces):
    tensors, targets = arguments(torch.float32)
    exact, _ = both(tensors, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(tensors, targets)
    for mine, its, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == its.dtype == torch.float32
        assert (mine - true).norm() <= 1.5 * (its - true).norm() + 1e-3 * true.norm()


def test_the_losses_of_evaluation_are_those_of_the_whole(pieces):
    tensors, targets = arguments()
    losses = functional.cross_entropy(functional.linear(*tensors), targets, reduction="none").detach()
    assert_close(symbol_losses(*tensors, targets), losses, rtol=1e-10, atol=1e-10)
    rounded = symbol_losses(*(tensor.bfloat16() for tensor in tensors), targets)
    assert rounded.dtype == torch.float32


def test_a_second_derivative_in_pieces_is_refused(pieces):
    tensors, targets = arguments()
    gradients = torch.autograd.grad(softmax_cross_entropy(*tensors, targets), tensors, create_graph=True)
    norm = sum(gradient.square().sum() for gradient in gradients) + tensors[1].pow(3).sum()
    with pytest.raises(MultintError, match="no second derivative"):
        norm.backward()


def test_evaluation_makes_no_gradients(pieces):
    tensors, targets = arguments()
    with torch.no_grad():
        loss = softmax_cross_entropy(*tensors, targets)
    assert not loss.requires_grad
    assert_close(loss, functional.cross_entropy(functional.linear(*tensors), targets).detach())


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("of", [softmax_cross_entropy, symbol_losses])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda o, W, b, wanted: (o, W, b, wanted.index_fill(0, torch.tensor(3), V)),
            "is 11, expected 0 to 10",
        ),
        (lambda o, W, b, wanted: (o, W, b, wanted.index_fill(0, torch.tensor(3), -100)), "a target is -100"),
        (lambda o, W, b, wanted: (o, W, b, wanted[:-1]), r"\(23, 5\), \(11, 5\), \(11,\), \(22,\), expected"),
        (lambda o, W, b, wanted: (o, W, b[:-1], wanted), "expected"),
        (lambda o, W, b, wanted: (o[:, 1:], W, b, wanted), "expected"),
        (lambda o, W, b, wanted: (o, W, b, wanted.double()), "targets are torch.float64, expected torch.int64"),
    ],
)
def test_bad_arguments_are_refused_in_pieces_and_at_once(rows, of, change, part, monkeypatch):
    monkeypatch.setattr(softmax_loss, "LOGITS_BYTES", 4 * V * rows)
    tensors, targets = arguments()
    with pytest.raises(MultintError, match=part):
        of(*change(*tensors, targets))


def test_a_frozen_softmax_gives_the_features_their_gradient(pieces):
    (features, weight, bias), targets = arguments()
    loss = softmax_cross_entropy(features, weight.detach(), bias.detach(), targets)
    [ours] = torch.autograd.grad(loss, [features])
    loss = functional.cross_entropy(functional.linear(features, weight, bias), targets)
    assert_close(ours, torch.autograd.grad(loss, [features])[0])
