"""A client's site: answers the server's question with the upload of its own domain, trained by its own settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from filelock import FileLock
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from packaging.version import Version

from sap_lightning import __version__
from sap_lightning.cli import SapCLI
from sap_lightning.console import quieten
from sap_lightning.errors import InputError
from sap_lightning.files import writing
from sap_lightning.flower.simulation import client_options, is_virtual
from sap_lightning.flower.turn import upload_of
from sap_lightning.flower.wire import Parts, Question, parts_in, question_in, upload_record

log = logging.getLogger(__name__)
app = ClientApp()
_quieten_once = cache(quieten)


class UnfitSite(InputError):
    """Why a site cannot answer, in words that may leave it."""


@app.lifespan()
def _quiet(context: Context) -> Iterator[None]:
    _quieten_once()  # a process that Ray has started answers for one virtual node after another
    yield


@app.train("upload")
def answer(message: Message, context: Context) -> Message:
    """The site's upload, or in its place one line that says nothing of the site's machine."""
    try:
        upload = _upload(question_in(message.content), parts_in(message.content), context)
        return Message(upload_record(upload), reply_to=message)
    except UnfitSite as error:
        log.error("%s", error)
        reason = str(error)
    except InputError as error:
        log.error("%s", error)
        reason = "cannot train at its settings; the site's log says why"
    except Exception as error:
        log.exception("training failed")
        reason = f"{type(error).__name__}; the site's log says more"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _upload(question: Question, parts: Parts, context: Context) -> Path:
    """The upload, which is trained now unless it stands.

    Raises:
        InputError: when the site cannot train.
        UnfitSite: when its adapter would not be what the server asks for.
    """
    cli = SapCLI("client", _options(context))
    _require_fit(cli, question)
    _require_one_process(cli, question)
    with writing(cli.run_folder.path):
        cli.run_folder.path.mkdir(parents=True, exist_ok=True)
        # A SuperNode that was killed may leave its training behind, which ends first.
        last = FileLock(cli.run_folder.path / ".flower.lock").acquire()
    with last:
        return upload_of(cli, question, parts)


def _options(context: Context) -> list[str]:
    """The site's own settings; those of the run where the node is a virtual one, which has none."""
    if is_virtual(context.node_config):
        return client_options(str(context.run_config["config"]), context.node_config)
    config = context.node_config.get("config")
    if not isinstance(config, str):
        raise InputError("config is not set; start the SuperNode with --node-config 'config=\"/path/to/site.yaml\"'")
    return ["--config", config]


def _require_fit(cli: SapCLI, question: Question) -> None:
    if Version(__version__) < Version(question.version):
        raise UnfitSite(f"the site has sap-lightning {__version__}, the server asks for {question.version} or later")
    if cli.datamodule.class_names != question.class_names:
        raise UnfitSite("the site's classes are not the server's; set data.class_names to the same names at both")
    cli.merge.configure_model()
    if cli.merge.base_fingerprint != question.base_fingerprint:
        raise UnfitSite(f"the site's base is {cli.merge.base_fingerprint}, the server's {question.base_fingerprint}")


def _require_one_process(cli: SapCLI, question: Question) -> None:
    """More would start Flower's own process anew."""
    upload = cli.run_folder.round(question.unseen, question.round).upload(cli.datamodule.require_domain())
    if not upload.exists() and cli.make_trainer(logger=False).world_size > 1:
        raise InputError(
            "trainer.devices: a SuperNode trains in one process; set 1, or train with the command client, whose upload"
            " is then sent as it stands"
        )
