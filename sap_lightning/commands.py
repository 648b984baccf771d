"""The commands, a function each: they put the parts together and show what became of it."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only

from sap_lightning.callbacks.prune import SaliencyPruneCallback
from sap_lightning.cli import SapCLI
from sap_lightning.console import table_console
from sap_lightning.data.folder import ImageFolderDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.client import UNTRAINED
from sap_lightning.federation.comparable import comparable
from sap_lightning.federation.one_shot import OneShotFederation, chosen_domains, server_logger
from sap_lightning.federation.run_folder import SERVER_SETTINGS, SERVER_SETTINGS_OF_ROUNDS, write_settings
from sap_lightning.federation.sweep import ALL, SEED, check, folder_of, measure
from sap_lightning.files import locked, refuse_existing, write_csv, writing
from sap_lightning.flower.app_folder import write_app
from sap_lightning.fuse import fuse
from sap_lightning.instruction_cli import InstructionCLI, tunes_on_instructions
from sap_lightning.merging.merged import Merged, push_to_hub, record_in
from sap_lightning.merging.selection import check_rejection
from sap_lightning.modules.merge import MergeModule
from sap_lightning.reporting.instruction import show_instruction
from sap_lightning.reporting.layers import report_table
from sap_lightning.reporting.show import show
from sap_lightning.reporting.table import metrics_table
from sap_lightning.results import Results, refuse_earlier

MODEL_CONFIG_FILE = "config.json"


def fit(args: Sequence[str]) -> None:
    """Train a client on each domain, merge for every unseen domain, and evaluate. Continues an interrupted run."""
    if tunes_on_instructions(args):
        _tune(args)
        return
    cli = SapCLI("fit", args, fit.__doc__)
    refuse_earlier(Path(cli.config_init.federation.run_dir))
    with locked(cli.config_init.federation.run_dir):
        federation = cli.federation()
        federation.run()
        show(federation, comparable(federation), cli.config_init.federation.report)


def _tune(args: Sequence[str]) -> None:
    cli = InstructionCLI(args, fit.__doc__)
    with locked(cli.config_init.federation.run_dir):
        federation = cli.federation()
        federation.run()
        rank_zero_only(show_instruction)(federation)


def sweep(args: Sequence[str]) -> None:
    """Measure merge methods over sparsities, seeds, unseen domains and settings. Continues an interrupted sweep."""
    cli = SapCLI("sweep", args, sweep.__doc__)
    wanted, run_dir = cli.config_init.sweep, Path(cli.config_init.federation.run_dir)
    if cli.config_init.merge.method is not None:
        raise InputError("merge.method is for fit and merge; name methods in sweep.methods")
    if cli.config_init.federation.last_method is not None:
        raise InputError("federation.last_method is for fit; name methods in sweep.methods")
    if cli.config_init.federation.unseen is not None:
        raise InputError("federation.unseen is for fit; name domains in sweep.unseen")
    cli.check_sweep(wanted)

    def federation_of(seed: int, variant: Mapping[str, Any], results: Results) -> OneShotFederation:
        one = cli.varied({SEED: seed, **variant})
        unseen = None if wanted.unseen == ALL else chosen_domains("sweep.unseen", wanted.unseen, one.datamodule.domains)
        server = SERVER_SETTINGS if one.config_init.federation.rounds == 1 else SERVER_SETTINGS_OF_ROUNDS
        return one.federation(
            run_dir=str(folder_of(run_dir, seed, variant, server, one.model.kind)),
            unseen=unseen,
            plan=wanted.plan_of(variant, one.config_init.prune),
            results=results,
            free_settings=server,
        )

    check(wanted, partial(federation_of, results=Results(run_dir)))
    with locked(run_dir):
        results = Results(run_dir)  # anew, as another command may have written until now
        write_settings(run_dir / "sweep.yaml", cli.settings())
        first, points = measure(wanted, partial(federation_of, results=results))
        show(first, results.only(points), cli.config_init.federation.report)


def client(args: Sequence[str]) -> None:
    """Train one client (--data.domain) at its own site and write its upload to <federation.run_dir>/uploads."""
    rank_zero_only(print)(f"Upload: {SapCLI('client', args, client.__doc__).train()}")


def merge(args: Sequence[str]) -> None:
    """Prune and merge uploads (--uploads DIR [DIR ...]) on the server and write the result to --merge.output."""
    cli = SapCLI("merge", args, merge.__doc__)
    options, module = cli.config_init.merge, cli.merge
    if not cli.uploads:
        raise InputError("--uploads is not set; name the folders that clients sent")
    if options.output is None:
        raise InputError("merge.output is not set; name a new folder for the merged model")
    refuse_existing(options.output)
    module.require_towers()
    module.use(module.read_uploads(cli.uploads))
    if module.reject_outliers:
        check_rejection(len(module.adapters))
    metrics = _merge_on_anchors(cli) if module.looks_at_anchors else {}
    merged = module.merged or module.merge()
    _leave_behind(merged, module, options, metrics)


def _merge_on_anchors(cli: SapCLI) -> dict[str, float]:
    logger = server_logger(cli.config_init.federation.run_dir)
    trainer = cli.make_trainer([SaliencyPruneCallback()], logger=logger, **UNTRAINED)
    with writing(cli.config_init.federation.run_dir):
        trainer.validate(cli.merge, datamodule=cli.config_init.anchors, verbose=False)
    return {"anchor_loss": float(trainer.callback_metrics["anchor_loss"])}


def compress(args: Sequence[str]) -> None:
    """Compress blocks of MODEL, CLIP or a language model, into --compress.output. Continues an interrupted run."""
    cli = SapCLI("compress", args, compress.__doc__)
    compression = cli.config_init.compress
    if (given := cli.given("anchors")) and not compression.looks_at_anchors:
        raise InputError(f"{given}: {compression.model} is shown no anchors by {compression.method}; leave it out")
    # Images are preprocessed as the model says itself.
    anchors = cli.varied({"model.base": compression.model}).config_init.anchors
    print(f"Compressed by {compression.method}: {compression.run(anchors)}")


@rank_zero_only
def _leave_behind(merged: Merged, module: MergeModule, options: Any, metrics: Mapping[str, float]) -> None:
    module.save(options.output, metrics)
    if options.report:
        table_console().print(report_table(merged.adapters, merged.weights, merged.update))
    measured = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
    if len(merged.adapters) == 1:
        print(f"One upload only: what was written is {merged.adapters[0].name}, as {merged.method.name} changes it")
    print(f"Merged {len(merged.adapters)} uploads by {merged.method.name}{measured}: {options.output}")
    if options.push_to_hub:
        print(f"Uploaded to {push_to_hub(options.output, options.push_to_hub)}")


def test(args: Sequence[str]) -> None:
    """Evaluate zero-shot, an upload or a merged model (--uploads DIR) on the whole of --data.domain."""
    cli = SapCLI("test", args, test.__doc__)
    model = _model(cli)
    # A merged model's images are preprocessed as it says itself.
    data = cli.varied({"model.base": model.base}).datamodule
    (metrics,) = cli.make_trainer(logger=False, **UNTRAINED).test(model, datamodule=data, verbose=False)
    rank_zero_only(table_console().print)(metrics_table(metrics))


def predict(args: Sequence[str]) -> None:
    """Classify a folder (--predict.images DIR --data.class_names [a,b]) by zero-shot or --uploads DIR; writes a CSV."""
    cli = SapCLI("predict", args, predict.__doc__)
    options, class_names = cli.config_init.predict, cli.config.data.class_names
    if class_names is None:
        raise InputError("data.class_names is not set; name the classes to choose from")
    refuse_existing(options.output)
    if not Path(options.output).absolute().parent.is_dir():
        raise InputError(f"predict.output {options.output}: there is no such folder; make it first")
    model = _model(cli)
    data = ImageFolderDataModule(
        options.images, class_names, model.base, cli.datamodule.batch_size, options.class_groups
    )
    trainer = cli.make_trainer(logger=False, devices=1, **UNTRAINED)
    batches = cast(list[torch.Tensor], trainer.predict(model, datamodule=data))
    columns = ["image", *(["group"] if data.groups else []), "class", "probability"]
    write_csv(Path(options.output), [columns, *_likeliest(data, torch.cat(batches))])
    print(f"{len(data.names)} images: {options.output}")


def _likeliest(data: ImageFolderDataModule, probabilities: torch.Tensor) -> Iterator[list[str]]:
    """The likeliest class of every image, or of every group for every image."""
    for name, row in zip(data.names, probabilities, strict=True):
        for group, numbers in (data.groups or {"": list(range(len(row)))}).items():
            probability, place = row[numbers].max(0)
            yield [name, *([group] if group else []), data.class_names[numbers[int(place)]], f"{probability:.4f}"]


def flower(args: Sequence[str]) -> None:
    """Write the app folder with which flwr run asks clients at their own sites (init DIR); see docs/flower.md."""
    parser = ArgumentParser(prog="python -m sap_lightning flower", description=flower.__doc__)
    parser.add_argument("action", choices=["init"])
    parser.add_argument("folder", help="new folder for the app")
    write_app(os.path.expanduser(parser.parse_args(args).folder))


def _model(cli: SapCLI) -> MergeModule:
    """The base, or what --uploads names: an upload, a merged adapter or a merged model."""
    uploads, base, templates = cli.uploads, cli.model.base, cli.model.templates
    if len(uploads) > 1:
        raise InputError(f"--uploads: {cli.command} takes one, got {len(uploads)}; merge them first")
    for upload in uploads:
        record_in(Path(upload), "*.safetensors")  # a person may have changed the rest
    if uploads and (Path(uploads[0]) / MODEL_CONFIG_FILE).is_file():
        return MergeModule(uploads[0], templates)
    module = MergeModule(base, templates)
    if uploads:
        (adapter,) = module.read_uploads(uploads)
        if adapter.kind == "prompt" and (given := cli.given("model.templates")):
            raise InputError(f"{given}: {uploads[0]} is a prompt, which stands in their place; leave it out")
        module.set_update(adapter.layers)
    return module


COMMANDS = {
    "fit": fit,
    "sweep": sweep,
    "client": client,
    "merge": merge,
    "fuse": fuse,
    "compress": compress,
    "test": test,
    "predict": predict,
    "flower": flower,
}
