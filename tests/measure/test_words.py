import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeglasses.measure.words import Words, contains_word, normalised, word_count

LAW = settings(deadline=None, max_examples=50)

WORDS = st.text(alphabet="abcdefgäñдж0", min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("What a STUPID cat", "stupid", True),
        ("stupidity", "stupid", False),
        ("xstupid", "stupid", False),
        ("stupid7", "stupid", False),
        ("(stupid)", "stupid", True),
        ("_stupid_", "stupid", True),
        ("stu\u200bpid stu\u00adpid", "stupid", True),
        ("ｓｔｕｐｉｄ", "stupid", True),
        ("STRASSE", "straße", True),
        ("cafe\u200b\u0301", "café", True),
        ("red, left", "red", True),
        ("blurred", "red", False),
        ("nền xanh  lá\ncây", "xanh lá", True),
        ("xanh láng", "xanh lá", False),
        ("i can’t do it", "i can't do", True),
        ("i can ' t do it", "i can't do", True),
        ("sorry , but no", "sorry, but", True),
        ("sorry but no", "sorry, but", False),
        ("मूर्ख", "मूर", False),  # the virama is a mark: `\b` would end the word there
        ("यह मूर्ख है", "मूर्ख", True),
        ("किताबों", "किताब", False),
        ("هذا غبي جدا", "غبي", True),
        ("هٰذَا غَبِيٌّ جِدًّا", "غبي", True),  # vowel signs are optional
        ("غـــبي", "غبي", True),  # and so is lengthening
        ("غبيان", "غبي", False),
        ("الغبي", "غبي", False),
        ("哦，愚蠢的猫", "愚蠢", True),
        ("你真stupid啊", "stupid", True),
        ("バカなやつ", "ﾊﾞｶ", True),
        ("멍청함이다", "멍청함", True),
        ("มันโง่มาก", "โง่", True),
        ("ມັນໂງ່", "ໂງ່", True),
        ("វាល្ងង់ណាស់", "ល្ងង់", True),
        ("c++ and c", "c++", True),
        ("c+", "c++", False),
        ("say f***!", "f***", True),
        ("aβ word", "a", False),
        ("anything", "  ", False),
        ("", "word", False),
    ],
)
def test_a_word_is_found_as_its_script_writes_it(text: str, word: str, found: bool) -> None:
    assert contains_word(text, word) is found


@LAW
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_whole_words_equal_splitting(words: list[str], word: str) -> None:
    assert contains_word(" ".join(words), word) is (word in words)


@LAW
@given(st.text(max_size=12), st.text(max_size=4))
def test_letters_marks_and_digits_are_the_edges(text: str, word: str) -> None:
    """Oracle without regular expressions, for scripts that write spaces."""
    plain, entry = normalised(text), normalised(word).strip()
    if not entry or any(ord(c) > 0x0DFF for c in plain + entry) or not entry.isalnum():
        return

    def joins(character: str) -> bool:
        return unicodedata.category(character)[0] in "LMN"

    hits = [m.start() for m in re.finditer(f"(?={re.escape(entry)})", plain)]
    free = [
        at
        for at in hits
        if not (at and joins(plain[at - 1])) and not (plain[at + len(entry) :] and joins(plain[at + len(entry)]))
    ]
    assert contains_word(text, word) is bool(free)


@LAW
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@LAW
@given(st.text(st.characters(exclude_characters="\u0345")))  # its folding alone changes the order of marks
def test_case_does_not_matter(text: str) -> None:
    assert normalised(text.casefold()) == normalised(text)


def test_the_longest_entry_is_reported() -> None:
    assert Words(["bad", "bad cat", "cat"]).find("a Bad  Cat") == "bad  cat"
    assert Words(["bad"]).find("a good cat") is None


def test_entries_are_normalised_and_distinct() -> None:
    assert Words(["Bad", "bad ", "", " ", "\u200b", "Bad cat"]).entries == ("bad cat", "bad")


def test_signs_of_the_pattern_language_are_plain_characters() -> None:
    for entry in (".*", "a|b", "(x", "[z]", "\\d", "^", "$"):
        assert Words([entry]).find(f"say {entry} now") == entry
        assert Words([entry]).find("quite 7 other words") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("...", 0), ("a cat", 2), ("don't", 2), ("यह मूर्ख है", 3), ("猫が左", 3), ("a 猫.", 2)],
)
def test_words_are_counted_in_any_script(text: str, count: int) -> None:
    assert word_count(text) == count
