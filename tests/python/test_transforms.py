"""torch.func, forward-mode derivatives and higher derivatives through converted layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import vramkit
from numerics import assert_within, nested_bound
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

FORMATS = ["nf4", "nf4_dq", "int4", "int8", "fp8", "bf16"]


@pytest.fixture(params=FORMATS)
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    made = nn.Linear(64, 33)
    vramkit.convert(made, request.param)
    return made


Function = Callable[[Tensor], Tensor]


def plain(layer: nn.Linear, *, absolute: bool = False) -> Function:
    """The layer in float64 with its decoded weight, or with the magnitudes of all its numbers."""
    weight, bias = layer.dense_weight(torch.float32).double(), layer.bias.detach().double()
    if absolute:
        weight, bias = weight.abs(), bias.abs()
    return lambda x: x.double() @ weight.t() + bias


def energy(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def check(
    transform: Callable[[Function], Callable[..., Tensor]],
    layer: nn.Linear,
    *inputs: Tensor,
    depth: int,
) -> None:
    """A transform of the layer, against the same of its float64 twin."""
    actual = transform(layer)(*inputs)
    expected = transform(plain(layer))(*(x.double() for x in inputs))
    # Everything here is a polynomial with positive coefficients of weights and inputs.
    magnitude = transform(plain(layer, absolute=True))(*(x.double().abs() for x in inputs))
    assert actual.isfinite().all()
    assert_within(actual.detach(), expected.detach(), nested_bound(magnitude.detach(), 65, depth))


def test_the_bound_can_fail(layer: nn.Linear) -> None:
    twin = plain(layer)
    weight = layer.dense_weight(torch.float32).double()
    wrong = weight.clone()
    wrong[3, 5] *= 1 + 2.0**-10
    x = torch.randn(5, 64)
    with pytest.raises(AssertionError, match="times its bound"):
        assert_within(
            x.double() @ wrong.t() + layer.bias.detach().double(),
            twin(x),
            nested_bound(plain(layer, absolute=True)(x.abs()), 65, 1),
        )


def test_reverse_mode(layer: nn.Linear) -> None:
    x = torch.randn(5, 64)
    check(lambda f: f, layer, x, depth=1)
    check(lambda f: grad(energy(f)), layer, x, depth=3)
    check(lambda f: jacrev(f), layer, x[0], depth=1)
    check(lambda f: lambda x: vjp(f, x)[0], layer, x, depth=1)
    check(lambda f: lambda x, y: vjp(f, x)[1](y)[0], layer, x, torch.randn(5, 33), depth=1)


def test_forward_mode(layer: nn.Linear) -> None:
    """Its derivative is not silently zero."""
    x, t = torch.randn(5, 64), torch.randn(5, 64)

    def dual(f: Function) -> Callable[..., Tensor]:
        def run(x: Tensor, t: Tensor) -> Tensor:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
                assert found is not None
                return found

        return run

    check(lambda f: lambda x, t: jvp(f, (x,), (t,))[1], layer, x, t, depth=1)
    check(lambda f: jacfwd(f), layer, x[0], depth=1)
    check(dual, layer, x, t, depth=1)


def test_vmap_and_compositions(layer: nn.Linear) -> None:
    x = torch.randn(3, 5, 64)
    check(lambda f: vmap(f), layer, x, depth=1)
    check(lambda f: vmap(f, in_dims=1, out_dims=1), layer, x, depth=1)
    check(lambda f: vmap(grad(energy(f))), layer, x, depth=3)
    check(lambda f: hessian(energy(f)), layer, x[0, 0], depth=3)


def test_double_backward(layer: nn.Linear) -> None:
    def second(f: Function) -> Function:
        def run(x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(energy(f)(x), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        return run

    check(second, layer, torch.randn(4, 64), depth=6)


def test_functional_call(layer: nn.Linear) -> None:
    x = torch.randn(5, 64)
    parameters = dict(layer.named_parameters())
    assert torch.equal(functional_call(layer, parameters, (x,)), layer(x))
    bias = layer.bias.detach()
    slope = grad(lambda b: functional_call(layer, {"bias": b}, (x,)).sum())(bias)
    assert torch.equal(slope, torch.full_like(bias, 5.0))


def test_embedding_vmap() -> None:
    layer = nn.Embedding(20, 64)
    vramkit.convert(layer, "nf4")
    ids = torch.randint(0, 20, (3, 4))
    assert torch.equal(vmap(layer)(ids), layer(ids))
