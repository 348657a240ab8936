"""The contender of outer_step.py that is written by hand in JAX, and jitted whole.

What was found fastest on a CPU: the MLP by vmap over tasks, all else by map over tasks; convolutions as products of
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loops import REG, SCALE
from steps import INNER_LR, OUTER_LR, Step
from workloads import Workload

from mlframework.base_layers.transformer import ROTARY_BASE

__all__ = ["with_jax"]

#: Of a batch norm and of an RMS norm.
EPS = 1e-5

Params = list[Any]


def with_jax(workload: Workload) -> Step:
    jax.config.update("jax_enable_x64", workload.double)
    jax.config.update("jax_default_matmul_precision", "float32")  # which on GPUs is not the default
    task, base_layer, episode = workload._replace(device="cpu").make()
    learned = base_layer if workload.head is None else base_layer.features
    params = [jnp.asarray(p.detach().cpu().numpy()) for p in learned.parameters()]
    data = tuple(jnp.asarray(leaf.cpu().numpy()) for part in episode for leaf in (part.x, part.y))
    heads = next((b.attention.heads for b in base_layer.features if hasattr(b, "attention")), 0)
    model = {"mlp": mlp, "strided": strided, "pooled": pooled, "transformer": transformer(heads)}[workload.network]
    loss = squared_error if task.spec.kind == "regression" else cross_entropy
    if workload.head is None:
        query_loss = adapted(lambda p, x, y: loss(model(p, x), y), workload)
    else:
        query_loss = fitted({"prototypes": prototypes, "ridge": ridge}[workload.head])

    def meta_gradient(params: Params) -> Params:
        grads = jax.grad(query_loss)
        if workload.network == "mlp":
            each = jax.vmap(grads, (None, 0, 0, 0, 0))(params, *data)
        else:
            each = lax.map(lambda examples: grads(params, *examples), data)
        return [g.mean(0) for g in each]

    outer = jax.jit(lambda *state: adam(meta_gradient(state[0]), *state))
    state: list[Any] = [params, [p * 0 for p in params], [p * 0 for p in params], jnp.zeros(())]

    def step() -> list[np.ndarray]:
        grads, *state[:] = jax.block_until_ready(outer(*state))
        return [np.asarray(g) for g in grads]

    return step


def adam(grads: Params, params: Params, first: Params, second: Params, count: Any) -> tuple[Any, ...]:
    """The gradients, and the state after a step along them."""
    count = count + 1
    first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
    second = [0.999 * v + 0.001 * g * g for v, g in zip(second, grads, strict=True)]
    moved = [
        p - OUTER_LR * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
        for p, m, v in zip(params, first, second, strict=True)
    ]
    return grads, moved, first, second, count


def adapted(loss_of: Callable[..., Any], workload: Workload) -> Callable[..., Any]:
    """The query loss of one task, after its inner steps."""

    def query_loss(params: Params, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        for _ in range(workload.inner_steps):
            grads = jax.grad(loss_of)(params, sx, sy)
            if workload.first_order:
                grads = lax.stop_gradient(grads)
            params = [p - INNER_LR * g for p, g in zip(params, grads, strict=True)]
        return loss_of(params, qx, qy)

    return query_loss


def fitted(logits_of: Callable[..., Any]) -> Callable[..., Any]:
    """The query loss of one task, with a head on the features of the strided network."""

    def query_loss(params: Params, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        support, query = (convolutions(params, x, pool=False).mean((2, 3)) for x in (sx, qx))
        return cross_entropy(logits_of(support, jax.nn.one_hot(sy, 5), query), qy)

    return query_loss


def prototypes(support: Any, classes: Any, query: Any) -> Any:
    means = (classes.T @ support) / classes.sum(0)[:, None]
    return -jnp.square(query[:, None] - means).sum(-1)


def ridge(support: Any, classes: Any, query: Any) -> Any:
    kernel = support @ support.T + 1 + REG * jnp.eye(len(support))
    return SCALE * (query @ support.T + 1) @ jax.scipy.linalg.solve(kernel, classes, assume_a="pos")


def squared_error(prediction: Any, y: Any) -> Any:
    return jnp.square(prediction - y).mean()


def cross_entropy(prediction: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(prediction), y[..., None], -1).mean()


def mlp(params: Params, x: Any) -> Any:
    for index in range(0, len(params) - 2, 2):
        x = jax.nn.relu(x @ params[index].T + params[index + 1])
    return x @ params[-2].T + params[-1]


def strided(params: Params, x: Any) -> Any:
    return convolutions(params[:-2], x, pool=False).mean((2, 3)) @ params[-2].T + params[-1]


def pooled(params: Params, x: Any) -> Any:
    return convolutions(params[:-2], x, pool=True).reshape(len(x), -1) @ params[-2].T + params[-1]


def convolutions(params: Params, x: Any, *, pool: bool) -> Any:
    """Blocks of `Conv4`: images `[n, c, h, w]` to the last block's."""
    for index in range(0, len(params), 4):
        weight, bias, scale, shift = params[index : index + 4]
        strides = (1, 1) if pool else (2, 2)
        columns = lax.conv_general_dilated_patches(x, (3, 3), strides, ((1, 1), (1, 1)))  # [n, c 9, h, w]
        x = jnp.einsum("ok,nkhw->nohw", weight.reshape(len(weight), -1), columns) + bias[:, None, None]
        centred = x - x.mean((0, 2, 3), keepdims=True)
        variance = jnp.square(centred).mean((0, 2, 3), keepdims=True)
        x = centred * (scale[:, None, None] * lax.rsqrt(variance + EPS)) + shift[:, None, None]
        if pool:
            n, c, h, w = x.shape
            x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
        x = jax.nn.relu(x)
    return x


def transformer(heads: int) -> Callable[[Params, Any], Any]:
    """`Transformer` with rotary positions: tokens `[n, length]` to logits `[n, length, vocabulary]`."""

    def model(params: Params, tokens: Any) -> Any:
        embedding, *blocks, norm, weight, bias = params
        x = embedding[tokens]
        for block in grouped(blocks, 8):
            norm1, query, key, value, output, norm2, expand, contract = block
            x = x + attention(rms_norm(x, norm1), (query, key, value), heads) @ output.T
            x = x + jax.nn.gelu(rms_norm(x, norm2) @ expand.T, approximate=False) @ contract.T
        return rms_norm(x, norm) @ weight.T + bias

    return model


def grouped(params: Params, size: int) -> Iterator[Params]:
    return (params[start : start + size] for start in range(0, len(params), size))


def rms_norm(x: Any, weight: Any) -> Any:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS) * weight


def attention(x: Any, weights: tuple[Any, ...], heads: int) -> Any:
    """Causal attention of `[n, length, width]`, before its output layer."""
    n, length, width = x.shape
    query, key, value = ((x @ w.T).reshape(n, length, heads, -1).transpose(0, 2, 1, 3) for w in weights)
    query, key = turned(query), turned(key)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(0, 1, 3, 2)
    seen = jnp.tril(jnp.ones((length, length), bool))
    found = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min)) @ value
    return found.transpose(0, 2, 1, 3).reshape(n, length, width)


def turned(x: Any) -> Any:
    """Rotary positions, of `[n, heads, length, d]`."""
    *_, length, width = x.shape
    turns = jnp.arange(length)[:, None] * ROTARY_BASE ** -(jnp.arange(0, width, 2) / width)
    first, second = jnp.split(x, 2, -1)
    cosine, sine = jnp.cos(turns), jnp.sin(turns)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
