import pytest

from trimtab.measure.scores import exact_match, final_number, first_line, rouge2


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        (" Port Elm", " Port Elm", 1.0),
        (" Port Elm\nQ: and then?", " Port Elm", 1.0),
        (" Port Elm.", " Port Elm", 0.0),
        ("\n Port Elm", " Port Elm", 0.0),
        ("", " Port Elm", 0.0),
    ],
)
def test_facts_match_up_to_the_first_line_break(answer: str, target: str, score: float) -> None:
    assert exact_match(answer, target) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 12+7=19. #### 19", 1.0),
        (" 12+7=18. #### 18", 0.0),
        (" #### 18 and then #### 19", 1.0),
        (" #### 1 9\n#### 7", 0.0),
        (" the answer is 19", 0.0),
        (" ####", 0.0),
        (" #### 19 apples", 1.0),
        (" #### 190", 0.0),
    ],
)
def test_arithmetic_counts_the_number_after_the_last_mark(answer: str, score: float) -> None:
    assert exact_match(answer, " 12+7=19. #### 19") == score


def test_numbers_are_read_through_spaces_and_commas() -> None:
    assert final_number("#### 1,024") == final_number("#### 1 0 2 4") == "1024"
    assert final_number("#### -3.5") == "-3.5"
    assert final_number("1024") is None


def test_first_line() -> None:
    assert first_line("  a b \nc") == "a b"


def test_rouge2_is_the_f1_of_word_pairs() -> None:
    # Pairs: (a b)(b c)(c d) against (a b)(b c)(c e): two of three in common, both ways.
    assert rouge2("a b c d", "a b c e") == pytest.approx(2 / 3)
    assert rouge2("a b c", "a b c") == 1.0
    assert rouge2("x y", "a b c") == 0.0
    assert rouge2("", "a b c") == 0.0
