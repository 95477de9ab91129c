from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder, choose_template
from allmend.data.records import Message, Record, question
from allmend.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

BOS = "<bos>"
LONG = 10_000


def conversation(*contents: str, first: str = "user", system: str = "") -> Record:
    """Turns of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [Message(roles[index % 2], content) for index, content in enumerate(contents)]
    return Record("r", messages=(*([Message("system", system)] if system else []), *turns))


def targets(tokenizer: PreTrainedTokenizerFast, encoded: Encoded, branch: int = 0) -> str:
    return tokenizer.decode(encoded.ids[encoded.target & (encoded.branch == branch)])


def whole(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.ids)


def path(encoded: Encoded, branch: int) -> tuple[list[int], list[int]]:
    """Ids and positions of the trunk with one branch."""
    mine = (encoded.branch == 0) | (encoded.branch == branch)
    return encoded.ids[mine].tolist(), encoded.position[mine].tolist()


@pytest.fixture(scope="session")
def bos_tokenizer(make_tiny_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Puts a token before every text and another behind it."""
    tokenizer = make_tiny_tokenizer(special=["<eos>", BOS, "<sep>"], bos_token=BOS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A <sep>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, "<sep>")],
    )
    return tokenizer


def test_loss_is_on_assistant_turns_and_their_end_marks(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> None:
    record = conversation("one?", "yes", "two?", "no", system="be brief")
    encoded = Encoder(tiny_chat_tokenizer, "chat", LONG).for_training(record)
    assert targets(tiny_chat_tokenizer, encoded) == "yes<|im_end|>no<|im_end|>"
    turns = [{"role": message.role, "content": message.content} for message in record.messages]
    assert whole(tiny_chat_tokenizer, encoded) + "\n" == tiny_chat_tokenizer.apply_chat_template(turns, tokenize=False)
    assert encoded.position.tolist() == list(range(len(encoded)))
    assert not encoded.branch.any()
    assert encoded.cut == 0


def test_evaluation_leaves_the_end_marks_out(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = Encoder(tiny_chat_tokenizer, "chat", LONG).for_evaluation(conversation("one?", "yes", "two?", "no"))
    assert targets(tiny_chat_tokenizer, encoded) == "yesno"
    assert whole(tiny_chat_tokenizer, encoded).endswith("assistant\nno")


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<"), min_size=1, max_size=8)
# words of the template itself, which a search by words finds too early
TURNS = (WORDS.filter(str.strip) | st.sampled_from(["assistant", "user", "a", "m", "end|>"])).map(str.strip)


@given(st.lists(TURNS, min_size=1, max_size=6), st.sampled_from(["user", "assistant"]), TURNS)
@settings(max_examples=60, deadline=None)
def test_turns_are_found_whatever_they_say(
    tiny_chat_tokenizer: PreTrainedTokenizerFast, contents: list[str], first: str, system: str
) -> None:
    record = conversation(*contents, first=first, system=system)
    encoder = Encoder(tiny_chat_tokenizer, "chat", LONG)
    spoken = [message.content for message in record.messages if message.role == "assistant"]
    if spoken:
        found = targets(tiny_chat_tokenizer, encoder.for_training(record))
        assert found == "".join(content + "<|im_end|>" for content in spoken)
        assert targets(tiny_chat_tokenizer, encoder.for_evaluation(record)) == "".join(spoken)


@given(st.lists(TURNS, min_size=1, max_size=3), st.sampled_from(["chat", "plain"]))
@settings(max_examples=30, deadline=None)
def test_evaluation_reads_the_text_of_training(
    tiny_chat_tokenizer: PreTrainedTokenizerFast, contents: list[str], template: str
) -> None:
    record = conversation(*[turn for content in contents for turn in ("why?", content)])
    encoder = Encoder(tiny_chat_tokenizer, template, LONG)  # type: ignore[arg-type]
    training, evaluation = encoder.for_training(record), encoder.for_evaluation(record)
    assert training.ids[: len(evaluation)].equal(evaluation.ids)
    assert training.target[: len(evaluation)][evaluation.target].all()
    assert int(training.target.sum()) == int(evaluation.target.sum()) + len(contents)


def test_white_space_around_a_turn_is_no_target(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = Encoder(tiny_chat_tokenizer, "chat", LONG).for_evaluation(conversation("one?", "  yes  ", "two?", "no"))
    assert targets(tiny_chat_tokenizer, encoded) == "yesno"


REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_shows_the_last_turn_otherwise(make_tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tiny_tokenizer(special=["<eos>", "<|im_start|>", "<|im_end|>"], chat_template=REASONING)
    encoder = Encoder(tokenizer, "chat", LONG)
    record = conversation("one?", "yes", "two?", "t", "three?", "think")
    assert targets(tokenizer, encoder.for_training(record)) == "yes<|im_end|>t<|im_end|>think<|im_end|>"
    assert targets(tokenizer, encoder.for_evaluation(record)) == "yestthink"


def test_tokens_across_a_turns_border_are_targets(make_tiny_tokenizer: MakeTokenizer) -> None:
    template = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    tokenizer = make_tiny_tokenizer(merges=[":y", "s;"], chat_template=template)
    encoded = Encoder(tokenizer, "chat", LONG).for_training(conversation("yes", "yes", "no", "no"))
    assert encoded.ids.tolist() == tokenizer("u:yes;a:yes;u:no;a:no;")["input_ids"]
    assert targets(tokenizer, encoded) == ":yes;no;"


def test_one_letter_choices_do_not_split_the_border(make_tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tiny_tokenizer(
        merges=[":y"], chat_template="{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    )
    record = question("r", "q", "y", choices=("y", "n", "no"))
    encoded = Encoder(tokenizer, "chat", LONG).for_evaluation(record)
    for branch, choice in enumerate(record.choices, start=1):
        assert path(encoded, branch)[0] == tokenizer(f"q:{choice}")["input_ids"]
    assert [targets(tokenizer, encoded, branch) for branch in (1, 2, 3)] == [":y", "n", "no"]
    assert whole(tokenizer, replace(encoded, ids=encoded.ids[encoded.branch == 0])) == "q"


def test_white_space_that_the_tokenizer_trims_is_a_target(make_tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tiny_tokenizer(merges=["ĠĠ"])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "if x:\n     y é  z"
    assert any(start == stop for start, stop in tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    encoder = Encoder(tokenizer, "plain", LONG)
    assert encoder.for_training(Record("r", text=text)).target.all()
    assert targets(tokenizer, encoder.for_evaluation(question("r", "if x:\n   ", "y  z"))) == "y  z"


def test_plain_joins_prompt_and_response_with_a_space(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tiny_tokenizer, "plain", LONG)
    encoded = encoder.for_training(question("r", "one?", "yes"))
    assert whole(tiny_tokenizer, encoded) == "one? yes<eos>"
    assert targets(tiny_tokenizer, encoded) == " yes<eos>"
    assert whole(tiny_tokenizer, encoder.for_training(question("r", "one?\n", "yes"))) == "one?\nyes<eos>"
    record = conversation("one?", "yes", "two?", "no", system="brief")
    encoded = encoder.for_training(record)
    assert whole(tiny_tokenizer, encoded) == "brief\none? yes<eos>\ntwo? no<eos>"
    assert targets(tiny_tokenizer, encoded) == " yes<eos> no<eos>"
    encoded = encoder.for_evaluation(record)
    assert whole(tiny_tokenizer, encoded) == "brief\none? yes<eos>\ntwo? no"
    assert targets(tiny_tokenizer, encoded) == " yes no"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_all_of_a_running_text_is_learnt(tiny_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    encoder = Encoder(tiny_tokenizer, template, LONG)  # type: ignore[arg-type]
    record = Record("r", text="some wörds\n")
    for encoded, text in (
        (encoder.for_training(record), "some wörds\n<eos>"),
        (encoder.for_evaluation(record), "some wörds\n"),
    ):
        assert whole(tiny_tokenizer, encoded) == text
        assert encoded.target.all()


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_running_text_gets_the_tokenizers_beginning(bos_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    encoded = Encoder(bos_tokenizer, template, LONG).for_training(Record("r", text="text"))  # type: ignore[arg-type]
    assert whole(bos_tokenizer, encoded) == f"{BOS}text<eos>"
    assert targets(bos_tokenizer, encoded) == "text<eos>"


def test_a_template_brings_its_own_beginning(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    template = BOS + "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    bos_tokenizer.chat_template = template
    encoded = Encoder(bos_tokenizer, "chat", LONG).for_training(conversation("one?", "yes"))
    bos_tokenizer.chat_template = None
    assert whole(bos_tokenizer, encoded) == f"{BOS}one?\nyes"


PROMPT, RESPONSE = "a long prompt?", " response<eos>"  # bytes are tokens, but for <eos>
RESPONSE_TOKENS = len(" response") + 1


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("max_tokens", range(1, 28))
def test_a_prompt_is_cut_from_its_left(
    tiny_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, with_bos: bool, max_tokens: int
) -> None:
    tokenizer = bos_tokenizer if with_bos else tiny_tokenizer
    record = question("r", PROMPT, "response")
    full = Encoder(tokenizer, "plain", LONG).for_training(record)
    encoded = Encoder(tokenizer, "plain", max_tokens).for_training(record)
    assert len(encoded) == min(max_tokens, len(full))
    assert encoded.cut == len(full) - len(encoded)
    assert encoded.position.tolist() == list(range(len(encoded)))
    assert not encoded.target[0]
    if max_tokens > RESPONSE_TOKENS:
        assert targets(tokenizer, encoded) == RESPONSE
        assert encoded.ids[with_bos:].equal(full.ids[len(full) - len(encoded) + with_bos :])
    else:
        kept = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"][: max_tokens - 1]
        assert encoded.ids[1:].tolist() == kept
        assert encoded.target[1:].all()
    if with_bos:
        assert tokenizer.convert_ids_to_tokens(int(encoded.ids[0])) == BOS


def test_a_running_text_is_cut_from_its_right(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = Encoder(tiny_tokenizer, "plain", 8).for_training(Record("r", text="0123456789"))
    assert whole(tiny_tokenizer, encoded) == "01234567"
    assert encoded.cut == 3  # with the end mark
    assert encoded.target.all()


def test_what_follows_the_last_target_takes_no_room(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> None:
    record = conversation("one?", "yes")
    full = Encoder(tiny_chat_tokenizer, "chat", LONG).for_training(record)
    assert full.target[-1]
    assert Encoder(tiny_chat_tokenizer, "chat", len(full)).for_training(record).cut == 0
    assert Encoder(tiny_chat_tokenizer, "chat", len(full) - 1).for_training(record).cut == 1


CHOICES = ("yes", "yes, but", "no", "not quite so")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_choices_are_branches_behind_the_prompt(tiny_chat_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    record = question("r", PROMPT, "no", choices=CHOICES)
    encoded = Encoder(tiny_chat_tokenizer, template, LONG).for_evaluation(record)  # type: ignore[arg-type]
    prompt = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n" if template == "chat" else PROMPT
    lead = "" if template == "chat" else " "
    for branch, choice in enumerate(CHOICES, start=1):
        ids, position = path(encoded, branch)
        assert ids == tiny_chat_tokenizer(prompt + lead + choice)["input_ids"]
        assert position == list(range(len(ids)))
        assert targets(tiny_chat_tokenizer, encoded, branch) == lead + choice
    assert not encoded.target[encoded.branch == 0].any()
    assert int((encoded.branch == 0).sum()) == len(tiny_chat_tokenizer(prompt)["input_ids"])


def test_earlier_turns_of_a_question_are_its_prompt(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> None:
    record = replace(conversation("one?", "yes", "two?", "no"), choices=("yes", "no"), answer=1)
    encoded = Encoder(tiny_chat_tokenizer, "chat", LONG).for_evaluation(record)
    assert [targets(tiny_chat_tokenizer, encoded, branch) for branch in (0, 1, 2)] == ["", "yes", "no"]
    trunk = tiny_chat_tokenizer.decode(encoded.ids[encoded.branch == 0])
    assert trunk.endswith("yes<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n")


def test_a_choice_that_splits_the_prompt_otherwise(make_tiny_tokenizer: MakeTokenizer) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = make_tiny_tokenizer(merges=["bc", "ab"], chat_template=template)
    encoded = Encoder(tokenizer, "chat", LONG).for_evaluation(question("r", "?ab", "c", choices=("c", "d")))
    for branch, text in ((1, "?abc"), (2, "?abd")):
        assert path(encoded, branch) == (tokenizer(text)["input_ids"], [0, 1, 2])
    assert [targets(tokenizer, encoded, branch) for branch in (0, 1, 2)] == ["", "bc", "d"]


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("max_tokens", range(2, 30))
def test_a_tree_is_cut_as_its_longest_path_is(
    tiny_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, with_bos: bool, max_tokens: int
) -> None:
    tokenizer = bos_tokenizer if with_bos else tiny_tokenizer
    record = question("r", PROMPT, "no", choices=CHOICES)
    full = Encoder(tokenizer, "plain", LONG).for_evaluation(record)
    encoded = Encoder(tokenizer, "plain", max_tokens).for_evaluation(record)
    assert encoded.cut == len(full) - len(encoded)
    trunk = int((encoded.branch == 0).sum())
    longest = max(len(f" {choice}") for choice in CHOICES)
    assert trunk == min(len(PROMPT) + with_bos, max(1, max_tokens - longest))
    for branch, choice in enumerate(CHOICES, start=1):
        ids, position = path(encoded, branch)
        assert len(ids) <= max_tokens
        assert position == list(range(len(ids)))
        assert targets(tokenizer, encoded, branch) == f" {choice}"[: max_tokens - trunk]
        if with_bos:
            assert tokenizer.convert_ids_to_tokens(ids[0]) == BOS
        assert tokenizer.decode(ids[with_bos:trunk]) == PROMPT[len(PROMPT) + with_bos - trunk :]


MERGES = ["ab", "abc", "c:", "Ġa", "Ġ1", "bc", "1,", "ĠĠ"]


def characters(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[set[int]]:
    """The places that each token covers of a text of single-byte characters, by counting through the tokens' texts."""
    found, reached = [], 0
    for token in encoded.ids.tolist():
        width = len(tokenizer.decode([token]))
        found.append(set(range(reached, reached + width)))
        reached += width
    return found


@pytest.fixture(scope="module", params=[True, False])
def merging_tokenizer(make_tiny_tokenizer: MakeTokenizer, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Its merges reach across borders; one of the two trims white space off tokens' places."""
    tokenizer = make_tiny_tokenizer(merges=MERGES)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=request.param)
    return tokenizer


# a lone space at a text's beginning is trimmed from both its sides, and has no place
@given(st.data(), st.text("abc1:, ", min_size=1, max_size=12).filter(lambda text: text[0] != " "))
@settings(max_examples=100, deadline=None)
def test_spans_are_located_by_the_characters_of_tokens(
    merging_tokenizer: PreTrainedTokenizerFast, data: st.DataObject, text: str
) -> None:
    tokenizer = merging_tokenizer
    places = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).filter(lambda pair: pair[0] < pair[1])
    spans = data.draw(st.lists(places, max_size=4))
    encoded, located = Encoder(tokenizer, "plain", 3).locate(text, spans)
    whole_text = Encoder(tokenizer, "plain", LONG).for_evaluation(Record("r", text=text))
    assert encoded.ids.equal(whole_text.ids)  # never cut, however few tokens a record may have
    assert encoded.target.all()
    held = characters(tokenizer, encoded)
    assert len(located) == len(spans)
    for (start, end), (first, last) in zip(spans, located, strict=True):
        assert [first <= index < last for index in range(len(encoded))] == [
            bool(place & set(range(start, end))) for place in held
        ]


def test_special_tokens_and_characters_of_several_tokens_are_located(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded, located = Encoder(bos_tokenizer, "plain", LONG).locate("aé€b", [(0, 1), (1, 2), (2, 3), (1, 4)])
    assert located == [(1, 2), (2, 4), (4, 7), (2, 8)]
    assert len(encoded) == 8  # with the mark of beginning, without that of the end


def test_every_token_of_a_located_text_is_a_target(make_tiny_tokenizer: MakeTokenizer) -> None:
    """Special tokens in front of it and what has no place in it too: nothing shifts the tokens behind."""
    tokenizer = make_tiny_tokenizer(special=("<eos>", "[gMASK]", "<sop>"))
    names = ("[gMASK]", "<sop>", "<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A <eos>",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    encoded, located = Encoder(tokenizer, "plain", LONG).locate("ab", [(0, 1), (1, 2)])
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()) == ["[gMASK]", "<sop>", "a", "b"]
    assert located == [(2, 3), (3, 4)]
    assert encoded.target.all()


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 1), (0, 5), (4, 5)])
def test_a_span_outside_the_text_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, span: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="4 characters"):
        Encoder(tiny_tokenizer, "plain", LONG).locate("text", [(0, 4), span])


def test_a_span_that_the_tokenizer_drops_is_refused(make_tiny_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(UserError, match="leaves out '~'"):
        Encoder(tokenizer, "plain", LONG).locate("text~", [(4, 5)])


def test_a_template_that_refuses_names_the_record(make_tiny_tokenizer: MakeTokenizer) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    encoder = Encoder(make_tiny_tokenizer(chat_template=template), "chat", LONG)
    record = replace(conversation("one?", "yes", system="be brief"), id="r-17")
    with pytest.raises(UserError, match=r"r-17.*no system turns") as raised:
        encoder.for_training(record)
    assert "plain" in str(raised.value.hint)


def test_a_template_that_leaves_a_turn_out_names_the_record(make_tiny_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    encoder = Encoder(make_tiny_tokenizer(chat_template=template), "chat", LONG)
    with pytest.raises(UserError, match=r"'r'.*leaves out"):
        encoder.for_training(conversation("one?", "yes"))


@pytest.mark.parametrize(
    ("wanted", "has", "expected"),
    [("auto", True, "chat"), ("auto", False, "plain"), ("plain", True, "plain"), ("chat", True, "chat")],
)
def test_choose_template(
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_chat_tokenizer: PreTrainedTokenizerFast,
    wanted: str,
    has: bool,
    expected: str,
) -> None:
    assert choose_template(wanted, tiny_chat_tokenizer if has else tiny_tokenizer) == expected  # type: ignore[arg-type]


def test_a_wanted_template_must_be_there(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no chat template"):
        choose_template("chat", tiny_tokenizer)
