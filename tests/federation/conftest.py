"""Members with a few made-up records, a tiny model with an adapter, and clients that learn in closed form."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from allmend.data.chat import Encoded
from allmend.events import Event
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Engine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.member import Member
from allmend.federation.privacy.ledger import NO_LEDGER, Ledger
from allmend.federation.rounds import Observer, run_rounds
from allmend.models.adapters import Trainable, add_lora
from allmend.models.tensors import Tensors
from allmend.recipe import Train
from allmend.strategy import State, Strategy, Trained, Turn

MakeMember = Callable[..., Member]
MakeTrainable = Callable[[], Trainable]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_member() -> MakeMember:
    """A member whose records and seed follow from `data`, by default its name."""

    def make(name: str, *, records: int = 4, data: str | None = None) -> Member:
        seed = zlib.crc32((data or name).encode())
        generator = torch.Generator().manual_seed(seed)
        made = []
        for index in range(records):
            length = int(torch.randint(4, 9, (), generator=generator))
            made.append(
                Encoded(
                    f"{data or name}-{index}",
                    torch.randint(0, 256, (length,), generator=generator),
                    torch.arange(length) > 0,
                    torch.zeros(length, dtype=torch.int64),
                    torch.arange(length),
                )
            )
        return Member(name, made, seed)

    return make


@pytest.fixture(scope="session")
def make_trainable(make_tiny_model: Callable[..., torch.nn.Module]) -> MakeTrainable:
    """A fresh model with a fresh adapter, the same each time."""
    return lambda: add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=0)


@pytest.fixture(scope="session")
def settings() -> Train:
    return Train(learning_rate=0.02, batch_size=2, schedule="constant", tokens_per_pass=32)


@dataclass
class Outcome:
    """What came of some rounds."""

    state: State
    states: dict[str, State]
    took_part: dict[str, int]
    events: list[Event]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, make_trainable: MakeTrainable) -> Callable[..., Outcome]:
    """Run a strategy's rounds over members, by default on a fresh model in this process."""

    def rounds(
        strategy: Strategy,
        members: Sequence[Member],
        settings: Train,
        *,
        rounds: int,
        engine: Engine | None = None,
        start: Checkpoint | None = None,
        folder: Path | None = None,
        trainable: Trainable | None = None,
        ledger: Ledger = NO_LEDGER,
        observe: Observer | None = None,
    ) -> Outcome:
        trainable = trainable or make_trainable()
        engine = engine or InProcessEngine(trainable, members, settings, lambda name, turn, step: None)
        events: list[Event] = []
        last = run_rounds(
            strategy,
            engine,
            start or Checkpoint(0, strategy.init(trainable.state()), {}),
            rounds=rounds,
            arm="arm",
            checkpoints=Checkpoints(folder or tmp_path_factory.mktemp("arm"), "identity"),
            emit=events.append,
            tokens=lambda: (0, None),
            ledger=ledger,
            observe=observe,
        )
        return Outcome(last.server, last.members, last.took_part, events)

    return rounds


@dataclass
class ToyClient:
    """Learns by adding a vector of its own (as float32), and counts its calls."""

    name: str
    examples: int
    step: torch.Tensor
    initial: Tensors = field(default_factory=lambda: {"x": torch.zeros(3)})
    state: State = field(default_factory=State)
    optimizers: list[Tensors | None] = field(default_factory=list)

    def train(
        self,
        start: Tensors,
        turn: Turn,
        *,
        optimizer: Tensors | None = None,
        proximal: float = 0.0,
        anchor: Tensors | None = None,
        validation: float = 0.0,
    ) -> Trained:
        self.optimizers.append(optimizer)
        count = (optimizer or {"steps": torch.zeros(())})["steps"] + 1
        return Trained({"x": start["x"] + self.step}, float(self.step.sum()), 1, 10, {"steps": count})

    def loss(self, at: Tensors, turn: Turn, *, records: int | None = None) -> float:
        """How far it would still go."""
        return float((at["x"] - self.step).square().sum())


@pytest.fixture
def make_toy() -> Callable[..., ToyClient]:
    def make(name: str, examples: int = 1) -> ToyClient:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return ToyClient(name, examples, torch.randn(3, generator=generator))

    return make
