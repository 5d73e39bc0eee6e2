-- What the rules about risk remember of an account: one row, replaced as a whole while its version is the one that was
-- read. Times are Unix microseconds.
create table {namespace}_risk_history (
    subject text collate "C" not null primary key,
    version bigint not null,
    history text not null,
    changed_us bigint not null
);
