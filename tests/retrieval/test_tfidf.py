import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from pinclip.retrieval.spaces import nearest
from pinclip.retrieval.tfidf import tfidf_space

TEXTS = ["a red cat", "red cats", "blue whale", "the whale song", "", "!?", "red cat a"]
ALL = np.arange(len(TEXTS))


def scores(texts, usable=None):
    usable = np.ones(len(texts), bool) if usable is None else np.array(usable)
    index = np.arange(len(texts))
    return tfidf_space(texts, usable).score(index, index).numpy()


def test_is_the_mean_of_the_two_cosines():
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    letters = TfidfVectorizer(ngram_range=(3, 5), sublinear_tf=True, analyzer="char_wb")
    w, c = words.fit_transform(TEXTS).toarray(), letters.fit_transform(TEXTS).toarray()
    expected = (w @ w.T + c @ c.T)[:4, :4] / 2
    np.testing.assert_allclose(scores(TEXTS)[:4, :4], expected, atol=1e-6)


def test_like_texts_are_near():
    space = tfidf_space(TEXTS, np.ones(len(TEXTS), bool))
    found = nearest(space, np.array([0, 2]), ALL, 2, without_self=True)
    assert found[0].tolist() == [6, 1]
    assert found[1, 0] == 3


def test_who_has_a_vector():
    space = tfidf_space(TEXTS, np.array([True, True, True, False, True, True, True]))
    assert space.has_query.tolist() == [True, True, True, False, False, True, True]
    assert (space.has_corpus == space.has_query).all()


def test_a_bad_pin_does_not_count_among_the_documents():
    usable = [True, True, True, False]
    np.testing.assert_array_equal(
        scores(["red cat", "cat", "dog", "red red"], usable)[:3, :3],
        scores(["red cat", "cat", "dog", ""], usable)[:3, :3],
    )


def test_equal_texts_tie():
    result = scores(["one red cat", "a dog", "one red cat", "one red cat"])
    assert (result[:, 0] == result[:, 2]).all()
    assert (result[:, 0] == result[:, 3]).all()


@pytest.mark.parametrize("texts", [["", ""], [" ", "\n"]])
def test_no_text_at_all(texts):
    space = tfidf_space(texts, np.ones(2, bool))
    assert not space.has_query.any()
    assert space.score(np.arange(2), np.arange(2)).tolist() == [[0, 0], [0, 0]]


def test_texts_without_a_single_word_still_have_letters():
    space = tfidf_space(["???", "!!!", "???"], np.ones(3, bool))
    assert nearest(space, np.array([0]), np.arange(3), 1, without_self=True).tolist() == [[2]]
