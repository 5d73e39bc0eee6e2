"""A store that comes back without its data: nobody who signs in afterwards is signed out by it."""

from __future__ import annotations

import shutil

import pytest

from coatcheck import Coatcheck, Settings
from coatcheck.session import SendCookie
from tests.servers.valkey import ValkeySingle

pytestmark = pytest.mark.servers
SETTINGS = Settings(server_key=bytes(32))


def sign_in(coat: Coatcheck, subject: str) -> str:
    session = coat.session(None)
    session.login(subject)
    assert isinstance(session.cookie_action, SendCookie)
    return session.cookie_action.id.text


def test_a_node_gives_an_emptied_store_its_keys_back_before_it_makes_an_id(valkey_single: ValkeySingle) -> None:
    with ValkeySingle() as server:
        running = Coatcheck(server.url, settings=SETTINGS)
        before = sign_in(running, "ann")
        assert running.session(before).subject == "ann"
        server.kill()
        shutil.rmtree(server.node.directory.path / "appendonlydir")
        server.ensure_running()
        after = sign_in(running, "bob")
        late = Coatcheck(server.url, settings=SETTINGS)
        assert [coat.session(after).subject for coat in (running, late)] == ["bob", "bob"]
        assert [coat.session(before).subject for coat in (running, late)] == [None, None]
        running.close()
        late.close()
