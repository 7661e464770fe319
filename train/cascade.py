"""A whole training script, its loop in sight: encoder layers score clusters, then few labels.

    python train/cascade.py DATASET TREE

gives, to the bit, the weights of `python train/run.py cascade-tiny --dataset DATASET --tree TREE`.
Read end_to_end.py first: here one table becomes one per level of a label tree, and each level
scores only what the level above has kept. Method: CascadeXML (NeurIPS 2022), sections 3 and 4.
"""

import sys

import torch

import xmlkernels as xk
from xmlkernels.data.inputs import TokenInputs
from xmlkernels.data.tokens import load_tokenizer
from xmlkernels.evaluation import evaluate_split
from xmlkernels.models.training import set_rates
from xmlkernels.nn.shortlist import count, select
from xmlkernels.tree.label_tree import arrangement

EPOCHS, BATCH, SEED = 8, 32, 0
TOPK, BOUND = (4, 24), 32  # clusters kept per level, and more for the true ones while training


def build(dataset: xk.Dataset, tree: xk.LabelTree) -> tuple[TokenInputs, xk.Cascade]:
    """Build how documents are read, and one table per level on the layers of a small encoder."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    encoder = xk.Encoder.tiny(tokenizer.vocab_size, seed=SEED, dropout=0.2)
    most = [tree.widest(r) for r in range(tree.levels - 1)]  # children of the widest cluster
    levels = {"layers": ((1,), (2,), (2,)), "topk": TOPK, "drops": 0.1}
    heads = xk.CascadeHeads(tree.sizes, most, encoder.width, **levels, dtype="bf16", seed=SEED)
    inputs = TokenInputs(dataset, tokenizer, dataset.max_length)
    return inputs, xk.Cascade(encoder, heads, tree)  # without settings of training: it predicts


def train(dataset: xk.Dataset, inputs: TokenInputs, model: xk.Cascade) -> None:
    """Train encoder and tables together; only children of kept clusters are ever touched."""
    tree, heads, encoder = model.tree, model.heads, model.encoder
    batches = inputs.batches(dataset.splits["train"], BATCH, seed=SEED, **arrangement(tree))
    steps = len(batches)
    rates = {"encoder_lr": 1e-3, "head_lr": 1e-2, "decay": 0.01}
    phases = {"total": EPOCHS * steps, "warmup": round(0.5 * steps), "cooldown": 3 * steps}
    settings = xk.CascadeTraining(**rates, **phases)
    for level in heads.levels:
        level.set_decay(settings.table_decay())
    optimizer = settings.make_optimizer(encoder, heads.projections)
    # Cluster c of a level has the children ptr[c] to ptr[c + 1] of the next; first the root.
    row_ptrs = [torch.tensor([0, tree.sizes[0]]), *(torch.tensor(ptr) for ptr in tree.children)]
    step = 0
    for epoch in range(EPOCHS):
        model.train()
        for batch in batches.epoch(epoch):
            encoder_lr, head_lr, beta1 = settings.rates(step)
            set_rates(optimizer, encoder_lr, head_lr, beta1)
            optimizer.zero_grad()
            how = {"lr": head_lr, "beta1": beta1, "dx_scale": 1.0, "need_loss": False}

            x = heads.features(encoder.layer_vectors(heads.layers, *batch.inputs))
            positives = [*batch.levels, (batch.pos_row, batch.pos_sample)]
            clusters, dx = torch.zeros(len(batch), 1, dtype=torch.int64), []
            for r, level in enumerate(heads.levels):
                ptr, most = row_ptrs[r], (tree.sizes[0], *heads.most)[r]
                scale = (1 / count(clusters, ptr).sum()).reshape(1)  # a mean over the candidates
                # The op cluster_step_: score the candidates and update their rows in place.
                gradient, scores, _ = level.step(
                    x[r].detach(), clusters, ptr, most, positives[r], scale=scale, **how
                )
                dx.append(gradient)
                if r < len(heads.topk):  # hand on the true clusters, then the best others
                    k = heads.topk[r]
                    kept = select(scores, clusters, ptr, k, width=k + BOUND, positives=positives[r])
                    clusters = kept.nodes
            torch.autograd.backward(x, dx)
            optimizer.step()
            step += 1
        evaluate(dataset, inputs, model, "val")


def evaluate(
    dataset: xk.Dataset, inputs: TokenInputs, model: xk.Cascade, name: str
) -> dict[str, float]:
    """Print the metrics of a split; `evaluate_split(…).levels` has those of the clusters."""
    split = dataset.splits[name]
    labels = evaluate_split(model, split, 5, batch_size=64, inputs=inputs).labels
    weights = xk.inverse_propensity(dataset.splits["train"].labels, *dataset.propensity)
    found = xk.evaluate(labels, split.labels, weights)
    print(name, *(f"{key} {found[key]:.2f}" for key in ("P@1", "P@3", "P@5", "PSP@5")), sep="  ")
    return found


if __name__ == "__main__":
    data = xk.Dataset.open(sys.argv[1])
    reading, trained = build(data, xk.LabelTree.load(sys.argv[2]))
    train(data, reading, trained)
    evaluate(data, reading, trained, "test")
