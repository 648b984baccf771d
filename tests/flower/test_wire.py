"""What crosses the wire comes out as it went in, or is refused."""

from __future__ import annotations

import pytest
from flower.uploads import QUESTION, record_of, write_upload
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from references import contents

from sap_lightning.errors import InputError
from sap_lightning.flower import wire
from sap_lightning.flower.wire import files_in, question_in, question_record, upload_record


def over_the_wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


def test_an_upload_arrives_byte_for_byte_and_is_as_large_as_its_files(tmp_path):
    folder = write_upload(tmp_path / "photo", "photo")
    record = over_the_wire(upload_record(folder))
    assert files_in(record) == contents(folder)
    sent = sum(len(array.data) for array in record.array_records["files"].values())
    assert sent == sum(file.stat().st_size for file in folder.iterdir())


def test_a_question_arrives_as_it_was_asked():
    assert question_in(over_the_wire(question_record(QUESTION))) == QUESTION


@pytest.mark.parametrize("content", [{}, {"question": ConfigRecord({"base": "x"})}])
def test_a_question_of_another_version_is_refused(content):
    with pytest.raises(InputError, match="it has another version of sap-lightning"):
        question_in(RecordDict(content))


def other(name: str) -> Array:
    return Array("uint8", (1,), "bytes", name.encode())


DAMAGES = {
    "an extra file": (
        lambda files: files.update({"notes.txt": other("x")}),
        r"sent the files \[.*'notes.txt'\], expected",
    ),
    "a name that leads out": (lambda files: files.update({"../photo": other("x")}), r"sent the files \['../photo', "),
    "a missing file": (lambda files: files.pop("manifest.json"), "sent the files .*, expected .*manifest.json"),
    "another content": (
        lambda files: files.update({"adapter_config.json": other("{}")}),
        "adapter_config.json: its sha256 is not what the client said; it was damaged on its way",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_exactly_those_of_an_upload_are_refused(tmp_path, damage):
    change, reason = DAMAGES[damage]
    record = record_of(tmp_path, "photo")
    change(record.array_records["files"])
    with pytest.raises(InputError, match=reason):
        files_in(record)


def test_an_upload_without_digests_is_refused(tmp_path):
    record = record_of(tmp_path, "photo")
    with pytest.raises(InputError, match="its sha256 is not what the client said"):
        files_in(RecordDict({"files": record["files"]}))


@pytest.mark.parametrize("content", [{}, {"files": ConfigRecord({"manifest.json": b"{}"})}, {"files": ArrayRecord()}])
def test_a_reply_of_another_form_is_refused(content):
    with pytest.raises(InputError, match=r"sent the files \[\], expected"):
        files_in(RecordDict(content))


def test_an_upload_that_is_too_large_is_refused(tmp_path, monkeypatch):
    record = record_of(tmp_path, "photo")
    size = sum(map(len, files_in(record).values()))
    monkeypatch.setattr(wire, "MOST_BYTES", size)
    files_in(record)
    monkeypatch.setattr(wire, "MOST_BYTES", size - 1)
    with pytest.raises(InputError, match=f"sent {size} bytes, more than {size - 1}"):
        files_in(record)
