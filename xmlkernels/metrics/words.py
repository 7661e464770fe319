"""One sentence for each metric, to be printed beside it."""

_AT = {
    "P": "Of the {k} best predictions of a document, the share that is right; mean over documents.",
    "nDCG": "Hits among the {k} best, worth less at later places, over what a perfect order gains.",
    "PSP": "P@{k} with a hit weighed by how rare its label is, over what a perfect list gains.",
    "PSnDCG": "nDCG@{k} with a hit weighed by how rare its label is, over a perfect list's.",
    "PSR": "R@{k} with a hit weighed by how rare its label is, over a perfect list's.",
    "R": "Of a document's true labels, the share among the {k} best; mean over documents.",
    "RP": "Hits among the {k} best, over {k} or, if fewer, the true labels; mean over documents.",
    "sampleF1": "Harmonic mean of precision and recall of the {k} best; mean over documents.",
    "microF1": "F1 of all pairs of document and label together, {k} predictions per document.",
    "macroF1": "F1 of each label over the documents, {k} predictions each; mean over all labels.",
    "macroP": "Precision of each label over the documents, {k} predictions each; mean over labels.",
    "macroR": "Recall of each label over the documents, {k} predictions each; mean over labels.",
    "coverage": "Of the labels that the split has, the share predicted rightly among {k}.",
    "abandonment": "The share of documents without a single hit among the {k} best.",
}
_AT_1 = {
    "P": "The share of documents whose best prediction is right.",
    "nDCG": "The same as P@1: of one prediction there is no order.",
    "RP": "The same as P@1: a document has one true label or more.",
    "R": "Of a document's true labels, the share that its best prediction is; mean over documents.",
    "sampleF1": "Harmonic mean of precision and recall of one prediction; mean over documents.",
    "coverage": "Of the labels that the split has, the share that is rightly some best prediction.",
    "abandonment": "The share of documents whose best prediction is wrong.",
}
CUT = {
    "microP": "Of the labels given, the share that is right; all documents together.",
    "microR": "Of the true labels, the share that is given; all documents together.",
    "microF1": "Harmonic mean of microP and microR.",
    "sampleF1": "Harmonic mean of a document's precision and recall; mean over documents.",
    "labels": "Labels given per document.",
}
_OVER = {
    "doc avg": "mean over documents",
    "subj avg": "mean over all labels",
    "weighted subj avg": "mean over labels, weighed by their documents",
    "microavg": "all pairs of document and label together",
}
_WHAT = {
    "Precision": "Of the suggestions, the share that is right",
    "Recall": "Of the true labels, the share that is suggested",
    "F1 score": "Harmonic mean of precision and recall",
}
_ANNIF = {f"{what} ({over})": f"{_WHAT[what]}; {_OVER[over]}." for over in _OVER for what in _WHAT}
_ANNIF |= {
    "F1@5": "Harmonic mean of precision and recall of the first 5; mean over documents.",
    "NDCG": "Hits among the suggestions, worth less at later places, over a perfect order's.",
    "NDCG@5": "NDCG of the first 5 suggestions; 1 for a document without labels.",
    "NDCG@10": "NDCG of the first 10 suggestions; 1 for a document without labels.",
    "Precision@1": "Of the first suggestion, the share that is right; mean over documents.",
    "Precision@3": "Of the first 3 suggestions there are, the share that is right.",
    "Precision@5": "Of the first 5 suggestions there are, the share that is right.",
    "True positives": "Suggestions that are right, counted over all documents.",
    "False positives": "Suggestions that are wrong, counted over all documents.",
    "False negatives": "True labels that were not suggested, counted over all documents.",
}


def sentence_of(name: str) -> str:
    """Return what a metric says, in one sentence.

    Args:
        name: as metrics are named here (`P@5`, `macroF1@3`; `microF1` of answers of any length), or
            by Annif.

    Raises:
        KeyError: no metric has this name.
    """
    if name in _ANNIF:
        return _ANNIF[name]
    kind, _, k = name.partition("@")
    if not k:
        return CUT[kind]
    if k == "1":
        return _AT_1.get(kind, _AT[kind].format(k=k).replace("1 predictions", "1 prediction"))
    return _AT[kind].format(k=k)


def by_annif(name: str) -> bool:
    """Return whether a metric is one of Annif's: a fraction or a count, not percent."""
    return name in _ANNIF
