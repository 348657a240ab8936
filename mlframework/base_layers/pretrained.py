"""Networks that were trained elsewhere, as the features of a base layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.backend.forward import runs_together
from mlframework.base_layers.base_layer import BaseLayer, InEvaluation
from mlframework.base_layers.check_base_layer import explained, recorded_calls
from mlframework.base_layers.weight_files import follow, load_network
from mlframework.episode import TaskSpec
from mlframework.errors import IncompatibleTask, InvalidValue, UserError

__all__ = ["Pretrained", "PretrainedFeatures"]


class Pretrained(BaseLayer):
    """The features of a network that was trained elsewhere, and a new linear head.

    The network stays in evaluation mode: no dropout, and batch norms with the running statistics that it came with.
    Frozen, it is the same for all tasks, and its features can be computed once; else its parameters learn and adapt.

    Args:
        spec: the task's shapes.
        network: builds the network, or is one, such as `Timm("resnet18")`; inputs `[n, *x_shape]` to features
            `[n, d]`, or through its own head to predictions.
        weights: a file of its weights: safetensors, or what `torch.save` wrote of a `state_dict()`, which is read
            without running code. None: as the network comes.
        head: its own head, which is left out: the name of a layer; `auto`: a linear layer whose output is the
            network's; None: it has none.
        frozen: whether its parameters stay as they are.
        image_size: the height and width to which images are scaled; None: as they are.
        mean, std: of each channel, over the images that it was trained on; None: inputs are taken as they are. Images
            of one channel are repeated for the others.
        cache: whether features of a frozen network are computed once for each example, and kept on disk.

    >>> spec = TaskSpec("classification", (3, 8, 8), 5)
    >>> Pretrained(spec, network=nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), head=None)(spec.zeros(2)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        network: Callable[[], nn.Module] | nn.Module,
        weights: str | Path | None = None,
        head: str | None = "auto",
        frozen: bool = True,
        image_size: int | None = None,
        mean: Sequence[float] | None = (0.485, 0.456, 0.406),
        std: Sequence[float] | None = (0.229, 0.224, 0.225),
        cache: bool = True,
    ) -> None:
        if spec.kind == "sequence":
            raise IncompatibleTask("base_layer=pretrained has one output for each input, not for each position")
        built = network if isinstance(network, nn.Module) else network()
        if not isinstance(built, nn.Module):
            raise InvalidValue("network", type(built).__name__, "must be a module, or a function that builds one")
        prepare = Preparation(spec, image_size, mean, std)
        x = prepare(spec.zeros(2).to(next(built.parameters(), torch.empty(0)).dtype))
        name = head_of(built, x) if head == "auto" else head
        if weights is not None and not follow():
            try:
                load_network(built, weights, without=name)
            except UserError as error:
                raise InvalidValue("weights", weights, str(error)) from error
        without_head(built, name)
        size = output_of(built, x).flatten(1).shape[1]
        features = PretrainedFeatures(built, size, prepare, frozen=frozen, cache=cache and spec.x_shape != (size,))
        super().__init__(features, nn.Linear(size, spec.out_features))

    @property
    def body(self) -> nn.Module:
        network = self.features.network
        assert isinstance(network, nn.Module)
        return network


class PretrainedFeatures(InEvaluation):
    """Inputs `[n, *x_shape]` to features `[n, size]`, by a network that was trained elsewhere.

    With `cache`, inputs of a frozen network may be features already, which pass as they are: heads are trained on
    features that were computed once.
    """

    def __init__(
        self, network: nn.Module, size: int, prepare: Callable[[Tensor], Tensor], *, frozen: bool, cache: bool
    ) -> None:
        super().__init__(network, frozen=frozen)
        self.size, self.prepare = size, prepare
        self.caches = cache and frozen and not self.mixing

    def forward(self, x: Tensor) -> Tensor:
        if self.caches and x.shape[1:] == (self.size,):
            return x
        return self.network(self.prepare(x)).flatten(1)

    def fingerprint(self) -> str:
        """Hexadecimal digits that stand for the weights, the architecture as torch prints it, and the preparation."""
        digest = hashlib.sha256(f"{self.network}{self.prepare}".encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


runs_together(PretrainedFeatures, when=lambda features: not features.mixing)


class Preparation:
    """Scales images and normalises their channels, as the network's training did."""

    def __init__(
        self, spec: TaskSpec, image_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        if image_size is not None and image_size < 1:
            raise InvalidValue("image_size", image_size, "must be at least 1, or null for images as they are")
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise InvalidValue("std", std, f"must hold a number for each of mean={mean}")
        if std is not None and not all(value > 0 for value in std):
            raise InvalidValue("std", list(std), "must hold numbers above 0")
        images = len(spec.x_shape) == 3
        for field, value in {"image_size": image_size, "mean": mean}.items():
            if value is not None and not images:
                raise InvalidValue(field, value, f"is for images, this task's inputs are {spec.x_shape}: must be null")
        if images and mean is not None and spec.x_shape[0] not in (1, len(mean)):
            raise InvalidValue("mean", list(mean), f"must hold {spec.x_shape[0]} numbers, one for each channel")
        self.image_size = image_size
        self.mean, self.std = (None if values is None else tuple(values) for values in (mean, std))

    def __repr__(self) -> str:
        return f"Preparation({self.image_size}, {self.mean}, {self.std})"

    def __call__(self, x: Tensor) -> Tensor:
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        if self.mean is None:
            return x
        mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1) for values in self.moments)
        return (x - mean) / std

    @property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        assert self.mean is not None and self.std is not None
        return self.mean, self.std


def head_of(network: nn.Module, x: Tensor) -> str | None:
    """The name of the linear layer whose output is that of the network; None where there is none."""
    with recorded_calls(network) as calls:
        output = output_of(network, x)
    return next((c.name for c in calls if c.name and isinstance(c.module, nn.Linear) and c.output is output), None)


def output_of(network: nn.Module, x: Tensor) -> Tensor:
    """The output of a network in evaluation mode for some inputs."""
    named = nn.ModuleDict({"network": network})
    with explained(named, f"on inputs {tuple(x.shape)}", "base_layer.network"), torch.no_grad():
        output = network.eval()(x)
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(x):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"base_layer.network ({type(network).__name__}): returns {shape}, and must return [n, d]")
    return output


def without_head(network: nn.Module, name: str | None) -> None:
    """Replaces the layer of a name by the identity."""
    if name is None:
        return
    owner, _, own = name.rpartition(".")
    try:
        network.get_submodule(name)
    except AttributeError as error:
        there = ", ".join(child for child, _ in network.named_children())
        raise InvalidValue("head", name, f"the network has no such layer; there are {there}") from error
    setattr(network.get_submodule(owner), own, nn.Identity())
