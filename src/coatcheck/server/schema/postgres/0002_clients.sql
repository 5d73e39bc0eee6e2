-- Programs with a credential of their own; only its digest is kept. Times are Unix microseconds.
create table {namespace}_clients (
    name text collate "C" not null primary key,
    digest text collate "C" not null unique,
    created_us bigint not null
);
