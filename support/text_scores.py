"""How similar two texts are: the word error rate and ROUGE, equal to jiwer's and to Google's rouge_score."""

import re
import unicodedata
from collections import Counter

from support import parsing


def edit_distance(a, b, substitution=1):
    """Least cost of the edits that turn list a into list b: an insertion or a deletion costs 1 (Levenshtein)."""
    # row[j]: the distance of the words of a so far from the first j words of b
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new_row = [i]
        for j, y in enumerate(b, 1):
            replaced = row[j - 1] if x == y else row[j - 1] + substitution
            new_row.append(min(row[j] + 1, new_row[j - 1] + 1, replaced))
        row = new_row
    return row[-1]


def word_error_rate(reference, hypothesis):
    """Edits per word of the reference, at least 0, as in jiwer 4.0. For an empty reference, the number of edits."""
    return edit_distance(reference, hypothesis) / max(len(reference), 1)


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_words(text):
    """Words for ROUGE: runs of letters, marks and digits; in a script without spaces each character is a word.

    For ASCII text these are the words of Google's rouge_score without stemming (the released code stems).

    >>> rouge_words("The cat's 2 mats"), rouge_words("naïve 猫が")
    (['the', 'cat', 's', '2', 'mats'], ['naïve', '猫', 'が'])
    """
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text.lower())
    pieces = []
    for character in parsing.normalized("NFKC", text).lower():
        kind = unicodedata.category(character)
        if kind[0] not in "LMN" and kind != "Cf":
            pieces.append(" ")
        elif SPACELESS.match(character):
            pieces.append(f" {character} ")
        elif kind != "Cf":
            # Cf: invisible characters such as joiners
            pieces.append(character)
    return "".join(pieces).split()


def require_words(text):
    """The text, if ROUGE can read a word in it. Else raises ValueError."""
    if not rouge_words(parsing.without_latex(text)):
        raise ValueError(f"no word that ROUGE can read (letters, digits) in {text[:80]!r}")
    return text


def f1(overlap, n_reference, n_hypothesis):
    """Harmonic mean of overlap / n_reference and overlap / n_hypothesis; 0 for empty texts."""
    return 2 * overlap / max(1, n_reference + n_hypothesis)


def n_grams(text, n):
    """Counter of the runs of n >= 1 words."""
    words = rouge_words(text)
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def rouge_n(reference, hypothesis, n):
    """F1 of the n-grams of two texts, in [0, 1]; as in rouge_score."""
    a = n_grams(reference, n)
    b = n_grams(hypothesis, n)
    return f1((a & b).total(), a.total(), b.total())


def rouge_l(reference, hypothesis):
    """F1 of the longest common subsequence of words, in [0, 1]; as in rouge_score."""
    a = rouge_words(reference)
    b = rouge_words(hypothesis)
    # without substitutions, exactly the words outside of the common subsequence are deleted and inserted
    n_edits = edit_distance(a, b, substitution=2)
    return f1((len(a) + len(b) - n_edits) // 2, len(a), len(b))
