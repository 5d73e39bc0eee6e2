-- Accounts, one-time links and the audit log. Times are Unix microseconds.
--
-- name_key is compared byte by byte: what makes two names equal is decided in core/names.py alone. first_admin is 1
-- in the row made through the set-up link and null elsewhere; being unique, it makes "the first" exact under races.
create table {namespace}_users (
    id text not null primary key,
    name text not null,
    name_key text not null unique,
    role text not null check (role in ('admin', 'user')),
    password_hash text,
    failures integer not null default 0,
    created_us integer not null,
    password_changed_us integer,
    disabled_us integer,
    first_admin integer unique check (first_admin = 1)
);
---
-- One row that takes the failures of accounts that do not exist, so that they cost what the others cost.
create table {namespace}_nobody (
    id integer not null primary key check (id = 1),
    failures integer not null
);
---
insert into {namespace}_nobody (id, failures) values (1, 0);
---
-- At most one live link for a purpose and subject: issuing the next voids the one before.
create table {namespace}_one_time (
    purpose text not null,
    subject text not null,
    digest text not null,
    created_us integer not null,
    expires_us integer not null,
    consumed_us integer,
    primary key (purpose, subject)
) without rowid;
---
create table {namespace}_audit (
    position integer not null primary key autoincrement,
    at_us integer not null,
    type text not null,
    envelope text not null
);
---
create trigger {namespace}_audit_keeps before update on {namespace}_audit
begin
    select raise(abort, 'the audit log is append-only');
end;
---
create trigger {namespace}_audit_stays before delete on {namespace}_audit
begin
    select raise(abort, 'the audit log is append-only');
end;
