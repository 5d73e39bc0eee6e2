-- Programs with a credential of their own; only its digest is kept. Times are Unix microseconds.
create table {namespace}_clients (
    name text not null primary key,
    digest text not null unique,
    created_us integer not null
) without rowid;
