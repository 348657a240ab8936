"""The residual networks of few-shot classification on images of 84x84."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer, Composed, Run, Stack
from mlframework.base_layers.conv4 import SpatialMean
from mlframework.base_layers.normalisation import norm_of
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue

__all__ = ["ResNet12", "ResNet18"]


class ResNet12(BaseLayer):
    """Four residual blocks of three 3x3 convolutions, each of which ends in a 2x2 max-pooling; a linear head.

    An image of 84x84 leaves 5x5 positions, over which features are averaged.

    Args:
        spec: the task's shapes; inputs are images `[n, channels, height, width]` of at least 16x16.
        widths: channels of the blocks: `[64, 160, 320, 640]` in MetaOptNet, `[64, 128, 256, 512]` in TADAM.
        norm: `batch` (statistics of the batch), `group` or `none`.

    Reference: Oreshkin, Rodriguez, Lacoste, TADAM, 2018, arXiv:1805.10123, section 4; Lee et al., MetaOptNet, 2019,
        arXiv:1904.03758, section 4.1. Deviations: no DropBlock; features are averaged, where MetaOptNet keeps all
        positions.

    >>> import torch
    >>> ResNet12(TaskSpec("classification", (3, 84, 84), 5), widths=[4, 4, 8, 8])(torch.zeros(2, 3, 84, 84)).shape
    torch.Size([2, 5])
    """

    def __init__(self, spec: TaskSpec, *, widths: Sequence[int] = (64, 160, 320, 640), norm: str = "batch") -> None:
        channels = checked(spec, "resnet12", widths)
        blocks = []
        for inputs, outputs in zip((channels, *widths[:-1]), widths, strict=True):
            branch = convolutions(inputs, [outputs] * 3, norm, lambda: nn.LeakyReLU(0.1))
            shortcut = Stack(nn.Conv2d(inputs, outputs, 1, bias=False), norm_of(norm, outputs))
            blocks.append(Residual(branch, shortcut, Stack(nn.LeakyReLU(0.1), nn.MaxPool2d(2))))
        super().__init__(Stack(*blocks, SpatialMean()), nn.Linear(widths[-1], spec.out_features))


class ResNet18(BaseLayer):
    """ResNet-18 for small images: a first 3x3 convolution, and four stages of two residual blocks; a linear head.

    The last three stages begin with a stride of 2: an image of 84x84 leaves 11x11 positions, over which features are
    averaged.

    Args:
        spec: the task's shapes; inputs are images `[n, channels, height, width]` of at least 16x16.
        widths: channels of the stages.
        norm: `batch` (statistics of the batch), `group` or `none`.

    Reference: He, Zhang, Ren, Sun, Deep Residual Learning, 2016, arXiv:1512.03385, table 1, without its first two
        down-samplings, as in Wang et al., SimpleShot, 2019, arXiv:1911.04623, section 4.1.

    >>> import torch
    >>> ResNet18(TaskSpec("classification", (3, 84, 84), 5), widths=[4, 4, 8, 8])(torch.zeros(2, 3, 84, 84)).shape
    torch.Size([2, 5])
    """

    def __init__(self, spec: TaskSpec, *, widths: Sequence[int] = (64, 128, 256, 512), norm: str = "batch") -> None:
        channels = checked(spec, "resnet18", widths)
        blocks: list[nn.Module] = [*convolutions(channels, [widths[0]], norm, nn.ReLU), nn.ReLU()]
        for inputs, outputs, stride in zip((widths[0], *widths[:-1]), widths, (1, 2, 2, 2), strict=True):
            blocks += [basic(inputs, outputs, stride, norm), basic(outputs, outputs, 1, norm)]
        super().__init__(Stack(*blocks, SpatialMean()), nn.Linear(widths[-1], spec.out_features))


class Residual(Composed):
    """`end(branch(x) + shortcut(x))`."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.end = branch, shortcut, end

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        return run("end", run("branch", x) + run("shortcut", x))


def basic(inputs: int, outputs: int, stride: int, norm: str) -> Residual:
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""
    shortcut: nn.Module = nn.Identity()
    if stride > 1 or inputs != outputs:
        shortcut = Stack(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm_of(norm, outputs))
    return Residual(convolutions(inputs, [outputs, outputs], norm, nn.ReLU, stride=stride), shortcut, nn.ReLU())


def convolutions(
    inputs: int, widths: Sequence[int], norm: str, activation: Callable[[], nn.Module], *, stride: int = 1
) -> Stack:
    """3x3 convolutions with a norm each, the first one with the stride; activations stand between them."""
    layers: list[nn.Module] = []
    for index, (before, width) in enumerate(zip((inputs, *widths[:-1]), widths, strict=True)):
        layers += [activation()] if index else []
        convolution = nn.Conv2d(before, width, 3, stride=1 if index else stride, padding=1, bias=False)
        layers += [convolution, norm_of(norm, width)]
    return Stack(*layers)


def checked(spec: TaskSpec, name: str, widths: Sequence[int]) -> int:
    """The channels of the task's images; refuses other inputs, small images and wrong widths."""
    if len(spec.x_shape) != 3:
        raise IncompatibleTask(f"base_layer={name} reads images, this task's inputs are {spec.x_shape}")
    channels, height, width = spec.x_shape
    if min(height, width) < 16:
        raise IncompatibleTask(f"base_layer={name} reads images of at least 16x16, and these are {height}x{width}")
    if len(widths) != 4 or not all(type(each) is int and each >= 1 for each in widths):
        raise InvalidValue("widths", list(widths), "must be the channels of four parts")
    return channels
