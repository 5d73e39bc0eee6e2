-- Whom an event is about, so that an account's own events are found without reading everybody's. Rows from before have
-- none: they stay in the log and are not found this way.
alter table {namespace}_audit add column subject text collate "C";
---
create index {namespace}_audit_of_subject on {namespace}_audit (subject, type, at_us) where subject is not null;
