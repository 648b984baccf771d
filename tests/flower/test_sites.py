"""Who may speak for which domain."""

from __future__ import annotations

import json

import pytest
from flower.grid import node

from sap_lightning.errors import InputError
from sap_lightning.flower.sites import Register, fingerprint_of, site_of

# ssh-keygen -t ecdsa -b 384 -f key; ssh-keygen -e -m PKCS8 -f key.pub; ssh-keygen -lf key.pub
PUBLIC_KEY = b"""\
-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEhlHywxpoR6NsPRMSfFO2KXp2uoEC4J+k
urpwEYJiXdw0x0pvXHTBObpwuyBBMqdUTXjmI3etCxZxiP24Rq33DG9xLSa15AJn
0NwZg6No/lnGFm9YRh4IBWDVZwQ4Bju2
-----END PUBLIC KEY-----
"""
FINGERPRINT = "SHA256:A6NKD03dvJY3VOpxhx/GMnaFjC/9Mb46FY0P323EnUI"


def test_a_key_s_fingerprint_is_that_of_ssh_keygen():
    assert fingerprint_of(PUBLIC_KEY) == FINGERPRINT


def test_the_first_key_that_is_bound_to_a_domain_alone_may_speak_for_it(tmp_path):
    first, second = site_of(node("photo", 1)), site_of(node("photo", 2))
    register = Register(tmp_path / "sites.json")
    assert register.refusal(first, [first]) == ""
    register.bind(first)
    for known in (register, Register(tmp_path / "sites.json")):
        known.bind(second)
        assert known.refusal(first, [first, second]) == ""
        assert known.refusal(second, [second]).startswith(f"the domain is bound to another key, {first.key}; if it has")
    assert json.loads((tmp_path / "sites.json").read_text()) == {"photo": first.key}


def test_of_two_nodes_of_one_name_neither_speaks_until_one_is_bound(tmp_path):
    sites = [site_of(node("photo", 1)), site_of(node("photo", 2))]
    register = Register(tmp_path / "sites.json")
    for site, other in (sites, sites[::-1]):
        assert register.refusal(site, sites).startswith(f"the key {other.key} is registered under this name too;")
    (tmp_path / "sites.json").write_text(json.dumps({"photo": sites[1].key}))
    register = Register(tmp_path / "sites.json")
    assert [register.refusal(site, sites) == "" for site in sites] == [False, True]


@pytest.mark.parametrize("name", ["", "../photo", "ph\noto"])
def test_a_node_must_be_registered_under_the_name_of_a_domain(tmp_path, name):
    site = site_of(node(name, 1))
    assert "its name must be at most 64 letters" in Register(tmp_path / "sites.json").refusal(site, [site])


def test_only_clients_that_take_part_speak(tmp_path):
    sites = [site_of(node("photo", 1)), site_of(node("sketch", 2))]
    register = Register(tmp_path / "sites.json", ["photo"])
    assert [register.refusal(site, sites) for site in sites] == ["", "it is not in federation.clients"]


@pytest.mark.parametrize("content", ["[]", '{"photo": 1}', "{"])
def test_a_faulty_file_is_named(tmp_path, content):
    (tmp_path / "sites.json").write_text(content)
    with pytest.raises(InputError, match=r"sites\.json: "):
        Register(tmp_path / "sites.json")
