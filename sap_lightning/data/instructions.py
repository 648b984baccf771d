"""Instructions to vision–language models: questions to an image or a text, and what to answer, in LLaVA's JSONL."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import lightning as L
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import DataLoader

from sap_lightning.data.anchors import HALF_CHARACTER, entries_in, image_file
from sap_lightning.data.loaders import eval_sampler, images_per_process, process_of, train_sampler
from sap_lightning.data.names import check_names, refuse_look_alikes
from sap_lightning.data.questions import ANCHORS_FILE, IMAGE
from sap_lightning.data.shapes.instructions import drawn_once
from sap_lightning.errors import InputError, check_at_least, short
from sap_lightning.files import FOLDER_NAME, FOLDER_NAME_WORDS, sha256_of_file
from sap_lightning.fingerprints import digest

BUILT_IN = "shapes"
"""The root that stands for the built-in world's clients."""
IGNORED = -100
"""The label of a token that is not learned."""
TRAIN, TEST = "train.jsonl", "test.jsonl"
SPEAKERS = ("human", "gpt")
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""LLaVA 1.5's without its system sentence, for tokenizers that have none."""
TODAY = "26 Jul 2024"
"""What templates that name the date are told, as Llama 3's are without a clock, so that a run is the same tomorrow."""
Score = Literal["exact", "f1", "iou"]
SCORES: tuple[Score, ...] = get_args(Score)
SCORES_OF_TASKS: dict[str, Score] = {"caption": "f1", "vqa": "exact", "grounding": "iou"}


class Sample(NamedTuple):
    """One conversation.

    Attributes:
        task: that it belongs to.
        turns: questions, the first with ``<image>`` where there is an image, and their answers.
        image: the image's file.
        place: how messages call it.
        other: another conversation's image, with which it is told whether answers depend on the image.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    image: Path | None
    place: str
    other: Path | None = None

    @property
    def answer(self) -> str:
        """The last answer, which is the one that is judged."""
        return self.turns[-1][1]


class Encoded(NamedTuple):
    """A conversation as tokens, an image token in place of each of the image's features.

    Attributes:
        ids: (length,) int64.
        labels: (length,) int64, the answers' ids, and IGNORED elsewhere.
    """

    ids: list[int]
    labels: list[int]


class InstructionBatch(NamedTuple):
    """Conversations, filled up to one length.

    Attributes:
        ids: (B, length) int64.
        attention: (B, length) int64, 0 where it was filled up.
        labels: (B, length) int64, as in ``Encoded``.
        images: files, one for each conversation; empty where none has an image.
        prompts: (B, shorter) int64, what goes before the last answer, filled up on the left.
        prompt_attention: (B, shorter) int64.
        answers: the last answers.
        others: as images, the image of another conversation for each; empty where there is none.
    """

    ids: Tensor
    attention: Tensor
    labels: Tensor
    images: tuple[Path, ...]
    prompts: Tensor
    prompt_attention: Tensor
    answers: tuple[str, ...]
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Conversations to tokens, by a language model's tokenizer and chat template.

    Each turn is encoded by itself, so that what a model reads before it answers is what it learned to answer to.

    Args:
        tokenizer: of the language model.
        image_token: id that stands for a feature of an image; None for a model that sees none.
        features: how many an image has.
        longest: tokens of a conversation; what is beyond is cut off.
    """

    tokenizer: Any
    image_token: int | None
    features: int
    longest: int

    def encode(self, sample: Sample, learn_questions: bool = False) -> Encoded:
        """A conversation with its answers.

        Args:
            sample: the conversation.
            learn_questions: whether all tokens but an image's are labels.

        Raises:
            InputError: it shows an image to a model that sees none, its image or all of its answers are beyond the
                longest, or the tokenizer's template changes earlier turns with later ones.
        """
        ids: list[int] = []
        labels: list[int] = []
        for number, (prompt, answer) in enumerate(self._turns(sample)):
            asked, answered = self._ids(prompt, sample), self._ids(answer, sample)
            ids += asked + answered
            learned = [id if learn_questions and id != self.image_token else IGNORED for id in asked]
            labels += learned + answered
            if number == 0 and len(asked) >= self.longest:
                raise InputError(
                    f"{sample.place}: its first question takes {len(asked)} tokens, data.longest is {self.longest}; set"
                    " it higher"
                )
        return Encoded(ids[: self.longest], labels[: self.longest])

    def prompt(self, sample: Sample) -> list[int]:
        """What goes before the last answer."""
        *before, (last, _) = self._turns(sample)
        return [id for turn in before for text in turn for id in self._ids(text, sample)] + self._ids(last, sample)

    def text(self, ids: Tensor) -> str:
        """What a model has answered, up to its end."""
        said = ids.tolist()
        end = next((place for place, id in enumerate(said) if id in self.ends), len(said))
        return str(self.tokenizer.decode(said[:end], skip_special_tokens=True)).strip()

    @cached_property
    def ends(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own end, and the special token that the template puts there."""
        ((_, answered),) = self._turns(Sample("", (("?", "!"),), None, "the tokenizer"))
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        of_template = [id for id in self.tokenizer(answered, add_special_tokens=False).input_ids if id in special][:1]
        own = self.tokenizer.eos_token_id
        return sorted({*of_template, *([] if own is None else [own])})

    @property
    def padding(self) -> int:
        """The id that batches are filled up with."""
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if found is None else int(found)

    def _turns(self, sample: Sample) -> list[tuple[str, str]]:
        """What the template makes of each question and answer, be it one that takes texts or one that takes parts."""
        for in_parts in (False, True):
            try:
                turns = self._templated(sample, in_parts)
            except TemplateError:
                continue
            pairs = zip(chain(*sample.turns), chain(*turns), strict=True)
            if all(said.strip() in made for said, made in pairs):
                return turns
        raise InputError(
            f"{sample.place}: the tokenizer's chat template leaves out what is said; give the base another template"
        )

    def _templated(self, sample: Sample, in_parts: bool) -> list[tuple[str, str]]:
        messages: list[dict[str, Any]] = []
        turns, done = [], ""
        for question, answer in sample.turns:
            messages.append(_message("user", question, in_parts))
            asked = self._rendered(messages, add_generation_prompt=True)
            messages.append(_message("assistant", answer, in_parts))
            answered = self._rendered(messages, add_generation_prompt=False)
            if not (asked.startswith(done) and answered.startswith(asked)):
                raise InputError(
                    f"{sample.place}: the tokenizer's chat template does not put one turn after another; give the base"
                    " another template"
                )
            turns.append((asked[len(done) :], answered[len(asked) :]))
            done = answered
        return turns

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        given = self.tokenizer.chat_template
        template = given.get("default") if isinstance(given, dict) else given
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=template or PLAIN_TEMPLATE,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=TODAY,
            )
        )

    def _ids(self, text: str, sample: Sample) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if IMAGE not in text:
            return ids
        if self.image_token is None:
            raise InputError(f"{sample.place}: has an image, and the base is a language model that sees none")
        found = ids.index(self.image_token)
        return [*ids[:found], *[self.image_token] * self.features, *ids[found + 1 :]]


def _message(role: str, said: str, in_parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": said}] if in_parts else said}


class InstructionDataModule(L.LightningDataModule):
    """The conversations of one client: those it trains on, and those it is judged by.

    Args:
        root: folder ``<client>/train.jsonl`` and ``<client>/test.jsonl`` in LLaVA's format, with the images that they
            name, relative to the client's folder. Each line may name a ``task``; all of a client's are of one. Public
            conversations of the server may stand beside the clients, in ``anchors.jsonl``. Or ``shapes``, for the
            clients of the built-in world, which are drawn once into the cache.
        batch_size: conversations a batch, over all processes.
        longest: tokens of a conversation, its image's among them; what is beyond is cut off.
        longest_answer: tokens of an answer that is judged; what a model would say beyond is not asked for.
        scores: by task how an answer is judged: ``exact`` (the same but for case and punctuation), ``f1`` (of its
            words), ``iou`` (the share of boxes that overlap by more than half). Of other tasks by f1.
        seed: of the order of training.
        learn_questions: whether questions are learned too, as FedIT's authors do; what is measured is of answers alone.

    Raises:
        InputError: on use, for anything wrong with these arguments or with the data.
    """

    def __init__(
        self,
        root: str = "instructions",
        batch_size: int = 16,
        longest: int = 1024,
        longest_answer: int = 128,
        scores: dict[str, Score] | None = None,
        seed: int = 0,
        learn_questions: bool = False,
    ) -> None:
        super().__init__()
        self.learn_questions = learn_questions
        check_at_least("data.batch_size", batch_size, 1)
        check_at_least("data.longest", longest, 8)
        self._given_root = root
        self.batch_size = batch_size
        check_at_least("data.longest_answer", longest_answer, 1)
        self.longest = longest
        self.longest_answer = longest_answer
        self.scores: dict[str, Score] = {**SCORES_OF_TASKS, **(scores or {})}
        self.seed = seed
        self._client: str | None = None
        self._encoder: Encoder | None = None
        self._first_epoch = 0
        self._read: dict[Path, list[Sample]] = {}

    @cached_property
    def root(self) -> Path:
        """The folder of all clients."""
        return drawn_once() if self._given_root == BUILT_IN else Path(self._given_root)

    @property
    def anchors(self) -> Path:
        """The server's public conversations.

        Raises:
            InputError: there are none.
        """
        if not (file := self.root / ANCHORS_FILE).is_file():
            raise InputError(f"{file}: is not there; sap looks at public conversations, lines as in train.jsonl")
        return file

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """Names of all clients, sorted.

        Raises:
            InputError: there is none, or a name that no upload can have.
        """
        found = sorted(path.parent.name for path in self.root.glob(f"[!.]*/{TRAIN}"))
        if not found:
            raise InputError(f"data.root {self.root}: holds no <client>/{TRAIN}; see docs/pilot.md for the layout")
        check_names(f"data.root {self.root}", "client", found)
        refuse_look_alikes(f"data.root {self.root}", "client", found)
        if odd := next((name for name in found if not re.fullmatch(FOLDER_NAME, name, re.ASCII)), None):
            raise InputError(
                f"data.root {self.root}: client {short(odd)}: its name must be {FOLDER_NAME_WORDS}; rename the folder"
            )
        return tuple(found)

    @cached_property
    def tasks(self) -> dict[str, str]:
        """The task of each client.

        Raises:
            InputError: one has samples of several.
        """
        return {client: self._task(client) for client in self.clients}

    def _task(self, client: str) -> str:
        tasks = sorted({sample.task for file in (TRAIN, TEST) for sample in self.samples(client, file)})
        if len(tasks) > 1:
            raise InputError(
                f"{self.root / client}: has samples of the tasks {', '.join(map(short, tasks))}; a client has one task:"
                " make it several clients"
            )
        return tasks[0]

    def samples(self, client: str, file: str) -> list[Sample]:
        """What a client trains on (train.jsonl), or is judged by (test.jsonl).

        Raises:
            InputError: naming the line that is no conversation, or whose image is missing.
        """
        path = self.root / client / file
        if path not in self._read:
            self._read[path] = read_samples(path)
        return self._read[path]

    def contents(self, client: str) -> str:
        """A digest of a client's conversations and their images."""
        samples = [*self.samples(client, TRAIN), *self.samples(client, TEST)]
        images = {image: sha256_of_file(image) for image in {sample.image for sample in samples} if image}
        return digest([(one.task, one.turns, images[one.image] if one.image else "") for one in samples])

    def score_of(self, task: str) -> Score:
        """How the answers of a task are judged."""
        return self.scores.get(task, "f1")

    def for_client(self, client: str, encoder: Encoder, first_epoch: int = 0) -> Self:
        """The same of one client, which shuffles as if so many epochs were done."""
        other = copy.copy(self)
        other._client, other._encoder, other._first_epoch = client, encoder, first_epoch
        return other

    @property
    def encoder(self) -> Encoder:
        """Conversations to tokens, of the base that the client has."""
        assert self._encoder is not None
        return self._encoder

    @property
    def num_samples(self) -> int:
        """How many conversations the client trains on."""
        assert self._client is not None
        return len(self.samples(self._client, TRAIN))

    def train_dataloader(self) -> DataLoader[InstructionBatch]:
        """The client's conversations in another order in every epoch."""
        return self._loader(TRAIN)

    def test_dataloader(self) -> DataLoader[InstructionBatch]:
        """What the client is judged by, in order."""
        return self._loader(TEST)

    def _loader(self, file: str) -> DataLoader[InstructionBatch]:
        assert self._client is not None
        samples = self.samples(self._client, file)
        encoder, (world, rank) = self.encoder, process_of(self.trainer)
        if file == TRAIN:
            sampler = train_sampler(samples, world, rank, self.seed + self._first_epoch)  # type: ignore[arg-type]
        else:
            samples = with_others(samples)
            sampler = eval_sampler(samples, world, rank, str(self.root / self._client / file))  # type: ignore[arg-type]
        size = images_per_process(self.batch_size, world)
        questions = file == TRAIN and self.learn_questions
        return DataLoader(
            samples,  # type: ignore[arg-type]
            size,
            sampler=sampler,
            collate_fn=lambda some: batch_of(some, encoder, questions),
        )


def batch_of(samples: Sequence[Sample], encoder: Encoder, learn_questions: bool = False) -> InstructionBatch:
    """Conversations of one file, of which all have an image, or none."""
    encoded = [encoder.encode(sample, learn_questions) for sample in samples]
    prompts = [encoder.prompt(sample) for sample in samples]
    padding = encoder.padding
    return InstructionBatch(
        _filled([one.ids for one in encoded], padding),
        _filled([[1] * len(one.ids) for one in encoded], 0),
        _filled([one.labels for one in encoded], IGNORED),
        tuple(sample.image for sample in samples if sample.image is not None),
        _filled(prompts, padding, left=True),
        _filled([[1] * len(prompt) for prompt in prompts], 0, left=True),
        tuple(sample.answer for sample in samples),
        tuple(sample.other for sample in samples if sample.other is not None),
    )


def with_others(samples: Sequence[Sample]) -> list[Sample]:
    """Each with the next conversation's image that is not its own, from the first on again after the last.

    So whose image it is depends neither on batches nor on processes. Where all have one image there is no other.
    """
    images = [sample.image for sample in samples]
    if len(set(images)) < 2:
        return list(samples)
    found: list[Sample] = []
    other = next(image for image in images if image != images[-1])
    for sample, after in zip(reversed(samples), [other, *reversed(images)], strict=False):
        other = after if after != sample.image else other
        found.append(sample._replace(other=other))
    return found[::-1]


def _filled(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    """Rows of ids as a matrix, filled up on the right, or on the left."""
    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)])


def read_samples(file: Path) -> list[Sample]:
    """The conversations of a file, a line each.

    Raises:
        InputError: naming the line that is no conversation, or whose image is missing or elsewhere, or that has none
            where others have.
    """
    samples = [_sample(entry, file.parent, where) for where, entry in entries_in(file)]
    if not samples:
        raise InputError(f"{file}: holds no conversation")
    blind = [sample for sample in samples if sample.image is None]
    if 0 < len(blind) < len(samples):
        raise InputError(f"{blind[0].place}: has no image, and others of the file have; make it several clients")
    return samples


def _sample(entry: dict[str, Any], folder: Path, place: str) -> Sample:
    task = entry.get("task", "instructions")
    if not (isinstance(task, str) and re.fullmatch(FOLDER_NAME, task, re.ASCII)):
        raise InputError(f"{place}: task is {short(task)}, expected a name of {FOLDER_NAME_WORDS}")
    turns = _turns(entry.get("conversations"), place)
    if entry.get("image") is None:
        if any(IMAGE in text for turn in turns for text in turn):
            raise InputError(f"{place}: speaks of {IMAGE}, and names none; add its file as image")
        return Sample(task, turns, None, place)
    return Sample(task, _shown(turns, place), image_file(folder, entry, place, "image"), place)


def _turns(said: Any, place: str) -> tuple[tuple[str, str], ...]:
    """Questions and answers in turn."""
    if not (isinstance(said, list) and said and len(said) % 2 == 0):
        raise InputError(f"{place}: conversations must be a list of questions, each with its answer")
    for number, one in enumerate(said):
        speaker = SPEAKERS[number % 2]
        if not (isinstance(one, dict) and one.get("from") == speaker and isinstance(one.get("value"), str)):
            raise InputError(
                f"{place}: conversations[{number}] is {short(one)}, expected an object of which from is {speaker!r} and"
                " value a text"
            )
    if broken := next((one["value"] for one in said if HALF_CHARACTER.search(one["value"])), None):
        raise InputError(f"{place}: {short(broken)} holds half a surrogate pair, no character; write it anew")
    if empty := next((number for number in range(1, len(said), 2) if not said[number]["value"].strip()), None):
        raise InputError(f"{place}: conversations[{empty}] is an empty answer")
    return tuple((said[at]["value"], said[at + 1]["value"]) for at in range(0, len(said), 2))


def _shown(turns: tuple[tuple[str, str], ...], place: str) -> tuple[tuple[str, str], ...]:
    """The turns with the image in the first question, where LLaVA puts one that nobody speaks of."""
    (first, answer), *rest = turns
    spoken = sum(text.count(IMAGE) for turn in turns for text in turn)
    if spoken > 1 or (spoken == 1 and IMAGE not in first):
        raise InputError(f"{place}: {IMAGE} must stand once, in the first question, got it {spoken} times")
    return ((first if spoken else f"{IMAGE}\n{first}", answer), *rest)
