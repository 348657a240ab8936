"""`mlframework-train`: meta-trains, then evaluates."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

__all__ = ["main"]


def train(config: DictConfig) -> float:
    """One run; returns the monitored validation metric, for sweepers."""
    # Imported here, so that --help and completion do not wait for torch.
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from mlframework.run import train_run
    from mlframework.run_folder import RunFolder
    from mlframework.tables import evaluation_table

    hydra_config = HydraConfig.get()
    folder = RunFolder(hydra_config.runtime.output_dir)
    choices = {
        group: option for group, option in hydra_config.runtime.choices.items() if not group.startswith("hydra/")
    }
    result, report = train_run(config, folder, overrides=hydra_config.overrides.task, choices=choices)
    if report is not None:
        Console().print(evaluation_table(report, result["monitor"]))
    return result["validation"][result["monitor"]]["mean"]


main = hydra.main(version_base="1.3", config_path="pkg://mlframework.conf", config_name="train")(train)

if __name__ == "__main__":
    main()
