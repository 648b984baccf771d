"""How often a poisoned client is left out of a merge by its anchor loss, how often an honest one is, and what it costs.

python benchmarks/rejection.py

Every seed draws three worlds, so that there are twelve clients: four styles, three of each. Each style is unseen in
turn, and K of the nine clients of the other styles federate, one of which is poisoned. *By hand* is the merge without
it. More seeds train four honest clients each, of one world, and every three of these are a federation.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import lightning as L
import numpy as np
from jsonargparse import auto_cli
from worlds import SHAPES_CLIP

from sap_lightning.console import quieten
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.shapes.world import DOMAINS, draw_anchors, draw_domain
from sap_lightning.federation.client import UNTRAINED, train_client
from sap_lightning.federation.poison import Poison, PoisonKind
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import new_folder
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging import SAP, Average, MergeMethod
from sap_lightning.merging.selection import standings
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule

SIZES = (3, 4, 8)
WORLDS = 3
METHODS = {
    "average": Average(),
    "sap": SAP(sparsity=0.9, space="factor"),
    "sap, median": SAP(sparsity=0.9, space="factor", consensus="median"),
}
"""As configs/shapes.yaml has them."""


def main(
    run: Path = Path("runs/rejection"), seeds: Sequence[int] = (0, 1, 2), honest_seeds: Sequence[int] = tuple(range(25))
) -> None:
    """Prints the tables.

    Args:
        run: folder where worlds and clients are kept; what stands in it is not made again.
        seeds: of worlds and training, with poisoned clients.
        honest_seeds: of worlds and training, without.
    """
    quieten()
    logging.getLogger("sap_lightning").setLevel(logging.ERROR)
    show_honest([thrown for seed in honest_seeds for thrown in Site(run / f"honest_{seed}", seed, worlds=1).honest()])
    show_poisoned([trial for seed in seeds for trial in Site(run / f"poisoned_{seed}", seed, WORLDS).poisoned()])


class Trial(NamedTuple):
    """One federation with a poisoned client.

    Attributes:
        kind: what the poisoned client does.
        clients: how many there are, with it.
        caught: whether it is left out.
        thrown: how many honest ones are.
        accuracy: on the unseen style, by method and what is merged.
    """

    kind: PoisonKind
    clients: int
    caught: bool
    thrown: int
    accuracy: dict[str, dict[str, float]]


class Site:
    """The worlds of a seed, and all clients in them.

    Args:
        folder: where they are kept.
        seed: of the worlds and of all training.
        worlds: how many of each style there are.
    """

    def __init__(self, folder: Path, seed: int, worlds: int) -> None:
        if not (folder / "world").exists():
            draw(folder / "world", seed, worlds)
        self.data = DomainDataModule(str(folder / "world" / "domains"), base=SHAPES_CLIP, seed=seed)
        self.anchors = AnchorDataModule(str(folder / "world" / "anchors"), base=SHAPES_CLIP)
        self.merge = MergeModule(SHAPES_CLIP)
        self.folder, self.seed = RunFolder(folder), seed
        self.trainer = make_trainer(**UNTRAINED)
        self.known: dict[tuple[str, str, tuple[str, ...]], float] = {}

    def honest(self) -> Iterator[int]:
        """How many are left out of every three clients, and of all of them."""
        adapters = self.read(self.train(domain) for domain in self.data.domains)
        self.merge.use(adapters, METHODS["sap"])
        self.trainer.validate(self.merge, self.anchors, verbose=False)
        yield len(self.left_out(adapters))
        for unseen in adapters:
            yield len(self.left_out([adapter for adapter in adapters if adapter is not unseen]))

    def poisoned(self) -> Iterator[Trial]:
        """Every unseen style, number of clients and poison."""
        for unseen in DOMAINS:
            clients = [domain for domain in by_turns(self.data.domains) if style(domain) != unseen]
            for kind in get_args(PoisonKind):
                for size in SIZES:
                    yield self.trial(unseen, clients[:size], kind)

    def trial(self, unseen: str, clients: Sequence[str], kind: PoisonKind) -> Trial:
        """The first of the clients is the poisoned one."""
        poison = Poison(clients[0], kind)
        honest = self.read(map(self.train, clients[1:]))
        every = self.read([self.spoil(poison), *map(self.train, clients[1:])])
        target = next(domain for domain in self.data.domains if style(domain) == unseen)
        accuracy = {
            name: {
                "by hand": self.accuracy(name, method, honest, target),
                "all": self.accuracy(name, method, every, target),
            }
            for name, method in METHODS.items()
        }
        out = self.left_out(every)
        kept = [adapter for adapter in every if adapter.name not in out]
        for name, method in METHODS.items():
            accuracy[name]["rejecting"] = self.accuracy(name, method, kept, target)
        return Trial(kind, len(clients), clients[0] in out, len(out - {clients[0]}), accuracy)

    def train(self, domain: str) -> Path:
        """An honest client's upload."""
        L.seed_everything(self.seed, verbose=False)
        client = CLIPLoRAModule(SHAPES_CLIP, learning_rate=2e-3, reach=False, seed=self.seed)
        return train_client(client, self.data.for_domain(domain), self.folder, make_trainer, domain, {})

    def spoil(self, poison: Poison) -> Path:
        """The poisoned client's upload."""
        assert poison.domain is not None
        folder = self.folder.poisoned(poison.name)
        if poison.poisons_labels:
            client = CLIPLoRAModule(SHAPES_CLIP, learning_rate=2e-3, reach=False, seed=self.seed)
            data = poison.relabelled(self.data.for_domain(poison.domain))
            return train_client(client, data, folder, make_trainer, poison.name, {})
        upload = folder.upload(poison.domain)
        if not upload.exists():
            poison.rewrite(self.train(poison.domain), upload)
        return upload

    def read(self, uploads: Iterable[Path]) -> list[Adapter]:
        return self.merge.read_uploads(list(uploads))

    def left_out(self, adapters: Sequence[Adapter]) -> set[str]:
        """Names of the clients that --merge.reject_outliers would leave out."""
        return {one.adapter.name for one in standings(adapters, self.merge.probe()) if one.stands_out}

    def accuracy(self, name: str, method: MergeMethod, adapters: Sequence[Adapter], unseen: str) -> float:
        """Of the merge on a domain; measured once."""
        key = (name, unseen, tuple(adapter.sha256 for adapter in adapters))
        if key not in self.known:
            self.merge.use(adapters, method)
            self.trainer.validate(self.merge, self.anchors, verbose=False)
            (metrics,) = self.trainer.test(self.merge, self.data.for_domain(unseen), verbose=False)
            self.known[key] = metrics["accuracy"]
        return self.known[key]


def draw(folder: Path, seed: int, worlds: int) -> None:
    with new_folder(folder) as draft:
        for number in range(worlds):
            for domain in DOMAINS:
                draw_domain(draft / "domains" / f"{domain}-{number}", domain, 60, 64, WORLDS * seed + number)
        draw_anchors(draft / "anchors", 64, seed)


def style(domain: str) -> str:
    return domain.partition("-")[0]


def by_turns(domains: Sequence[str]) -> list[str]:
    """One of every style, then another of every style, and so on."""
    return sorted(domains, key=lambda domain: domain.partition("-")[::-1])


def show_honest(thrown: Sequence[int]) -> None:
    print(f"honest federations: {len(thrown)}; with a client thrown out: {sum(count > 0 for count in thrown)}\n")


def show_poisoned(trials: Sequence[Trial]) -> None:
    print("| poison | clients | left out | honest ones left out |" + "".join(f" {name} |" for name in columns()))
    print("| --- | ---: | ---: | ---: |" + " ---: |" * len(columns()))
    groups = defaultdict(list)
    for trial in trials:
        groups[trial.kind, trial.clients].append(trial)
    for (kind, clients), group in groups.items():
        cells = [kind, str(clients), f"{sum(trial.caught for trial in group)} of {len(group)}"]
        cells.append(str(sum(trial.thrown for trial in group)))
        cells += [
            f"{np.mean([trial.accuracy[name][merged] for trial in group]):.3f}"
            for name in METHODS
            for merged in ("by hand", "all", "rejecting")
        ]
        print("| " + " | ".join(cells) + " |")


def columns() -> list[str]:
    return [f"{name}, {merged}" for name in METHODS for merged in ("by hand", "all", "rejecting")]


make_trainer = partial(
    L.Trainer,
    accelerator="cpu",
    max_epochs=5,
    enable_model_summary=False,
    enable_progress_bar=False,
    deterministic=True,
    logger=False,
)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
