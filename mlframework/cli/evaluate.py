"""`mlframework-evaluate`: evaluates a run and its baselines on held-out tasks, its own or others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework import processes
from mlframework.cli.command_line import as_override, command, job, report as report_error
from mlframework.errors import UserError

if TYPE_CHECKING:  # --help does without them
    from mlframework.evaluation.report import Report
    from mlframework.runs.run_folder import RunFolder

__all__ = ["evaluate_command"]

#: An override of the task, or of a group of its parts.
OF_TASK = re.compile(r"\+{0,2}task([./][\w./]+)?=")


@job(
    settings={"run": str, "weights": str, "device": str, "asked": list[str]},
    required=("evaluation",),
    others=("task",),
)
def evaluate_command(config: DictConfig) -> None:
    """Evaluates the run in a folder on each combination of task settings, and prints and writes what it finds."""
    from mlframework.runs.asked import combinations
    from mlframework.runs.evaluated import Evaluated, show_combinations
    from mlframework.runs.run_folder import RunFolder

    folder, found, failed = RunFolder(config.run, key="run"), [], 0
    with open_dict(config):
        add_parts_of_run(config.evaluation, folder)
    processes.agreed(folder.check_writable)
    asked = combinations(config.asked)
    for typed in asked:
        try:
            report, path = evaluate_on(config, folder, typed)
        except Exception as error:
            if len(asked) == 1:
                raise
            named = isinstance(error, UserError)  # its line has the override
            failed = report_error(error, config, prefix="" if named else f"{' '.join(typed)}: ").exit_code
        else:
            found.append(Evaluated(typed, report, path))
    if len(asked) > 1 and found and processes.leads():
        print(f"written to {show_combinations(found, folder.config().trainer.monitor)}")
    if failed:
        raise SystemExit(failed)


def add_parts_of_run(evaluation: DictConfig, folder: RunFolder) -> None:
    """Adds the baselines and measures of the run, unless the user names others."""
    own, typed = folder.config().get("evaluation") or {}, HydraConfig.get().overrides.task
    for group in ("baseline", "measure"):
        if own.get(group) and not any(o.startswith(f"evaluation/{group}=") for o in typed):
            evaluation[group] = OmegaConf.merge(own[group], evaluation.get(group) or {})


def evaluate_on(config: DictConfig, folder: RunFolder, typed: Sequence[str]) -> tuple[Report, Any]:
    """Evaluates on the run's own tasks, or on those of some overrides; the report, and the file it is written to."""
    from mlframework.runs.asked import Asked, asked_task
    from mlframework.runs.run import check_importable, evaluate_run, find_data
    from mlframework.runs.tables import show_report

    own, asked = folder.config(), None
    check_importable(own, folder.trained_in())
    find_data(own, folder.trained_in())  # before paths that are typed here, which lead from here
    if typed:
        asked = Asked(asked_task(own, folder.choices().get("task"), typed), " ".join(typed))
    with open_dict(config):
        config.task = own.task if asked is None else asked.task  # by which errors find their key
    report = evaluate_run(folder, config.evaluation, weights=config.weights, device=config.device, asked=asked)
    if typed:
        print(" ".join(typed))
    show_report(report, own.trainer.monitor)  # before it is written, which may fail
    others = [override for override in HydraConfig.get().overrides.task if not override.startswith("asked=")]
    content = {**report.to_json(), "weights": config.weights, "overrides": [*others, *typed]}
    content |= {"task_config": OmegaConf.to_container(config.task, resolve=True)}
    name = "_".join(each.lstrip("+").removeprefix("task.") for each in typed)
    path = processes.agreed(lambda: folder.add_evaluation(content, asked=name))
    print(f"written to {path}")
    return report, path


def with_asked(arguments: Sequence[str]) -> list[str]:
    """The overrides of the task as one list, `asked`: only the run knows which settings its task has.

    Several values of one, `task.k_shot=1,5`, are several evaluations in one process, with -m or without.
    """
    asked = [each for each in arguments if OF_TASK.match(each)]
    others = [each for each in arguments if not OF_TASK.match(each)]
    if not asked:
        return others
    if not any(override and override.is_sweep_override() for override in map(as_override, others)):
        others = [each for each in others if each not in ("-m", "--multirun")]
    texts = ",".join(map(quoted, asked))
    # In the place of the first one: behind a flag that follows other overrides Hydra takes none.
    place = len([each for each in arguments[: arguments.index(asked[0])] if each in others])
    return [*others[:place], f"asked=[{texts}]", *others[place:]]


def quoted(text: str) -> str:
    """A text between quotes that is read as it stands; its interpolations are those of the task, not of this config."""
    # OmegaConf reads backslashes before an interpolation, and only there.
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(plain, Quote.single).with_quotes()


main = command(evaluate_command, config_name="evaluate", rewrite=with_asked, ranks=True)

if __name__ == "__main__":
    main()
