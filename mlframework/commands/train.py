"""`mlframework-train`: meta-trains, then evaluates."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

__all__ = ["main"]


def train(config: DictConfig) -> float | None:
    """One run, from its config to its validation metric."""
    # Imported here, so that --help and completion do not wait for torch.
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from mlframework import build, checkpoint
    from mlframework.run_folder import RunFolder
    from mlframework.trainer import Training

    hydra_config = HydraConfig.get()
    folder = RunFolder(hydra_config.runtime.output_dir)
    with folder.locked():
        torch.manual_seed(config.seed)
        task = build.build_task(config)
        device = build.build_device(config.device)
        meta_layer = build.build_meta_layer(config, task).to(device)
        outer = build.build_outer_loop(config, meta_layer)
        generator = torch.Generator().manual_seed(config.seed)
        training = Training(task, meta_layer, outer, generator, device, folder)
        progress = checkpoint.Progress()
        if config.resume:
            progress = checkpoint.restore(folder.last, meta_layer=meta_layer, outer=outer, generator=generator)
        else:
            folder.record(config, hydra_config.overrides.task)
        logger = instantiate(config.logger)(folder.path, start=progress.step)
        logger.text("config", f"```yaml\n{OmegaConf.to_yaml(config, resolve=True)}```")
        progress = instantiate(config.trainer).run(training, logger, progress)
        logger.close()
    return progress.best


main = hydra.main(version_base="1.3", config_path="pkg://mlframework.conf", config_name="train")(train)

if __name__ == "__main__":
    main()
