"""The recipe for small data and laptops: a label tree, and a linear classifier per label on it."""

import logging
import sys

import products

import xmlkernels as xk


def main(folder: str = "runs/examples") -> dict[str, float]:
    """Build the tree, train the classifiers, ask them; then rank a bag of words' shortlists."""
    data = xk.Dataset.from_texts(
        f"{folder}/split",
        train=products.make(2000),
        test=products.make(200, seed=1),
        validation=products.make(200, seed=2),
    )
    dataset = str(data.folder)
    xk.build_tree(xk.TreeConfig(dataset, f"{folder}/tree", depths=(3,), plot=False, overwrite=True))
    tree = xk.RankerConfig(dataset, f"{folder}/on-tree", tree=f"{folder}/tree", beam=4)
    found = {"label tree + ranker": xk.train_ranker(tree)["test"]["both"]["P@3"]}
    for labels in xk.load(f"{folder}/on-tree").predict(["folding bamboo stool"], k=3):
        print([label.name for label in labels])

    # The same ranker on the shortlists and embeddings of a trained model; both scores are mixed.
    xk.train(
        xk.RECIPES["bow"].replace(
            dataset=dataset, output=f"{folder}/split-bow", overwrite=True, epochs=6
        )
    )
    model = xk.RankerConfig(dataset, f"{folder}/on-model", checkpoint=f"{folder}/split-bow")
    report = xk.train_ranker(model)["test"]
    found |= {"bag of words": report["plain model"]["P@3"], "+ ranker": report["both"]["P@3"]}
    for name, value in found.items():
        print(f"{name}: P@3 {value:.1f} of 100 on new titles")
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:2])
