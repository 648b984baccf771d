"""The commands, all on one LightningCLI: every setting has the same name in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.callbacks.prune import SaliencyPruneCallback
from sap_lightning.data.anchors import AnchorDataModule
from sap_lightning.data.domains import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation import UNTRAINED, OneShotFederation, server_logger, train_client
from sap_lightning.files import refuse_existing
from sap_lightning.modules.clip_lora import CLIPLoRAModule
from sap_lightning.modules.merge import MergeModule
from sap_lightning.run_folder import RunFolder, hold_to

MODEL_CONFIG_FILE = "config.json"
PARTS = {"client", "data", "anchors", "prune", "merge", "make_trainer", "config"}


class SapCLI(LightningCLI):
    """LightningCLI with the groups anchors, prune, merge and federation beside model, data and trainer."""

    def __init__(self, command: Callable[..., None], args: Sequence[str], **extra: dict[str, Any]) -> None:
        self.extra = extra
        super().__init__(
            CLIPLoRAModule,
            DomainDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": f"python -m sap_lightning {command.__name__}", "description": command.__doc__},
            args=list(args),
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
        parser.link_arguments("model.templates", "merge.templates")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)
        for name, options in self.extra.items():
            parser.add_argument(f"--{name}", **options)

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

    def settings(self) -> dict[str, Any]:
        """Everything that was configured, as plain values."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        return {name: value for name, value in settings.items() if name != "config"}


def fit(args: Sequence[str]) -> None:
    """Train a client on each domain, merge for every unseen domain, and evaluate. Continues an interrupted run."""
    cli = SapCLI(fit, args)
    parts = cli.config_init
    OneShotFederation(
        client=cli.model,
        data=cli.datamodule,
        anchors=parts.anchors,
        prune=parts.prune,
        merge=parts.merge,
        make_trainer=cli.make_trainer,
        config=cli.settings(),
        **parts.federation,
    ).run()


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
    module, output = cli.config_init.merge, cli.config_init.merge.output
    if output is None:
        raise InputError("merge.output is not set; name a new folder for the merged model")
    refuse_existing(output)
    module.adapters = module.read_uploads(cli.config_init.uploads)
    logger = server_logger(cli.config_init.federation.run_dir)
    trainer = cli.make_trainer([cli.config_init.prune], logger=logger, **UNTRAINED)
    trainer.validate(module, datamodule=cli.config_init.anchors, verbose=False)
    if trainer.is_global_zero:
        module.save(output)
    loss = trainer.callback_metrics["anchor_loss"]
    rank_zero_only(print)(f"Merged {len(module.adapters)} uploads, anchor loss {loss:.4f}: {output}")


def test(args: Sequence[str]) -> None:
    """Evaluate zero-shot, an upload or a merged model (--adapter DIR) on the whole of --data.domain."""
    cli = SapCLI(test, args, adapter={"default": None, "help": "an upload, a merged adapter or a merged model"})
    module, folder = cli.config_init.merge, cli.config_init.adapter
    if folder and (Path(folder) / MODEL_CONFIG_FILE).is_file():
        module = MergeModule(base=folder, templates=module.templates)
    elif folder:
        module.adapters = module.read_uploads([folder])
        module.merge()
    cli.make_trainer(logger=False, **UNTRAINED).test(module, datamodule=cli.datamodule)
