"""A whole training script, its loop in sight: all labels are scored and trained in every step.

    python train/end_to_end.py [DATASET]

gives, to the bit, the weights and metrics of `python train/run.py tiny`. Start reading here: an
encoder, a label table, and the four lines that train both. What run.py adds is around the loop:
checkpoints, resuming, logs, several processes. Method: Renee (MLSys 2023), section 3.
"""

import copy
import sys

import numpy as np
import torch

import xmlkernels as xk
from xmlkernels.data.inputs import TokenInputs
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.evaluation import evaluation_batches
from xmlkernels.optim import encoder_optimizer, warmup_cosine
from xmlkernels.training.inputs import open_dataset

EPOCHS, BATCH, WARMUP, SEED = 2, 32, 10, 0
ENCODER_LR, TABLE_LR = 1e-3, 0.02  # the loss is a sum over the batch, so TABLE_LR belongs to BATCH


def build(dataset: xk.Dataset) -> tuple[TokenInputs, xk.EndToEnd]:
    """Build how documents are read, and a small random encoder under an empty label table."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    encoder = xk.Encoder.tiny(tokenizer.vocab_size, seed=SEED, dropout=0.2)
    rows = xk.RowOptimizer("sgd", momentum=0.9, decay=1e-4)
    head = xk.FullHead(dataset.num_labels, encoder.width, dtype="bf16", optimizer=rows, seed=SEED)
    inputs = TokenInputs(dataset, tokenizer, dataset.max_length)
    return inputs, xk.EndToEnd(encoder, head)  # without settings of training: it predicts


def train(dataset: xk.Dataset, inputs: TokenInputs, model: xk.EndToEnd) -> None:
    """Train encoder and table together; the logits and the table's gradient are never held."""
    encoder, head = model.encoder, model.head
    optimizer = encoder_optimizer(encoder, ENCODER_LR, weight_decay=0.01)
    batches = inputs.batches(dataset.splits["train"], BATCH, seed=SEED)
    total, step, best = EPOCHS * len(batches), 0, {"P@1": -1.0}
    for epoch in range(EPOCHS):
        model.train()
        for batch in batches.epoch(epoch):
            factor = warmup_cosine(step, WARMUP, total)
            for group in optimizer.param_groups:
                group["lr"] = ENCODER_LR * factor
            optimizer.zero_grad()

            x = encoder(*batch.inputs)  # fp32 [B, D]
            # The op bce_step_: logits, loss and gradients tile by tile; the table moves in place.
            dx, loss = head.step(
                x.detach(),
                batch.pos_row,
                batch.pos_sample,
                lr=TABLE_LR * factor,
                need_loss=step % 10 == 0,
            )
            x.backward(dx)
            optimizer.step()

            if loss.numel():
                print(f"step {step:4d} of {total}  loss {float(loss) / len(batch):.3f}")
            step += 1
        found = evaluate(dataset, inputs, model, "val")
        if found["P@1"] > best["P@1"]:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def evaluate(
    dataset: xk.Dataset, inputs: TokenInputs, model: xk.EndToEnd, name: str
) -> dict[str, float]:
    """Score all labels for every document (the op matmul_topk), and print the metrics."""
    split = dataset.splits[name]
    best = np.empty((len(split), 5), np.int64)
    with torch.no_grad():
        for batch, exclude in evaluation_batches(model, split, 256, inputs):
            _, labels = model.head.topk(model.encoder(*batch.inputs), 5, exclude)
            best[batch.index] = labels.numpy()
    weights = xk.inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    found = xk.evaluate(best, split.labels, weights)
    print(name, *(f"{key} {found[key]:.2f}" for key in ("P@1", "P@3", "P@5", "PSP@5")), sep="  ")
    return found


if __name__ == "__main__":
    data = xk.Dataset.open(sys.argv[1]) if sys.argv[1:] else open_dataset(xk.RECIPES["tiny"].config)
    reading, trained = build(data)
    train(data, reading, trained)
    evaluate(data, reading, trained, "test")
