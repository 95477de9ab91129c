"""Questions over a post that loses letters, by a clock that the test turns."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

MakePost = Callable[..., Any]


def echo(question: bytes) -> bytes:
    return question[::-1]


def test_answers_come_in_the_order_of_names(make_post: MakePost) -> None:
    post = make_post(dict.fromkeys(["b", "c", "a"], echo))
    post.slow = {"a": 30.0, "b": 1.0}
    found = list(post.exchange().ask({name: name.encode() * 2 for name in "bca"}, seconds=100))
    assert found == [("a", b"aa"), ("b", b"bb"), ("c", b"cc")]
    assert post.sent == ["b", "c", "a"] or sorted(post.sent) == ["a", "b", "c"]


def test_who_is_late_is_none_and_the_others_are_there(make_post: MakePost) -> None:
    post = make_post(dict.fromkeys("abc", echo))
    post.slow = {"b": 101.0}
    found = dict(post.exchange().ask(dict.fromkeys("abc", b"xy"), seconds=100))
    assert found == {"a": b"yx", "b": None, "c": b"yx"}
    assert len(post.forgotten) >= 1


def test_a_lost_letter_is_sent_again_at_growing_distances(make_post: MakePost) -> None:
    post = make_post({"a": echo}, lose=lambda member, number: number < 3)
    times: list[float] = []
    send = post.send
    post.send = lambda member, data: (times.append(post.now), send(member, data))[1]
    assert list(post.exchange().ask({"a": b"xy"}, seconds=10_000)) == [("a", b"yx")]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert [round(gap / 60) for gap in gaps] == [1, 2, 4]


def test_who_was_away_is_asked_again_at_once(make_post: MakePost) -> None:
    """Its letter may have been delivered to a process that is dead."""
    post = make_post({"a": echo}, lose=lambda member, number: number == 0)
    sleep = post.sleep

    def passing(seconds: float) -> None:
        sleep(seconds)
        if 5 < post.now < 8:
            post.there.clear()
        else:
            post.there["a"] = 0.0

    post.sleep = passing
    exchange = post.exchange()
    assert list(exchange.ask({"a": b"xy"}, seconds=100)) == [("a", b"yx")]
    assert post.now < 10
    assert len(post.sent) == 2


def test_who_began_anew_is_asked_again_although_nobody_missed_it(make_post: MakePost) -> None:
    post = make_post({"a": echo}, lose=lambda member, number: number == 0)
    sleep = post.sleep

    def passing(seconds: float) -> None:
        sleep(seconds)
        if post.now > 5:
            post.there["a"] = 1234.5

    post.sleep = passing
    assert list(post.exchange().ask({"a": b"xy"}, seconds=100)) == [("a", b"yx")]
    assert post.now < 6


def test_who_is_not_there_is_asked_as_soon_as_it_comes(make_post: MakePost) -> None:
    post = make_post({"a": echo})
    post.there.clear()
    sleep = post.sleep

    def passing(seconds: float) -> None:
        sleep(seconds)
        if post.now > 42:
            post.there["a"] = 42.0

    post.sleep = passing
    waits: list[Any] = []
    exchange = post.exchange()
    exchange.on_wait = lambda waiting, away: waits.append((waiting, away))
    assert list(exchange.ask({"a": b"xy"}, seconds=100)) == [("a", b"yx")]
    assert waits[0] == (["a"], ["a"])
    assert len(post.sent) == 1


def test_a_spoilt_answer_is_asked_for_again(make_post: MakePost) -> None:
    post = make_post({"a": echo})
    first = [True]
    answers = post.answers

    def spoilt(waiting: Any) -> Any:
        for answer in answers(waiting):
            if first:
                first.clear()
                answer = type(answer)(answer.member, answer.letter, None)
            yield answer

    post.answers = spoilt
    assert list(post.exchange().ask({"a": b"xy"}, seconds=100)) == [("a", b"yx")]


def test_whoever_stops_listening_leaves_no_letter_behind(make_post: MakePost) -> None:
    post = make_post(dict.fromkeys("abc", echo))
    answers = post.exchange().ask(dict.fromkeys("abc", b"xy"), seconds=100)
    next(answers)
    answers.close()
    assert len(post.forgotten) == 3 - 0 or set(post.sent) == {"a", "b", "c"}
    assert post.inbox == {}
