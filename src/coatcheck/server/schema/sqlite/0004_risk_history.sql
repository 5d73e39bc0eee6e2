-- What the rules about risk remember of an account: one row, replaced as a whole while its version is the one that was
-- read. Times are Unix microseconds.
create table {namespace}_risk_history (
    subject text not null primary key,
    version integer not null,
    history text not null,
    changed_us integer not null
) without rowid;
