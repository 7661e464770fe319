"""A cascade: clusters of labels first, then only the labels of the clusters that were kept."""

import logging
import sys

import products

import xmlkernels as xk


def main(folder: str = "runs/examples") -> dict[str, object]:
    """Build a label tree, train on it, and see what each level of clusters keeps.

    The encoder is a tiny random one, so that this takes seconds. For work take "minilm" or any
    Hugging Face model, and its tokenizer.
    """
    data = xk.Dataset.from_texts(
        f"{folder}/tokens",
        train=products.make(2000),
        test=products.make(200, seed=1),
        tokenizer="minilm",
        max_length=16,
    )
    dataset = str(data.folder)
    xk.build_tree(
        xk.TreeConfig(dataset, f"{folder}/clusters", depths=(1, 3), plot=False, overwrite=True)
    )
    tiny = xk.RECIPES["cascade-tiny"].replace(
        dataset=dataset,
        tree=f"{folder}/clusters",
        topk=(2, 6),
        output=f"{folder}/cascade",
        overwrite=True,
        epochs=4,
        encoder_lr=3e-3,
    )
    report = xk.train(tiny)["test"]
    for level in report["levels"]:
        kept, clusters = level["kept"], level["clusters"]
        print(f"{kept:.1f} of {clusters} clusters keep {level['shortlist_recall']:.1f}% of labels")
    print(f"P@3 {report['P@3']:.1f} of 100 on new titles")

    model = xk.load(f"{folder}/cascade").model
    rows, labels = model.labels_under(0)  # which labels each of the coarse clusters holds
    print(f"cluster 0 holds labels {labels[rows[0] : rows[1]].tolist()}")
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*sys.argv[1:2])
