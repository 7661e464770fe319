"""Train a classifier over all labels: `python train/run.py RECIPE [--key value …]`.

Writes into its output folder: config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/.
"""

import time
from typing import Any

import torch

from config import Config
from recipes import RECIPES
from report import command
from session import Session


def train(config: Config) -> dict[str, Any]:
    """Runs one configuration from data to metrics; returns what metrics.json holds."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Session(config)
    model = run.model.train()
    while run.epoch < config.epochs:
        for batch in run.batches.epoch(run.epoch, start=run.position):
            started = time.perf_counter()
            need_loss = config.loss_every > 0 and model.steps % config.loss_every == 0
            loss = model.step(batch.to(run.device, non_blocking=True), need_loss=need_loss)
            run.position += 1
            run.seconds["train"] += time.perf_counter() - started
            run.collect(loss, batch)
            if model.steps % config.log_every == 0:
                run.log_progress()  # the only place in the loop that waits for the device
            if config.save_every and model.steps % config.save_every == 0:
                run.save_last()
        run.epoch, run.position = run.epoch + 1, 0
        if run.validation is not None and (run.epoch % config.evaluate_every == 0 or run.epoch == config.epochs):
            metrics, _, _ = run.evaluate(run.validation, k=5)
            run.keep_if_best(metrics)
        run.save_last()
    return run.finish()


def main() -> None:
    from tyro.extras import overridable_config_cli

    train(overridable_config_cli(RECIPES, prog="train/run.py", description=__doc__))


if __name__ == "__main__":
    command(main)
