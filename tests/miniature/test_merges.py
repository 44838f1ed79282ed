"""Learning byte pairs: frequent neighbours first, ties settled, nothing merged that is not repeated."""

from collections import Counter

from tools.miniature_weights.merges import learn_merges


def test_the_most_frequent_neighbours_come_first():
    merges = learn_merges(Counter({"low": 5, "lower": 2, "new": 6}), 4)
    assert merges == [("l", "o"), ("e", "w</w>"), ("n", "ew</w>"), ("lo", "w</w>")]


def test_equals_are_in_alphabetical_order_whatever_order_the_words_came_in():
    words = {"ab": 3, "cd": 3, "ef": 3}
    merges = learn_merges(Counter(words), 9)
    assert merges == [("a", "b</w>"), ("c", "d</w>"), ("e", "f</w>")]
    assert learn_merges(Counter(dict(reversed(words.items()))), 9) == merges


def test_a_run_of_one_letter_merges_from_the_left():
    assert learn_merges(Counter({"aaab": 2}), 3) == [("a", "a"), ("a", "b</w>"), ("aa", "ab</w>")]


def test_what_occurs_once_is_left_apart():
    assert learn_merges(Counter({"zebra": 1}), 10) == []
