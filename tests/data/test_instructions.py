"""Conversations as LLaVA's JSONL has them, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava import FEATURES, TEMPLATE, conversations, tiny_tokenizer

from sap_lightning.data.instructions import (
    IGNORED,
    Encoder,
    InstructionDataModule,
    Sample,
    batch_of,
    read_samples,
    with_others,
)
from sap_lightning.errors import InputError

CLIENTS = {"vqa_a": "vqa", "caption_a": "caption"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("instructions"), CLIENTS)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer(), 4, FEATURES, 64)


def words(encoder: Encoder, ids: Any) -> list[str]:
    return list(encoder.tokenizer.convert_ids_to_tokens(ids))


def sample(*turns: tuple[str, str], image: str | None = "there.png") -> Sample:
    return Sample("vqa", turns, Path(image) if image else None, "a.jsonl:1")


def test_only_answers_and_their_end_are_learned(encoder):
    encoded = encoder.encode(sample(("<image>\nwhat colour is it ?", "red")))
    image = ["<image>"] * FEATURES
    assert words(encoder, encoded.ids) == ["[ask]", *image, "what", "colour", "is", "it", "?", "[say]", "red", "[end]"]
    learned = [one for one in encoded.labels if one != IGNORED]
    assert words(encoder, learned) == ["red", "[end]"]
    assert encoded.labels[-2:] == encoded.ids[-2:]


def test_questions_may_be_learned_too_but_no_image(encoder, root):
    one = sample(("<image>\nwhat colour is it ?", "red"))
    encoded = encoder.encode(one, learn_questions=True)
    assert encoded.labels == [IGNORED if id == 4 else id for id in encoded.ids]
    data = InstructionDataModule(str(root), batch_size=6, learn_questions=True).for_client("vqa_a", encoder)
    (trained,), (judged,) = data.train_dataloader(), data.test_dataloader()
    assert (trained.labels != IGNORED).sum() > (judged.labels != IGNORED).sum()


def test_a_model_is_asked_what_it_has_learned_to_answer(encoder):
    one = sample(("<image>\nwhat colour is it ?", "red"), ("is it green ?", "no"))
    encoded, prompt = encoder.encode(one), encoder.prompt(one)
    assert encoded.ids[: len(prompt)] == prompt
    assert words(encoder, encoded.ids[len(prompt) :]) == ["no", "[end]"]
    assert words(encoder, [i for i, k in zip(encoded.ids, encoded.labels, strict=True) if k != IGNORED]) == [
        "red", "[end]", "no", "[end]",
    ]  # fmt: skip


def test_an_image_that_nobody_speaks_of_goes_first(tmp_path, root):
    line = {"image": "0.png", "conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "0.png").write_bytes((root / "vqa_a/images/0.png").read_bytes())
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    (read,) = read_samples(tmp_path / "train.jsonl")
    assert read.turns == (("<image>\nwhat ?", "red"),)
    assert read.task == "instructions"


def test_what_is_too_long_is_cut_but_never_in_the_first_question():
    short = Encoder(tiny_tokenizer(), 4, FEATURES, FEATURES + 8)
    encoded = short.encode(sample(("<image>\nwhat colour is it ?", "a red picture .")))
    assert len(encoded.ids) == FEATURES + 8 and encoded.ids.count(4) == FEATURES
    with pytest.raises(InputError, match=r"a.jsonl:1: its first question takes 11 tokens, data.longest is 8"):
        Encoder(tiny_tokenizer(), 4, FEATURES, 8).encode(sample(("<image>\nwhat colour is it ?", "red")))


def test_a_batch_is_filled_up_on_the_right_to_train_and_on_the_left_to_ask(encoder):
    batch = batch_of([sample(("<image>\nwhat ?", "red")), sample(("<image>\nwhat colour is it ?", "a"))], encoder)
    assert batch.attention.tolist()[0][-3:] == [0, 0, 0] and batch.attention[1].all()
    assert batch.prompt_attention.tolist()[0][:3] == [0, 0, 0] and batch.prompt_attention[1].all()
    assert (batch.labels[0][-3:] == IGNORED).all()
    assert batch.answers == ("red", "a")


def test_a_text_model_is_shown_no_image(encoder):
    blind = Encoder(tiny_tokenizer(), None, 0, 64)
    with pytest.raises(InputError, match="has an image, and the base is a language model that sees none"):
        blind.encode(sample(("<image>\nwhat ?", "red")))


def test_a_file_has_images_or_none(tmp_path, root):
    (tmp_path / "0.png").write_bytes((root / "vqa_a/images/0.png").read_bytes())
    lines = [{"image": "0.png", "conversations": GOOD}, {"conversations": GOOD}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"train.jsonl: line 2: has no image, and others of the file have"):
        read_samples(tmp_path / "train.jsonl")


PARTS_TEMPLATE = (
    "{% for message in messages %}[ask] {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }} {% endfor %}{% if message['role'] == 'assistant' %}[end]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("wrapped", [PARTS_TEMPLATE, {"default": TEMPLATE, "rag": "{{ documents }}"}])
def test_templates_of_parts_and_several_templates_say_what_was_said(encoder, wrapped):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = wrapped
    one = sample(("<image>\nwhat colour is it ?", "red"))
    encoded = Encoder(tokenizer, 4, FEATURES, 64).encode(one)
    assert encoded.ids.count(4) == FEATURES
    assert [id for id in encoded.labels if id != IGNORED][-2:] == encoder.encode(one).labels[-2:]


@pytest.mark.parametrize("template", ["hello", "{{ raise_exception('no') }}", {"default": "?"}])
def test_a_template_that_leaves_out_what_is_said_is_refused(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"a.jsonl:1: the tokenizer's chat template leaves out what is said"):
        Encoder(tokenizer, 4, FEATURES, 64).encode(sample(("<image>\nwhat ?", "red")))


def test_a_template_that_names_the_date_says_the_same_tomorrow():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%f') %}{% endif %}{{ date_string }} "
        + TEMPLATE
    )
    first, second = (Encoder(tokenizer, 4, FEATURES, 64)._turns(sample(("what ?", "red"))) for _ in range(2))
    assert first == second and first[0][0].startswith("26 Jul 2024")


def test_an_answer_ends_where_the_template_ends_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("[end]", "[ask]")
    encoder = Encoder(tokenizer, None, 0, 64)
    assert encoder.ends == [1, 2]
    assert encoder.text(torch.tensor(tokenizer("red green [ask] blue").input_ids)) == "red green"


def test_lines_may_hold_any_character_between_them(tmp_path):
    said = [{"from": "human", "value": "what\u2028?"}, {"from": "gpt", "value": "red\u0085"}]
    file = tmp_path / "train.jsonl"
    file.write_text("\ufeff" + json.dumps({"conversations": said}, ensure_ascii=False), encoding="utf-8")
    assert read_samples(file)[0].turns == (("what\u2028?", "red\u0085"),)


def test_a_template_that_changes_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match="does not put one turn after another"):
        Encoder(tokenizer, 4, FEATURES, 64).encode(sample(("<image>\nwhat ?", "red")))


def test_without_a_template_it_is_llava_s():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    asked = Encoder(tokenizer, None, 0, 64)._turns(sample(("what ?", "red"), image=None))
    assert asked == [("USER: what ? ASSISTANT: ", "red[end]")]


def test_clients_and_their_tasks(root):
    data = InstructionDataModule(str(root))
    assert data.clients == ("caption_a", "vqa_a")
    assert data.tasks == {"caption_a": "caption", "vqa_a": "vqa"}
    assert data.score_of("grounding") == "iou" and data.score_of("another") == "f1"


def test_the_order_of_training_goes_on_from_epoch_to_epoch(root, encoder):
    data = InstructionDataModule(str(root), batch_size=6)

    def order(first_epoch: int, epoch: int) -> tuple[str, ...]:
        loader = data.for_client("vqa_a", encoder, first_epoch).train_dataloader()
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        return batch.answers

    assert order(0, 2) == order(2, 0) == order(1, 1)
    assert order(0, 0) != order(0, 1)


GOOD = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
FAULTS: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[]", "expected a JSON object, got list"),
    ({"conversations": []}, "must be a list of questions, each with its answer"),
    ({"conversations": GOOD[:1]}, "must be a list of questions, each with its answer"),
    ({"conversations": GOOD[::-1]}, r"conversations\[0\] is .*expected an object of which from is 'human'"),
    ({"conversations": [GOOD[0], {"from": "gpt", "value": 3}]}, r"conversations\[1\]"),
    ({"conversations": [GOOD[0], {"from": "gpt", "value": " "}]}, "an empty answer"),
    ({"conversations": GOOD, "task": 3}, "task is 3, expected a name"),
    *(
        ({"conversations": GOOD, "task": name}, "task is .*expected a name")
        for name in ("..", "/tmp/a", "a/b", "vqa\n")
    ),
    ({"conversations": GOOD, "image": "none.png"}, "image 'none.png' is missing"),
    ({"conversations": GOOD, "image": "/etc/hosts"}, "image '/etc/hosts' points out of the folder"),
    ({"conversations": GOOD, "image": 7}, "image must be the name of an image, got 7"),
    ({"conversations": [GOOD[0], {"from": "gpt", "value": "\ud800"}]}, "half a surrogate pair"),
    ({"conversations": [{"from": "human", "value": "<image> ?"}, GOOD[1]]}, "speaks of <image>, and names none"),
    (
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image><image>"}, GOOD[1]]},
        "must stand once, in the first question, got it 2 times",
    ),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_a_faulty_line_is_named(tmp_path, root, line, message):
    (tmp_path / "0.png").write_bytes((root / "vqa_a/images/0.png").read_bytes())
    file = tmp_path / "train.jsonl"
    file.write_text("\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(InputError, match=f"train.jsonl: line 2: .*{message}"):
        read_samples(file)


def test_an_empty_or_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_samples(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no conversation"):
        read_samples(tmp_path / "train.jsonl")


def test_a_root_without_clients_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no <client>/train.jsonl"):
        _ = InstructionDataModule(str(tmp_path)).clients


def test_two_spellings_of_a_client_are_refused(tmp_path):
    for name in ("vqa_a", "VQA_A"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    with pytest.raises(InputError, match="clients 'VQA_A' and 'vqa_a' differ in spelling alone"):
        _ = InstructionDataModule(str(tmp_path)).clients


def test_a_client_of_two_tasks_is_refused(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    lines = [json.dumps({"task": task, "conversations": GOOD}) for task in ("caption", "vqa")]
    for file in ("train.jsonl", "test.jsonl"):
        (folder / file).write_text("\n".join(lines))
    with pytest.raises(InputError, match="has samples of the tasks 'caption', 'vqa'"):
        _ = InstructionDataModule(str(tmp_path)).tasks


@pytest.mark.parametrize(
    ("images", "others"),
    [("abc", "bca"), ("aabbc", "bbcca"), ("abba", "baab"), ("abaa", "babb"), ("aa", "--"), ("a", "-")],
)
def test_the_other_image_is_the_next_one_that_is_another(images, others):
    found = with_others([sample(("what ?", "red"), image=image) for image in images])
    assert "".join("-" if one.other is None else str(one.other) for one in found) == others


def test_of_text_alone_there_is_no_other_image():
    assert [one.other for one in with_others([sample(("what ?", "red"), image=None)] * 3)] == [None] * 3
