-- Refresh families, the denylist and the sealed key ring.
--
-- A family of a session lives under it: tag, then of_session (1), then the session's handle as root, so whatever ends
-- the session finds its families by the key alone. One that stands alone (of_session 0) is found by its owner within
-- the tag. due_us is a lower bound of the moment a row may be removed, as with sessions. grace_until_us ends the grace
-- of the predecessor.
create table {namespace}_families (
    tag integer not null,
    of_session integer not null,
    root text not null,
    name text not null,
    due_us integer not null,
    owner text not null,
    subject text not null,
    client text not null,
    key text not null,
    grant text not null,
    created_us integer not null,
    rotated_us integer not null,
    idle_us integer not null,
    absolute_us integer not null,
    generation integer not null,
    digest text not null,
    prev_digest text,
    sealed blob,
    grace_until_us integer not null,
    ended_us integer,
    reason text,
    primary key (tag, of_session, root, name)
);
---
create index {namespace}_families_due on {namespace}_families (due_us);
---
create index {namespace}_families_sealed on {namespace}_families (grace_until_us) where sealed is not null;
---
-- Writers take turns, so positions come in the order of commits. autoincrement remembers the last one when the newest
-- entries are gone. A position is the time in microseconds where that is ahead, so none is given out a second time
-- after an old backup was put back.
create table {namespace}_denials (
    position integer primary key autoincrement,
    kind text not null,
    id text not null,
    until_us integer not null,
    not_before_us integer not null
);
---
create index {namespace}_denials_id on {namespace}_denials (kind, id);
---
create index {namespace}_denials_until on {namespace}_denials (until_us);
---
create table {namespace}_ring (
    place integer primary key check (place = 1),
    version integer not null,
    packed blob not null
);
