"""Bytes kept for backward, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import invref
from invref import storages
from invref.kernels import sidebits
from invref.storages import counting


def mlp(act: nn.Module, width: int = 8, wide: int = 32, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, wide), act, nn.Linear(wide, width)).to(dtype)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 700),
    wide=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_perceptron_by_hand(tokens, wide, dtype):
    size = torch.finfo(dtype).bits // 8
    x = torch.randn(tokens, 8).to(dtype)
    # The first layer keeps x, the activation its input, the second layer the activation's output.
    native = mlp(nn.GELU(), wide=wide, dtype=dtype)
    with counting(native) as kept:
        native(x)
    assert kept.total == size * tokens * (8 + 2 * wide)
    assert [s.bytes for s in kept.of("1")] == [size * tokens * wide]
    assert kept.alone(frozenset({"1"})) == size * tokens * wide
    # Ours keeps the output, which the second layer keeps anyway, and the side bits.
    ours = mlp(invref.GELU(), wide=wide, dtype=dtype)
    with counting(ours) as kept:
        ours(x)
    assert kept.total == size * tokens * (8 + wide) + sidebits.size(tokens * wide)
    assert kept.alone(frozenset({"1"})) == sidebits.size(tokens * wide)
    assert sorted(s.bytes for s in kept.of("1")) == sorted([size * tokens * wide, sidebits.size(tokens * wide)])


def test_a_view_counts_with_all_of_its_storage_and_once():
    x = torch.randn(10, 64, requires_grad=True)
    with counting() as kept:
        half, other = (x * 2).chunk(2, dim=1)
        half.exp()  # keeps its own output
        half.sin()
        other.sin()
    assert sorted(s.bytes for s in kept.storages) == [10 * 32 * 4, 10 * 64 * 4]


def test_parameters_buffers_and_what_is_named_do_not_count():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    with counting(model, but=(x,)) as kept:
        model(x)
    assert kept.total == 0
    norm = nn.BatchNorm1d(4).eval()
    with counting(norm) as kept:
        norm(x)
    # x, and the two tensors of no elements in which eval mode keeps no statistics; not the running ones.
    assert [s.bytes for s in kept.storages] == [x.nbytes]


def test_freed_storages_are_not_taken_for_later_ones_at_their_address():
    x = torch.randn(1000, requires_grad=True)
    with counting() as kept:
        for _ in range(5):
            # The graph dies at once, and its memory is free to be given to the next.
            x.exp()
    assert kept.total == 5 * 4000


def test_checkpointing_keeps_the_input_alone():
    model = mlp(nn.GELU())
    x = torch.randn(10, 8, requires_grad=True)
    with counting(model) as kept:
        checkpoint(model, x, use_reentrant=False)
    assert kept.total == 10 * 8 * 4


def test_sites_are_named_by_the_innermost_module_and_errors_leave_nothing_behind():
    class Inner(nn.Module):
        def forward(self, x):
            if x.shape[0] == 13:
                raise ValueError("thirteen")
            return x.sin() * 2

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x).cos()

    model = Outer()
    with pytest.raises(ValueError, match="thirteen"), counting(model):
        model(torch.randn(13, requires_grad=True))
    with counting(model) as kept:
        model(torch.randn(12, requires_grad=True))
    assert [list(s.keepers) for s in kept.storages] == [["inner"], [""]]
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_wrapped_tensors_count_by_what_they_wrap():
    masked = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (4,), check_invariants=True)
    assert sum(s.nbytes() for _, s in storages.parts(masked)) == 2 * 8 + 2 * 4
