"""Custom operations: they trace, and `needs_op` knows when someone is watching."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_dispatch import ArgumentError, needs_op, register_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def scaled(x: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    torch.mul(x, scale, out=out)
    return x.sum(-1)


def scaled_fake(x: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1])


def fill_one(out: torch.Tensor) -> None:
    out.fill_(1.0)


scaled_op = register_op("kernel_dispatch_test::scaled", scaled, ("out",), scaled_fake)
fill_op = register_op("kernel_dispatch_test::fill_one", fill_one, ("out",))


def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an operation does: the dispatcher only if needed."""
    out = torch.full_like(x, float("nan"))
    total = (scaled_op if needs_op(x, out) else scaled)(x, 3.0, out)
    (fill_op if needs_op(total) else fill_one)(total)
    return out, total


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_call_agrees_in_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (2, 5):
        x = torch.randn(rows, 4)
        for got, expected in zip(compiled(x), call(x), strict=True):
            assert torch.equal(got, expected)


class Call(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call(x)


def test_exported_graph_holds_the_ops() -> None:
    program = torch.export.export(Call(), (torch.randn(2, 4),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("kernel_dispatch_test.scaled" in target for target in targets), targets
    x = torch.randn(2, 4)
    for got, expected in zip(program.module()(x), call(x), strict=True):
        assert torch.equal(got, expected)


def test_registration_passes_the_checks_of_torch() -> None:
    results = torch.library.opcheck(scaled_op, (torch.randn(2, 4), 2.0, torch.empty(2, 4)))  # type: ignore[arg-type]
    assert set(results.values()) == {"SUCCESS"}


def test_op_that_returns_needs_a_fake() -> None:
    with pytest.raises(
        ArgumentError, match=r"^fake: None, expected a shape function, .*kernel_dispatch_test::nope"
    ):
        register_op("kernel_dispatch_test::nope", scaled, ("out",))


def test_plain_tensors_need_no_op() -> None:
    assert not needs_op(torch.zeros(2), None, torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    assert not needs_op()
    with torch.no_grad():
        assert not needs_op(torch.zeros(2, requires_grad=True))


class Subclass(torch.Tensor):
    pass


def fake_tensor() -> torch.Tensor:
    return FakeTensorMode().from_tensor(torch.zeros(2))


@pytest.mark.parametrize(
    "make",
    [fake_tensor, lambda: torch.zeros(2).as_subclass(Subclass), lambda: torch.zeros(2, requires_grad=True)],
    ids=["fake", "subclass", "autograd"],
)
def test_special_tensors_need_the_op(make: Callable[[], torch.Tensor]) -> None:
    assert needs_op(torch.zeros(2), None, make())


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_modes_and_transforms_need_the_op() -> None:
    seen: list[bool] = []
    with Watcher():  # type: ignore[no-untyped-call]
        seen.append(needs_op())

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append(needs_op(x))
        return x

    torch.vmap(record)(torch.zeros(2, 3))
    assert seen == [True, True]
    assert not needs_op()
