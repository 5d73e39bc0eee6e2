-- A feed of what changed, for near copies, in PostgreSQL, version 3.
--
-- Triggers, so that it does not matter who writes: a verb of this release or of the one before, or a statement typed
-- into a shell. ENABLE ALWAYS, so that a session in the role of a replica (a restore, an apply of logical replication)
-- tells as well. Whoever listens proves at each heartbeat that they are all there and on.
--
-- What is told lies on one channel, `{namespace}_feed`:
--
--     s and a handle   the record of this session changed, ended or was removed
--     o and a tag      all sessions of a subject with this tag were ended at once
--     x                the table was emptied
--     p and a word     somebody proves that its connection hears; of no meaning to others
--
-- A transaction that tells takes one lock of the whole server from just before its commit to its end. So nothing is
-- told that no copy can depend on: not a new session, not activity, not when the sweep looks next.

CREATE FUNCTION {namespace}_tell_session() RETURNS trigger
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    -- Cut short: a message has a largest size, and no handle, however it came here, may make a DELETE fail.
    PERFORM pg_notify('{namespace}_feed', 's' || left(OLD.handle, 16));
    IF TG_OP = 'UPDATE' AND NEW.handle <> OLD.handle THEN
        PERFORM pg_notify('{namespace}_feed', 's' || left(NEW.handle, 16));
    END IF;
    RETURN NULL;
END
$$;
---
CREATE FUNCTION {namespace}_tell_cut() RETURNS trigger
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_notify('{namespace}_feed', 'o' || NEW.tag);
    RETURN NULL;
END
$$;
---
CREATE FUNCTION {namespace}_tell_emptied() RETURNS trigger
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_notify('{namespace}_feed', 'x');
    RETURN NULL;
END
$$;
---
-- Every column but seen_us and due_us. By name, not by comparing rows: a touch sets neither of these, and is passed
-- over without a look at its content.
CREATE TRIGGER {namespace}_feed_changed AFTER UPDATE OF
    version, created_us, auth_us, idle_us, absolute_us, ended_us, alias_until_us, tag, schema_number, handle, owner,
    digest, subject, authority, fields, reason, alias_digest, alias_sealed, evicted
    ON {namespace}_sessions FOR EACH ROW EXECUTE FUNCTION {namespace}_tell_session();
---
CREATE TRIGGER {namespace}_feed_removed AFTER DELETE
    ON {namespace}_sessions FOR EACH ROW EXECUTE FUNCTION {namespace}_tell_session();
---
CREATE TRIGGER {namespace}_feed_emptied AFTER TRUNCATE
    ON {namespace}_sessions FOR EACH STATEMENT EXECUTE FUNCTION {namespace}_tell_emptied();
---
-- A cut that goes away revives nothing that anybody holds.
CREATE TRIGGER {namespace}_feed_cut AFTER INSERT OR UPDATE
    ON {namespace}_cuts FOR EACH ROW EXECUTE FUNCTION {namespace}_tell_cut();
---
ALTER TABLE {namespace}_sessions ENABLE ALWAYS TRIGGER {namespace}_feed_changed;
---
ALTER TABLE {namespace}_sessions ENABLE ALWAYS TRIGGER {namespace}_feed_removed;
---
ALTER TABLE {namespace}_sessions ENABLE ALWAYS TRIGGER {namespace}_feed_emptied;
---
ALTER TABLE {namespace}_cuts ENABLE ALWAYS TRIGGER {namespace}_feed_cut;
