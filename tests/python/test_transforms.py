"""torch.func, forward-mode derivatives and higher derivatives through converted layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import vramkit
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

FORMATS = ["nf4", "nf4_dq", "int4", "int8", "fp8", "bf16"]
# A float64 reference of the same decoded weight against float32 sums of 64 products of numbers
# near one: 64 * 2^-24 = 4e-6 of sums that reach 10^2 for the quadratic forms below.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(params=FORMATS)
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    made = nn.Linear(64, 33)
    vramkit.convert(made, request.param)
    return made


def plain(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.dense_weight(torch.float32).double(), layer.bias.detach().double()
    return lambda x: x.double() @ weight.t() + bias


def energy(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).square().sum()


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **CLOSE)


def test_reverse_mode(layer: nn.Linear) -> None:
    x, f = torch.randn(5, 64), plain(layer)
    check(grad(energy(layer))(x), grad(energy(f))(x.double()))
    check(jacrev(layer)(x[0]), jacrev(f)(x[0].double()))
    y, back = vjp(layer, x)
    check(y, f(x))
    check(back(y)[0], vjp(f, x.double())[1](y.double())[0])


def test_forward_mode(layer: nn.Linear) -> None:
    """Its derivative is not silently zero."""
    x, t, f = torch.randn(5, 64), torch.randn(5, 64), plain(layer)
    check(jvp(layer, (x,), (t,))[1], jvp(f, (x.double(),), (t.double(),))[1])
    check(jacfwd(layer)(x[0]), jacfwd(f)(x[0].double()))
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
    check(out.tangent, jvp(f, (x.double(),), (t.double(),))[1])


def test_vmap_and_compositions(layer: nn.Linear) -> None:
    x, f = torch.randn(3, 5, 64), plain(layer)
    check(vmap(layer)(x), f(x))
    check(vmap(layer, in_dims=1, out_dims=1)(x), f(x))
    check(vmap(grad(energy(layer)))(x), vmap(grad(energy(f)))(x.double()))
    check(hessian(energy(layer))(x[0, 0]), hessian(energy(f))(x[0, 0].double()))


def test_double_backward(layer: nn.Linear) -> None:
    def second(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(energy(f)(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = torch.randn(4, 64)
    wanted = second(plain(layer), x.double())
    torch.testing.assert_close(second(layer, x).double(), wanted, rtol=1e-3, atol=1e-2)


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
