"""The training loop of both models."""

from typing import Any

import torch

from xmlkernels.training.checks import check
from xmlkernels.training.config import Config
from xmlkernels.training.running import running


def train(config: Config) -> dict[str, Any]:
    """Run one configuration from data to metrics; returns what metrics.json holds.

    Raises:
        InputError: settings or data that cannot be used; told before any work.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    with running(config) as run:
        model = run.model.train()
        run.clock.start(
            "train"
        )  # evaluation and checkpoints count apart; waiting for data counts here
        while run.epoch < config.epochs:
            for batch in run.batches.epoch(run.epoch, start=run.position):
                need_loss = config.loss_every > 0 and model.steps % config.loss_every == 0
                loss = model.step(batch.to(run.device, non_blocking=True), need_loss=need_loss)
                run.position += 1
                run.collect(loss, batch)
                if model.steps % config.log_every == 0:
                    # here and in the next the loop waits for the device, nowhere else
                    run.log_progress()
                elif run.progress.due():
                    run.tell_progress()
                if config.save_every and model.steps % config.save_every == 0:
                    run.save()
                run.stop_if_asked()
            run.epoch, run.position = run.epoch + 1, 0
            best = False
            if run.validation is not None and (
                run.epoch % config.evaluate_every == 0 or run.epoch == config.epochs
            ):
                best = run.improved(run.validate())
            if best or config.save_every or run.epoch == config.epochs:
                run.save(best=best)
        return run.finish()
