-- Sessions, cuts, rate limits and the keys of ids.
--
-- The key begins with the tag, and all sessions of a subject share theirs: an owner's sessions are found by the key
-- alone and need no index of their own. A table with row ids keeps records of this size in 13 % fewer bytes than one
-- without. due_us is a lower bound of the moment a row may be removed; it is corrected when it comes, so that
-- activity never writes an index. A tombstone has ended_us, and holds nothing the session held.
create table {namespace}_sessions (
    tag integer not null,
    handle text not null,
    due_us integer not null,
    owner text not null,
    created_us integer not null,
    seen_us integer not null,
    idle_us integer not null,
    absolute_us integer not null,
    ended_us integer,
    reason text,
    ended_by text,
    schema integer not null,
    version integer not null,
    digest text not null,
    subject text not null,
    auth_us integer not null,
    prev_digest text,
    sealed blob,
    alias_until_us integer,
    authority text not null,
    fields text not null,
    primary key (tag, handle)
);
---
create index {namespace}_sessions_due on {namespace}_sessions (due_us);
---
create table {namespace}_owners (
    owner text not null primary key,
    cut_us integer not null
) without rowid;
---
create index {namespace}_owners_cut on {namespace}_owners (cut_us);
---
create table {namespace}_rate_limits (
    key text not null primary key,
    tat_us integer not null
) without rowid;
---
create table {namespace}_meta (
    key text not null primary key,
    value blob not null
) without rowid;
