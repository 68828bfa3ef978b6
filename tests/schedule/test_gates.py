"""Gates: who goes live, why, and what cannot be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import bson
import numpy as np
import pytest

from mongotorch import Always, Better, Never
from mongotorch.codecs import Codecs
from mongotorch.errors import ParameterError
from mongotorch.schedule import Gate, Scores, Verdict, gate_of
from mongotorch.schedule.gates import interval_of_mean

OURS = Scores([0.4, 0.2, 0.3])
NAN = float("nan")


def lower(champion: Scores | None, challenger: Scores | None) -> bool:
    return challenger is not None and (champion is None or sum(challenger.losses) < sum(champion.losses))


def judge(gate: Gate, theirs: Sequence[float], ours: Scores | None = OURS) -> Verdict:
    return gate.judge(ours, Scores(theirs))


@pytest.mark.parametrize(
    ("gate", "theirs", "promote", "why"),
    [
        (
            Better(),
            [0.3, 0.2, 0.1],
            True,
            "mean loss 0.2 against the champion's 0.3 on 3 documents: better by 0.1",
        ),
        (
            Better(),
            [0.5, 0.3, 0.4],
            False,
            "mean loss 0.4 against the champion's 0.3 on 3 documents: worse by 0.1",
        ),
        (Better(), [0.4, 0.2, 0.3], False, "mean loss 0.3 against the champion's 0.3 on 3 documents: equal"),
        (
            Better(margin=0.2),
            [0.3, 0.2, 0.1],
            False,
            "mean loss 0.2 against the champion's 0.3 on 3 documents: better by 0.1, "
            "which is not more than the margin of 0.2",
        ),
        (Better(margin=0.05), [0.3, 0.2, 0.1], True, "better by 0.1"),
        (Better(margin=-0.05), [0.4, 0.2, 0.3], True, "equal"),
        (Better(margin=-0.05), [0.5, 0.3, 0.4], False, "worse by 0.1"),
    ],
)
def test_the_lower_mean_loss_goes_live_by_more_than_the_margin(
    gate: Better, theirs: list[float], promote: bool, why: str
) -> None:
    verdict = judge(gate, theirs)

    assert verdict.promote is promote
    assert verdict.why.endswith(why)
    assert (verdict.documents, verdict.interval, verdict.gate) == (3, None, repr(gate))


def test_a_single_step_of_a_float_is_better_and_no_step_is_not() -> None:
    one = Scores([1.0])

    assert judge(Better(), [float(np.nextafter(1.0, 0.0))], one).promote
    assert not judge(Better(), [1.0], one).promote


def test_where_nothing_is_live_a_finite_model_goes_live() -> None:
    verdict = judge(Better(confidence=0.95), [0.5], None)

    assert (verdict.promote, verdict.why, verdict.champion) == (True, "nothing is live yet", None)


@pytest.mark.parametrize("ours", [None, OURS, Scores([NAN, 1.0, 1.0])])
@pytest.mark.parametrize("loss", [NAN, float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_never_goes_live(ours: Scores | None, loss: float) -> None:
    verdict = judge(Better(), [0.1, loss, loss], ours)

    assert not verdict.promote
    assert verdict.why == "the trained model's loss is not finite on 2 of 3 documents"


def test_losses_whose_mean_is_beyond_what_a_float_holds_are_not_finite_either() -> None:
    verdict = judge(Better(), [1.7e308, 1.7e308], Scores([1.0, 1.0]))

    assert (verdict.promote, verdict.why) == (False, "the trained model's loss has no finite mean")


def test_a_finite_model_takes_the_place_of_one_that_is_not() -> None:
    verdict = judge(Better(confidence=0.99, margin=5), [9.0, 9.0, 9.0], Scores([0.1, NAN, 0.1]))

    assert verdict.promote
    assert verdict.why == "the live model's loss is not finite on 1 of 3 documents"


@pytest.mark.parametrize("challenger", [None, Scores([])])
def test_a_model_that_was_not_scored_does_not_go_live(challenger: Scores | None) -> None:
    verdict = Better().judge(OURS, challenger)

    assert (verdict.promote, verdict.why) == (False, "the trained model was not scored on any document")


def test_different_documents_are_not_compared() -> None:
    with pytest.raises(ParameterError, match="3 documents and the trained one on 2") as caught:
        judge(Better(), [0.1, 0.2])

    assert caught.value.field == "losses"


def test_losses_are_one_number_a_document() -> None:
    rows: Any = [[0.1, 0.2], [0.3, 0.4]]

    with pytest.raises(ParameterError, match="shape") as caught:
        judge(Better(), rows)

    assert caught.value.field == "losses"


def test_confidence_asks_for_the_lower_end_of_the_interval() -> None:
    generator = np.random.default_rng(1)
    ours = generator.normal(1.0, 0.5, 400)
    noise = generator.normal(0.0, 0.5, 400)
    clear, unclear = ours - 0.2 + noise, ours - 0.01 + (noise - noise.mean())

    promoted = judge(Better(confidence=0.95), clear.tolist(), Scores(ours.tolist()))
    kept = judge(Better(confidence=0.95), unclear.tolist(), Scores(ours.tolist()))

    assert promoted.promote
    assert promoted.interval is not None
    assert 0 < promoted.interval[0] < 0.2 - noise.mean() < promoted.interval[1]
    assert f"(95 % interval {promoted.interval[0]:.4g} to {promoted.interval[1]:.4g})" in promoted.why
    assert not kept.promote
    assert kept.interval is not None
    assert kept.interval[0] < 0 < kept.interval[1]
    assert kept.why.endswith("which is not surely more than nothing")
    assert judge(Better(), unclear.tolist(), Scores(ours.tolist())).promote


def test_the_interval_is_the_same_each_time_and_in_whatever_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(2).normal(0.1, 1.0, 37)

    first, again = interval_of_mean(differences, 0.9), interval_of_mean(differences, 0.9)
    monkeypatch.setattr("mongotorch.schedule.gates._MAX_DRAWS", 37 * 7)
    chunked = interval_of_mean(differences, 0.9)

    assert first == again == chunked


def test_the_interval_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(3).normal(0.0, 2.0, 1000)
    error = differences.std() / np.sqrt(len(differences))

    low, high = interval_of_mean(differences, 0.95)

    # For a thousand normal numbers the bootstrap and the textbook agree to a few percent of the width.
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_one_document_is_sure_of_nothing() -> None:
    verdict = judge(Better(confidence=0.5), [0.1], Scores([9.0]))

    assert not verdict.promote
    assert verdict.interval == (-np.inf, np.inf)


def test_always_and_never_do_not_look_at_the_scores() -> None:
    assert not Always().needs_scores
    assert judge(Always(), [NAN, 1.0, 1.0]).promote
    assert Always().judge(None, None) == Verdict(
        promote=True, why="every trained model goes live", gate="Always()"
    )
    assert not judge(Never(), [0.0, 0.0, 0.0]).promote
    assert judge(Never(), [0.0, 0.0, 0.0]).challenger == {"objective": 0.0}


def test_a_function_is_a_gate() -> None:
    gate = gate_of(lower)

    assert gate.needs_scores
    assert [judge(gate, losses).promote for losses in ([0.1, 0.1, 0.1], [1.0, 1.0, 1.0])] == [True, False]
    assert judge(gate, [0.1, 0.1, 0.1]).why == "lower said yes"
    assert gate.judge(None, Scores([1.0])).promote


def test_a_gate_is_a_gate_already() -> None:
    gate = Better(margin=1)

    assert gate_of(gate) is gate


@pytest.mark.parametrize("value", [None, 3, "better", Better, Always])
def test_what_is_neither_a_gate_nor_a_function_is_refused(value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        gate_of(value)

    assert caught.value.field == "gate"


@pytest.mark.parametrize("answer", [None, 1, "yes", 0.0])
def test_a_function_that_gives_no_answer_is_refused(answer: Any) -> None:
    with pytest.raises(ParameterError, match="True or False") as caught:
        judge(gate_of(lambda champion, challenger: answer), [0.1, 0.1, 0.1])

    assert caught.value.field == "gate"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"margin": NAN}, "margin"),
        ({"margin": "0.1"}, "margin"),
        ({"margin": True}, "margin"),
        ({"confidence": 0}, "confidence"),
        ({"confidence": 1}, "confidence"),
        ({"confidence": 95}, "confidence"),
        ({"confidence": NAN}, "confidence"),
        ({"confidence": "high"}, "confidence"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        Better(**given)

    assert caught.value.field == field


def test_a_verdict_is_plain_with_the_values_of_both() -> None:
    champion = Scores(np.array([0.4, 0.2]).tolist(), {"objective": 0.31, "accuracy": np.float64(0.8)})

    verdict = Better(confidence=0.9).judge(champion, Scores([0.1, 0.1], {"accuracy": 0.9}))
    document = bson.decode(bson.encode(verdict.to_document()))

    assert verdict.interval is not None
    assert document == {
        "promote": True,
        "why": verdict.why,
        "gate": "Better(margin=0.0, confidence=0.9)",
        "documents": 2,
        "champion": {"objective": 0.31, "accuracy": 0.8},
        "challenger": {"objective": 0.1, "accuracy": 0.9},
        "interval": list(verdict.interval),
        "unit": "documents",
    }


@pytest.mark.parametrize("gate", [Better(margin=0.5, confidence=0.95), Better(), Always(), Never()])
def test_gates_are_values_that_are_stored_as_such(gate: Gate) -> None:
    codecs = Codecs.builtin()
    record = codecs.encode(gate, lambda _: pytest.fail("nothing is put beside it"))

    assert record["_codec"] == "value"
    assert codecs.decode(bson.decode(bson.encode(record)), lambda _: b"") == gate
    assert hash(dataclasses.replace(gate)) == hash(gate)  # type: ignore[type-var]


def batches(losses: list[float], weights: list[float]) -> Scores:
    return Scores(losses, unit="batches", weights=weights, documents=20)


def test_batches_count_by_their_weight_and_the_verdict_says_that_they_are_compared() -> None:
    verdict = Better().judge(batches([1.0, 9.0], [16, 4]), batches([1.5, 2.0], [16, 4]))
    assert verdict.promote, "2.6 against 1.6"
    assert (verdict.unit, verdict.documents) == ("batches", 20)
    assert verdict.to_document()["unit"] == "batches"
    assert "1.6 against the champion's 2.6 on 20 documents in 2 batches: better by 1" in verdict.why
    assert Scores([1.0, 9.0], weights=[16, 4]).to_document() == {"objective": pytest.approx(2.6)}


def test_the_interval_of_batches_is_that_of_the_documents_they_repeat() -> None:
    draw = np.random.default_rng(3)
    ours, gain = draw.normal(1.0, 0.1, 50), draw.normal(0.05, 0.1, 50)
    plain = Better(confidence=0.95).judge(Scores(ours.tolist()), Scores((ours - gain).tolist()))
    same = [Scores(losses.tolist(), weights=[4.0] * 50) for losses in (ours, ours - gain)]
    assert Better(confidence=0.95).judge(*same).interval == plain.interval
    one = np.where(np.arange(50) == 7, 1e6, 1.0)
    weighed = [Scores(losses.tolist(), weights=one.tolist()) for losses in (ours, ours - gain)]
    interval = Better(confidence=0.95).judge(*weighed).interval
    assert interval is not None
    assert interval[0] < gain[7] - 0.01 or interval[1] > gain[7] + 0.01, (
        "a third of the resamples lack the heavy one"
    )
    assert interval[0] <= gain[7] + 1e-3 <= interval[1] + 2e-3


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (batches([1.0], [4]), Scores([1.0]), "1 batches and the trained one on 1 documents"),
        (batches([1.0, 2.0], [4, 3]), batches([1.0, 2.0], [3, 4]), "differs"),
        (batches([1.0, 2.0], [4, 0]), batches([1.0, 2.0], [4, 0]), "above 0"),
        (batches([1.0, 2.0], [4]), batches([1.0, 2.0], [4]), "for each loss"),
    ],
)
def test_scores_of_other_units_or_weights_are_not_compared(ours: Scores, theirs: Scores, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Better().judge(ours, theirs)
