"""Train a classifier over all labels: `python train/run.py RECIPE [--key value …]`.

On N GPUs of a machine: `torchrun --nproc-per-node N train/run.py RECIPE …`; each encodes its part of every batch.
Writes into its output folder: config.json, log.jsonl, metrics.json, predictions.npz and checkpoint/.

SIGINT, SIGTERM and SIGHUP end a run after the step, with a checkpoint to go on from by --resume; a second one ends it at once.
"""

if __name__ == "__main__":  # before torch is loaded
    import waiting

    waiting.choose()

import sys
from typing import Any

import torch

from arguments import parse_named
from checks import check
from config import Config, resolved_device
from recipes import RECIPES
from report import command, python, say
from running import running
from xmlkernels import dist


def train(config: Config) -> dict[str, Any]:
    """Runs one configuration from data to metrics; returns what metrics.json holds."""
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    with running(config) as run:
        model = run.model.train()
        run.clock.start("train")  # evaluation and checkpoints count apart; waiting for data counts here
        while run.epoch < config.epochs:
            for batch in run.batches.epoch(run.epoch, start=run.position):
                need_loss = config.loss_every > 0 and model.steps % config.loss_every == 0
                loss = model.step(batch.to(run.device, non_blocking=True), need_loss=need_loss)
                run.position += 1
                run.collect(loss, batch)
                if model.steps % config.log_every == 0:
                    run.log_progress()  # here and in the next the loop waits for the device, nowhere else
                elif run.progress.due():
                    run.tell_progress()
                if config.save_every and model.steps % config.save_every == 0:
                    run.save()
                run.stop_if_asked()
            run.epoch, run.position = run.epoch + 1, 0
            best = False
            if run.validation is not None and (run.epoch % config.evaluate_every == 0 or run.epoch == config.epochs):
                best = run.improved(run.validate())
            if best or config.save_every or run.epoch == config.epochs:
                run.save(best=best)
        return run.finish()


def main() -> None:
    config = parse_named(RECIPES, "recipe", "train/run.py", __doc__ or "")
    check(config, given={word[2:].split("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")})
    dist.start(resolved_device(config.device), config.timeout)
    train(config)
    say(f'ask it: {python()} train/predict.py --checkpoint {config.output} --text "…"   (--input FILE for many texts)')
    dist.wait()  # the first process may still be writing, and torchrun takes a lost one for a failure


if __name__ == "__main__":
    command(main, several=True)
