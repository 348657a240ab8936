"""Tries a training once before anything is written, so that a part that cannot work is named in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from mlframework.backend.forward import fork_rng
from mlframework.base_layers.base_layer import MIXING
from mlframework.base_layers.check_base_layer import TWO_OUTPUTS, Call, culprit, explained, moved, recorded_calls
from mlframework.episode import Episode, Examples, Split
from mlframework.errors import UserError
from mlframework.evaluation.task_set import judge_by_step, policies
from mlframework.inner_loop.inner_loop import last
from mlframework.meta_layers.meta_layer import MetaLayer, Metrics
from mlframework.tasks.check_episode import check_episode
from mlframework.tasks.on_features import on_features
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training import checkpoint
from mlframework.training.checkpoint import Progress, Training
from mlframework.training.meta_gradient import meta_gradient

__all__ = ["try_out"]

#: The most queries to predict: under some policies each takes its own pass.
QUERIES = 4


def try_out(training: Training, make_meta_layer: Callable[[], MetaLayer]) -> Metrics:
    """Draws from every split, chooses the engine, steps and judges once, saves and loads once; returns the metrics.

    Parameters, buffers and random numbers stay as they are. Saved weights are loaded into a new meta layer. A
    `UserError` names the task, or the module, at fault.
    """
    meta_layer, device = training.meta_layer, training.device
    task = on_features(training.task, meta_layer.base_layer)
    with fork_rng(device):
        drawn = {split: draw(task, split).to(device) for split in get_args(Split)}
        few = first_queries(drawn["validation"])
        one = few.tasks(slice(1))
        try:
            with explained(meta_layer.base_layer, "in training mode", algorithm(meta_layer)):
                training.outer.prepare(drawn["train"])
                _, metrics = meta_gradient(meta_layer.train(), drawn["train"])
            with explained(meta_layer.base_layer, "in evaluation mode", algorithm(meta_layer)):
                for policy in policies(meta_layer):
                    judge_by_step(meta_layer, few, meta_layer.test_inner_steps, policy, ends_only=True)
                check_determinism(meta_layer, one)
                check_queries(meta_layer, one)
                if task.spec.ragged:
                    check_padding(meta_layer, one)
            check_files(training, make_meta_layer, one)
        finally:
            meta_layer.train()
            meta_layer.zero_grad()
    return metrics


def draw(task: TaskDistribution, split: Split) -> Episode:
    """Two tasks of a split, checked."""
    where, drawn = f"task ({type(task).__name__}), {split} split", []
    for count in (1, 2, 2):
        with explained(torch.nn.Module(), f"to sample {count} tasks", where):
            drawn.append(task.sample(count, split, torch.Generator().manual_seed(0)))
        check_episode(drawn[-1], task.spec, num_tasks=count, where=where)
    if drawn[1].hash() != drawn[2].hash():
        why = "two generators of one seed give two episodes: draw all random numbers from the generator"
        raise UserError(f"{where}: {why}")
    return drawn[1]


def first_queries(episode: Episode) -> Episode:
    """The same tasks with the first queries that count in some task."""
    rows = episode.query.mask.movedim(1, 0).flatten(1).any(1).nonzero().flatten()[:QUERIES]
    return episode._replace(query=Examples(*(leaf[:, rows] for leaf in episode.query)))


def algorithm(meta_layer: MetaLayer) -> str:
    return f"algorithm ({type(meta_layer).__name__})"


def predicted(meta_layer: MetaLayer, episode: Episode, seed: int = 0) -> Tensor:
    """Predictions in evaluation mode, after one inner step if there are any."""
    meta_layer.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        adapted = last(meta_layer.trajectory(episode.support, min(1, meta_layer.test_inner_steps)))
        return meta_layer.predict_query(adapted, episode, meta_layer.batch_norm)


def calls(meta_layer: MetaLayer, x: Tensor, mask: Tensor | None, seed: int = 0) -> list[Call]:
    """The calls of the base layer's modules, for the first of some tasks."""
    torch.manual_seed(seed)
    with torch.no_grad(), recorded_calls(meta_layer.base_layer) as found:
        meta_layer.base_layer(x[0], None if mask is None else mask[0])
    return found


def blamed(meta_layer: MetaLayer, call: Call | None) -> str:
    """The module at fault, or the algorithm if no module is."""
    return algorithm(meta_layer) if call is None else str(call)


def check_determinism(meta_layer: MetaLayer, episode: Episode) -> None:
    """In evaluation mode one input has one prediction."""
    if not moved(predicted(meta_layer, episode), predicted(meta_layer, episode, seed=1)):
        return
    found = [calls(meta_layer, episode.query.x, None, seed) for seed in (0, 1)]
    raise UserError(f"{blamed(meta_layer, culprit(found))}: {TWO_OUTPUTS}")


def check_queries(meta_layer: MetaLayer, episode: Episode) -> None:
    """The other queries do not move a query's prediction, unless the policy lets them."""
    policy, mixes = meta_layer.batch_norm, meta_layer.base_layer.mixes_examples
    if mixes and policy == "transductive":
        return
    (support, query), first = episode, slice(0, 1)
    # The first query in the place of the others: its inputs are valid for any task.
    changed = query._replace(x=query.x[:, first].expand_as(query.x))
    one, other = (predicted(meta_layer, episode._replace(query=q))[:, first] for q in (query, changed))
    if not moved(one, other):
        return
    mask = torch.cat([support.mask, torch.zeros_like(query.mask)], dim=1)
    rows = slice(support.x.shape[1], support.x.shape[1] + 1)
    found = [calls(meta_layer, torch.cat([support.x, q.x], dim=1), mask) for q in (query, changed)]
    call = culprit(found, rows)
    why = (
        "an example's output depends on the examples beside it, unannounced: derive it from MixesExamples and let only "
        "those count that its mask counts"
    )
    if call is None:
        why = "a query's prediction depends on the other queries"
    elif isinstance(call.module, MIXING):
        why = (
            f"other queries move a query's prediction under algorithm.batch_norm={policy}: a module around it drops "
            "the mask; let that take the mask and hand it on (TakesMask), or choose algorithm.batch_norm=transductive"
        )
    raise UserError(f"{blamed(meta_layer, call)}: {why}")


def check_padding(meta_layer: MetaLayer, episode: Episode) -> None:
    """Masked rows do not move the predictions for other rows."""
    padded = [Episode(*(with_padding(part, row) for part in episode)) for row in (0, -1)]
    counts = episode.query.mask > 0
    one, other = (predicted(meta_layer, each)[:, : counts.shape[1]][counts] for each in padded)
    if not moved(one, other):
        return
    found = [calls(meta_layer, each.support.x, each.support.mask) for each in padded]
    who = blamed(meta_layer, culprit(found, slice(episode.support.x.shape[1])))
    raise UserError(
        f"{who}: rows of padding move the predictions of rows that count: let it take the mask (TakesMask), hand it on "
        "and leave out what the mask leaves out"
    )


def with_padding(examples: Examples, row: int) -> Examples:
    """The same examples with two more, copies of the first or the last one, that do not count."""
    more = Examples(*(leaf[:, [row, row]] for leaf in examples))
    more = more._replace(mask=torch.zeros_like(more.mask))
    return Examples(*(torch.cat(leaves, dim=1) for leaves in zip(examples, more, strict=True)))


def check_files(training: Training, make_meta_layer: Callable[[], MetaLayer], episode: Episode) -> None:
    """Weights that are saved and loaded predict as before; a checkpoint can be read."""
    meta_layer = training.meta_layer
    with explained(meta_layer.base_layer, "to be saved and loaded", algorithm(meta_layer)):
        content = io.BytesIO()
        torch.save(checkpoint.state_of(training, Progress()), content)
        content.seek(0)
        torch.load(content, map_location="cpu", weights_only=True)
        torch.manual_seed(training.generator.initial_seed() + 1)  # other initial values
        other = make_meta_layer().to(training.device)
        checkpoint.load_state(other, checkpoint.from_bytes(checkpoint.to_bytes(meta_layer)), "a copy of its own")
    other.engine = meta_layer.engine
    if not moved(predicted(meta_layer, episode), predicted(other, episode)):
        return
    found = [calls(layer, episode.query.x, None) for layer in (meta_layer, other)]
    who = blamed(meta_layer, culprit(found))
    raise UserError(
        f"{who}: gives other outputs once its weights are saved and loaded: it keeps state that is neither a parameter "
        "nor a buffer (register_buffer)"
    )
