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

FAMILY_COLUMNS: Final = (
    "owner",
    "subject",
    "client",
    "key",
    "grant",
    "created_us",
    "rotated_us",
    "idle_us",
    "absolute_us",
    "generation",
    "digest",
    "prev_digest",
    "sealed",
    "grace_until_us",
    "ended_us",
    "reason",
)

_PARTS: Final = {
    "{columns}": ", ".join(COLUMNS),
    "{session_columns}": ", ".join(f"session.{name}" for name in COLUMNS),
    "{family_columns}": ", ".join(FAMILY_COLUMNS),
    "{this_family}": "tag = :tag and of_session = :of_session and root = :root and name = :name",
    # At the very microsecond of a deadline the session is over.
    "{alive}": "ended_us is null and absolute_us > :now and seen_us + idle_us > :now",
    # What an ended family held goes; who holds it and what recognizes it stay, and its end is where it was.
    "{ended_family}": (
        "ended_us = :at, reason = :reason, due_us = min(absolute_us, rotated_us + idle_us), digest = '', owner = '', "
        "subject = '', grant = '', prev_digest = null, sealed = null"
    ),
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

    # The families of a session, wherever its row is ended or removed.
    forget_families: str = "delete from {namespace}_families where tag = ? and of_session = 1 and root = ?"

    find_family: str = (
        "select {family_columns} from {namespace}_families where tag = ? and of_session = ? and root = ? and name = ?"
    )
    insert_family: str = (
        "insert into {namespace}_families (tag, of_session, root, name, due_us, owner, subject, client, key, grant, "
        "created_us, rotated_us, idle_us, absolute_us, generation, digest, grace_until_us) "
        "values (:tag, :of_session, :root, :name, :due, :owner, :subject, :client, :holder_key, :grant, "
        ":created, :rotated, :idle, :absolute, :generation, :digest, 0)"
    )
    drop_over_families: str = (
        "delete from {namespace}_families where tag = :tag and of_session = 1 and root = :root and "
        "(ended_us is not null or absolute_us <= :now or rotated_us + idle_us <= :now) and :maximum <= "
        "(select count(*) from {namespace}_families where tag = :tag and of_session = 1 and root = :root)"
    )
    drop_oldest_families: str = (
        "delete from {namespace}_families where rowid in (select rowid from {namespace}_families "
        "where tag = ? and of_session = 1 and root = ? order by created_us desc, name desc limit -1 offset ?)"
    )
    # due_us stays: it is a lower bound, and a rotation only moves the end away.
    rotate_family: str = (
        "update {namespace}_families set generation = :generation, digest = :digest, rotated_us = :rotated, "
        "prev_digest = :prev_digest, sealed = :sealed, grace_until_us = :until where {this_family}"
    )
    forget_sealed: str = (
        "update {namespace}_families set sealed = null "
        "where tag = ? and of_session = ? and root = ? and name = ? and sealed is not null"
    )
    end_family: str = "update {namespace}_families set {ended_family} where {this_family}"
    newest_alone: str = (
        "select max(created_us) from {namespace}_families "
        "where tag = ? and of_session = 0 and owner = ? and ended_us is null and typeof(created_us) = 'integer'"
    )
    end_alone: str = (
        "update {namespace}_families set {ended_family} "
        "where tag = :tag and of_session = 0 and owner = :owner and ended_us is null"
    )
    due_families: str = (
        "select rotated_us, idle_us, absolute_us, rowid from {namespace}_families "
        "where due_us <= ? order by due_us limit ?"
    )
    remove_family: str = "delete from {namespace}_families where rowid = ?"
    put_off_family: str = "update {namespace}_families set due_us = ? where rowid = ?"
    sweep_sealed: str = (
        "update {namespace}_families set sealed = null where rowid in (select rowid from {namespace}_families "
        "where sealed is not null and grace_until_us <= ? order by grace_until_us limit ?)"
    )

    add_denial: str = (
        "insert into {namespace}_denials (position, kind, id, until_us, not_before_us) "
        "select max(:now, 1 + coalesce((select max(position) from {namespace}_denials), 0), "
        "1 + coalesce((select seq from sqlite_sequence where name = '{namespace}_denials'), 0)), "
        ":kind, :id, :until, :not_before where not exists (select 1 from {namespace}_denials "
        "where kind = :kind and id = :id and until_us = :until and not_before_us = :not_before)"
    )
    # One row at least, for the end of the log. The end outlives its entries in SQLite's own table.
    denials: str = (
        "select log.last, entry.* from (select coalesce("
        "(select seq from sqlite_sequence where name = '{namespace}_denials'), 0) as last) as log left join "
        "(select position, kind, id, until_us, not_before_us from {namespace}_denials "
        "where position > :after and until_us > :now order by position limit :limit) as entry on true "
        "order by entry.position"
    )
    sweep_denials: str = (
        "delete from {namespace}_denials where position in "
        "(select position from {namespace}_denials where until_us <= ? order by until_us limit ?)"
    )
    # Both looks in one statement, so that both are of one moment.
    standing: str = (
        "select {session_columns}, denied.entries, session.tag is not null from "
        "(select count(*) as entries from {namespace}_denials "
        "where kind = 'jti' and id = :jti and until_us > :now) as denied "
        "left join {namespace}_sessions as session on session.tag = :tag and session.handle = :handle"
    )

    ring: str = "select version, packed from {namespace}_ring"
    first_ring: str = "insert into {namespace}_ring (place, version, packed) values (1, 1, ?) on conflict do nothing"
    next_ring: str = "update {namespace}_ring set packed = ?, version = version + 1 where version = ?"

    tally_changes: str = "select changed, announced, words from {namespace}_changes"
    announce_changes: str = "update {namespace}_changes set announced = announced + ? where words = ?"
    claim_changes: str = "update {namespace}_changes set words = ?"

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
