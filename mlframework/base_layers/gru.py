"""A gated recurrent network over tokens, written so that it can be vmapped over its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlframework.base_layers.base_layer import BaseLayer, Stack, TakesMask
from mlframework.base_layers.recall import Recalls, check_sequence
from mlframework.episode import TaskSpec

__all__ = ["GRU"]


class GRU(BaseLayer):
    """Predicts every next token from the state of gated recurrent layers that have read those before it.

    Positions that a mask leaves out change no state.

    Args:
        spec: the task's shapes: sequences of tokens.
        width: size of an embedding and of a state.
        layers: of gated units, one upon the other.

    Reference: Cho et al. 2014, arXiv:1406.1078, section 2.3, in torch's variant: the reset gate acts on the product
        with the state, not on the state.

    >>> GRU(TaskSpec("sequence", (8,), 257), width=16)(torch.zeros(3, 8, dtype=torch.long)).shape
    torch.Size([3, 8, 257])
    """

    def __init__(self, spec: TaskSpec, *, width: int = 128, layers: int = 1) -> None:
        check_sequence(spec, "gru", width=width, layers=layers)
        embedding = nn.Embedding(spec.out_features, width)
        features = Stack(embedding, *(GatedUnits(width) for _ in range(layers)))
        super().__init__(features, nn.Linear(width, spec.out_features))


class GatedUnits(Recalls, TakesMask):
    """A layer of gated recurrent units: inputs `[n, length, width]` to the states `[n, length, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (state,) = self.memory or (torch.zeros_like(x[:, 0]),)
        states = []
        for position, inputs in enumerate(self.from_input(x).unbind(1)):
            moved = self.step(inputs, state)
            state = moved if mask is None else torch.where(mask[:, position, None] > 0, moved, state)
            states.append(state)
        if self.memory is not None:
            self.memory = (state,)
        return torch.stack(states, dim=1)

    def step(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The next state `[n, width]`, from the input's share in the three gates `[n, 3 width]`."""
        reset, update, new = inputs.chunk(3, dim=-1)
        state_reset, state_update, state_new = self.from_state(state).chunk(3, dim=-1)
        update = torch.sigmoid(update + state_update)
        candidate = torch.tanh(new + torch.sigmoid(reset + state_reset) * state_new)
        return candidate + update * (state - candidate)
