"""Checks that every task distribution and every meta layer must pass, ours and a user's own.

Plain functions that raise an `AssertionError` of one line; they need no test runner.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mlframework.backend.forward import Engine, fork_rng
from mlframework.backend.step import choose_engine
from mlframework.episode import Episode, Examples, Split, TaskSpec
from mlframework.errors import UserError
from mlframework.inner_loop import Adam, RMSprop
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.runs.try_out import check_determinism, check_queries, first_queries
from mlframework.tasks.check_episode import faults
from mlframework.tasks.task_distribution import TaskDistribution
from mlframework.training.meta_gradient import MissingGradient, meta_gradient

__all__ = ["check_meta_layer", "check_task_distribution", "directional_errors"]

MakeMetaLayer = Callable[[TaskDistribution], MetaLayer]

#: The difference between two orders of summation in float64, after a few inner steps have amplified it. Rules that
#: divide a gradient by its size amplify more: the gradient of a bias before a batch norm is zero but for rounding.
ROUNDING, SCALED_ROUNDING = 1e-8, 1e-6


def check_task_distribution(
    task: TaskDistribution,
    *,
    splits: Sequence[Split] = get_args(Split),
    num_tasks: int = 8,
    inputs_repeat: bool = False,
    labels_repeat: bool = False,
) -> None:
    """Raises an `AssertionError` that names a task distribution's fault.

    Shapes and types follow the spec; all randomness comes from the given generator; support and query share no example,
    nor do the splits of a classification; class numbers are drawn anew for every task; losses and metrics are one per
    example, and finite.

    Args:
        splits: the splits that the distribution has.
        num_tasks: tasks per draw.
        inputs_repeat: whether different examples may have the same input by nature, as with a handful of items to rate;
            the checks that tell examples apart by their inputs are then left out.
        labels_repeat: whether a training class keeps its number from task to task by design; the others may not.
    """
    require(isinstance(task, TaskDistribution), f"a {described(task)}: hand over the object, as in MyTasks(...)")
    with as_assertions():
        check_draws(task, splits, num_tasks, inputs_repeat)
    if task.spec.kind == "classification" and not inputs_repeat:
        check_splits_differ(task, splits, num_tasks)
        permuted = [split for split in splits if not (labels_repeat and split == "train")]
        check_labels_are_permuted(task, permuted[0], num_tasks)


def described(thing: object) -> str:
    return f"class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


@contextmanager
def as_assertions() -> Iterator[None]:
    """Faults that a command line would print are faults of the check."""
    try:
        yield
    except UserError as error:
        raise AssertionError(str(error)) from error


def check_draws(task: TaskDistribution, splits: Sequence[Split], num_tasks: int, inputs_repeat: bool) -> None:
    """The episodes of each split: random numbers, shapes, types, scores, and that queries are new."""
    for split in splits:
        check_randomness(task, split, num_tasks)
        episode = task.sample(num_tasks, split, seeded(0))
        require(episode.num_tasks == num_tasks, f"{split}: {num_tasks} tasks wanted, {episode.num_tasks} drawn")
        for part, examples in episode._asdict().items():
            for fault in faults(examples, task.spec):
                require(False, f"{split} {part}: {fault}")
            check_scores(task, examples, f"{split} {part}")
        if not inputs_repeat:
            check_query_is_new(episode, split)


def check_scores(task: TaskDistribution, examples: Examples, where: str) -> None:
    """The loss and the metrics of a random prediction: one each per example that counts, and finite."""
    y, mask = examples.y, examples.mask
    prediction = torch.randn(*mask.shape, task.spec.out_features, generator=seeded(0))
    metrics = task.metrics(prediction, y)
    require("loss" not in metrics, f"{where}: no metric may be called loss")
    for name, value in {"loss": task.loss(prediction, y), **metrics}.items():
        require(value.shape == mask.shape, f"{where}: {name} is {tuple(value.shape)}, the mask {tuple(mask.shape)}")
        require(bool(torch.isfinite(value[mask.bool()]).all()), f"{where}: {name} is not finite")
    of_tasks = task.scores(prediction, y, mask)
    require("loss" in of_tasks, f"{where}: the loss is not among the scores")
    for name, value in of_tasks.items():
        require(value.shape == mask.shape[:1], f"{where}: the score {name} is {tuple(value.shape)}, not one per task")


def check_randomness(task: TaskDistribution, split: Split, num_tasks: int) -> None:
    """Same state of the generator, same episode; nothing else is drawn from, nothing is remembered."""
    modules = len(sys.modules)
    used, first, second = drawn_twice(task, split, num_tasks)
    if used and len(sys.modules) > modules:  # an import may have drawn, as that of rich does, and will not again
        used, first, second = drawn_twice(task, split, num_tasks)
    require(not used, f"{split}: draws from the global generator of {used}, not only from the one it is given")
    require(first != second, f"{split}: two draws in a row are the same episode")
    again = task.sample(num_tasks, split, seeded(0)).hash()
    require(first == again, f"{split}: the same state of the generator gives another episode")
    other = task.sample(num_tasks, split, seeded(1)).hash()
    require(first != other, f"{split}: another state of the generator gives the same episode")


def drawn_twice(task: TaskDistribution, split: Split, num_tasks: int) -> tuple[str, str, str]:
    """The global generators that two draws in a row use, and the hashes of the two episodes."""
    before, generator = global_random_state(), seeded(0)
    first, second = (task.sample(num_tasks, split, generator).hash() for _ in range(2))
    used = ", ".join(name for name, state in global_random_state().items() if state != before[name])
    return used, first, second


def check_query_is_new(episode: Episode, split: str) -> None:
    """No task is asked about an example that it adapts to."""
    for number in range(episode.num_tasks):
        support, query = (inputs_of(part, number) for part in episode)
        why = "has an input in both support and query (inputs_repeat=True if that is natural)"
        require(not set(support) & set(query), f"{split}: task {number} {why}")


def check_splits_differ(task: TaskDistribution, splits: Sequence[Split], num_tasks: int) -> None:
    """No example of one split is drawn in another."""
    seen: dict[bytes, Split] = {}
    for split in splits:
        examples = task.sample(num_tasks, split, seeded(0)).joined()
        drawn = {row for number in range(num_tasks) for row in inputs_of(examples, number)}
        elsewhere = {seen[row] for row in drawn if row in seen}
        require(not elsewhere, f"{split} shares examples with {', '.join(elsewhere)}")
        seen.update(dict.fromkeys(drawn, split))


def check_labels_are_permuted(task: TaskDistribution, split: Split, num_tasks: int) -> None:
    """An example that is drawn in several tasks does not keep its class number; passes if hardly any is drawn twice."""
    generator, recurrences = seeded(0), 0
    label_of: dict[bytes, int] = {}
    for _ in range(50):
        examples = task.sample(num_tasks, split, generator).joined()
        for number in range(num_tasks):
            labels = examples.y[number][examples.mask[number].bool()].tolist()
            for row, label in zip(inputs_of(examples, number), labels, strict=True):
                recurrences += row in label_of
                if label_of.setdefault(row, label) != label:
                    return
    # By chance alone, ten of them keep their label once in a thousand times or less.
    require(recurrences < 10, f"{split}: classes keep their number from task to task: it could be learned by heart")


def inputs_of(examples: Examples, task: int) -> list[bytes]:
    """The inputs of one task that count, as keys."""
    counted = examples.mask[task].unsqueeze(-1).flatten(1).any(1)
    return [row.tobytes() for row in examples.x[task][counted].numpy()]


def global_random_state() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": pickle.dumps(random.getstate()),
    }


def check_meta_layer(
    make_meta_layer: MakeMetaLayer,
    task: TaskDistribution,
    *,
    num_tasks: int = 3,
    padding: bool = True,
    tolerance: float = 1e-6,
    device: torch.device | str = "cpu",
) -> None:
    """Raises an `AssertionError` that names a meta layer's fault; computes in float64.

    Every meta-parameter gets a gradient; with `exact` it is the gradient of the query loss. Tasks do not see each
    other, whether vectorised, in a loop, or alone. Neither the order of the support nor padding matters. Adapting
    leaves the module unchanged. Its state can be saved and loaded. The same seed makes the same step.

    What a command line would refuse is a fault as well: a prediction that other queries move, or rows of padding.

    Args:
        make_meta_layer: makes a new meta layer for a task distribution, with torch's global generator. Adapting and
            predicting draw nothing: leave dropout out.
        task, num_tasks: where the episode of the checks comes from, and its size.
        padding: False leaves out the check of padding, for a layer that takes only tasks of equal size.
        tolerance: of the meta-gradient, relative to its norm.
    """
    device = torch.device(device)
    with reproducible(device), as_assertions():
        check_makes(make_meta_layer, task)
        episode = in_float64(task.sample(num_tasks, "train", seeded(0))).to(device)
        make = partial(make_seeded, make_meta_layer, task=task, device=device)
        make = partial(make, engine=choose_engine(make(), episode, "auto"))
        check_nothing_is_drawn(make(), episode)
        check_every_parameter_learns(make(), episode)
        check_adapting_changes_nothing(make(), episode)
        check_tasks_are_independent(make(), episode)
        if not make().support_order_matters:
            check_order_of_support(make(), episode)
        if padding:
            ragged = copy.copy(task)
            ragged.spec = task.spec._replace(ragged=True)
            check_padding(make(task=ragged), episode)
        check_as_a_run(make(), episode)
        check_same_step(make(), make(), episode)
        check_state_dict(make(seed=0), make(seed=1), episode)
        check_exact(make(), episode, tolerance)


def check_makes(make_meta_layer: MakeMetaLayer, task: TaskDistribution) -> None:
    """A function makes a new meta layer with every call."""
    hint = "hand over a function that makes one, as in lambda task: MAML(MLP(task.spec), task, ...)"
    require(not isinstance(make_meta_layer, torch.nn.Module), f"a {described(make_meta_layer)} is one layer: {hint}")
    one, other = make_meta_layer(task), make_meta_layer(task)
    require(isinstance(one, MetaLayer), f"makes a {described(one)}, and must make a MetaLayer: {hint}")
    shared = {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    require(not shared, f"makes the same parameters twice: {hint}")


def check_nothing_is_drawn(meta_layer: MetaLayer, episode: Episode) -> None:
    """Random numbers in training mode make two losses of one state; torch's own dropouts are named."""
    with torch.no_grad():
        one, other = (seeded_losses(meta_layer.train(), episode, seed) for seed in (0, 1))
    dropouts = [name for name, part in meta_layer.named_modules() if "Dropout" in type(part).__name__]
    named = f" ({', '.join(dropouts)})" if dropouts else ""
    why = f"adapting draws random numbers{named}: leave dropout out, or train with regulariser=inner_dropout"
    require(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True), why)


def seeded_losses(meta_layer: MetaLayer, episode: Episode, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.enable_grad():
        return meta_layer.query_metrics(meta_layer.adapt(episode.support), episode)["query_loss"].detach()


def check_as_a_run(meta_layer: MetaLayer, episode: Episode) -> None:
    """What a run tries before it starts."""
    one = first_queries(episode).tasks(slice(1))
    check_determinism(meta_layer, one)
    check_queries(meta_layer, one)


def make_seeded(
    make_meta_layer: MakeMetaLayer, task: TaskDistribution, device: torch.device, engine: Engine = "loop", seed: int = 0
) -> MetaLayer:
    """A new meta layer in float64, whose first parameters follow from the seed."""
    torch.manual_seed(seed)
    meta_layer = make_meta_layer(task).double().to(device)
    meta_layer.engine = engine
    return meta_layer


def check_every_parameter_learns(meta_layer: MetaLayer, episode: Episode) -> None:
    try:
        meta_gradient(meta_layer, episode)
    except MissingGradient as error:
        raise AssertionError(str(error)) from error
    broken = [name for name, p in meta_layer.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not broken, f"the meta-gradient of {', '.join(broken)} is not finite")


def check_adapting_changes_nothing(meta_layer: MetaLayer, episode: Episode) -> None:
    before = copy.deepcopy(meta_layer.state_dict())
    for mode in (True, False):
        meta_layer.train(mode)
        query_mask = meta_layer.mask_or_none(episode.query.mask)
        meta_layer.predict(meta_layer.adapt(episode.support), episode.query.x, query_mask)
        changed = [name for name, value in meta_layer.state_dict().items() if not torch.equal(value, before[name])]
        require(not changed, f"adapting changes {', '.join(changed)}")
        touched = [name for name, p in meta_layer.named_parameters() if p.grad is not None]
        require(not touched, f"adapting leaves a gradient in {', '.join(touched)}")
        require(meta_layer.training == mode, "adapting switches between training and evaluation mode")


def check_tasks_are_independent(meta_layer: MetaLayer, episode: Episode) -> None:
    together, alone = outcome(meta_layer, episode), outcome(meta_layer, episode, chunk=1)
    rounding = SCALED_ROUNDING if isinstance(getattr(meta_layer, "update", None), (Adam, RMSprop)) else ROUNDING
    require_equal(alone, together, "a task alone gives another result than in company", rounding)
    if meta_layer.engine == "vectorised":
        meta_layer.engine = "loop"
        require_equal(outcome(meta_layer, episode), together, "vectorised and loop give different results", rounding)


def check_order_of_support(meta_layer: MetaLayer, episode: Episode) -> None:
    moved = episode._replace(support=Examples(*(leaf.roll(1, dims=1) for leaf in episode.support)))
    require_equal(
        query_losses(meta_layer, moved), query_losses(meta_layer, episode), "the order of the support matters"
    )


def check_padding(meta_layer: MetaLayer, episode: Episode) -> None:
    padded = Episode(*(with_garbage(part, meta_layer.task.spec) for part in episode))
    same = query_losses(meta_layer, padded), query_losses(meta_layer, episode)
    require_equal(*same, "padding matters: rows that the mask leaves out change the loss")
    if meta_layer.exact:
        same = outcome(meta_layer, padded), outcome(meta_layer, episode)
        require_equal(*same, "padding matters: rows that the mask leaves out change the meta-gradient")


def check_same_step(one: MetaLayer, other: MetaLayer, episode: Episode) -> None:
    for meta_layer in (one, other):
        torch.manual_seed(0)
        meta_gradient(meta_layer, episode)
        torch.optim.SGD(meta_layer.parameters(), lr=0.1).step()
    require_equal(flat(one.parameters()), flat(other.parameters()), "the same seed makes another step")


def check_state_dict(one: MetaLayer, other: MetaLayer, episode: Episode) -> None:
    other.load_state_dict(one.state_dict())
    same = outcome(other, episode), outcome(one, episode)
    require_equal(*same, "a state that is saved and loaded gives another result")


def check_exact(meta_layer: MetaLayer, episode: Episode, tolerance: float) -> None:
    meta_layer.outer_step = 10**9  # every schedule has ended
    if meta_layer.exact:
        # The median: in a wide network some direction may well cross a kink, such as a ReLU's.
        error = float(directional_errors(meta_layer, episode).median())
        off = f"the meta-gradient is off by {error:.1e} of its norm from differences of the query loss"
        require(error <= tolerance, f"exact is claimed, and {off}")


def directional_errors(
    meta_layer: MetaLayer,
    episode: Episode,
    *,
    losses_of: Callable[[MetaLayer, Episode], Tensor] | None = None,
    directions: int = 5,
    step: float = 1e-6,
    seed: int = 0,
) -> Tensor:
    """How far the meta-gradient is from differences of the mean query loss, along standard normal directions.

    The mean of the squared errors is an unbiased estimate of the squared norm of the whole error.

    Args:
        meta_layer, episode: in float64; the parameters are unchanged afterwards.
        losses_of: the losses `[tasks]` to take differences of; None: the query losses after adapting.
        directions, seed: how many are drawn, and from which seed.
        step: length of the step to either side. In float64, 1e-6 keeps rounding near 1e-9 and crosses few kinks.

    Returns:
        `[directions]`: absolute errors, relative to the norm of the meta-gradient.
    """
    meta_gradient(meta_layer, episode)
    learned = [p for p in meta_layer.parameters() if p.requires_grad]
    gradient, values = flat(p.grad for p in learned if p.grad is not None), flat(learned)
    losses_of, errors = losses_of or query_losses, []

    def loss_at(values: Tensor) -> Tensor:
        set_flat(learned, values)
        return losses_of(meta_layer, episode).mean()

    for direction in torch.randn(directions, len(values), generator=seeded(seed), dtype=values.dtype).to(values.device):
        length = direction.norm()
        above, below = (loss_at(values + side * step * direction / length) for side in (1, -1))
        errors.append((above - below) / (2 * step) * length - gradient @ direction)
    set_flat(learned, values)
    return torch.stack(errors).abs() / gradient.norm()


def query_losses(meta_layer: MetaLayer, episode: Episode) -> Tensor:
    """The query metric that the algorithm minimises, by default the query loss, `[tasks]`, after adapting."""
    with torch.no_grad():
        return meta_layer.query_metrics(meta_layer.adapt(episode.support), episode)[meta_layer.minimised]


def outcome(meta_layer: MetaLayer, episode: Episode, *, chunk: int | None = None) -> Tensor:
    """The meta-loss of every task and the meta-gradient, as one vector."""
    losses, _ = meta_gradient(meta_layer, episode, chunk=chunk)
    return torch.cat([losses, flat(p.grad for p in meta_layer.parameters() if p.grad is not None)])


def with_garbage(examples: Examples, spec: TaskSpec) -> Examples:
    """The same examples and two rows of nonsense, masked."""
    x, y, mask = (leaf[:, :1].expand(-1, 2, *leaf.shape[2:]) for leaf in examples)
    nonsense = 7 - 3 * x if x.is_floating_point() else x
    wrong = 7 - 3 * y if y.is_floating_point() else spec.out_features - 1 - y
    added = Examples(nonsense, wrong, torch.zeros_like(mask))
    return Examples(*(torch.cat(leaves, dim=1) for leaves in zip(examples, added, strict=True)))


def in_float64(episode: Episode) -> Episode:
    halves = ([leaf.double() if leaf.is_floating_point() else leaf for leaf in part] for part in episode)
    return Episode(*(Examples(*leaves) for leaves in halves))


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Makes float64 the default, and leaves it and the global generator as they were."""
    before = torch.get_default_dtype()
    try:
        with fork_rng(device):
            torch.set_default_dtype(torch.float64)
            yield
    finally:
        torch.set_default_dtype(before)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def set_flat(tensors: Sequence[Tensor], values: Tensor) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, values.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def require(condition: bool, message: str) -> None:
    """An assert that `python -O` does not leave out."""
    if not condition:
        raise AssertionError(message)


def require_equal(found: Tensor, wanted: Tensor, message: str, rounding: float = ROUNDING) -> None:
    """Requires two vectors to be the same up to rounding, relative to their norm."""
    error = float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny))
    require(error <= rounding, f"{message} (by {error:.1e} of its norm)")
