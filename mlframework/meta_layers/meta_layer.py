"""The one interface of all algorithms: adapt to a support set, predict with the adapted model."""

from __future__ import annotations

import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlframework.backend.forward import Engine, call_per_task, has_bf16
from mlframework.base_layers.base_layer import BATCH_NORMS, BaseLayer, PlainLayer, as_base_layer, mixing_parts
from mlframework.episode import Episode, Examples, Kind, Params, masked_mean
from mlframework.errors import IncompatibleKind, InvalidValue, UserError, part_of
from mlframework.files import KeepsArguments
from mlframework.meta_layers.predictive import Predictive, normal_nll
from mlframework.meta_layers.regulariser import Regulariser
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = [
    *("Adapted", "BatchNormPolicy", "MetaLayer", "Metrics", "call_features", "learned_names", "matching"),
    *("require_features", "with_settings_of"),
]

#: A task's own model in whatever form an algorithm keeps it; every leaf starts with `[tasks]`.
Adapted = Any
#: Names to values per task, `[tasks]`.
Metrics = dict[str, Tensor]

BatchNormPolicy = Literal["transductive", "inductive", "support"]

Init = TypeVar("Init", bound=Callable[..., None])


def with_settings_of(parent: type, *, but: Collection[str] = ()) -> Callable[[Init], Init]:
    """Lets a constructor's signature, by which configs are checked, name its parent's keywords too, `but` for some."""
    theirs = vars(parent)["__init__"]

    def named(init: Init) -> Init:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {*but, *(p.name for p in own)}
        others = [p for p in inspect.signature(theirs).parameters.values() if p.kind is p.KEYWORD_ONLY]
        init.__annotations__ = {**get_type_hints(theirs), **get_type_hints(init)}
        vars(init)["__signature__"] = inspect.Signature([*own, *(p for p in others if p.name not in taken)])
        return init

    return named


class MetaLayer(KeepsArguments, nn.Module, ABC):
    """Turns a support set into a task's own model, and predicts with it; every leaf in and out starts with `[tasks]`.

    Args:
        base_layer: a `BaseLayer`, or any module from inputs to predictions, which is then wrapped: see `PlainLayer`.
        task: says what the loss and the metrics are.
        frozen: a regular expression for the base layer's parameters that are neither adapted nor learned.
        batch_norm: which statistics normalise the queries, if the base layer mixes the examples of a batch.
            `transductive`: those of all queries together. `inductive`: those of each query alone beside the support set
            (Nichol et al. 2018, arXiv:1803.02999, section 6.1). `support`: those of the support set alone, which is
            inductive as well (MetaBN in Bronskill et al. 2020, arXiv:2003.03284, section 3.2).

    Raises:
        IncompatibleKind: the algorithm does not take tasks of this kind.
    """

    #: The kinds of task that the algorithm takes.
    kinds: tuple[Kind, ...] = get_args(Kind)

    #: The query metric that `meta_loss` is, unless the algorithm has a loss of its own.
    minimised: str = "query_loss"
    #: Whether `meta_loss` has exactly the gradient of the query metric `minimised`.
    exact: bool = True
    #: Whether a task in use may have more classes than those of the training.
    any_n_way: bool = False
    #: Whether a task's model depends on the order of its support set, because a recurrent network reads it, say.
    support_order_matters: bool = False
    #: Inner steps at evaluation; 0 for an algorithm without inner steps.
    test_inner_steps: int = 0
    #: Names of parameters whose values nothing reads; weights for another number of classes load without them.
    unread: tuple[str, ...] = ()
    #: Outer steps taken so far, set by the outer loop, for schedules.
    outer_step: int = 0
    #: How the base layer runs over tasks; see `mlframework.backend.forward.over_tasks`.
    engine: Engine = "vectorised"
    #: How many examples of a support set are adapted to at a time; None: all of them. See `take_support_by`.
    support_chunk: int | None = None
    #: The type of the base layer's products in training; None: that of its parameters. See `multiply_in`.
    products: torch.dtype | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        task: TaskDistribution,
        *,
        frozen: str | None = None,
        batch_norm: BatchNormPolicy = "transductive",
    ) -> None:
        super().__init__()
        if task.spec.kind not in self.kinds:
            raise IncompatibleKind(type(self).__name__, self.kinds, type(task).__name__, task.spec.kind)
        self.base_layer = base_layer = as_base_layer(base_layer)
        self.task = task
        self.regularisers = nn.ModuleDict()
        self.batch_norm = batch_norm
        self.check_policy(batch_norm)
        running = [name for name, norm in torch_norms(base_layer).items() if norm.track_running_stats]
        if running:  # accuracies collapse where evaluation uses the averages
            why = (
                "keeps running statistics, which mix tasks: give it track_running_stats=False, or use BatchStatistics; "
                "base_layer=pretrained keeps those of a network that is trained already"
            )
            raise InvalidValue("base_layer", running[0], why)
        if frozen is not None:
            for name in matching(frozen, dict(base_layer.named_parameters(remove_duplicate=False)), field="frozen"):
                base_layer.get_parameter(name).requires_grad_(False)

    def check_policy(self, batch_norm: str) -> None:
        """Refuses an unknown batch-norm policy, and one that the base layer cannot follow."""
        if batch_norm not in get_args(BatchNormPolicy):
            raise InvalidValue("batch_norm", batch_norm, f"must be one of {', '.join(get_args(BatchNormPolicy))}")
        if batch_norm == "support" and (norms := torch_norms(self.base_layer)):
            why = f"{next(iter(norms))} takes no mask: use BatchStatistics, or another policy"
            raise InvalidValue("batch_norm", batch_norm, why)

    def take_support_by(self, chunk: int | None) -> None:
        """Lets a support set larger than memory be adapted to in parts of so many examples; None: all at once.

        Results are those of the whole support set but for rounding: inner gradients are summed over the parts, and
        features are computed part by part. A backward pass computes each part anew. The memory is that of one part.

        Raises:
            InvalidValue: the algorithm needs all examples at once.
        """
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise InvalidValue("support_chunk", chunk, "must be at least 1, or null for all examples at once")
        if chunk is not None and self.base_layer.mixes_examples:
            why = f"{next(mixing_parts(self.base_layer))[0]} mixes examples, so it needs all of a support set"
            raise InvalidValue("support_chunk", chunk, f"{why}: use base_layer.norm=group, or a frozen network")
        self.support_chunk = chunk

    def multiply_in(self, precision: str) -> None:
        """Lets the base layer multiply in bfloat16 while it is trained (`bf16`), or in the type of its parameters.

        All else stays in float32: parameters, losses, inner steps, solvers, the meta-gradient and its optimizer.

        Raises:
            InvalidValue: no such precision, or the device has no bfloat16.
        """
        if precision not in ("float32", "bf16"):
            raise InvalidValue("precision", precision, "must be float32 or bf16")
        device = next(self.parameters(), torch.empty(0)).device
        if precision == "bf16" and not has_bf16(device):
            raise InvalidValue("precision", precision, f"this {device.type} does not compute in bfloat16: use float32")
        self.products = torch.bfloat16 if precision == "bf16" else None

    def in_parts(self, run: Callable[..., Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        """The outputs `[tasks, n, ...]` of `run(x, mask)`, `support_chunk` examples at a time."""
        size, n = self.support_chunk, x.shape[1]
        if size is None or n <= size:
            return run(x, mask)
        found = []
        for start in range(0, n, size):
            rows = slice(start, start + size)
            args = (x[:, rows], None if mask is None else mask[:, rows])
            graph = torch.is_grad_enabled()
            found.append(checkpoint(run, *args, use_reentrant=False) if graph else run(*args))
        return torch.cat(found, dim=1)

    @property
    def trained_inner_steps(self) -> int:
        """The inner steps that meta-training optimises for; validation selects weights after as many."""
        return self.test_inner_steps

    @abstractmethod
    def adapt(self, support: Examples) -> Adapted:
        """Each task's own model, from its support set; the module itself stays as it is."""

    @abstractmethod
    def predict(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions `[tasks, n, out_features]` for inputs `[tasks, n, *x_shape]`; `mask`: which count (None: all)."""

    def predict_distribution(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Predictive:
        """The predictive distribution, with the arguments of `predict`; with a variance if the algorithm states one."""
        return Predictive(self.predict(adapted, x, mask))

    def adapted_features(self, adapted: Adapted, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features `[tasks, n, d]` on which each task's head works, with the arguments of `predict`.

        Stacked parameters of a task's own stand in for the base layer's, as in `predict`.
        """
        return call_features(self, adapted if isinstance(adapted, Mapping) else {}, x, mask)

    def trajectory(self, support: Examples, steps: int) -> Iterator[Adapted]:
        """Each task's model after 0, 1, ..., `steps` inner steps; an algorithm without inner steps has one model."""
        yield self.adapt(support)

    def meta_loss(self, episode: Episode) -> tuple[Tensor, Metrics]:
        """The loss that the outer loop differentiates `[tasks]`, by default `minimised`, and the metrics it reports.

        An algorithm with a meta-gradient of its own returns a loss that has this gradient.
        """
        metrics = self.query_metrics(self.adapt(episode.support), episode)
        return metrics[self.minimised], metrics

    def regularise(self, regularisers: Mapping[str, Regulariser]) -> None:
        """Trains with regularisers, by name; they change the meta-loss in this order, the first one innermost."""
        for name, regulariser in regularisers.items():
            with part_of(f"regulariser.{name}"):
                regulariser.check(self.task)
                regulariser.attach(self)
        self.regularisers = nn.ModuleDict(regularisers)

    def before_step(self, episode: Episode, generator: torch.Generator) -> Episode:
        """The episode to train on, in place of the one that was drawn."""
        for regulariser in self.regularisers.values():
            episode = cast(Regulariser, regulariser).before_step(self, episode, generator)
        return episode

    def training_loss(self, episode: Episode) -> tuple[Tensor, Metrics]:
        """The meta-loss as regularisers change it `[tasks]`, and the metrics."""
        loss_of = self.meta_loss
        for regulariser in self.regularisers.values():
            loss_of = partial(cast(Regulariser, regulariser).meta_loss, self, loss_of=loss_of)
        return loss_of(episode)

    def query_metrics(self, adapted: Adapted, episode: Episode, batch_norm: BatchNormPolicy | None = None) -> Metrics:
        """The query loss and the task's metrics of adapted models, each `[tasks]`, named `query_...`."""
        found = self.query_distribution(adapted, episode, batch_norm or self.batch_norm)
        return self.metrics_of(adapted, found, episode.query)

    def metrics_of(self, adapted: Adapted, found: Predictive, query: Examples) -> Metrics:
        """The query loss and metrics of predictions for a query set; with `query_nll` if they have a variance."""
        scores = self.task.scores(found.prediction, query.y, query.mask)
        if found.variance is not None:
            nll = normal_nll(found.prediction, found.variance, query.y)
            scores = {**scores, "nll": masked_mean(nll, self.mask_or_none(query.mask))}
        return {**{f"query_{name}": value for name, value in scores.items()}, **self.diagnostics(adapted)}

    def diagnostics(self, adapted: Adapted) -> Metrics:
        """Metrics of adapting itself, per task `[tasks]`, such as a solver's residual."""
        return {}

    def predict_query(self, adapted: Adapted, episode: Episode, batch_norm: BatchNormPolicy) -> Tensor:
        """Predictions for the query set `[tasks, n, out_features]` under a policy."""

        def predict(x: Tensor, mask: Tensor | None) -> Predictive:
            return Predictive(self.predict(adapted, x, mask))

        return self.by_policy(predict, episode, batch_norm).prediction

    def query_distribution(self, adapted: Adapted, episode: Episode, batch_norm: BatchNormPolicy) -> Predictive:
        """The predictive distribution for the query set under a policy."""
        return self.by_policy(functools.partial(self.predict_distribution, adapted), episode, batch_norm)

    def by_policy(
        self, predict: Callable[[Tensor, Tensor | None], Predictive], episode: Episode, batch_norm: BatchNormPolicy
    ) -> Predictive:
        """What `predict` gives for the query set, beside the examples that a policy normalises queries by."""
        support, query = episode
        if batch_norm == "transductive" or not self.base_layer.mixes_examples:
            return predict(query.x, self.mask_or_none(query.mask))
        if batch_norm == "support":
            # Rows that a mask leaves out are normalised by those that it counts.
            mask = torch.cat([support.mask, torch.zeros_like(query.mask)], dim=1)
            return predict(torch.cat([support.x, query.x], dim=1), mask).rows(slice(support.x.shape[1], None))
        alone = []
        for row in range(query.x.shape[1]):
            x = torch.cat([support.x, query.x[:, row : row + 1]], dim=1)
            mask = torch.cat([support.mask, torch.ones_like(support.mask[:, :1])], dim=1)
            alone.append(predict(x, self.mask_or_none(mask)).rows(slice(-1, None)))
        return Predictive.joined(alone)

    def targets(self, examples: Examples) -> Tensor:
        """The targets of a fit, `[tasks, n, out_features]`: values, or one-hot classes; 0 in rows of padding."""
        y, spec = examples.y, self.task.spec
        if spec.kind != "regression":
            # Tokens are no numbers to compute with; parameters are.
            like = examples.x if examples.x.is_floating_point() else next(self.parameters(), torch.empty(0))
            y = F.one_hot(y, spec.out_features).to(like.dtype)
        return torch.where(examples.mask.unsqueeze(-1) > 0, y, torch.zeros_like(y))

    def mask_or_none(self, mask: Tensor) -> Tensor | None:
        """The mask, or None if the task promises that every example counts, which is cheaper."""
        return mask if self.task.spec.ragged else None

    def call_base_layer(self, params: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The base layer of each task, with stacked parameters in place of its own: `[tasks, n, out_features]`."""
        products = self.products if self.training else None
        return call_per_task(self.base_layer, params, x, mask, engine=self.engine, multiply_in=products)

    @property
    def batch_norm_policy(self) -> str:
        """The policy to record with a result: `none` where the base layer does not mix examples."""
        return self.batch_norm if self.base_layer.mixes_examples else "none"


def matching(pattern: str, names: Iterable[str], *, field: str, what: str = "parameter") -> list[str]:
    """The names that a regular expression finds; if it finds none, the error lists all names."""
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise InvalidValue(field, pattern, f"is not a regular expression: {error}") from None
    if not found:
        raise InvalidValue(field, pattern, f"matches no {what}; there are {', '.join(names)}")
    return found


def learned_names(pattern: str, module: nn.Module, *, field: str) -> list[str]:
    """The names of learned parameters that a regular expression finds; of a tied parameter, its first name."""
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    first = {id(p): name for name, p in learned.items()}
    every = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    found = {first[id(every[name])] for name in matching(pattern, every, field=field)}
    return [name for name in learned if name in found]


def torch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Torch's batch norms in a module that mix examples, by what messages call them."""
    norms = {name: part for name, part in mixing_parts(module) if isinstance(part, BATCH_NORMS)}
    return {f"{type(part).__name__} ({name})": part for name, part in norms.items()}


def require_features(base_layer: nn.Module, algorithm: str) -> None:
    """Refuses a plain module, which has no features of its own."""
    if not isinstance(base_layer, BaseLayer) or isinstance(base_layer, PlainLayer):
        raise UserError(f"{algorithm} works on features: base_layer must be a BaseLayer(features, head)")


def call_features(meta_layer: MetaLayer, params: Params, x: Tensor, mask: Tensor | None) -> Tensor:
    """The base layer's features `[tasks, n, d]`, with those of the stacked parameters that belong to them."""
    require_features(meta_layer.base_layer, type(meta_layer).__name__)
    network = BaseLayer(meta_layer.base_layer.features, nn.Identity())
    own = {name: p for name, p in params.items() if name.startswith("features.")}
    products = meta_layer.products if meta_layer.training else None
    run = partial(call_per_task, network, own, engine=meta_layer.engine, multiply_in=products)
    return meta_layer.in_parts(run, x, mask)
