"""The label table under an encoder of your own, in a plain PyTorch loop.

`FullHead.step` scores all labels and trains their table in place; it returns the gradient of the
embeddings, and your encoder's backward goes on from there. Neither the logits nor the gradient of
the table are ever held, so that a million labels fit where a `torch.nn.Linear` does not.
"""

import sys

import products
import torch
from torch import nn

import xmlkernels as xk


class Words(nn.Module):
    """Any module that gives [B, D] will do: here a mean of word vectors and two layers."""

    def __init__(self, vocabulary: dict[str, int], width: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.vectors = nn.EmbeddingBag(len(vocabulary), width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, texts: list[str]) -> torch.Tensor:
        """Turn texts into embeddings [B, D]."""
        words = [[self.vocabulary[word] for word in text.split()] for text in texts]
        starts = torch.tensor([0, *map(len, words[:-1])]).cumsum(0)
        flat = torch.tensor([word for text in words for word in text])
        return self.layers(self.vectors(flat, starts))


def main(folder: str = "") -> float:
    """Train for ten epochs; return the share of new titles whose three labels are all found."""
    torch.manual_seed(0)
    (texts, lists), (new_texts, new_lists) = products.make(2000), products.make(200, seed=1)
    names = sorted({name for labels in lists for name in labels})
    ids = {name: number for number, name in enumerate(names)}
    vocabulary = {word: number for number, word in enumerate(sorted(set(" ".join(texts).split())))}
    encoder = Words(vocabulary, 32)
    head = xk.FullHead(len(names), 32, dtype="bf16", optimizer="adam", bias=True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)

    for epoch in range(10):
        total = 0.0
        for start in range(0, len(texts), 64):
            lists_here = lists[start : start + 64]
            # The positives as pairs (label, document in the batch), sorted by label.
            pairs = sorted((ids[n], at) for at, labels in enumerate(lists_here) for n in labels)
            row, sample = torch.tensor(pairs).T.contiguous()
            x = encoder(texts[start : start + 64])
            dx, loss = head.step(x.detach(), row, sample.int(), lr=0.01, need_loss=True)
            optimizer.zero_grad()
            x.backward(dx / 64)
            optimizer.step()
            total += float(loss)
        print(f"epoch {epoch + 1}: loss {total / len(texts):.3f} per document")

    with torch.no_grad():
        _, best = head.topk(encoder(new_texts), 3)  # exact, over all labels
    answers = zip(best, new_lists, strict=True)
    hits = [{names[i] for i in row.tolist()} == set(own) for row, own in answers]
    print(f"all three labels of {sum(hits)} of {len(hits)} new titles")
    return sum(hits) / len(hits)


if __name__ == "__main__":
    main(*sys.argv[1:2])
