"""One question to every site, and what comes of it: each reply is checked before it is written, and recorded."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from sap_lightning.errors import InputError, short
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.files import append_bytes, new_folder, write_bytes, write_files
from sap_lightning.flower.simulation import Partitions
from sap_lightning.flower.sites import Register, Site
from sap_lightning.flower.wire import MESSAGE_TYPE, Question, files_in, question_record
from sap_lightning.io.adapter import Adapter

log = logging.getLogger(__name__)
Reader = Callable[[Mapping[str, bytes], str], Adapter]
"""Reads and validates the files of an upload; the second argument is what messages call its sender."""
RECORD_FILE = "replies.jsonl"
SECONDS_BETWEEN_LOOKS = 1.0
_QUESTION_LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Flower's own words for a site that is away, or a reply that did not arrive; it takes no answer to that question."""


class Collection:
    """Uploads of a run folder, and how the missing ones get there.

    A site that was away, or was started anew with a question open to it, is asked again: Flower delivers none twice.

    Args:
        grid: Flower's way to the sites.
        register: which site may speak for which domain.
        question: what they are asked.
        read: reads and validates what they send.
        folder: of the run.
        known: uploads that stand in it.
        later: what each site that takes part in a later round is asked, by domain; all are asked the question if not
            given.
    """

    def __init__(
        self,
        grid: Grid,
        register: Register | Partitions,
        question: Question,
        read: Reader,
        folder: RunFolder,
        known: Iterable[Adapter] = (),
        later: Mapping[str, RecordDict] | None = None,
    ) -> None:
        self.grid = grid
        self.register = register
        self.question = question
        self.read = read
        self.folder = folder
        self.later = later
        self.taken = {adapter.name: adapter.sha256 for adapter in known}
        self._asked: dict[str, Site] = {}
        self._open: set[str] = set()
        self._answered: set[Site] = set()
        self._refused: set[Site] = set()

    @property
    def uploads(self) -> list[Path]:
        """Those that stand, in the order of their domains."""
        return [self.folder.upload(domain) for domain in sorted(self.taken)]

    def wait(self, quorum: int, timeout: float) -> list[Path]:
        """Asks every site whose upload does not stand, and takes what they send.

        Ends when there are enough and no site owes an answer, or the time is up.

        Args:
            quorum: uploads that are enough.
            timeout: seconds.

        Returns:
            The uploads that stand.

        Raises:
            InputError: fewer than the quorum.
        """
        until = time.monotonic() + timeout
        while True:
            self.ask(ttl=until - time.monotonic() + SECONDS_BETWEEN_LOOKS)
            if self._open:
                self.take(self.grid.pull_messages(sorted(self._open)))
            if time.monotonic() >= until or (len(self.taken) >= quorum and not self._owing()):
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._record_missing()
        if len(self.taken) < quorum:
            raise InputError(
                f"{len(self.taken)} uploads ({', '.join(sorted(self.taken)) or 'none'}) are fewer than the"
                f" quorum of {quorum}; they stay in {self.folder.path / 'uploads'}, a second run asks for the others"
            )
        return self.uploads

    def _owing(self) -> list[Site]:
        """Sites that were asked and have not answered, as they were when they were asked last."""
        last = {site.domain: site for site in self._asked.values()}
        return [site for site in last.values() if not (self._stands(site) or site in self._answered)]

    def _stands(self, site: Site) -> bool:
        return site.domain in self.taken

    def _record_missing(self) -> None:
        for site in self._owing():
            self._record(site, "late", "has not answered in time; a second run asks it again")
        seen = {*self.taken, *(site.domain for site in self._asked.values())}
        for domain in sorted(set(self.later or self.register.domains or ()) - seen):
            self._record(Site(domain, self.register.keys.get(domain, ""), 0, ""), "absent", "no node of it came")

    def ask(self, ttl: float) -> None:
        """Puts the question to every site that may speak, whose upload is missing and that was not asked yet.

        Args:
            ttl: seconds for which an answer counts.
        """
        sites = [site for site in self.register.sites(self.grid.get_nodes()) if self._takes_part(site)]
        asked = {*self._answered, *(self._asked[number] for number in self._open)}
        wanted = []
        for site in sites:
            if reason := self.register.refusal(site, sites):
                if site not in self._refused:
                    self._refused.add(site)
                    self._record(site, "refused", reason)
            elif not self._stands(site) and site not in asked:
                self.register.bind(site)
                wanted.append(site)
        questions = [Message(self._content(site), site.node, MESSAGE_TYPE, ttl=ttl) for site in wanted]
        for number, site in zip(self.grid.push_messages(questions), wanted, strict=True):
            if number:  # else Flower has no such node any more
                log.info("%s: asked", site.domain)
                self._asked[number] = site
                self._open.add(number)

    def _takes_part(self, site: Site) -> bool:
        return self.later is None or site.domain in self.later

    def _content(self, site: Site) -> RecordDict:
        return question_record(self.question) if self.later is None else self.later[site.domain]

    def take(self, replies: Iterable[Message]) -> None:
        """Writes the uploads among these replies, and records every one."""
        for reply in replies:
            number = reply.metadata.reply_to_message_id
            site = self._asked.get(number)
            if site is None or not (reply.has_error() or reply.metadata.src_node_id == site.node):
                self._record(Site("", "", reply.metadata.src_node_id, ""), "refused", "it was not asked")
                continue
            self._open.discard(number)
            if not _is_lost(reply, site):
                self._answered.add(site)
                self._take(reply, site)

    def _take(self, reply: Message, site: Site) -> None:
        if reply.has_error():
            self._record(site, "failed", short(reply.error.reason))
            return
        try:
            files = files_in(reply.content)
            adapter = self._checked(files, site)
        except InputError as error:
            self._record(site, "refused", str(error))
            return
        with new_folder(self.folder.upload(site.domain)) as staging:
            write_files(staging, files)
        self.taken[site.domain] = adapter.sha256
        self._open = {number for number in self._open if self._asked[number].domain != site.domain}
        self._record(site, "taken", size=sum(map(len, files.values())))

    def _checked(self, files: Mapping[str, bytes], site: Site) -> Adapter:
        """What a site sent, if it is what it may send.

        Raises:
            InputError: when it is not.
        """
        if self._stands(site):
            raise InputError("it has answered before")
        adapter = self.read(files, site.domain)
        assert adapter.manifest is not None  # one of the files
        if adapter.name != site.domain:
            raise InputError(f"the upload is of {short(adapter.name)}, for which another site speaks")
        if list(adapter.manifest.class_names) != self.question.class_names:
            raise InputError("the upload's class_names are not those that were asked for")
        if adapter.manifest.round != self.question.round:
            raise InputError(f"the upload is of round {adapter.manifest.round}, asked was {self.question.round}")
        # A alone stays as the common seed drew it until B has moved.
        sender = next((domain for domain, sha256 in self.taken.items() if sha256 == adapter.sha256), None)
        if sender and adapter.manifest.parts != ("lora_A",):
            raise InputError(f"the same adapter as that of {sender}")
        return adapter

    def _record(self, site: Site, outcome: str, reason: str = "", size: int = 0) -> None:
        """Says what became of a site, and adds it to the run's record."""
        said = f"{size} bytes" if size else reason
        log.log(logging.INFO if size else logging.WARNING, "%s: %s, %s", site.domain or site.node, outcome, said)
        row = {"domain": site.domain, "key": site.key, "node": str(site.node), "outcome": outcome}
        line = json.dumps(row | {"reason": reason, "bytes": size}).encode() + b"\n"
        file = self.folder.path / RECORD_FILE
        (append_bytes if file.is_file() else write_bytes)(file, line)


def _is_lost(reply: Message, site: Site) -> bool:
    """Whether Flower itself, not the site, says that there is no reply."""
    return reply.has_error() and reply.error.code in _QUESTION_LOST and reply.metadata.src_node_id != site.node
