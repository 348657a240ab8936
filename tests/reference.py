"""Slow, obvious versions to compare with: a Python loop over tasks, explicit gradients, torch's own optimizers."""

import copy

import torch
from torch import nn
from torch.func import functional_call


def loss_of(network, params, examples, task, number):
    """The mean loss of one task's examples."""
    x, y = examples.x[number], examples.y[number]
    return task.loss(functional_call(network, params, (x,)), y).mean()


def maml(network, task, episode, *, lr, steps, first_order=False):
    """Query losses `[tasks]` after inner SGD, and the gradient of their mean by parameter name."""
    initial = dict(network.named_parameters())
    losses = []
    for number in range(episode.num_tasks):
        params = dict(initial)
        for _ in range(steps):
            loss = loss_of(network, params, episode.support, task, number)
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
            params = {name: p - lr * g for (name, p), g in zip(params.items(), gradients, strict=True)}
        losses.append(loss_of(network, params, episode.query, task, number))
    losses = torch.stack(losses)
    gradients = torch.autograd.grad(losses.mean(), list(initial.values()))
    return losses.detach(), dict(zip(initial, gradients, strict=True))


def reptile(network, task, episode, *, optimizer, steps, batch_size=None):
    """Initial minus trained parameters by name, averaged over tasks; each trains a copy by a torch optimizer."""
    differences = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for number in range(episode.num_tasks):
        x = torch.cat([episode.support.x[number], episode.query.x[number]])
        y = torch.cat([episode.support.y[number], episode.query.y[number]])
        trained = copy.deepcopy(network)
        rule = optimizer(trained.parameters())
        size = batch_size or len(x)
        for step in range(steps):
            rows = [(step * size + i) % len(x) for i in range(size)]
            rule.zero_grad()
            task.loss(trained(x[rows]), y[rows]).mean().backward()
            rule.step()
        for name, p in trained.named_parameters():
            differences[name] += (network.get_parameter(name) - p).detach() / episode.num_tasks
    return differences


def vmap_of_grad(network, task, episode, *, lr):
    """MAML with one inner step, the usual way: everything of one task, its inner gradient included, inside one vmap.

    Returns the same as `maml`. Exact only for networks without a native batch, layer or instance norm.
    """

    def query_loss(params, support_x, support_y, query_x, query_y):
        def loss(params, x, y):
            return task.loss(functional_call(network, params, (x,)), y).mean()

        gradients = torch.func.grad(loss)(params, support_x, support_y)
        return loss({name: p - lr * gradients[name] for name, p in params.items()}, query_x, query_y)

    initial = dict(network.named_parameters())
    data = (episode.support.x, episode.support.y, episode.query.x, episode.query.y)
    losses = torch.func.vmap(query_loss, in_dims=(None, 0, 0, 0, 0))(initial, *data)
    gradients = torch.autograd.grad(losses.mean(), list(initial.values()))
    return losses.detach(), dict(zip(initial, gradients, strict=True))


class Recurrent(nn.Module):
    """Reads its input as a sequence of one number after another: `[n, d]` to `[n, 4]`; vmap refuses it."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 4, batch_first=True)

    def forward(self, x):
        return self.gru(x.unsqueeze(-1))[0][:, -1]
