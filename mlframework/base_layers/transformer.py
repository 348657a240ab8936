"""A small causal transformer: tokens to the token that follows, at every position."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.backend.forward import per_task, runs_per_task, table
from mlframework.base_layers.base_layer import BaseLayer, Composed, Run, Stack, TakesMask
from mlframework.base_layers.recall import Recalls, check_sequence
from mlframework.episode import TaskSpec
from mlframework.errors import InvalidValue

__all__ = ["Attention", "LearnedPositions", "RMSNorm", "Transformer"]

Positions = Literal["rotary", "learned"]

#: The longest wave of rotary positions, in positions, divided by 2 pi.
ROTARY_BASE = 10_000.0


class Transformer(BaseLayer):
    """A decoder-only transformer; features are its last hidden states, the head predicts the next token of each.

    What a mask leaves out is as if it were not there, wherever it stands: nobody attends to it, and it takes up no
    position. Linear layers are called `query`, `key`, `value`, `output`, `expand` and `contract` in each block.

    Args:
        spec: the task's shapes; inputs are tokens `[n, length]`.
        width: of the hidden states.
        depth: blocks.
        heads: attention heads of a block; they share its width.
        positions: `rotary` (only distances count, and inputs may be longer than those of the task) or `learned` (a
            vector for each of the task's positions).

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; blocks as in Radford et al., GPT-2, 2019, section 2.3
        (normalisation first, outputs into the residual stream start small). Deviations: RMSNorm, whose second
        derivatives are exact under vmap (LayerNorm's are not); no dropout, no offsets in the blocks; the head is not
        tied to the embedding; weights start with variance 1 / inputs.

    >>> Transformer(TaskSpec("sequence", (16,), 257), width=8, heads=2)(torch.zeros(3, 16, dtype=torch.long)).shape
    torch.Size([3, 16, 257])
    """

    def __init__(
        self, spec: TaskSpec, *, width: int = 64, depth: int = 4, heads: int = 4, positions: Positions = "rotary"
    ) -> None:
        check_sequence(spec, "transformer", width=width, depth=depth, heads=heads)
        if positions not in get_args(Positions):
            raise InvalidValue("positions", positions, "must be rotary or learned")
        rotary = positions == "rotary"
        if width % heads or (rotary and width // heads % 2):
            raise InvalidValue("heads", heads, f"must divide width={width} into {'even ' if rotary else ''}parts")
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=nn.Embedding(spec.out_features, width))
        if not rotary:
            layers["positions"] = LearnedPositions(spec.x_shape[0], width)
        for number in range(depth):
            layers[f"block{number}"] = Block(width, heads, rotary=rotary, depth=depth)
        layers["norm"] = RMSNorm(width)
        head = nn.Linear(width, spec.out_features)
        # Small, so that all tokens start about equally likely.
        nn.init.normal_(head.weight, std=0.1 / math.sqrt(width))
        nn.init.zeros_(head.bias)
        super().__init__(Stack(layers), head)


class Block(Composed):
    """Attention and a perceptron, each on the normalised residual stream; the more blocks, the smaller each starts."""

    def __init__(self, width: int, heads: int, *, rotary: bool, depth: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, rotary=rotary)
        self.mlp_norm = RMSNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        for linear in (self.attention.output, self.contract):
            linear.weight.data /= math.sqrt(2 * depth)

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + run("attention", run("attention_norm", x))
        return x + run("contract", F.gelu(run("expand", run("mlp_norm", x))))


class Attention(Composed, Recalls):
    """Causal self-attention, written from products of matrices, which can be vmapped and differentiated twice.

    If it is `rotary`, queries and keys are turned by their positions, so that they meet at their distance alone (Su et
    al., RoFormer, 2021, arXiv:2104.09864, section 3.2; the halves of a head are its pairs).
    """

    def __init__(self, width: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def through(self, run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[..., length, width]` to the same shape; `mask` `[..., length]`."""
        query, key, value = (self.parted(run(name, x)) for name in ("query", "key", "value"))
        query = query * query.shape[-1] ** -0.5
        counted = counted_so_far(self, x, mask)
        if self.rotary:
            turns = angles(query, counted)
            query, key = turned(query, *turns), turned(key, *turns)
        if self.memory:
            _, keys, values = self.memory
            key, value = torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)
        if self.memory is not None and counted is not None:
            self.memory = (counted, key, value)
        return run("output", attended(query, key, value, counted).transpose(-2, -3).flatten(-2))

    def parted(self, x: Tensor) -> Tensor:
        """`[..., length, width]` to heads: `[..., heads, length, width / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


def attended(query: Tensor, key: Tensor, value: Tensor, counted: Tensor | None) -> Tensor:
    """For each query, the mean of the values up to its own position, weighted by how well their keys fit.

    Queries `[..., heads, length, d]`, scaled, are of the last `length` positions of keys and values
    `[..., heads, read, d]`; `counted` `[..., read]`: which keys count (None: all).
    """
    hidden = later(key, query.shape[-2], key.shape[-2])
    if counted is not None:
        unread = torch.zeros_like(counted, dtype=key.dtype).masked_fill(~counted, least(key.dtype))
        hidden = hidden + unread[..., None, None, :]
    # It is added: filling takes longer.
    return (query @ key.mT + hidden).softmax(-1) @ value


@table
def later(like: Tensor, length: int, read: int) -> Tensor:
    """What is added to products of the last `length` queries with `read` keys, so that none reads a later one."""
    hidden = torch.ones(length, read, dtype=torch.bool, device=like.device).triu(read - length + 1)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, least(like.dtype))


def least(dtype: torch.dtype) -> float:
    """What is added to a product that must not count; twice over it is still a number, as is its softmax."""
    return torch.finfo(dtype).min / 2


def counted_so_far(reader: Recalls, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which positions count, `[..., read + length]`: those read earlier, and those of `x` `[..., length, width]`.

    A reader's memory, if there is any, starts with the answer of the last call. Without mask `[..., length]` all of `x`
    count; None: all count, and nothing is remembered.
    """
    if mask is None and reader.memory is None:
        return None
    counted = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask > 0
    return torch.cat([reader.memory[0], counted], dim=-1) if reader.memory else counted


def positions_of(length: int, counted: Tensor) -> Tensor:
    """The number of each of the last `length` tokens among those that count: `[..., read]` to `[..., length]`."""
    # Nobody reads a token before the first one that counts, but it needs a position.
    return (counted.cumsum(-1) - 1).clamp(min=0)[..., -length:]


def angles(x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary attention's angles, each `[length, d / 2]` or `[..., 1, length, d / 2]`.

    They are those of queries or keys `x` `[..., heads, length, d]`, the last of the positions `counted` `[..., read]`
    (None: all count, and there are no others).
    """
    length = x.shape[-2]
    read = length if counted is None else counted.shape[-1]
    cosines, sines = rotations(x, read, x.shape[-1], ROTARY_BASE).unbind()
    if counted is None:
        return cosines, sines
    positions = positions_of(length, counted).unsqueeze(-2)
    return cosines[positions], sines[positions]


@table
def rotations(like: Tensor, count: int, width: int, base: float) -> Tensor:
    """Cosines and sines by which vectors are turned at each of `count` positions, `[2, count, width / 2]`."""
    rates = base ** -(torch.arange(0, width, 2, device=like.device, dtype=like.dtype) / width)
    turns = torch.arange(count, device=like.device).unsqueeze(-1) * rates
    return torch.stack([turns.cos(), turns.sin()])


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Vectors `[..., d]`, each pair of their numbers, one of each half, turned by its angle: `[..., d / 2]` of them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class LearnedPositions(TakesMask, Recalls):
    """Adds to each token's vector a learned one of its position; no input may be longer than `count` positions."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(count, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[n, length, width]` to the same shape; `mask` `[n, length]`."""
        counted = counted_so_far(self, x, mask)
        length = x.shape[1] if counted is None else counted.shape[1]
        if length > self.vectors.num_embeddings:
            why = f"knows {self.vectors.num_embeddings} positions, and this sequence has {length}: use rotary"
            raise InvalidValue("positions", "learned", why)
        if counted is None:
            return x + self.vectors.weight[:length]
        if self.memory is not None:
            self.memory = (counted,)
        return x + self.vectors(positions_of(x.shape[1], counted))


class RMSNorm(nn.Module):
    """Scales vectors to a root mean square of one, then each number by a learned weight; `eps` is added to the square.

    Reference: Zhang, Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return to_unit(x, self.eps) * self.weight


def to_unit(x: Tensor, eps: float) -> Tensor:
    """Vectors `[..., d]` divided by the root of their mean square, to which `eps` is added."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


runs_per_task(RMSNorm, lambda norm, params, x, mask: to_unit(x, norm.eps) * per_task(params["weight"], x))
