"""Sweeps: the whole protocol for several merge methods, sparsities, seeds and settings, resumable point by point."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from sap_lightning.errors import InputError, check_seed, check_share
from sap_lightning.federation.one_shot import OneShotFederation
from sap_lightning.federation.points import Plan
from sap_lightning.federation.run_folder import CONFIG_FILE, SERVER_SETTINGS, RunFolder, belongs_to, read_settings
from sap_lightning.fingerprints import digest
from sap_lightning.io.manifest import Kind
from sap_lightning.merging import METHODS, SAP, MergeMethod
from sap_lightning.results import Result

ALL = "all"
USUAL: list[MergeMethod | str] = ["average", "sap"]
SEED = "seed_everything"
LONGEST_NAME = 150
"""Characters of a folder's name; file systems take 255 bytes."""
OWN_SETTINGS = {
    SEED: "sweep.seeds",
    "merge.method": "sweep.methods",
    "federation.unseen": "sweep.unseen",
    "federation.last_method": "sweep.methods",
    "federation.poison.domain": "a sweep of its own",
    "sweep": "the group sweep itself",
    "federation.run_dir": "the option itself",
}
"""Settings that a sweep cannot vary as it does others, and what does."""


@dataclass
class Sweep:
    """Everything that is measured: methods × sparsities × seeds × unseen domains × other settings.

    Args:
        methods: names of merge methods, or methods with settings of their own (class_path and init_args), or all that
            there are.
        sparsities: values of ρ for the methods that prune; each method's own if empty.
        seeds: of the clients' training; the table's spread is over these.
        unseen: domains to hold out in turn, or all.
        over: values to go through for other settings, by name: ``{anchors.num_pairs: [4, 8, 16]}``. Clients are
            trained anew only for settings of model, data and trainer.

    Raises:
        InputError: for an unknown method, a sparsity outside [0, 1], an empty list or values that look alike.
    """

    methods: list[MergeMethod | str] | str = field(default_factory=lambda: [*USUAL])
    sparsities: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    unseen: list[str] | str = ALL
    over: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.methods == ALL:
            self.methods = [*METHODS]
        if isinstance(self.methods, str):
            raise InputError(f"sweep.methods: got {self.methods!r}, expected a list such as [{self.methods}], or {ALL}")
        for setting in ("methods", "seeds", "unseen"):
            if not getattr(self, setting):
                raise InputError(f"sweep.{setting} is empty")
        for setting in ("sparsities", "seeds", "unseen"):
            values = getattr(self, setting)
            if isinstance(values, list) and (twice := [value for value in values if values.count(value) > 1]):
                raise InputError(f"sweep.{setting} names {twice[0]} twice")
        for sparsity in self.sparsities:
            check_share("sweep.sparsities", sparsity)
        for seed in self.seeds:
            check_seed("sweep.seeds", seed)
        for name in self.methods:
            if isinstance(name, str) and name not in METHODS:
                raise InputError(f"sweep.methods: no method {name!r}; there are {', '.join(METHODS)}")
        if self.sparsities and "prune.sparsity" in self.over:
            raise InputError("sweep.over.prune.sparsity: sweep.sparsities sets it already; name one of them")
        for name, values in self.over.items():
            _check_variants(name, values)

    def variants(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every seed with every combination of the other settings."""
        for seed, *values in product(self.seeds, *self.over.values()):
            # In the order in which results.jsonl gives them back.
            yield seed, dict(sorted(zip(self.over, values, strict=True)))

    def plan_of(self, variant: Mapping[str, Any], sap: SAP) -> Plan:
        """What is measured of one variant.

        Args:
            variant: the settings that it changes, by name.
            sap: what the name ``sap`` stands for.

        Raises:
            InputError: when two methods have the same name, or sparsities are given and none prunes.
        """
        methods = self.labelled(sap)
        if self.sparsities and all(method.sparsity is None for method in methods.values()):
            raise InputError("sweep.sparsities: no method of sweep.methods prunes; name one that does, or leave it out")
        return Plan(methods, self.sparsities, dict(variant), keeps_models=False)

    def labelled(self, sap: SAP) -> dict[str, MergeMethod]:
        """The methods by what the table calls them: their names, and settings where these are not the defaults.

        Args:
            sap: what the name ``sap`` stands for.

        Raises:
            InputError: when two have the same name.
        """
        methods: dict[str, MergeMethod] = {}
        for given in self.methods:
            if isinstance(given, MergeMethod):
                method, label = given, label_of(given, sap, with_sparsity=not self.sparsities)
            else:
                method, label = sap if given == SAP.name else METHODS[given](), given
            if label in methods:
                raise InputError(f"sweep.methods: {label} is named twice")
            methods[label] = method
        return methods


FederationFactory = Callable[[int, Mapping[str, Any]], OneShotFederation]
"""Gives the federation of a seed and variant."""


def check(sweep: Sweep, federation_of: FederationFactory) -> None:
    """Finds a fault in any variant before the first client is trained."""
    for seed, variant in sweep.variants():
        if seed == sweep.seeds[0]:
            federation_of(seed, variant).check()


def measure(sweep: Sweep, federation_of: FederationFactory) -> tuple[OneShotFederation, list[Result]]:
    """Measures what is missing of every seed and variant.

    Returns:
        The first federation, and the points of all, without their metrics.
    """
    first: OneShotFederation | None = None
    wanted: list[Result] = []
    for seed, variant in sweep.variants():
        federation = federation_of(seed, variant)
        federation.run()
        first = first or federation
        wanted += federation.wanted()
    assert first is not None
    return first, wanted


def _check_variants(name: object, values: object) -> None:
    """Refuses what a sweep has a setting of its own for, and values that the table could not tell apart."""
    if not isinstance(name, str):
        raise InputError(f"sweep.over.{name}: is no name of a setting, such as model.rank")
    for setting, own in OWN_SETTINGS.items():
        if belongs_to(name, [setting]):
            raise InputError(f"sweep.over.{name}: that is what {own} is for")
    if not isinstance(values, list) or not values:
        raise InputError(f"sweep.over.{name} must be a list of values, got {values!r}")
    shown = [Result("merge", "", "", "", variant={name: value}).variant_label.removeprefix(", ") for value in values]
    if alike := [label for label in shown if shown.count(label) > 1]:
        raise InputError(f"sweep.over.{name}: two values are {alike[0]} in the table; leave one out or rename it")


def label_of(method: MergeMethod, sap: SAP, with_sparsity: bool = False) -> str:
    """A method's name and the settings that its name alone does not stand for, such as ``sap (space factor)``.

    One that is under another is shown in the same way: ``lines (method ties (scale 0.5))``.

    Args:
        method: the method.
        sap: what the name ``sap`` stands for; other names stand for their defaults.
        with_sparsity: whether ρ counts.
    """
    try:
        defaults = sap.settings if type(method) is SAP else type(method)().settings
    except TypeError:  # a method of one's own may have settings without defaults
        defaults = {}

    def shown(name: str, value: Any) -> Any:
        under = getattr(method, name)
        return label_of(under, SAP(), with_sparsity) if isinstance(under, MergeMethod) else value

    settings = method.settings.items()
    changed = [f"{name} {shown(name, value)}" for name, value in settings if (name, value) not in defaults.items()]
    changed = [setting for setting in changed if with_sparsity or not setting.startswith("sparsity ")]
    return f"{method.name} ({', '.join(changed)})" if changed else method.name


def folder_of(
    run_dir: str | Path,
    seed: int,
    variant: Mapping[str, Any],
    server: Sequence[str] = SERVER_SETTINGS,
    kind: Kind = "lora",
) -> Path:
    """Where clients of a seed and of settings that their training depends on are kept.

    That is the run folder itself where ``fit`` has trained them there.

    Args:
        run_dir: of the sweep.
        seed: of the clients' training.
        variant: the settings that the sweep changes, by name.
        server: settings that no client's training depends on.
        kind: of the clients.
    """
    training = {name: value for name, value in variant.items() if not belongs_to(name, server)}
    if not training and _seed_of(RunFolder(run_dir).of_kind(kind).path) == seed:
        return Path(run_dir)
    name = ",".join([f"seed_{seed}", *(f"{name}={value}" for name, value in training.items())])
    plain = re.sub(r"[^\w.,=+-]+", "_", name)
    if plain != name or len(plain) > LONGEST_NAME:
        plain = f"{plain[:LONGEST_NAME]}_{digest(name)[:12]}"
    return Path(run_dir) / plain


def _seed_of(run_dir: Path) -> int | None:
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        return None
    seed = read_settings(file).get(SEED)
    return None if seed is None else int(seed)
