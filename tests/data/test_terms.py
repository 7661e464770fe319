"""Words of any script, against what scikit-learn splits where both should agree, and what a model
learns of texts without spaces.
"""

import random
import unicodedata

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from xmlkernels.data.vectorizer import Vectorizer
from xmlkernels.ranker.knn import KNNBaseline
from xmlkernels.terms import Terms, count_words, has_spaces
from xmlkernels.tree.features import TextFeatures


@pytest.mark.parametrize(
    ("text", "longest", "terms"),
    [
        ("Vitamin C, an_x2", 1, ["vitamin", "c", "an_x2"]),
        ("boil an egg", 3, ["boil", "an", "egg", "boil an", "an egg", "boil an egg"]),
        ("हिन्दी भाषा", 1, ["हिन्दी", "भाषा"]),  # vowel signs are no letters
        ("Über Straße", 1, ["über", "straße"]),
        ("cafe\u0301 caf\u00e9", 1, ["caf\u00e9"] * 2),
        ("ｆｕｌｌ ﬁne", 1, ["full", "fine"]),
        ("我爱北京", 1, ["我", "爱", "北", "京", "我爱", "爱北", "北京"]),
        ("京都", 2, ["京", "都", "京都"]),
        ("Tokyo東京 rain", 2, ["tokyo", "東", "京", "東京", "rain"]),  # no phrase across a run
        ("ภาษา", 1, ["ภา", "าษ", "ษา", "ภาษ", "าษา"]),
        ("한국어 문서", 1, ["한국어", "문서"]),
        ("ไ", 1, ["ไ"]),
        ("…!", 1, []),
        ("", 2, []),
    ],
)
def test_terms(text: str, longest: int, terms: list[str]) -> None:
    assert Terms(longest)(text) == terms


def test_snake_case_is_one_word_or_two() -> None:
    assert Terms()("read_file x") == ["read_file", "x"]
    assert Terms(2, underscores=False)("read_file") == ["read", "file", "read file"]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_latin_texts_are_split_as_by_scikit_learn(longest: int) -> None:
    letters = "abcdeäéßøž _-.,'\"123\n\t"
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=200)) for _ in range(50)]
    texts = [unicodedata.normalize("NFKC", text) for text in texts]
    theirs = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, longest))
    analyse = theirs.build_analyzer()
    assert [sorted(Terms(longest)(text)) for text in texts] == [sorted(analyse(x)) for x in texts]


def test_words_are_counted() -> None:
    assert count_words("boil an egg") == 3
    assert count_words("Tokyo東京 rain, हिन्दी") == 5
    assert count_words("  ") == count_words("") == 0
    assert has_spaces("egg हिन्दी") and not has_spaces("京")


def unspaced(documents: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of ideographs: a word of two, which says the label, among ten characters."""
    draw = random.Random(seed)
    characters = [chr(0x4E00 + n) for n in range(60)]
    words = [characters[n] + characters[-n - 1] for n in range(8)]
    texts, labels = [], []
    for _ in range(documents):
        label = draw.randrange(8)
        noise = draw.choices(characters[8:-8], k=10)
        noise.insert(draw.randrange(11), words[label])
        texts.append("".join(noise))
        labels.append(label)
    return texts, np.array(labels)


def test_texts_without_spaces_can_be_learnt() -> None:
    (train, own), (test, other) = unspaced(200, 0), unspaced(50, 1)
    found = Vectorizer(longest=1)
    features = found.fit(train)
    targets = np.eye(8)[own]
    right = (found.transform(test) @ (features.T @ targets)).argmax(1) == other
    assert right.mean() > 0.95
    near = KNNBaseline(train, csr_matrix(targets)).nearest(test, 1)[1][:, 0]
    assert (own[near] == other).mean() > 0.6  # of 8 labels
    assert TextFeatures(train).documents.shape[1] > 100
