"""What of a table of addresses is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coatcheck.core.geo import NOWHERE, Location, MaxMindGeography
from coatcheck.errors import ConfigurationError
from coatcheck.server.geo_file import geography_of


class Rows:
    def __init__(self, record: object) -> None:
        self.record = record

    def get(self, ip_address: str) -> object:
        if isinstance(self.record, Exception):
            raise self.record
        return self.record


@pytest.mark.parametrize(
    "record",
    [
        None,
        "KR",
        ValueError("an address of the other family"),
        {"country": "KR"},
        {"country": {"iso_code": "kr"}},
        {"country": {"iso_code": "KOR"}},
        {"location": {"latitude": 91, "longitude": 0}},
        {"location": {"latitude": float("nan"), "longitude": 0}},
        {"location": {"latitude": True, "longitude": 0}},
        {"autonomous_system_number": "64496"},
        {"autonomous_system_number": 2**32},
    ],
)
def test_what_is_missing_or_odd_is_not_known(record: object) -> None:
    assert MaxMindGeography([Rows(record)]).locate("203.0.113.7") == NOWHERE


def test_the_first_table_that_tells_decides_and_the_owners_country_is_second_best() -> None:
    city = {"country": {"iso_code": "KR"}, "location": {"latitude": 37.5, "longitude": 127, "accuracy_radius": 20}}
    other = {"registered_country": {"iso_code": "US"}, "autonomous_system_number": 64496}
    found = MaxMindGeography([Rows(city), Rows(other)]).locate("203.0.113.7")
    assert found == Location(country="KR", position=(37.5, 127.0), radius_km=20, asn=64496)
    assert MaxMindGeography([Rows(other)]).locate("203.0.113.7").country == "US"


def test_a_real_table_is_read(tmp_path: Path) -> None:
    pytest.importorskip("maxminddb")
    writer = pytest.importorskip("mmdb_writer")
    netaddr = pytest.importorskip("netaddr")
    made = writer.MMDBWriter(ip_version=6, ipv4_compatible=True, float_type="f64")
    record = {"country": {"iso_code": "KR"}, "location": {"latitude": 37.5, "longitude": 127.0, "accuracy_radius": 5}}
    made.insert_network(netaddr.IPSet(["203.0.113.0/24", "2001:db8::/32"]), record)
    file = tmp_path / "city.mmdb"
    made.to_db_file(str(file))
    with geography_of([file]) as geography:
        known = Location(country="KR", position=(37.5, 127.0), radius_km=5)
        assert geography.locate("203.0.113.7") == geography.locate("2001:db8::1") == known
        assert geography.locate("198.51.100.1") == NOWHERE


def test_a_file_that_is_no_table_is_refused_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("maxminddb")
    (tmp_path / "x.mmdb").write_bytes(b"no table")
    for name in ("x.mmdb", "missing.mmdb"):
        with pytest.raises(ConfigurationError, match=f"{name} is no table"), geography_of([tmp_path / name]):
            pass
