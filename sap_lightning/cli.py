"""The commands, all on one LightningCLI: every setting has the same name in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from sap_lightning.callbacks.prune import SaliencyPruneCallback
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.data.folder import ImageFolderDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation import UNTRAINED, OneShotFederation, chosen_domains, server_logger, train_client
from sap_lightning.files import held, refuse_existing, write_csv, write_text
from sap_lightning.layer_report import report_table
from sap_lightning.merging import METHODS, Average
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.output import push_to_hub
from sap_lightning.results import Results
from sap_lightning.run_folder import RunFolder, hold_to
from sap_lightning.sweep import Sweep, assign, check, folder_of, measure, options_of

METHOD_OPTION = "--merge.method"
MODEL_CONFIG_FILE = "config.json"
ADAPTER = {"default": None, "help": "an upload, a merged adapter or a merged model"}
PARTS = {"client", "data", "anchors", "prune", "merge", "make_trainer", "config"}


class SapCLI(LightningCLI):
    """LightningCLI with the groups anchors, prune, merge and federation beside model, data and trainer."""

    def __init__(self, command: Callable[..., None], args: Sequence[str], **extra: dict[str, Any]) -> None:
        self.command = command
        self.extra = extra
        super().__init__(
            CLIPLoRAModule,
            DomainDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": f"python -m sap_lightning {command.__name__}", "description": command.__doc__},
            args=with_class_paths(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(AnchorDataModule, "anchors")
        parser.add_class_arguments(SaliencyPruneCallback, "prune")
        parser.add_class_arguments(MergeModule, "merge")
        parser.add_class_arguments(OneShotFederation, "federation", skip=PARTS, instantiate=False)
        for target in ("data.base", "anchors.base", "merge.base"):
            parser.link_arguments("model.base", target)
        if self.command is sweep:
            parser.add_class_arguments(Sweep, "sweep")
        parser.link_arguments("model.templates", "merge.templates")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        for name, options in self.extra.items():
            parser.add_argument(f"--{name}", **options)

    def instantiate_classes(self) -> None:
        """Makes the parts; what one of them says of bad input is said as it is, not as jsonargparse wraps it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise

    def make_trainer(self, callbacks: Sequence[L.Callback] = (), **overrides: Any) -> L.Trainer:
        """A Trainer as configured, with these callbacks besides the configured ones and these overrides."""
        trainer = self.config_init.trainer
        configured = copy.deepcopy(trainer.callbacks or [])
        if isinstance(configured, L.Callback):
            configured = [configured]
        if trainer.logger not in (None, True):
            overrides.pop("logger", None)
        if trainer.enable_progress_bar is False:
            overrides["enable_progress_bar"] = False
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        return self.instantiate_trainer(callbacks=[*configured, *callbacks], **overrides)

    def federation(self, **changed: Any) -> OneShotFederation:
        """The federation as configured, but for what is changed."""
        parts = self.config_init
        return OneShotFederation(
            client=self.model,
            data=self.datamodule,
            anchors=parts.anchors,
            prune=parts.prune,
            merge=parts.merge,
            make_trainer=self.make_trainer,
            config=self.settings(),
            **{**parts.federation, **changed},
        )

    def settings(self) -> dict[str, Any]:
        """Everything that was configured, as plain values."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        return {name: value for name, value in settings.items() if name != "config"}


def with_class_paths(args: Sequence[str]) -> list[str]:
    """``--merge.method ties`` stands for that class, so that ``--merge.method.sparsity`` and the like are known."""
    named = list(args)
    has_settings = any(arg.startswith(f"{METHOD_OPTION}.") for arg in named)
    for index, arg in enumerate(named):
        option, equals, name = arg.partition("=")
        if option == METHOD_OPTION and equals:
            named[index] = f"{option}={_class_path(name, has_settings)}"
        elif option == METHOD_OPTION and index + 1 < len(named):
            named[index + 1] = _class_path(named[index + 1], has_settings)
    return named


def _class_path(name: str, has_settings: bool) -> str:
    # Without settings of its own sap is what the groups prune and merge say.
    if name not in METHODS or (name == "sap" and not has_settings):
        return name
    return f"{METHODS[name].__module__}.{METHODS[name].__qualname__}"


def fit(args: Sequence[str]) -> None:
    """Train a client on each domain, merge for every unseen domain, and evaluate. Continues an interrupted run."""
    cli = SapCLI(fit, args)
    with held(cli.config_init.federation.run_dir):
        cli.federation().run()


def sweep(args: Sequence[str]) -> None:
    """Measure merge methods over sparsities, seeds, unseen domains and settings. Continues an interrupted sweep."""
    whole = SapCLI(sweep, args)
    plan, run_dir = whole.config_init.sweep, Path(whole.config_init.federation.run_dir)
    if whole.config_init.merge.method is not None:
        raise InputError("merge.method is for fit and merge; name methods in sweep.methods")
    if whole.config_init.federation.unseen is not None:
        raise InputError("federation.unseen is for fit; name domains in sweep.unseen")

    def federation_of(seed: int, variant: Mapping[str, Any]) -> OneShotFederation:
        one = SapCLI(sweep, [*args, *options_of(seed, variant)])
        domains = one.datamodule.domains
        unseen = None if plan.unseen == "all" else chosen_domains("sweep.unseen", plan.unseen, domains)
        return assign(one.federation(run_dir=str(folder_of(run_dir, seed, variant)), unseen=unseen), plan, variant)

    check(plan, federation_of)
    with held(run_dir):
        write_text(run_dir / "sweep.yaml", yaml.safe_dump(whole.settings(), sort_keys=False, allow_unicode=True))
        measure(plan, federation_of, Results(run_dir))


def client(args: Sequence[str]) -> None:
    """Train one client (--data.domain) at its own site and write its upload to <federation.run_dir>/uploads."""
    cli = SapCLI(client, args)
    folder, domain = RunFolder(cli.config_init.federation.run_dir), cli.datamodule.domain
    if (folder.path / "config.yaml").is_file():
        hold_to(folder.path, cli.settings())
    if domain is not None:
        hold_to(folder.client(domain), cli.settings())
    upload = train_client(cli.model, cli.datamodule, folder, cli.make_trainer, f"client {domain}")
    rank_zero_only(print)(f"Upload: {upload}")


def merge(args: Sequence[str]) -> None:
    """Prune and merge uploads (--uploads DIR [DIR ...]) on the server and write the result to --merge.output."""
    cli = SapCLI(merge, args, uploads={"nargs": "+", "required": True, "help": "folders that clients sent"})
    module, prune, output = cli.config_init.merge, cli.config_init.prune, cli.config_init.merge.output
    if output is None:
        raise InputError("merge.output is not set; name a new folder for the merged model")
    refuse_existing(output)
    module.adapters = module.read_uploads(cli.config_init.uploads)
    if module.method is None:
        module.offered_method = prune.method_for(module)
    module.require_towers()
    module.check_rejection(len(module.adapters))
    metrics = {}
    if module.looks_at_anchors:
        metrics = _merge_on_anchors(cli)
    else:
        module.merge()
    _leave_behind(module, output, metrics)


def _merge_on_anchors(cli: SapCLI) -> dict[str, float]:
    parts = cli.config_init
    trainer = cli.make_trainer([parts.prune], logger=server_logger(parts.federation.run_dir), **UNTRAINED)
    trainer.validate(parts.merge, datamodule=parts.anchors, verbose=False)
    return {"anchor_loss": float(trainer.callback_metrics["anchor_loss"])}


@rank_zero_only
def _leave_behind(module: MergeModule, output: str, metrics: dict[str, float]) -> None:
    module.save(output, metrics)
    if module.report:
        Console().print(report_table(module.adapters, module.client_weights(), module.update))
    measured = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
    print(f"Merged {len(module.adapters)} uploads by {module.merge_method.name}{measured}: {output}")
    if module.push_to_hub:
        print(f"Uploaded to {push_to_hub(output, module.push_to_hub)}")


def test(args: Sequence[str]) -> None:
    """Evaluate zero-shot, an upload or a merged model (--adapter DIR) on the whole of --data.domain."""
    cli = SapCLI(test, args, adapter=ADAPTER)
    cli.make_trainer(logger=False, **UNTRAINED).test(_model(cli), datamodule=cli.datamodule)


def predict(args: Sequence[str]) -> None:
    """Classify a folder of images (--images DIR --class_names [a,b]) by zero-shot or --adapter DIR; writes a CSV."""
    images = {"required": True, "help": "folder of images, at any depth"}
    names = {"type": list[str], "required": True, "help": "classes to choose from"}
    output = {"default": "predictions.csv", "help": "new file for image, class and probability"}
    cli = SapCLI(predict, args, adapter=ADAPTER, images=images, class_names=names, output=output)
    parts = cli.config_init
    refuse_existing(parts.output)
    if not Path(parts.output).absolute().parent.is_dir():
        raise InputError(f"--output {parts.output}: there is no such folder; make it first")
    model = _model(cli)
    data = ImageFolderDataModule(parts.images, parts.class_names, model.base, cli.datamodule.batch_size)
    trainer = cli.make_trainer(logger=False, devices=1, **UNTRAINED)
    batches = cast(list[torch.Tensor], trainer.predict(model, datamodule=data))
    probability, label = torch.cat(batches).max(1)
    rows = zip(data.names, label.tolist(), probability.tolist(), strict=True)
    table = [[name, parts.class_names[index], f"{share:.4f}"] for name, index, share in rows]
    write_csv(Path(parts.output), [["image", "class", "probability"], *table])
    print(f"{len(data.names)} images: {parts.output}")


def _model(cli: SapCLI) -> MergeModule:
    """The base, or what --adapter names: an upload, a merged adapter or a merged model."""
    module, folder = cli.config_init.merge, cli.config_init.adapter
    if folder and (Path(folder) / MODEL_CONFIG_FILE).is_file():
        return MergeModule(base=folder, templates=module.templates)
    if folder:
        module.adapters, module.method = module.read_uploads([folder]), Average()
        module.merge()
    return module
