"""Every statement of the SQLite store, in one place and for one name space.

Values never become part of a statement: they are bound. What is replaced in the texts is the name space, which
`StoreOptions` has checked, and the texts of this file. `coatcheck.stores.schema` says what the columns mean.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

COLUMNS: Final = (
    "tag",
    "handle",
    "due_us",
    "ended_us",
    "reason",
    "schema",
    "version",
    "digest",
    "owner",
    "subject",
    "created_us",
    "auth_us",
    "idle_us",
    "absolute_us",
    "seen_us",
    "authority",
    "fields",
    "prev_digest",
    "sealed",
    "alias_until_us",
)

_PARTS: Final = {
    "{columns}": ", ".join(COLUMNS),
    # At the very microsecond of a deadline the session is over.
    "{alive}": "ended_us is null and absolute_us > :now and seen_us + idle_us > :now",
    # Rows with a key of another kind were not written by this package and are in no list.
    "{own_key}": (
        "typeof(tag) = 'integer' and typeof(handle) = 'text' and handle not glob '*[^A-Za-z0-9_-]*' "
        "and typeof(created_us) = 'integer'"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """The texts by name. The defaults are templates; `statements_of` fills them in."""

    find: str = "select {columns} from {namespace}_sessions where tag = ? and handle = ?"
    of_owner: str = (
        "select {columns} from {namespace}_sessions where tag = ? and owner = ? and ended_us is null "
        "order by created_us, handle"
    )
    list_by_owner: str = (
        "select {columns} from {namespace}_sessions where tag = :tag and owner = :owner and {alive} and {own_key} "
        "and (created_us, handle) > (:number, :handle) order by created_us, handle limit :limit"
    )
    scan: str = (
        "select {columns} from {namespace}_sessions where (tag, handle) > (:number, :handle) and {alive} and {own_key} "
        "order by tag, handle limit :limit"
    )
    evicted_by: str = (
        "select tag, handle from {namespace}_sessions where tag = ? and ended_by = ? order by created_us, handle"
    )
    insert: str = (
        "insert into {namespace}_sessions (tag, handle, due_us, schema, version, digest, owner, subject, "
        "created_us, auth_us, idle_us, absolute_us, seen_us, authority, fields) "
        "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    end: str = (
        "update {namespace}_sessions set ended_us = :now, reason = :reason, ended_by = :ended_by, due_us = :due, "
        "created_us = :created, absolute_us = :absolute, digest = :mark, schema = :schema, version = 0, seen_us = 0, "
        "idle_us = 0, auth_us = 0, owner = '', subject = '', prev_digest = null, sealed = null, alias_until_us = null, "
        "authority = '', fields = '' where tag = :tag and handle = :handle"
    )
    write_fields: str = "update {namespace}_sessions set fields = ?, version = ? where tag = ? and handle = ?"
    write_rotation: str = (
        "update {namespace}_sessions set version = :version, digest = :digest, authority = :authority, "
        "prev_digest = :prev_digest, sealed = :sealed, alias_until_us = :until, "
        # The alias has to go when its time is over, so the row is due then.
        "due_us = min(due_us, coalesce(:until, due_us)) where tag = :tag and handle = :handle"
    )
    touch: str = (
        "update {namespace}_sessions set seen_us = :seen where tag = :tag and handle = :handle and seen_us < :seen "
        "and {alive}"
    )
    # A row of other bytes than ours is still found by its row id, or a sweep would meet it for ever.
    due: str = "select {columns}, rowid from {namespace}_sessions where due_us <= ? order by due_us limit ?"
    remove: str = "delete from {namespace}_sessions where rowid = ?"
    put_off: str = "update {namespace}_sessions set due_us = ? where rowid = ?"
    forget_alias: str = (
        "update {namespace}_sessions set due_us = ?, prev_digest = null, sealed = null, alias_until_us = null "
        "where rowid = ?"
    )

    cut: str = "select cut_us from {namespace}_owners where owner = ?"
    raise_cut: str = (
        "insert into {namespace}_owners (owner, cut_us) values (?, ?) "
        "on conflict (owner) do update set cut_us = max(cut_us, excluded.cut_us)"
    )
    forget_cuts: str = (
        "delete from {namespace}_owners where owner in (select owner from {namespace}_owners where cut_us <= ? limit ?)"
    )

    rate: str = "select tat_us from {namespace}_rate_limits where key = ?"
    write_rate: str = (
        "insert into {namespace}_rate_limits (key, tat_us) values (?, ?) "
        "on conflict (key) do update set tat_us = excluded.tat_us"
    )
    forget_rate: str = "delete from {namespace}_rate_limits where key = ?"
    rates_after: str = "select key, tat_us from {namespace}_rate_limits where key > ? order by key limit ?"

    meta: str = "select value from {namespace}_meta where key = ?"
    write_meta: str = "insert into {namespace}_meta (key, value) values (?, ?)"


def statements_of(namespace: str) -> Statements:
    """The statements of one name space."""
    templates = Statements()
    return Statements(**{each.name: _filled(getattr(templates, each.name), namespace) for each in fields(Statements)})


def _filled(template: str, namespace: str) -> str:
    for mark, text in _PARTS.items():
        template = template.replace(mark, text)
    return template.replace("{namespace}", namespace)
