"""The conventional methods of a comparison, by the names that users type: `against=[scratch,knn]`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from mlframework.errors import InvalidValue, UserError, nearest
from mlframework.evaluation.part import Baseline
from mlframework.runs.check_config import is_part
from mlframework.tasks.task_distribution import TaskDistribution

__all__ = ["add_contenders", "without_misfits"]

log = logging.getLogger(__name__)

#: Where the options of contenders lie: they are the baselines of an evaluation.
GROUP = "evaluation/baseline"

#: Short names of options.
SHORT = {
    "scratch": "from_scratch",
    "knn": "nearest_neighbours",
    "gbdt": "gradient_boosting",
    "svm": "support_vectors",
}

#: The contenders of `against=null`, as far as they suit the task.
USUAL = ("scratch", "finetune", "linear_probe", "knn", "gbdt", "random_forest", "svm", "in_context")


def add_contenders(evaluation: DictConfig, against: Sequence[str] | None) -> None:
    """Puts the named contenders, with the settings that the user typed, in place of an evaluation's baselines.

    None: the usual ones and the baselines that are there already, which the task's yaml names.

    Raises:
        InvalidValue: there is no such contender, or it is named twice.
    """
    there = evaluation.get("baseline") or OmegaConf.create({})
    names = [SHORT.get(name, name) for name in (USUAL if against is None else against)]
    options = GlobalHydra.instance().config_loader().get_group_options(GROUP, ObjectType.CONFIG)
    if against is not None:
        known = [*(name for name in options if name not in SHORT.values()), *SHORT]
        for given, name in zip(against, names, strict=True):
            if name not in options:
                why = f"no such contender{nearest(given, known)}; there are {', '.join(sorted(known))}"
                raise InvalidValue("against", given, why)
            if names.count(name) > 1:
                raise InvalidValue("against", given, "is named twice")
    parts: list[DictConfig] = [composed(name) for name in names]
    own = [str(key) for key, part in there.items() if is_part(part) and against is None]
    chosen = {str(key) for part in parts for key in part}
    settings = [key for key in map(str, there) if key in chosen or key in own]
    OmegaConf.set_struct(evaluation, False)
    evaluation.baseline = OmegaConf.merge(OmegaConf.create({}), *parts, OmegaConf.masked_copy(there, settings))


def composed(name: str) -> DictConfig:
    """The baselines that an option of the group defines, by their keys."""
    found = compose(f"{GROUP}/{name}")
    OmegaConf.set_struct(found, False)  # so that others can be merged
    for part in GROUP.split("/"):
        found = found.get(part, found)
    return found


def without_misfits(
    baselines: Mapping[str, Baseline], task: TaskDistribution, *, key: str, named: bool = False
) -> dict[str, Baseline]:
    """The baselines that suit a task, with a line under the setting `key` for each other one.

    Where the user has `named` them, one that does not suit is refused.
    """
    found = {}
    for name, baseline in baselines.items():
        try:
            baseline.check(task)
        except UserError as error:
            if named:
                raise UserError(f"{key}: {name} {error}") from error
            log.info("%s: %s is left out: it %s", key, name, error)
            continue
        found[name] = baseline
    return found
