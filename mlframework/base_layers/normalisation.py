"""Normalisation whose statistics are a named choice."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mlframework.backend.forward import batch_norm, by_vmap, runs_per_task
from mlframework.base_layers.base_layer import MixesExamples
from mlframework.errors import InvalidValue, nearest

__all__ = ["NORMS", "BatchStatistics", "FixedStatistics", "GroupNorm", "norm_of", "with_fixed_statistics"]

#: The choices of `norm`.
NORMS = ("batch", "group", "none")


class BatchStatistics(MixesExamples):
    """Batch normalisation by the statistics of the very examples it is given, always; it keeps no running averages.

    What stands beside an example therefore changes its prediction: a query set normalised as a whole is *transductive*.
    Padding does not count. Written from mean and variance, it has exact derivatives of every order under `vmap`.

    Args:
        channels: size of axis 1.
        eps: added to the variance.

    Reference: Ioffe, Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1; batch statistics at test time
        as in Finn et al. 2017 (the official code).

    >>> BatchStatistics(3)(torch.randn(8, 3, 4, 4)).mean((0, 2, 3)).abs().max() < 1e-6
    tensor(True)
    """

    #: Mean and variance `[1, channels, 1, ...]` to normalise by in place of the examples' own, of an exported model.
    fixed: tuple[Tensor, Tensor] | None = None

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises `x` `[n, channels, ...]` over all axes but the channels, by the rows that count (`mask` `[n]`)."""
        per_channel = (1, -1, *(1 for _ in range(x.dim() - 2)))
        x = x.to(self.weight.dtype)  # not in bfloat16
        if self.fixed is None:
            centred, _, variance = self.moments(x, mask)
        else:
            centred, variance = x - self.fixed[0], self.fixed[1]
        scale = self.weight.view(per_channel) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(per_channel), centred, scale)

    def moments(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`x` minus the mean of the rows that count; that mean and their variance, `[1, channels, 1, ...]`."""
        axes = (0, *range(2, x.dim()))
        if mask is None:
            mean = x.mean(axes, keepdim=True)
            centred = x - mean
            return centred, mean, centred.square().mean(axes, keepdim=True)
        weight = mask.to(x.dtype).view(-1, *(1 for _ in range(x.dim() - 1)))
        count = (weight.sum() * x[0, 0].numel()).clamp(min=1)
        mean = (x * weight).sum(axes, keepdim=True) / count
        centred = x - mean
        return centred, mean, (centred.square() * weight).sum(axes, keepdim=True) / count


runs_per_task(BatchStatistics, batch_norm)


class FixedStatistics(nn.Module):
    """Normalisation by a mean and a variance that stay, as a conventionally trained batch norm has them in use.

    Args:
        norm: whose weight, bias and `eps` it has.
        mean, variance: of each channel.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, norm: BatchStatistics, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` `[n, channels, ...]`."""
        per_channel = (1, -1, *(1 for _ in range(x.dim() - 2)))
        scale = (self.weight * torch.rsqrt(self.variance + self.eps)).view(per_channel)
        return torch.addcmul(self.bias.view(per_channel), x - self.mean.view(per_channel), scale)


runs_per_task(FixedStatistics, lambda norm, params, x, mask: by_vmap(norm, params, x))


def with_fixed_statistics(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a module whose batch norms keep the statistics that the inputs `x` `[n, ...]` have there."""
    made, found = copy.deepcopy(module), {}

    def record(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = (0, *range(2, inputs[0].dim()))
        found[norm] = inputs[0].mean(axes), inputs[0].var(axes, unbiased=False)

    norms = {name: part for name, part in made.named_modules() if isinstance(part, BatchStatistics)}
    hooks = [part.register_forward_pre_hook(record) for part in norms.values()]
    with torch.no_grad():
        made(x)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        path, _, own = name.rpartition(".")
        setattr(made.get_submodule(path), own, FixedStatistics(norm, *found[norm]))
    return made


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` written from mean and variance, which takes images in any memory format under `vmap`.

    Reference: Wu, He, Group Normalization, 2018, arXiv:1803.08494, equations 1 to 3.

    >>> GroupNorm(2, 4)(torch.randn(3, 4, 5, 5)).mean((2, 3)).sum().abs() < 1e-5
    tensor(True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` `[n, channels, ...]` over each group of channels and all positions."""
        groups = x.to(self.weight.dtype).unflatten(1, (self.num_groups, -1))  # not in bfloat16
        axes = tuple(range(2, groups.dim()))
        centred = groups - groups.mean(axes, keepdim=True)
        normalised = (centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + self.eps)).flatten(1, 2)
        per_channel = (1, -1, *(1 for _ in range(x.dim() - 2)))
        return torch.addcmul(self.bias.view(per_channel), normalised, self.weight.view(per_channel))


runs_per_task(GroupNorm, lambda norm, params, x, mask: by_vmap(norm, params, x))


def norm_of(norm: str, channels: int) -> nn.Module:
    """The norm of a name; groups are of eight channels, or one where eight does not divide them (arXiv:1803.08494)."""
    if norm not in NORMS:
        raise InvalidValue("norm", norm, f"must be one of {', '.join(NORMS)}{nearest(norm, NORMS)}")
    if norm == "group":
        return GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
    return BatchStatistics(channels) if norm == "batch" else nn.Identity()
