"""Texts and labels in Python lists → a model → labels for new texts."""

import logging
import sys

import products

import xmlkernels as xk


def main(folder: str = "runs/examples") -> list[list[xk.Label]]:
    """Train on 2,000 titles, and label two new ones."""
    xk.Dataset.from_texts(
        f"{folder}/products", train=products.make(2000), test=products.make(200, seed=1)
    )
    recipe = xk.RECIPES["bow"]  # the recipe without a transformer: seconds instead of minutes
    config = recipe.replace(
        dataset=f"{folder}/products", output=f"{folder}/bow", overwrite=True, epochs=12
    )
    report = xk.train(config)
    print(f"P@1 {report['test']['P@1']:.1f}, P@3 {report['test']['P@3']:.1f} of 100 on new titles")

    texts = ["folding bamboo stool", "a classic marble clock, bright"]
    found = list(xk.load(f"{folder}/bow").predict(texts, k=3))
    for text, labels in zip(texts, found, strict=True):
        print(text, "→", ", ".join(f"{label.name} ({label.probability:.2f})" for label in labels))
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows the progress
    main(*sys.argv[1:2])
