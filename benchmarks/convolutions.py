"""How long each way to convolve takes, for one task and for tasks with weights of their own.

`python benchmarks/convolutions.py [--threads 1]`. Each cell is a convolution, its gradient and its second derivative,
as in a step of MAML. `method_for` in base_layers/convolution.py states the rule that follows.
"""

from __future__ import annotations

import argparse
import functools
from typing import NamedTuple

import torch

from mlframework.backend import allocator
from mlframework.backend.stopwatch import medians
from mlframework.base_layers.convolution import METHODS, Shape, method_for


class Case(NamedTuple):
    """A convolution with 3x3 kernels: tasks, images of each, channels, and the side of an image."""

    tasks: int
    images: int
    in_channels: int
    out_channels: int
    side: int
    stride: int

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[tasks, images, ...]`, without a gradient in a first layer, and weights `[tasks, ...]`."""
        x = torch.ones(self.tasks, self.images, self.in_channels, self.side, self.side)
        weight = torch.ones(self.tasks, self.out_channels, self.in_channels, 3, 3)
        return x.requires_grad_(self.in_channels > 3), weight.requires_grad_()


LAYERS = ((1, 64, 28, 2), (64, 64, 14, 2), (64, 64, 7, 2), (64, 64, 14, 1), (3, 32, 84, 1), (32, 32, 21, 1))
CASES = tuple(Case(tasks, images, *layer) for tasks in (1, 4, 16) for layer in LAYERS for images in (5, 25))


def twice(method: str, case: Case) -> None:
    """A convolution with its gradient by the weights, and the gradient of that."""
    x, weight = case.tensors
    y = torch.func.vmap(lambda x, weight: METHODS[method](x, weight, (case.stride,) * 2, (1, 1)))(x, weight)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), [leaf for leaf in (x, weight) if leaf.requires_grad])


def chosen(case: Case) -> str:
    """The method that the rule chooses."""
    found: list[str] = []

    def see(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found.append(method_for(Shape.of(x, weight, (case.stride,) * 2, (1, 1))))
        return x

    torch.func.vmap(see)(*case.tensors)
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    allocator.tune()
    print("| tasks | images | channels | side | stride |", " | ".join(f"{name}, ms" for name in METHODS), "| by rule |")
    print("| ---: | ---: | ---: | ---: | ---: |", " | ".join("---:" for _ in METHODS), "| --- |")
    for case in CASES:
        names = [name for name in METHODS if name != "torch" or case.tasks == 1]
        seconds = medians({name: functools.partial(twice, name, case) for name in names})
        cells = " | ".join(f"{seconds[name] * 1e3:.3g}" if name in seconds else "" for name in METHODS)
        channels = f"{case.in_channels} to {case.out_channels}"
        print(f"| {case.tasks} | {case.images} | {channels} | {case.side} | {case.stride} | {cells} | {chosen(case)} |")


if __name__ == "__main__":
    main()
