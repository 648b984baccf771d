"""The parser of ``fit`` for clients that are tuned on instructions."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from sap_lightning.command_cli import TRAINER_DEFAULTS, CommandCLI, class_named
from sap_lightning.data.instructions import InstructionDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.instruction import InstructionFederation
from sap_lightning.modules.vlm_lora import VLMLoRAModule
from sap_lightning.options import config_files_first, path_of, refuse_others


def tunes_on_instructions(args: Sequence[str]) -> bool:
    """Whether a command line names clients that are tuned on instructions."""
    return class_named(args) in (VLMLoRAModule.__name__, path_of(VLMLoRAModule), "sap_lightning.modules.VLMLoRAModule")


class InstructionCLI(CommandCLI):
    """LightningCLI with the groups model, data, federation and trainer of instruction tuning.

    Args:
        args: the command line after ``fit``.
        description: what the command does, for its help.

    Raises:
        InputError: for an unknown option or a faulty setting.
    """

    command = "fit"
    client = VLMLoRAModule

    def __init__(self, args: Sequence[str], description: str | None = None) -> None:
        refuse_others(self.command, args)
        super().__init__(
            VLMLoRAModule,
            InstructionDataModule,
            config_files_first(args),
            description,
            subclass_mode_model=True,
            trainer_defaults={**TRAINER_DEFAULTS, "max_epochs": None},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parts = {"client", "data", "make_trainer", "config"}
        parser.add_class_arguments(InstructionFederation, "federation", skip=parts, instantiate=False)
        for target in ("model.init_args.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)

    def put_together(self) -> None:
        if self.config_init.trainer.max_epochs is not None:
            raise InputError("trainer.max_epochs: federation.epochs_per_round says how long; leave it out")
        self.check_that_it_trains()

    def federation(self) -> InstructionFederation:
        """The federation as configured."""
        return InstructionFederation(
            self.model, self.datamodule, self.make_trainer, config=self.settings(), **self.config_init.federation
        )
