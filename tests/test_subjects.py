import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from allmend.depth.architectures import quantised_error
from allmend.errors import UserError
from allmend.models.load import load_model
from allmend.subjects import BUILT_IN, load_subject, read_texts


@pytest.fixture
def adapter(deep_folder: Path, tmp_path: Path) -> Path:
    """A LoRA whose B is not 0."""
    model = AutoModelForCausalLM.from_pretrained(deep_folder)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    wrapped.peft_config["default"].base_model_name_or_path = str(deep_folder)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_only_if_that_is_asked_for(adapter: Path, deep_folder: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)is an adapter.*--merge"):
        load_subject(str(adapter))

    merged = load_subject(str(adapter), merge=True, device="cpu")

    base = AutoModelForCausalLM.from_pretrained(deep_folder)
    from peft import PeftModel

    expected = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(merged.model(ids).logits, expected(ids).logits, atol=1e-3)
        assert not torch.allclose(merged.model(ids).logits, load_model(str(deep_folder)).model(ids).logits, atol=1e-2)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert merged.digest != load_model(str(deep_folder)).digest


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")

    with pytest.raises(UserError, match="does not name its base"):
        load_subject(str(adapter), merge=True)


def test_a_quantised_model_is_refused_before_it_is_loaded(deep_folder: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for path in deep_folder.iterdir():
        (quantised / path.name).symlink_to(path)
    config = json.loads((deep_folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantised / "config.json").unlink()
    (quantised / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match=r"(?s)is quantised.*Fold first"):
        load_subject(str(quantised), quantised=quantised_error)


def test_two_texts(deep_folder: Path, two_texts: tuple[Path, Path]) -> None:
    loaded = load_model(str(deep_folder), device="cpu")

    found = read_texts(loaded, *two_texts)

    assert found.search.ids.shape == (4, 256)
    assert found.report.ids.shape[1] == 512
    with pytest.raises(UserError, match="that of the search"):
        read_texts(loaded, two_texts[1], two_texts[1])


def test_one_text_is_cut_in_two(deep_folder: Path, two_texts: tuple[Path, Path]) -> None:
    loaded = load_model(str(deep_folder), device="cpu")

    found = read_texts(loaded, two_texts[1], None)

    whole = two_texts[1].read_text()
    said = [loaded.tokenizer.decode(some.ids.flatten()) for some in (found.search, found.report)]
    assert all(words in whole for words in said)
    assert whole.index(said[0]) + len(said[0]) <= whole.index(said[1])


def test_without_a_text_the_built_in_terms(deep_folder: Path) -> None:
    found = read_texts(load_model(str(deep_folder), device="cpu"), None, None)

    assert found.search.source.startswith(BUILT_IN)
    assert found.search.tokens == found.report.tokens == 8192
    assert found.search.notes == ()
