import os

from sap_lightning.fingerprints import digest, file_fingerprint


def test_a_digest_depends_on_every_value_and_not_on_key_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(1, 2), digest(2, 1), digest([1, 2]), digest(1), digest("1")}) == 5


def test_rewrites_in_quick_succession_with_mtime_kept_all_show(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0")
    stat = file.stat()
    seen = set()
    for number in range(5):
        file.write_bytes(str(number).encode())
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.add(file_fingerprint([file]))
    assert len(seen) == 5


def test_files_of_equal_stats_elsewhere_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"same")
    assert file_fingerprint([tmp_path / "a" / "file"]) != file_fingerprint([tmp_path / "b" / "file"])
