"""Several rounds: what they start from and hand over, by real short trainings on the small world."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from conftest import taken
from damage import cut, flip
from federation.runs import DOMAINS
from kills import killed
from places import SHAPES_CLIP
from references import contents
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sap_lightning.cli import SapCLI
from sap_lightning.errors import InputError
from sap_lightning.federation.handed import Handed
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.poison import Poison
from sap_lightning.federation.rounds import RoundsFederation
from sap_lightning.functional.lora import dense
from sap_lightning.functional.traffic import fedavg_bytes
from sap_lightning.io.adapter import Adapter, read_adapter
from sap_lightning.io.uploads import read_uploads
from sap_lightning.merging import Average, Krum
from sap_lightning.models.layers import block_of
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule

WEIGHTS = "adapter_model.safetensors"
LAYER = "vision_model.encoder.layers.0.self_attn.q_proj"
A_KEY = f"base_model.model.{LAYER}.lora_A.weight"
QUIET = ["--model.reach=false", "--trainer.limit_val_batches=0", "--federation.report=false"]
Federation = Callable[..., RoundsFederation]


@pytest.fixture(scope="session")
def federation(options) -> Federation:
    """The federation that ``fit`` makes of options, to be played without measuring."""

    def make(folder: Path, *more: str, **others: Any) -> RoundsFederation:
        cli = SapCLI("fit", [*taken(options, "fit"), *QUIET, f"--federation.run_dir={folder}", *more])
        return cli.federation(**others)

    return make


@pytest.fixture(scope="session")
def first(federation, tmp_path_factory) -> Path:
    """A run folder of which the first of two rounds has been played by all clients but sketch's."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    federation(folder, "--federation.rounds=2", "--federation.unseen=sketch", "--federation.schedule=round").train()
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def weights(upload: Path) -> dict[str, torch.Tensor]:
    return load_file(upload / WEIGHTS)


# One round


def test_one_round_is_the_one_shot_byte_for_byte(federation, finished, tmp_path):
    shutil.copytree(finished / "uploads", tmp_path / "one_shot" / "uploads")
    rounds = federation(
        tmp_path / "one_shot", "--federation.rounds=1", "--federation.unseen=sketch", "--model.reach=true"
    )
    parts = {name: getattr(rounds, name) for name in ("client", "data", "anchors", "merge", "make_trainer", "config")}
    one_shot = OneShotFederation(**parts, run_dir=str(tmp_path / "one_shot"), unseen="sketch")
    one_shot.run()
    expected = contents(tmp_path / "one_shot", "merged/**/*")
    assert len(expected) == 2 * 4
    for name, content in expected.items():
        assert (finished / name).read_bytes() == content, name


def test_the_first_of_several_rounds_is_trained_as_one_shot_is(first, finished):
    for domain in ("cartoon", "painting", "photo"):
        upload = Path("uploads") / domain
        assert (first / upload / WEIGHTS).read_bytes() == (finished / upload / WEIGHTS).read_bytes()
        said = json.loads((first / upload / "manifest.json").read_text())
        assert (said["format_version"], said["round"], said["kind"]) == (2, 0, "lora")


# Several rounds of one client are one training


def test_rounds_of_a_client_alone_are_one_training_bit_for_bit(federation, run, tmp_path):
    """Shuffles, augmentation, dropout, learning rate and Adam's moments go on where the round before has ended."""
    settings = ["--model.dropout=0.3", "--federation.clients=[cartoon]", "--federation.unseen=photo"]
    rounds = [*settings, "--federation.rounds=2", "--federation.aggregation=fedit", "--federation.optimizer=keep"]
    federation(tmp_path / "rounds", *rounds).gather()
    federation(tmp_path / "whole", *settings, "--trainer.max_epochs=2").train()
    expected = weights(tmp_path / "whole" / "uploads" / "cartoon")
    assert_close(
        weights(tmp_path / "rounds" / "rounds" / "photo" / "1" / "uploads" / "cartoon"), expected, atol=0, rtol=0
    )


# Rounds of one full batch are steps on the union of the clients' images


class FullBatch(CLIPLoRAModule):
    """Trains by plain gradient descent."""

    def configure_optimizers(self) -> Any:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trainable, lr=0.5)


@pytest.fixture(scope="session")
def shared(world, tmp_path_factory) -> Path:
    """Two clients of 8 and 24 images, one that has the images of both, and an unseen domain."""
    folder = tmp_path_factory.mktemp("shared")
    for classes in sorted((world / "domains" / "photo").iterdir()):
        for place, image in enumerate(sorted(classes.iterdir())[:4]):
            for client in ("both", "small" if place == 0 else "large"):
                target = folder / client / classes.name / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, target)
    shutil.copytree(folder / "both", folder / "unseen")
    return folder


def merged_after_rounds(federation: Federation, folder: Path, shared: Path, clients: str) -> dict[str, torch.Tensor]:
    """ΔW by layer of the mean after two rounds of one step each, by the way whose mean is exact."""
    made = federation(
        folder,
        *[f"--data.root={shared}", "--data.val_fraction=0", "--data.augment=false", "--data.batch_size=64"],
        *["--federation.rounds=2", "--federation.unseen=unseen", f"--federation.clients={clients}"],
        *["--merge.weights=samples", "--federation.aggregation=flora"],
    )
    made.client = FullBatch(made.client.base)
    made.gather()
    merged = made.evaluation.merge_of(made.sent.adapters, Average())
    return {name: dense(update) for name, update in merged.update.items()}


def test_rounds_of_one_full_batch_are_gradient_descent_on_all_images(federation, shared, tmp_path):
    apart, together = (
        merged_after_rounds(federation, tmp_path / clients, shared, clients) for clients in ("[small,large]", "[both]")
    )
    longest = max(float(update.abs().max()) for update in together.values())
    assert longest > 1e-3, "or nothing would be shown"
    assert_close(apart, together, atol=1e-6, rtol=1e-4)


def test_epochs_are_those_of_a_round_or_of_all_shared_out(federation, tmp_path):
    options = (
        ([], 1),
        (["--federation.epochs_per_round=3"], 3),
        (["--federation.total_epochs=6", "--federation.rounds=3"], 2),
        (["--federation.total_epochs=6"], 6),
    )
    for more, epochs in options:
        made = federation(tmp_path, *more)
        assert made.epochs == made.client_trainer().max_epochs == epochs
    assert made.server.max_epochs == 1, "what is configured, for all but clients"


# Who takes part


def test_a_share_of_the_clients_takes_part_and_everybody_in_time(federation, tmp_path):
    made = federation(
        tmp_path, "--federation.rounds=40", "--federation.share=0.5", "--federation.unseen=[photo,sketch]"
    )
    chosen = [made.chosen("photo", number) for number in range(40)]
    assert chosen == [made.chosen("photo", number) for number in range(40)]
    assert all(len(some) == len(set(some)) == 2 and "photo" not in some for some in chosen)
    assert set(Counter(domain for some in chosen for domain in some)) == {"cartoon", "painting", "sketch"}
    assert made.domains == sorted({*made.chosen("photo", 0), *made.chosen("sketch", 0)})
    assert made.senders("photo") == chosen[-1]


def test_at_least_one_client_takes_part(federation, tmp_path):
    made = federation(tmp_path, "--federation.rounds=2", "--federation.share=0.01")
    assert [len(made.chosen(domain, 0)) for domain in DOMAINS] == [1] * 4


# What is handed over


def hand(of: RoundsFederation) -> None:
    """Lets the server hand over after the first round."""
    of._hand_over("sketch", 0, of._uploads("sketch", 0, []))


def test_the_order_of_the_clients_changes_no_byte_of_what_is_handed_over(federation, first, tmp_path):
    made = []
    for place, clients in enumerate(("[cartoon,painting,photo]", "[photo,painting,cartoon]")):
        folder = copied(first, tmp_path / str(place))
        of = federation(
            folder, "--federation.rounds=2", f"--federation.clients={clients}", "--federation.unseen=sketch"
        )
        hand(of)
        made.append(contents(folder, "rounds/**/*"))
    assert made[0] == made[1] and len(made[0]) == 3


def handed(folder: Path) -> Adapter:
    return read_adapter(folder / "rounds" / "sketch" / "0" / "global" / "start")


@pytest.fixture
def hand_over(federation, first, tmp_path) -> Callable[..., Path]:
    """Lets the server hand over after the first round, in a copy of its folder."""

    def make(*more: str) -> Path:
        folder = tmp_path if (tmp_path / "uploads").exists() else copied(first, tmp_path / "copy")
        hand(federation(folder, "--federation.rounds=2", "--federation.unseen=sketch", *more))
        return folder

    return make


def test_fedit_hands_over_the_means_of_a_and_of_b(first, hand_over):
    uploads = [read_adapter(first / "uploads" / domain) for domain in ("cartoon", "painting", "photo")]
    for name, layer in handed(hand_over("--federation.aggregation=fedit")).layers.items():
        assert_close(layer.A, torch.stack([one.layers[name].A for one in uploads]).mean(0))
        assert_close(layer.B, torch.stack([one.layers[name].B for one in uploads]).mean(0))
        assert layer.scale == 2


def test_flexlora_hands_over_the_mean_cut_to_its_largest_singular_values_and_says_how_far_it_is(first, hand_over):
    folder = hand_over()
    uploads = [read_adapter(first / "uploads" / domain) for domain in ("cartoon", "painting", "photo")]
    missed, whole = 0.0, 0.0
    for name, layer in handed(folder).layers.items():
        mean = torch.stack([one.layers[name].delta().double() for one in uploads]).mean(0)
        sigma = torch.linalg.svdvals(mean)
        assert_close(torch.linalg.svdvals(layer.delta().double())[:8], sigma[:8], atol=1e-6, rtol=1e-4)
        missed, whole = missed + float(sigma[8:].square().sum()), whole + float(sigma.square().sum())
    record = json.loads((folder / "rounds" / "sketch" / "0" / "global" / "round.json").read_text())
    assert record["relative_error"] == pytest.approx((missed / whole) ** 0.5, rel=1e-3)


def test_a_round_may_be_merged_by_any_method(first, hand_over):
    folder = hand_over("--merge.method=median")
    uploads = [read_adapter(first / "uploads" / domain) for domain in ("cartoon", "painting", "photo")]
    name, layer = next(iter(handed(folder).layers.items()))
    median = torch.stack([one.layers[name].delta() for one in uploads]).median(0).values
    U, sigma, V = torch.linalg.svd(median)
    assert_close(layer.delta(), (U[:, :8] * sigma[:8]) @ V[:8], atol=1e-6, rtol=1e-4)


def test_what_was_handed_over_is_held_to(first, hand_over, federation, tmp_path):
    folder = hand_over()
    before = contents(folder, "rounds/**/*")
    same = ["--federation.rounds=2", "--federation.unseen=sketch"]
    hand(federation(folder, *same))
    assert contents(folder, "rounds/**/*") == before
    with pytest.raises(InputError, match="rounds/sketch/0/global: was made with another method; start anew"):
        hand(federation(folder, *same, "--merge.method=median"))
    with pytest.raises(InputError, match="was made with another aggregation"):
        hand(federation(folder, *same, "--federation.aggregation=fedit"))
    with pytest.raises(InputError, match="was made with another set of uploads"):
        hand(federation(folder, *same, "--federation.clients=[cartoon,photo]"))
    assert contents(folder, "rounds/**/*") == before


# Ways that change the base, or share a part

TWO = [
    *["--federation.rounds=2", "--federation.schedule=round"],
    *["--federation.unseen=sketch", "--federation.clients=[cartoon,photo]"],
]


@pytest.fixture
def play(federation, first, tmp_path) -> Callable[..., tuple[RoundsFederation, Path]]:
    """Two rounds of cartoon and photo for sketch, the first of which had been played by those that send A and B."""

    def make(way: str) -> tuple[RoundsFederation, Path]:
        folder = tmp_path / "run"
        if way not in ("ffa_lora", "fedsa_lora"):  # as if trained elsewhere, where nobody knew the way
            shutil.copytree(first / "uploads", folder / "uploads")
        made = federation(folder, *TWO, f"--federation.aggregation={way}")
        made.gather()
        return made, folder

    return make


def factors_in(folder: Path) -> set[str]:
    return {key.split("lora_")[1][0] for key in weights(folder)}


@pytest.mark.parametrize("way", ["flora", "fedex_lora"])
def test_what_is_added_to_the_base_is_in_what_is_merged(play, way):
    made, folder = play(way)
    name = next(iter(made.sent.adapters[0].layers))
    handed = folder / "rounds/sketch/0/global"
    before = read_adapter(handed / "folded").layers[name].delta()
    for adapter in made.sent.adapters:
        own = read_adapter(folder / "rounds/sketch/1/uploads" / adapter.name).layers[name].delta()
        assert_close(adapter.layers[name].delta(), before + own)
    uploads = [read_adapter(folder / "uploads" / client).layers[name] for client in ("cartoon", "photo")]
    start = 0 if way == "flora" else read_adapter(handed / "start").layers[name].delta()
    assert_close(before + start, (uploads[0].delta() + uploads[1].delta()) / 2, atol=1e-7, rtol=1e-5)
    assert (handed / "start").exists() == (way == "fedex_lora")


def test_an_upload_for_a_changed_base_is_none_for_the_base_as_it_was(play):
    made, folder = play("flora")
    with pytest.raises(InputError, match=r"cartoon/manifest\.json: base_fingerprint is .*, this base's is"):
        made.merge.read_uploads([folder / "rounds/sketch/1/uploads/cartoon"])


def test_ffa_trains_sends_and_takes_b_alone(play):
    made, folder = play("ffa_lora")
    for place in ("uploads", "rounds/sketch/1/uploads"):
        assert factors_in(folder / place / "photo") == {"B"}
        assert json.loads((folder / place / "photo/manifest.json").read_text())["parts"] == ["lora_B"]
    assert factors_in(folder / "rounds/sketch/0/global/start") == {"B"}
    drawn = made.client.drawn()
    for adapter in made.sent.adapters:
        assert all(torch.equal(layer.A, drawn[name].A) for name, layer in adapter.layers.items())
        assert all(layer.B.any() for layer in adapter.layers.values())
    with pytest.raises(InputError, match=r"parts are \('lora_B',\), expected \('lora_A', 'lora_B'\)"):
        read_adapter(folder / "rounds/sketch/1/uploads/photo")
    save_file(weights(folder / "uploads/photo") | {A_KEY: drawn[LAYER].A}, folder / "uploads/photo" / WEIGHTS)
    with pytest.raises(InputError, match=r"q_proj\.lora_A\.weight. is not to be sent, as both sides have it"):
        made.gather()


def test_fedsa_keeps_b_at_home_until_the_last_round(play):
    made, folder = play("fedsa_lora")
    assert factors_in(folder / "uploads/photo") == factors_in(folder / "rounds/sketch/0/global/start") == {"A"}
    assert factors_in(folder / "rounds/sketch/1/uploads/photo") == {"A", "B"}
    handed = made._hand_over("sketch", 0, made._uploads("sketch", 0, []))
    (own,) = read_uploads([folder / "clients/photo/last.ckpt"])
    mean = torch.stack([weights(folder / "uploads" / client)[A_KEY] for client in ("cartoon", "photo")]).mean(0)
    start = made.agreed.turn(1, None, [handed], folder / "clients/photo").start
    assert_close(start[LAYER].A, mean)
    assert all(torch.equal(layer.B, own.layers[name].B) and layer.B.any() for name, layer in start.items())


def test_clients_of_other_ranks_are_averaged_and_the_largest_rank_is_handed_over(federation, tmp_path):
    made = federation(tmp_path, *TWO, "--federation.ranks={photo: 2}")
    uploads = [read_adapter(upload) for upload in made.train()]
    assert [one.layers[LAYER].rank for one in uploads] == [8, 2]
    hand(made)
    U, sigma, V = torch.linalg.svd(sum(one.layers[LAYER].delta() for one in uploads) / 2)
    start = read_adapter(tmp_path / "rounds/sketch/0/global/start").layers[LAYER]
    assert_close(start.delta(), (U[:, :8] * sigma[:8]) @ V[:8], atol=1e-6, rtol=1e-4)
    assert made.first_client("photo").rank == 2 and made.first_client("cartoon").rank == 8


def test_a_client_that_missed_rounds_downloads_all_that_the_base_was_given_since(federation, tmp_path):
    made = federation(tmp_path, "--federation.rounds=6", "--federation.share=0.3", "--federation.aggregation=flora")
    handed = [Handed(Adapter("", {}, "", size=10), Adapter("", {}, "", size=10**number)) for number in range(1, 6)]
    (last,) = made.chosen("sketch", 5)
    before = max((number for number in range(5) if made.chosen("sketch", number) == [last]), default=0)
    assert before < 4, "or it missed none"
    assert made._downloads("sketch", 5, handed) == 10 + sum(10 ** (number + 1) for number in range(before, 5))


# On the wire


class Played(NamedTuple):
    """Two rounds of two clients for sketch, the first of which had been played, and how many changes the other made."""

    federation: RoundsFederation
    folder: Path
    changes: int


@pytest.fixture(scope="session")
def played(federation, first, tmp_path_factory) -> Played:
    folder = copied(first, tmp_path_factory.mktemp("played") / "run")
    made = federation(folder, *TWO)
    changes = killed(folder, made.gather)
    made.gather()
    return Played(made, folder, changes)


def files_of_rounds(folder: Path) -> dict[str, bytes]:
    """What was sent and handed over; checkpoints and settings name the folder."""
    return contents(folder, "rounds/**/uploads/**/*") | contents(folder, "rounds/**/global/**/*")


def size_of(folder: Path, pattern: str) -> int:
    return sum(map(len, contents(folder, pattern).values()))


def test_what_has_crossed_the_wire_is_counted_in_files(played):
    ups = [size_of(played.folder, f"**/uploads/{client}/*") for client in ("cartoon", "photo")]
    down = size_of(played.folder, "rounds/sketch/0/global/start/*")
    *_, average, _ = played.federation.points_on("sketch")
    assert (average.result.model, average.result.rounds) == ("average", 2)
    assert average.result.bytes == sum(ups) + 2 * down


def test_the_tensors_on_the_wire_are_those_of_the_formula_of_fedavg(played):
    once = [size_of(played.folder, f"uploads/{client}/{WEIGHTS}") for client in ("cartoon", "photo")]
    up = size_of(played.folder, f"uploads/cartoon/{WEIGHTS}") + size_of(played.folder, f"uploads/photo/{WEIGHTS}")
    up += size_of(played.folder, f"rounds/**/uploads/*/{WEIGHTS}")
    down = 2 * size_of(played.folder, f"rounds/**/global/start/{WEIGHTS}")
    assert up + down == fedavg_bytes(once, rounds=2) - sum(once), (
        "what the first round starts from is drawn by the seed"
    )


def test_an_upload_of_an_earlier_round_is_refused_in_a_later_one(federation, played, tmp_path):
    folder = copied(played.folder, tmp_path / "run")
    shutil.rmtree(folder / "rounds/sketch/1/uploads/photo")
    shutil.copytree(folder / "uploads/photo", folder / "rounds/sketch/1/uploads/photo")
    with pytest.raises(
        InputError, match="sketch/1/uploads: the upload of photo says that it is of round 0, expected 1"
    ):
        federation(folder, *TWO).gather()


def test_an_upload_of_a_later_round_is_refused_in_one_shot(federation, played, tmp_path):
    folder = copied(played.folder, tmp_path / "run")
    shutil.rmtree(folder / "uploads/photo")
    shutil.move(folder / "rounds/sketch/1/uploads/photo", folder / "uploads/photo")
    one_shot = federation(folder, "--federation.unseen=sketch", "--federation.clients=[cartoon,photo]")
    with pytest.raises(InputError, match="uploads: the upload of photo says that it is of round 1, expected 0"):
        one_shot.collect([folder / "uploads" / client for client in ("cartoon", "photo")])


def test_nothing_but_the_adapter_leaves_a_client(played):
    """What a client keeps, checkpoints with Adam's moments, is nowhere but in its own folder."""
    for upload in (played.folder / "rounds/sketch/1/uploads").iterdir():
        assert {file.name for file in upload.iterdir()} == {WEIGHTS, "adapter_config.json", "manifest.json"}
        assert all(".lora_A." in key or ".lora_B." in key for key in weights(upload))
    kept = {file.relative_to(played.folder).parts for file in played.folder.rglob("*.ckpt")}
    assert kept and all("clients" in parts for parts in kept)


# Interruptions


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_killed_at_a_change_of_a_file_it_continues_to_the_same_bytes(federation, first, played, tmp_path, share):
    folder = copied(first, tmp_path / "run")
    made = federation(folder, *TWO)
    killed(folder, made.gather, at=1 + int(share * played.changes))
    assert files_of_rounds(folder) != files_of_rounds(played.folder)
    made.gather()
    assert files_of_rounds(folder) == files_of_rounds(played.folder)


@pytest.mark.parametrize(("file", "damage"), [("round.json", cut), ("round.json", flip), (f"start/{WEIGHTS}", flip)])
def test_what_was_handed_over_and_is_damaged_is_made_anew(federation, played, tmp_path, file, damage):
    folder = copied(played.folder, tmp_path / "run")
    damage(folder / "rounds/sketch/0/global" / file)
    federation(folder, *TWO).gather()
    assert files_of_rounds(folder) == files_of_rounds(played.folder)


# Settings


@pytest.fixture(scope="session")
def parts(federation, tmp_path_factory) -> dict[str, Any]:
    """What a federation is made of beside its settings."""
    made = federation(tmp_path_factory.mktemp("parts"))
    names = ("client", "data", "anchors", "merge", "make_trainer")
    return {name: getattr(made, name) for name in names} | {"run_dir": str(made.folder.path)}


KRUM = Krum(byzantine=1)
MERGES = MergeModule(SHAPES_CLIP, reject_outliers=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, r"^federation\.rounds must be at least 1, got 0"),
        ({"rounds": 10**20}, r"^federation\.rounds 1000.*: a manifest counts 1,000,000 at most"),
        ({"epochs_per_round": 0}, r"^federation\.epochs_per_round must be at least 1"),
        ({"total_epochs": 0}, r"^federation\.total_epochs must be at least 1"),
        ({"rounds": 2, "total_epochs": 3}, r"^federation\.total_epochs 3: cannot be shared out evenly over 2 rounds"),
        (
            {"total_epochs": 2, "epochs_per_round": 1},
            r"^federation\.total_epochs stands in place of federation\.epochs_per_round",
        ),
        ({"share": 1.5}, r"^federation\.share must lie in"),
        ({"rounds": 2, "optimizer": "keep"}, r"^federation\.optimizer keep: flexlora hands over factors that no"),
        ({"rounds": 2, "poison": Poison("photo")}, r"^federation\.poison is for one round; leave it out"),
        ({"ranks": {"clipart": 2}}, r"^federation\.ranks clipart: no such domain"),
        ({"ranks": {"photo": 0}}, r"^federation\.ranks\.photo must be at least 1"),
        (
            {"rounds": 2, "ranks": {"photo": 2}, "aggregation": "fedit"},
            r"^federation\.ranks: fedit takes clients of one rank; use --federation\.aggregation flexlora",
        ),
        (
            {"rounds": 2, "merge": MERGES, "aggregation": "flora"},
            r"^merge\.reject_outliers: anchors cannot judge what clients of flora send",
        ),
        (
            {"rounds": 2, "merge": MergeModule(SHAPES_CLIP, weights="reach")},
            r"^merge\.weights reach: clients say theirs in the last round alone; use samples or uniform",
        ),
        ({"rounds": 2, "method": KRUM}, r"krum needs at least 5 clients"),
        ({"rounds": 2, "last_method": KRUM}, r"krum needs at least 5 clients"),
        ({"last_method": "nosuch"}, r"^federation\.last_method nosuch: no such method"),
        (
            {"last_method": "ties", "method": KRUM},
            r"^federation\.last_method: nothing would use merge\.method, as there is one round",
        ),
        (
            {"rounds": 2, "aggregation": "fedit", "last_method": "ties", "method": KRUM},
            r"^federation\.last_method: nothing would use merge\.method, as fedit averages the clients",
        ),
        (
            {"rounds": 2, "make_trainer": partial(L.Trainer, max_epochs=-1, max_steps=3)},
            r"^federation\.rounds: set federation\.epochs_per_round",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(parts, settings, message):
    with pytest.raises(InputError, match=message):
        RoundsFederation(**parts | settings).check()


@pytest.mark.parametrize(
    ("settings", "rounds", "last"),
    [
        ([], "average", "sap"),
        (["--merge.method=ties"], "ties", "ties"),
        (["--merge.method=average", "--federation.last_method=sap", "--prune.sparsity=0.5"], "average", "sap"),
        (["--merge.method=sap", "--federation.last_method=ties"], "sap", "ties"),
    ],
)
def test_rounds_and_the_last_may_be_merged_by_two_methods(federation, tmp_path, settings, rounds, last):
    made = federation(tmp_path, "--federation.rounds=2", *settings)
    assert made.method.name == rounds
    assert list(made.plan.methods) == ["average", last]
    if "--prune.sparsity=0.5" in settings:
        assert made.plan.methods["sap"].sparsity == 0.5


# Blocks that all clients send, and easy images first

BLOCKS = ["--model.sent_blocks=[2,3]", "--data.curriculum.start=0.5", "--data.batch_size=8"]


def test_named_blocks_cross_the_wire_and_the_others_stay_each_client_s_own(federation, first, tmp_path):
    folder = tmp_path / "run"
    made = federation(folder, *TWO, *BLOCKS, "--federation.aggregation=fedit")
    made.gather()
    uploads = {client: read_adapter(folder / "uploads" / client) for client in ("cartoon", "photo")}
    start = handed(folder)
    for adapter in (*uploads.values(), start, *made.sent.adapters):
        assert {block_of(name) for name in adapter.layers} == {2, 3}
    for name, layer in start.layers.items():
        for factor in ("A", "B"):
            own = [getattr(one.layers[name], factor) for one in uploads.values()]
            assert_close(getattr(layer, factor), torch.stack(own).mean(0))
    homes = {client: folder / "clients" / client for client in uploads}
    starts = {client: made.agreed.turn(1, None, [Handed(start, None)], home).start for client, home in homes.items()}
    for client, home in homes.items():
        (own,) = read_uploads([home / "last.ckpt"])
        for name, layer in own.layers.items():
            expected = start.layers.get(name, layer)
            assert torch.equal(starts[client][name].B, expected.B) and expected.B.any()
    assert not torch.equal(starts["cartoon"][LAYER].B, starts["photo"][LAYER].B)
    steps = [
        torch.load(home / "clients" / "photo" / "last.ckpt", weights_only=True)["global_step"]
        for home in (folder, folder / "rounds/sketch/1")
    ]
    assert steps == [19 // 8, 31 // 8], "the share of the images grows over all rounds"
    shutil.rmtree(folder / "uploads" / "photo")
    shutil.copytree(first / "uploads" / "photo", folder / "uploads" / "photo")
    with pytest.raises(InputError, match=r"'photo' has layers of blocks \[0, 1, 2, 3\], model.sent_blocks is \[2, 3\]"):
        federation(folder, *TWO, *BLOCKS, "--federation.aggregation=fedit").gather()


@pytest.mark.parametrize("way", ["flora", "fedex_lora", "ffa_lora", "fedsa_lora"])
def test_ways_that_need_all_layers_refuse_blocks(federation, tmp_path, way):
    with pytest.raises(InputError, match=rf"model\.sent_blocks: {way} needs all layers of a client; use fedit"):
        federation(tmp_path, *TWO, *BLOCKS, f"--federation.aggregation={way}")


def test_in_several_rounds_blocks_are_named(federation, tmp_path):
    with pytest.raises(InputError, match=r"model\.sent_blocks: in several rounds .* name them, such as \[2,3\]"):
        federation(tmp_path, *TWO, "--model.sent_blocks=0.5")
