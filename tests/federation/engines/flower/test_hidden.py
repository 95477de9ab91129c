"""Secure sums as questions: exact with members lost on the way, and what a member does not let happen."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.errors import UserError
from allmend.federation.engines.flower.hidden import STEPS, HiddenPart, Hiding, ask_sum
from allmend.federation.privacy.vectors import VectorCode
from allmend.learn.noise import noise_source
from allmend.models.tensors import dump, parse
from allmend.recipe import SecureAggregation
from allmend.strategy import Reply, Turn

NAMES = ["a", "b", "c", "d", "e"]
TURN = Turn(3, 0, 9, 5)


class Parts:
    """Five members and what they have worked out."""

    def __init__(self, folder: Path, **layer: Any) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
        public = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}
        code = VectorCode({"update/x": torch.Size([4])}, ("weight",), clip=100.0, members=5)
        self.hiding = Hiding("run", "arm", public, [code, code], SecureAggregation(**layer))
        generator = torch.Generator().manual_seed(0)
        self.replies = {
            name: Reply({"update/x": torch.randn(4, generator=generator)}, {"weight": float(place + 1)})
            for place, name in enumerate(NAMES)
        }
        self.folder = folder
        self.parts = {name: self.part(name) for name in NAMES}
        self.lost: dict[str, str] = {}
        self.tasks: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []

    def part(self, name: str) -> HiddenPart:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return HiddenPart(
            name,
            self.keys[name],
            self.hiding,
            folder,
            lambda round, leg: (self.replies[name], self.tasks.get(name, "task")),
            lambda turn: noise_source("seeded", 7, turn.round),
        )

    def answer(self, name: str, question: bytes) -> bytes:
        from allmend.federation.engines.flower.site import error_answer

        tensors, about = parse(question)
        self.asked.append((name, about["step"]))
        try:
            return self.parts[name].answer(about, tensors)
        except UserError as error:
            return error_answer(error)

    def ask(
        self, questions: Mapping[str, bytes], *, seconds: float, largest: int
    ) -> Iterator[tuple[str, bytes | None]]:
        for name in sorted(questions):
            step = parse(questions[name])[1]["step"]
            gone = self.lost.get(name)
            away = gone is not None and STEPS.index(step) >= STEPS.index(gone)
            yield name, None if away else self.answer(name, questions[name])

    def sum(self, names: list[str] | None = None, *, turn: Turn = TURN) -> Any:
        warned: list[str] = []
        found = ask_sum(self, self.hiding, turn, "task", names or NAMES, seconds=1.0, warn=warned.append)  # type: ignore[arg-type]
        return (*found, warned)

    def plain(self, names: list[str]) -> torch.Tensor:
        return sum((self.replies[name].summed["update/x"].double() for name in names), torch.zeros(4).double())


@pytest.fixture
def make_parts(tmp_path: Path) -> Callable[..., Parts]:
    return lambda **layer: Parts(tmp_path, **layer)


@pytest.mark.parametrize("step", STEPS)
def test_the_sum_is_that_of_those_whose_vectors_came(step: str, make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    parts.lost = {"c": step}
    sums, survivors, warned = parts.sum()
    within = NAMES if step == "opened" else ["a", "b", "d", "e"]
    assert survivors == within
    torch.testing.assert_close(sums["update/x"], parts.plain(within), rtol=0, atol=1e-6)
    assert sums.fact("weight") == sum(parts.replies[name].summed_facts["weight"] for name in within)
    assert any("member 'c'" in words for words in warned)


def test_too_few_members_end_the_round(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    parts.lost = dict.fromkeys("cd", "masked")
    with pytest.raises(UserError, match="needed"):
        parts.sum()
    with pytest.raises(UserError, match="a sum over 2 members would show"):
        parts.sum(["a", "b"])


def test_one_vector_is_in_one_opened_sum(make_parts: Callable[..., Parts]) -> None:
    """A second sum without one of them would bare its part: none of them opens it, also after a restart."""
    parts = make_parts()
    parts.sum()
    parts.parts = {name: parts.part(name) for name in NAMES}
    with pytest.raises(UserError, match=r"0 of the 4 .* have opened"):
        parts.sum(["a", "b", "c", "d"])
    parts.lost = {"e": "masked"}
    with pytest.raises(UserError, match=r"0 of the 5 .* have opened"):
        parts.sum()


def test_a_sum_that_was_opened_can_be_formed_again_over_the_same_members(make_parts: Callable[..., Parts]) -> None:
    """It tells nothing new, and a coordinator that died before it had kept the sum needs it."""
    parts = make_parts()
    parts.lost = {"c": "masked"}
    first, survivors, _ = parts.sum()
    parts.parts = {name: parts.part(name) for name in NAMES}
    parts.lost = {}
    again, _, _ = parts.sum(survivors)
    assert torch.equal(first["update/x"], again["update/x"])


def test_work_that_was_opened_is_not_changed_and_opened_again(make_parts: Callable[..., Parts]) -> None:
    """The difference of both sums would be what one of them had changed by, and so its first vector."""
    parts = make_parts()
    parts.sum()
    parts.replies["a"] = Reply({"update/x": torch.zeros(4)}, {"weight": 1.0})
    parts.parts = {name: parts.part(name) for name in NAMES}
    with pytest.raises(UserError, match=r"0 of the 5 .* have opened"):  # the others open nothing without it
        parts.sum()
    assert ("a", "masked") not in parts.asked[len(NAMES) * len(STEPS) :]


def test_work_that_was_opened_in_one_turn_is_not_opened_over_others_in_another(
    make_parts: Callable[..., Parts],
) -> None:
    """A coordinator can ask for the same work twice under other numbers."""
    parts = make_parts()
    parts.sum()
    for other in (Turn(3, 1, 9, 5), Turn(4, 0, 9, 5)):
        for names in (["a", "b", "c", "d"], NAMES):
            with pytest.raises(UserError, match=r"0 of the \d .* have opened"):
                parts.sum(names, turn=other)
    parts.hiding = replace(parts.hiding, arm="another")  # which begins alike
    parts.parts = {name: parts.part(name) for name in NAMES}
    with pytest.raises(UserError, match=r"0 of the 4 .* have opened"):
        parts.sum(["a", "b", "c", "d"])
    assert parts.sum()[1] == NAMES


def test_who_was_given_another_task_is_in_no_sum_with_the_others(make_parts: Callable[..., Parts]) -> None:
    """A coordinator that sends all but one a model that teaches nothing would see that one's part in the sum."""
    parts = make_parts()
    parts.tasks = {"a": "another task"}
    _, survivors, warned = parts.sum()
    assert survivors == ["b", "c", "d", "e"]
    assert any("member 'a'" in words and "another sum" in words for words in warned)


def test_who_is_in_the_sum_is_told_before_anybody_opens_it(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    parts.lost = {"c": "masked"}
    told: list[Any] = []
    ask_sum(
        parts,  # type: ignore[arg-type]
        parts.hiding,
        TURN,
        "task",
        NAMES,
        seconds=1.0,
        warn=lambda words: None,
        opening=lambda survivors: told.append((survivors, {step for _, step in parts.asked})),
    )
    assert told == [(["a", "b", "d", "e"], {"keys", "shares", "masked"})]


def test_a_round_that_was_not_opened_can_be_tried_again(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    parts.lost = dict.fromkeys("abc", "masked")
    with pytest.raises(UserError):
        parts.sum()
    parts.lost = {}
    sums, survivors, _ = parts.sum()
    assert survivors == NAMES
    torch.testing.assert_close(sums["update/x"], parts.plain(NAMES), rtol=0, atol=1e-6)


def test_a_member_that_begins_anew_in_the_middle_is_lost_and_the_sum_is_not(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    answer = parts.answer

    def restarting(name: str, question: bytes) -> bytes:
        if name == "b" and parse(question)[1]["step"] == "masked":
            parts.parts["b"] = parts.part("b")
        return answer(name, question)

    parts.answer = restarting  # type: ignore[method-assign]
    sums, survivors, warned = parts.sum()
    assert survivors == ["a", "c", "d", "e"]
    assert any("begun anew" in words for words in warned)
    torch.testing.assert_close(sums["update/x"], parts.plain(survivors), rtol=0, atol=1e-6)


def test_a_member_keeps_to_what_was_agreed_on(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts(threshold=1.0)
    about = {"round": 3, "leg": 0, "once": "x", "names": NAMES, "step": "keys"}
    for change, why in (
        ({"names": ["a", "b"]}, "over 2 members would show"),
        ({"names": ["a", "b", "c", "stranger"]}, "stranger is not registered"),
        ({"names": ["b", "c", "d"]}, "do not have member 'a'"),
        ({"step": "shares"}, "not in that sum"),
        ({"step": "open sesame"}, "not a step"),
        ({"round": "x"}, "not a step"),
        ({"once": 3}, "not a step"),
    ):
        with pytest.raises(UserError, match=why):
            parts.parts["a"].answer(about | change, {})
    parts.lost = {"c": "opened"}  # all shares are needed
    with pytest.raises(UserError, match=r"4 of the 5 .* have opened"):
        parts.sum()


def test_a_reply_that_does_not_fit_is_told(make_parts: Callable[..., Parts]) -> None:
    parts = make_parts()
    parts.replies["b"] = Reply({"update/x": torch.full((4,), torch.nan)}, {"weight": 1.0})
    sums, survivors, warned = parts.sum()
    assert survivors == ["a", "c", "d", "e"]
    assert any("holds NaN" in words for words in warned)
    assert torch.isfinite(sums["update/x"]).all()


def test_messages_are_bytes(make_parts: Callable[..., Parts]) -> None:
    part = make_parts().parts["a"]
    about = {"round": 3, "leg": 0, "once": "x", "names": NAMES, "step": "keys"}
    part.answer(about, {})
    with pytest.raises(UserError, match="must be bytes"):
        part.answer(about | {"step": "shares"}, {"message": torch.zeros(3)})
    assert dump({}, {})
