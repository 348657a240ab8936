"""`mlframework-evaluate`: evaluates a run and its baselines on held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from mlframework.cli.command_line import command, job

__all__ = ["evaluate_command"]


@job(settings={"run": str, "weights": str, "device": str}, required=("evaluation",))
def evaluate_command(config: DictConfig) -> None:
    """Evaluates the run in a folder, prints the table, and writes the evaluation to a file of its own in the folder."""
    from mlframework.runs.run import evaluate_run
    from mlframework.runs.run_folder import RunFolder
    from mlframework.runs.tables import show_report

    folder, overrides = RunFolder(config.run, key="run"), list(HydraConfig.get().overrides.task)
    evaluation = with_own(config.evaluation, folder.config().get("evaluation"), overrides)
    report = evaluate_run(folder, evaluation, weights=config.weights, device=config.device)
    show_report(report, folder.config().trainer.monitor)  # before it is written, which may fail
    path = folder.add_evaluation({**report.to_json(), "weights": config.weights, "overrides": overrides})
    print(f"written to {path}")


def with_own(evaluation: DictConfig, own: DictConfig | None, overrides: Sequence[str]) -> DictConfig:
    """The evaluation with the baselines and measures of the run, unless the user names others.

    Args:
        evaluation: as it was composed.
        own: the evaluation in the config of the run.
        overrides: typed by the user.
    """
    with open_dict(evaluation):
        for group in ("baseline", "measure"):
            if own and own.get(group) and not any(o.startswith(f"evaluation/{group}=") for o in overrides):
                evaluation[group] = OmegaConf.merge(own[group], evaluation.get(group) or {})
    return evaluation


main = command(evaluate_command, config_name="evaluate")

if __name__ == "__main__":
    main()
