-- Accounts, one-time links and the audit log. Times are Unix microseconds.
--
-- name_key is compared byte by byte: what makes two names equal is decided in core/names.py alone, never by a locale.
-- first_admin is 1 in the row made through the set-up link and null elsewhere; being unique, it makes "the first"
-- exact under races.
create table {namespace}_users (
    id text collate "C" not null primary key,
    name text not null,
    name_key text collate "C" not null unique,
    role text not null check (role in ('admin', 'user')),
    password_hash text,
    failures bigint not null default 0,
    created_us bigint not null,
    password_changed_us bigint,
    disabled_us bigint,
    first_admin smallint unique check (first_admin = 1)
);
---
-- One row that takes the failures of accounts that do not exist, so that they cost what the others cost.
create table {namespace}_nobody (
    id smallint not null primary key check (id = 1),
    failures bigint not null
);
---
insert into {namespace}_nobody (id, failures) values (1, 0);
---
-- At most one live link for a purpose and subject: issuing the next voids the one before.
create table {namespace}_one_time (
    purpose text collate "C" not null,
    subject text collate "C" not null,
    digest text collate "C" not null,
    created_us bigint not null,
    expires_us bigint not null,
    consumed_us bigint,
    primary key (purpose, subject)
);
---
create table {namespace}_audit (
    position bigint generated always as identity primary key,
    at_us bigint not null,
    type text not null,
    envelope text not null
);
---
create function {namespace}_audit_refuse() returns trigger language plpgsql as $$
begin
    raise exception 'the audit log is append-only';
end
$$;
---
create trigger {namespace}_audit_keeps before update or delete or truncate on {namespace}_audit
    for each statement execute function {namespace}_audit_refuse();
---
-- Writers take turns until they commit: otherwise position 8 may be visible before 7 is, and whoever reads on from 8
-- never sees 7.
create function {namespace}_audit_in_order() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('{namespace}_audit', 0));
    return null;
end
$$;
---
create trigger {namespace}_audit_order before insert on {namespace}_audit
    for each statement execute function {namespace}_audit_in_order();
