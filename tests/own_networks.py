"""Networks as a user writes them, for tasks of 8x8 grey images: plain modules with what people use."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class Convolutions(nn.Module):
    """Batch norm and spectral norm."""

    def __init__(self, spec, *, running=False, dropout=0.0):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(1, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4, track_running_stats=running)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * 16, spec.out_features)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(torch.max_pool2d(x, 2).flatten(1)))


class RowReader(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, spec, *, dropout=0.0):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, spec.out_features)

    def forward(self, x):
        _, (state, _) = self.lstm(x.squeeze(1))
        return self.fc(self.drop(state[-1]))


class Patches(nn.Module):
    """Attention over patches, with layer norms."""

    def __init__(self, spec, *, dropout=0.0):
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.fc = nn.Linear(8, spec.out_features)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.fc(tokens.mean(1))


class DropsMask(nn.Module):
    """A batch norm inside a module that takes no mask."""

    def __init__(self, channels):
        super().__init__()
        from mlframework.base_layers import BatchStatistics

        self.norm = BatchStatistics(channels)

    def forward(self, x):
        return self.norm(x)
