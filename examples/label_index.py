"""Label vectors out of a trained model, for an index of nearest neighbours.

A model without biases scores a label by the inner product of its row with the document's embedding.
Any index of maximum inner products can therefore serve it; this one is a matrix product.
"""

import logging
import sys

import numpy as np
import products
import torch

import xmlkernels as xk


def main(folder: str = "runs/examples") -> bool:
    """Compare the index with the model's own exact search."""
    data = xk.Dataset.from_texts(
        f"{folder}/products", train=products.make(2000), test=products.make(200, seed=1)
    )
    plain = {"bias": False, "frequency_bias": False, "centroid_norm": 0.0, "epochs": 6}
    xk.train(
        xk.RECIPES["bow"].replace(
            dataset=str(data.folder), output=f"{folder}/unbiased", overwrite=True, **plain
        )
    )
    predictor = xk.load(f"{folder}/unbiased")
    vectors = predictor.model.label_rows(0, predictor.model.labels).numpy()  # fp32 [L, D]
    np.save(f"{folder}/label_vectors.npy", vectors)  # `xmlkernels export` does this and more

    texts = ["folding bamboo stool", "bright glass lamp"]
    (batch,) = predictor.inputs.text_batches(texts, 2)
    with torch.no_grad():
        queries = predictor.model.embed(batch).numpy()
    best = np.argsort(-queries @ vectors.T, axis=1)[:, :3]
    found = [[data.label_names[label] for label in row] for row in best]
    exact = [[label.name for label in labels] for labels in predictor.predict(texts, k=3)]
    for text, names in zip(texts, found, strict=True):
        print(text, "→", ", ".join(names))
    return found == exact


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:2])
