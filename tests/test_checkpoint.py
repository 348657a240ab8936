"""Weights in files: whatever shares memory is saved, and comes back as it was."""

from __future__ import annotations

import pytest
import safetensors
import torch
from torch import nn

from mlframework.base_layers import BaseLayer
from mlframework.errors import UserError
from mlframework.training.checkpoint import load_weights, save_weights


class Wide(nn.Linear):
    """A linear layer of a size that ties can be made with."""

    def __init__(self) -> None:
        super().__init__(4, 4)


def tied() -> BaseLayer:
    """Features and head share one weight."""
    layer = BaseLayer(nn.Sequential(Wide(), nn.Tanh()), Wide())
    layer.head.weight = layer.features[0].weight
    return layer


class Views(nn.Module):
    """Buffers that are views of one tensor: a part, its transpose, an expanded row, and one that is empty."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(4, 4)
        for name, view in {"whole": whole, "part": whole[:2], "turned": whole.T, "row": whole[0].expand(3, 4)}.items():
            self.register_buffer(name, view)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("other_empty", torch.empty(0, 3))


@pytest.mark.parametrize("make", [tied, Views], ids=["tied", "views"])
def test_what_shares_memory_is_saved_and_loaded(tmp_path, make):
    one, other = make(), make()
    save_weights(tmp_path / "w.safetensors", one)
    if make is Views:  # an expanded row cannot be written into
        other.row = other.row.clone()
        other.turned, other.part = other.turned.clone(), other.part.clone()
    load_weights(tmp_path / "w.safetensors", other)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_tied_weight_is_in_the_file_once_and_stays_tied(tmp_path):
    one, other = tied(), tied()
    save_weights(tmp_path / "w.safetensors", one)
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["features.0.bias", "features.0.weight", "head.bias"]
    load_weights(tmp_path / "w.safetensors", other)
    assert other.head.weight is other.features[0].weight
    assert torch.equal(other.head.weight, one.head.weight)


def test_a_part_whose_weight_is_saved_under_a_name_outside_it_is_loaded_by_its_prefix(tmp_path):
    whole = nn.Module()
    whole.first, whole.base_layer = Wide(), tied()
    whole.first.weight = whole.base_layer.head.weight
    save_weights(tmp_path / "w.safetensors", whole)
    part = tied()
    load_weights(tmp_path / "w.safetensors", part, prefix="base_layer.")
    assert torch.equal(part.features[0].weight, whole.first.weight)


def test_two_weights_are_not_loaded_into_one(tmp_path):
    save_weights(tmp_path / "w.safetensors", BaseLayer(nn.Sequential(Wide(), nn.Tanh()), Wide()))
    with pytest.raises(UserError, match=r"head.weight and features.0.weight are one tensor here and two there$"):
        load_weights(tmp_path / "w.safetensors", tied())


def test_a_tied_file_is_loaded_into_two_weights(tmp_path):
    one, other = tied(), BaseLayer(nn.Sequential(Wide(), nn.Tanh()), Wide())
    save_weights(tmp_path / "w.safetensors", one)
    load_weights(tmp_path / "w.safetensors", other)
    assert torch.equal(other.head.weight, one.head.weight)
    assert torch.equal(other.features[0].weight, one.head.weight)
