"""`mlframework-evaluate`: evaluates a run and its baselines on held-out tasks."""

from __future__ import annotations

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
    own = folder.config().get("evaluation") or {}
    with open_dict(config.evaluation):
        for group in ("baseline", "measure"):  # those of the run, unless the user names others
            if own.get(group) and not any(o.startswith(f"evaluation/{group}=") for o in overrides):
                config.evaluation[group] = OmegaConf.merge(own[group], config.evaluation.get(group) or {})
    report = evaluate_run(folder, config.evaluation, weights=config.weights, device=config.device)
    show_report(report, folder.config().trainer.monitor)  # before it is written, which may fail
    path = folder.add_evaluation({**report.to_json(), "weights": config.weights, "overrides": overrides})
    print(f"written to {path}")


main = command(evaluate_command, config_name="evaluate")

if __name__ == "__main__":
    main()
