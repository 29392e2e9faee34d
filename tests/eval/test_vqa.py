import pytest
import torch

from mmtp.eval.vqa import (
    ALL,
    OPEN,
    OTHER_PICTURE,
    PRIOR,
    WITH_PICTURE,
    WITHOUT_PICTURE,
    YES_NO,
    VqaSample,
    commonest_answers,
    easy_vqa_prior,
    easy_vqa_samples,
    evaluate,
    exchange,
    score,
)

COLOURS = ["red", "blue", "green"]


def samples() -> list[VqaSample]:
    out = []
    for i in range(30):
        picture = torch.zeros(3, 4, 4)
        picture[i % 3] = 1 - i / 100
        colour = COLOURS[[0, 2, 1][i % 3]]
        out.append(VqaSample(f"p{i}", picture, "what color is the shape?", colour))
        out.append(VqaSample(f"p{i}", picture, "is there a red shape?", "yes" if colour == "red" else "no"))
        out.append(VqaSample(f"p{i}", picture, "is there not a red shape?", "no" if colour == "red" else "yes"))
    return out


class Looks:
    """Answers from the picture; without one it says what is commonest."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def answer(self, images, questions, *, batch_size=64):
        self.sizes.append(len(questions))
        out = []
        for image, question in zip(images, questions, strict=True):
            colour = "red" if image is None else COLOURS[[0, 2, 1][int(image.amax((1, 2)).argmax())]]
            if question.startswith("what"):
                out.append(f" {colour.title()} ")
            else:
                out.append("yes" if (colour == "red") != ("not" in question) else "no")
        return out


def test_a_model_that_looks_is_right_and_falls_in_both_controls():
    asked = samples()
    told = []
    result = evaluate(Looks(), asked, prior={"what color is the shape?": "red"}, batch_size=4, progress=lambda *state: told.append(state))
    assert told[-1] == (3 * len(asked),) * 2 and len(told) == 9
    counts = result.counts
    assert result.accuracy == 1.0 and counts[WITH_PICTURE][OPEN].total == 30 and counts[WITH_PICTURE][YES_NO].total == 60
    assert counts[WITH_PICTURE]["colour"].total == 30 and counts[WITH_PICTURE]["absence"].total == 30
    assert counts[WITHOUT_PICTURE][OPEN].share == pytest.approx(1 / 3)
    assert counts[OTHER_PICTURE][OPEN].share < 0.7
    assert counts[PRIOR][OPEN].share == pytest.approx(1 / 3)
    table = result.table("caption")
    assert table.columns[2:] == [WITH_PICTURE, WITHOUT_PICTURE, OTHER_PICTURE, PRIOR]
    assert table.rows[0][:3] == [ALL, 90, "100.0 %"]
    assert result.to_dict()[WITH_PICTURE][ALL] == {"right": 90, "total": 90, "share": 1.0}


def test_one_picture_has_no_other():
    one = samples()[:1]
    assert list(evaluate(Looks(), one).counts) == [WITH_PICTURE, WITHOUT_PICTURE]


def test_without_controls_only_the_picture_is_asked():
    result = evaluate(Looks(), samples(), controls=False)
    assert list(result.counts) == [WITH_PICTURE]


def test_exchange_never_gives_a_picture_back_to_its_own_question():
    asked = samples()
    others = exchange(asked, seed=3)
    assert all(other is not sample.picture for sample, other in zip(asked, others, strict=True))
    assert {id(o) for o in others} == {id(s.picture) for s in asked}
    assert all(a is b for a, b in zip(others, exchange(asked, seed=3), strict=True))
    assert any(a is not b for a, b in zip(others, exchange(asked, seed=4), strict=True))
    with pytest.raises(ValueError, match="two pictures"):
        exchange(asked[:3])


def test_score_wants_the_word_itself():
    one = [VqaSample("a", torch.zeros(3, 2, 2), "what color is it?", "red")]
    assert score(one, ["RED "])[ALL].right == 1
    assert score(one, ["reddish"])[ALL].right == 0
    with pytest.raises(ValueError):
        score(one, [])


def test_commonest_answers_break_ties_by_the_alphabet():
    assert commonest_answers([("q", "b"), ("q", "a"), ("r", "z"), ("r", "y"), ("r", "z")]) == {"q": "a", "r": "z"}


def test_easy_vqa_questions_are_drawn_the_same_every_time():
    pytest.importorskip("easy_vqa")
    few, again = (easy_vqa_samples("test", limit=40, seed=1) for _ in range(2))
    assert [(s.key, s.question, s.answer) for s in few] == [(s.key, s.question, s.answer) for s in again]
    assert len(few) == 40 and few[0].picture.shape == (3, 64, 64)
    everything = easy_vqa_samples("test")
    assert len(everything) == 9673
    same = [s for s in everything if s.key == everything[0].key]
    assert len(same) > 1 and all(s.picture is same[0].picture for s in same)
    prior = easy_vqa_prior()
    assert prior["is there a red shape?"] == "no" and prior["is there not a red shape?"] == "yes"


def test_time_that_is_up_ends_the_questions_but_all_conditions_have_the_same():
    result = evaluate(Looks(), samples(), batch_size=1, max_seconds=0.0, prior={})
    assert [groups[ALL].total for groups in result.counts.values()] == [8, 8, 8, 8]
