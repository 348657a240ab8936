"""`mlframework-evaluate`: judges a run on held-out tasks, conventional learning beside it."""

from __future__ import annotations

from omegaconf import DictConfig

from mlframework.commands.command_line import command, job

__all__ = ["evaluate", "main"]


@job(settings={"run": str, "weights": str, "device": str}, required=("evaluation",))
def evaluate(config: DictConfig) -> None:
    """Evaluates the run in a folder, prints the table and writes `evaluation.json` beside the run's result."""
    from rich.console import Console

    from mlframework.run import evaluate_run
    from mlframework.run_folder import RunFolder
    from mlframework.tables import evaluation_table, quality_table

    folder = RunFolder(config.run, key="run")
    report = evaluate_run(folder, config.evaluation, weights=config.weights, device=config.device)
    folder.write_json(folder.path / "evaluation.json", {**report.to_json(), "weights": config.weights})
    Console().print(evaluation_table(report, folder.config().trainer.monitor))
    if report.quality is not None:
        Console().print(quality_table(report.quality))


main = command(evaluate, config_name="evaluate")

if __name__ == "__main__":
    main()
