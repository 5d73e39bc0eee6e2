-- Refresh families, the denylist and the key ring in PostgreSQL, version 2.
--
-- What 0001 says about functions, locks and the clock holds here too. The order of locks is now: the advisory lock of
-- an owner, session rows by ascending handle, family rows, their seals, and last of all the advisory lock of the
-- denylist. Families of a session are only written under the lock of its row. A sweep holds single families and seals
-- and waits for nobody then, but who wants one of those waits for it: a verb looks at the clock after its last row.
--
-- A process of the release before this one may still be running: the functions it calls keep their names, answer as
-- they did, and take one parameter more, which has a default.

-- One row a family. Families of a session lie under it (root is its handle) and go with it, in the same statement
-- block that writes its tombstone (_end). An ended family keeps what recognizes its holder, and nothing it was granted.
CREATE TABLE {namespace}_families (
    created_us bigint NOT NULL,
    rotated_us bigint NOT NULL,
    idle_us bigint NOT NULL,
    absolute_us bigint NOT NULL,
    -- When sweep looks at this row next; never later than the family's end. A rotation moves that end and leaves this
    -- alone, so it changes no index and stays on its page, as a touch does.
    due_us bigint NOT NULL,
    ended_us bigint,
    grace_until_us bigint,
    generation integer NOT NULL,
    tag integer NOT NULL,
    of_session boolean NOT NULL,
    root text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL,
    prev_digest text COLLATE "C",
    owner text COLLATE "C" NOT NULL,
    subject text NOT NULL,
    client text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    granted text NOT NULL,
    reason text,
    PRIMARY KEY (root, of_session, name),
    CONSTRAINT {namespace}_families_ended CHECK ((ended_us IS NULL) = (reason IS NULL)),
    CONSTRAINT {namespace}_families_generation CHECK (generation >= 1),
    -- As with sessions: no row, however it came here, can make a verb overflow.
    CONSTRAINT {namespace}_families_times CHECK (
        least(created_us, rotated_us, idle_us, absolute_us, due_us) >= 0
        AND greatest(created_us, rotated_us, idle_us, absolute_us, due_us) < 4611686018427387904
    )
) WITH (fillfactor = 85);
---
-- The sealed successor of a rotation, while its grace lasts and nobody has used it. Not a column of the family: an
-- index that finds the end of a grace, however partial, would make every rotation write all of that table's indexes.
-- It goes by its own time where its family went before it: what it opens is good for nothing then.
CREATE TABLE {namespace}_seals (
    until_us bigint NOT NULL,
    of_session boolean NOT NULL,
    root text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    sealed bytea NOT NULL,
    PRIMARY KEY (root, of_session, name)
);
---
CREATE INDEX {namespace}_seals_until ON {namespace}_seals (until_us);
---
CREATE INDEX {namespace}_families_owner ON {namespace}_families (tag, owner)
    WHERE ended_us IS NULL AND owner <> '' AND NOT of_session;
---
CREATE INDEX {namespace}_families_due ON {namespace}_families (due_us);
---
-- The denylist. Entries are numbered in the order of their commits; the newest is never removed, so the end of the log
-- is its highest number, and a number is never given twice. Nor is it after a restore from a backup: a number is the
-- time in microseconds where that is ahead, so what is new lies behind every position that was given out before.
CREATE TABLE {namespace}_denials (
    entry bigint NOT NULL,
    until_us bigint NOT NULL,
    not_before_us bigint NOT NULL,
    kind text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    PRIMARY KEY (entry)
);
---
-- A hash, because an id may be longer than what a tree takes.
CREATE INDEX {namespace}_denials_id ON {namespace}_denials USING hash (id);
---
CREATE INDEX {namespace}_denials_until ON {namespace}_denials (until_us);
---
CREATE TABLE {namespace}_ring (
    version bigint NOT NULL,
    -- One row at most.
    sole boolean NOT NULL CHECK (sole),
    packed bytea NOT NULL,
    PRIMARY KEY (sole)
);
---
-- Put ids on the denylist, in this order. Always the last step of a verb: the lock is kept until the commit, and
-- whoever waits for it must hold nothing that the holder may still want.
CREATE FUNCTION {namespace}_deny(
    p_kind text, p_ids text[], p_until_us bigint, p_not_before_us bigint, p_now_us bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    earliest bigint;
BEGIN
    -- With an older snapshot the end of the log would be that of before the wait.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE 'coatcheck needs default_transaction_isolation = read committed for this role';
    END IF;
    -- A sequence would hand out a number before the commit of the one below it: a reader could pass that one for ever.
    PERFORM pg_advisory_xact_lock(hashtextextended('{namespace}:denials', 0));
    SELECT greatest(max(d.entry) + 1, p_now_us) INTO earliest FROM {namespace}_denials d;
    -- What an entry already says is not said again: a repeated call adds nothing.
    INSERT INTO {namespace}_denials (entry, until_us, not_before_us, kind, id)
        SELECT earliest - 1 + row_number() OVER (ORDER BY each.place), p_until_us, p_not_before_us, p_kind, each.id
        FROM unnest(p_ids) WITH ORDINALITY AS each (id, place)
        WHERE NOT EXISTS (
            SELECT FROM {namespace}_denials d
            WHERE d.id = each.id AND d.kind = p_kind
            AND d.until_us = p_until_us AND d.not_before_us = p_not_before_us
        );
END
$$;
---
-- Sessions a verb has ended: nothing to do where the caller issues no tokens (p_deny_us is 0).
CREATE FUNCTION {namespace}_deny_sessions(
    p_tag integer, p_handles text[], p_now_us bigint, p_deny_us bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF p_deny_us > 0 AND cardinality(p_handles) > 0 THEN
        PERFORM {namespace}_deny('sid', array_agg(lpad(to_hex(p_tag), 4, '0') || '.' || each.handle ORDER BY each.place),
                p_now_us + p_deny_us, 0, p_now_us)
            FROM unnest(p_handles) WITH ORDINALITY AS each (handle, place);
    END IF;
END
$$;
---
-- Since when a session is over that _judge found so; 0 where it is not there or cannot be read.
CREATE FUNCTION {namespace}_over_since(p_row {namespace}_sessions, p_cause text) RETURNS bigint
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(
        p_row.ended_us,
        (SELECT c.cut_us FROM {namespace}_cuts c
            WHERE c.tag = p_row.tag AND c.owner = p_row.owner
            AND p_row.created_us <= c.cut_us AND p_row.handle <> c.kept),
        CASE p_cause
            WHEN 'absolute_timeout' THEN p_row.absolute_us
            WHEN 'idle_timeout' THEN p_row.seen_us + p_row.idle_us
        END,
        0
    )
$$;
---
CREATE OR REPLACE FUNCTION {namespace}_end(
    p_handle text, p_reason text, p_now_us bigint, p_tombstone_us bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    UPDATE {namespace}_sessions SET
        ended_us = p_now_us,
        reason = p_reason,
        due_us = least(absolute_us, p_now_us + p_tombstone_us),
        digest = {namespace}_buried(digest),
        owner = '',
        subject = '',
        authority = '',
        fields = '{}',
        alias_digest = NULL,
        alias_sealed = NULL,
        alias_until_us = NULL
    WHERE handle = p_handle AND ended_us IS NULL;
    DELETE FROM {namespace}_families WHERE root = p_handle AND of_session;
    DELETE FROM {namespace}_seals WHERE root = p_handle AND of_session;
END
$$;
---
DROP FUNCTION {namespace}_create(
    integer, text, text, text, text, bigint, bigint, text, jsonb, bigint, boolean, text, text, text, bigint, bigint
);
---
-- Create, and admit under a limit where p_maximum is given. outcome: created, limit (handles: who is alive), taken.
CREATE FUNCTION {namespace}_create(
    p_tag integer, p_handle text, p_digest text, p_owner text, p_subject text,
    p_idle_us bigint, p_absolute_us bigint, p_authority text, p_fields jsonb,
    p_maximum bigint, p_evict boolean, p_supersedes text,
    p_reason_superseded text, p_reason_evicted text, p_tombstone_us bigint, p_offset_us bigint,
    p_deny_us bigint DEFAULT 0,
    OUT outcome text, OUT written_us bigint, OUT handles text[], OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    earlier {namespace}_sessions%ROWTYPE;
    alive text[];
    replaced text;
    surplus bigint;
    cut bigint;
BEGIN
    IF p_owner <> '' THEN
        PERFORM {namespace}_hold_owner(p_tag, p_owner);
    END IF;
    LOOP
        SELECT * INTO earlier FROM {namespace}_sessions s WHERE s.handle = p_handle;
        IF FOUND THEN
            now_us := {namespace}_clock(p_offset_us);
            written_us := earlier.created_us;
            handles := coalesce(earlier.evicted, '{}');
            outcome := CASE
                WHEN earlier.tag <> p_tag THEN 'taken'
                WHEN earlier.ended_us IS NULL AND earlier.digest = p_digest THEN 'created'
                WHEN earlier.ended_us IS NOT NULL AND earlier.digest = {namespace}_buried(p_digest) THEN 'created'
                ELSE 'taken'
            END;
            RETURN;
        END IF;
        handles := '{}';
        IF p_owner <> '' AND (p_maximum IS NOT NULL OR p_supersedes IS NOT NULL) THEN
            -- A touch that is not committed yet may keep a session alive that looks idle: wait for it, then count.
            PERFORM 1 FROM {namespace}_sessions s
                WHERE s.tag = p_tag AND s.owner = p_owner
                AND s.owner <> '' AND s.ended_us IS NULL
                ORDER BY s.handle FOR UPDATE;
            now_us := {namespace}_clock(p_offset_us);
            SELECT array_agg(s.handle ORDER BY s.created_us, s.handle) INTO alive FROM {namespace}_sessions s
                WHERE s.tag = p_tag AND s.owner = p_owner
                AND s.owner <> '' AND s.ended_us IS NULL AND {namespace}_judge(s, now_us) IS NULL;
            alive := coalesce(alive, '{}');
            IF p_supersedes = ANY (alive) THEN
                replaced := p_supersedes;
                alive := array_remove(alive, p_supersedes);
            END IF;
            surplus := greatest(0, cardinality(alive) + 1 - p_maximum);
            IF surplus > 0 AND NOT p_evict THEN
                outcome := 'limit';
                handles := alive;
                RETURN;
            END IF;
            IF p_maximum IS NOT NULL THEN
                handles := alive[1:surplus];
            END IF;
        END IF;
        now_us := {namespace}_clock(p_offset_us);
        SELECT c.cut_us INTO cut FROM {namespace}_cuts c
            WHERE c.tag = p_tag AND c.owner = p_owner;
        written_us := greatest(now_us, cut + 1);
        INSERT INTO {namespace}_sessions AS s (
            version, created_us, auth_us, seen_us, idle_us, absolute_us, due_us, tag, schema_number,
            handle, owner, digest, subject, authority, fields, evicted
        ) VALUES (
            1, written_us, CASE WHEN p_owner = '' THEN 0 ELSE written_us END, written_us, p_idle_us,
            written_us + p_absolute_us,
            written_us + least(p_absolute_us, p_idle_us + p_tombstone_us), p_tag, 1,
            p_handle, p_owner, p_digest, p_subject, p_authority, p_fields, nullif(handles, '{}')
        ) ON CONFLICT DO NOTHING;
        -- Not inserted: the same handle was committed a moment ago. Look at it as a repetition.
        EXIT WHEN FOUND;
    END LOOP;
    IF replaced IS NOT NULL THEN
        PERFORM {namespace}_end(replaced, p_reason_superseded, now_us, p_tombstone_us);
    END IF;
    PERFORM {namespace}_end(gone, p_reason_evicted, now_us, p_tombstone_us)
        FROM unnest(handles) AS gone;
    PERFORM {namespace}_deny_sessions(p_tag, array_remove(replaced || handles, NULL), now_us, p_deny_us);
    outcome := 'created';
END
$$;
---
DROP FUNCTION {namespace}_revoke(integer, text, text, bigint, bigint);
---
CREATE FUNCTION {namespace}_revoke(
    p_tag integer, p_handle text, p_reason text, p_tombstone_us bigint, p_offset_us bigint,
    p_deny_us bigint DEFAULT 0,
    OUT ended boolean, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    found_row {namespace}_sessions%ROWTYPE;
    cause text;
BEGIN
    SELECT * INTO found_row FROM {namespace}_sessions s
        WHERE s.handle = p_handle AND s.tag = p_tag FOR UPDATE;
    now_us := {namespace}_clock(p_offset_us);
    ended := false;
    IF found_row.handle IS NOT NULL AND found_row.ended_us IS NULL THEN
        cause := {namespace}_judge(found_row, now_us);
        -- What this release cannot read may be alive to a newer one: it is ended like any other.
        ended := cause IS NULL OR cause = 'unreadable';
        PERFORM {namespace}_end(
            p_handle, CASE WHEN ended THEN p_reason ELSE cause END, now_us, p_tombstone_us
        );
    END IF;
    -- Whether or not there was something to end: the call may make up for one that was cut off.
    PERFORM {namespace}_deny_sessions(p_tag, ARRAY[p_handle], now_us, p_deny_us);
END
$$;
---
DROP FUNCTION {namespace}_revoke_owner(integer, text, text, text, bigint, bigint);
---
CREATE FUNCTION {namespace}_revoke_owner(
    p_tag integer, p_owner text, p_reason text, p_keep text,
    p_tombstone_us bigint, p_offset_us bigint,
    p_deny_us bigint DEFAULT 0,
    OUT handles text[], OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    each record;
    newest bigint;
    newest_family bigint;
BEGIN
    PERFORM {namespace}_hold_owner(p_tag, p_owner);
    PERFORM 1 FROM {namespace}_sessions s
        WHERE s.tag = p_tag AND s.owner = p_owner
        AND s.owner <> '' AND s.ended_us IS NULL
        ORDER BY s.handle FOR UPDATE;
    -- A rotation that is not committed yet comes before the end, by the clock too.
    PERFORM 1 FROM {namespace}_families f
        WHERE f.tag = p_tag AND f.owner = p_owner
        AND f.owner <> '' AND f.ended_us IS NULL AND NOT f.of_session
        ORDER BY f.root, f.name FOR UPDATE;
    now_us := {namespace}_clock(p_offset_us);
    handles := '{}';
    FOR each IN
        SELECT s.handle, s.created_us, {namespace}_judge(s, now_us) AS cause FROM {namespace}_sessions s
            WHERE s.tag = p_tag AND s.owner = p_owner
            AND s.owner <> '' AND s.ended_us IS NULL
            ORDER BY s.created_us, s.handle
    LOOP
        newest := greatest(newest, each.created_us);
        CONTINUE WHEN each.handle = p_keep;
        IF each.cause IS NULL OR each.cause = 'unreadable' THEN
            handles := handles || each.handle;
            each.cause := p_reason;
        END IF;
        PERFORM {namespace}_end(each.handle, each.cause, now_us, p_tombstone_us);
    END LOOP;
    WITH over AS (
        UPDATE {namespace}_families f SET
            ended_us = now_us, reason = p_reason, owner = '', subject = '', granted = '',
            due_us = least(f.absolute_us, f.rotated_us + f.idle_us)
        WHERE f.tag = p_tag AND f.owner = p_owner
        AND f.owner <> '' AND f.ended_us IS NULL AND NOT f.of_session
        RETURNING f.created_us, f.root, f.name
    ), unsealed AS (
        DELETE FROM {namespace}_seals e USING over o WHERE e.root = o.root AND NOT e.of_session AND e.name = o.name
    )
    SELECT max(o.created_us) INTO newest_family FROM over o;
    -- A clock that stepped back must not leave the cut before a session that is there already.
    INSERT INTO {namespace}_cuts AS c (cut_us, tag, owner, kept, reason)
        VALUES (greatest(now_us, newest, newest_family), p_tag, p_owner, coalesce(p_keep, ''), p_reason)
        ON CONFLICT (tag, owner) DO UPDATE SET
            cut_us = greatest(c.cut_us, excluded.cut_us), kept = excluded.kept, reason = excluded.reason;
    PERFORM {namespace}_deny_sessions(p_tag, handles, now_us, p_deny_us);
END
$$;
---
-- Let a session, whose row is locked, have room for one family more: what is over goes before anything that lives.
CREATE FUNCTION {namespace}_make_room(p_root text, p_maximum bigint, p_now_us bigint) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF (SELECT count(*) FROM {namespace}_families f WHERE f.root = p_root AND f.of_session) < p_maximum THEN
        RETURN;
    END IF;
    DELETE FROM {namespace}_families f
        WHERE f.root = p_root AND f.of_session AND (
            f.ended_us IS NOT NULL
            OR {namespace}_lapse(f.absolute_us, f.idle_us, f.rotated_us, p_now_us) IS NOT NULL
        );
    DELETE FROM {namespace}_families f USING (
        SELECT o.name FROM {namespace}_families o
        WHERE o.root = p_root AND o.of_session
        ORDER BY o.created_us DESC, o.name DESC OFFSET p_maximum - 1
    ) AS surplus
    WHERE f.root = p_root AND f.of_session AND f.name = surplus.name;
END
$$;
---
-- outcome: created, gone (cause), taken.
CREATE FUNCTION {namespace}_create_family(
    p_tag integer, p_root text, p_name text, p_of_session boolean, p_digest text, p_owner text, p_subject text,
    p_client text, p_key text, p_granted text, p_idle_us bigint, p_absolute_us bigint,
    p_maximum bigint, p_offset_us bigint,
    OUT outcome text, OUT cause text, OUT written_us bigint, OUT now_us bigint, OUT session {namespace}_sessions
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    earlier {namespace}_families%ROWTYPE;
    cut bigint;
BEGIN
    IF p_of_session THEN
        SELECT * INTO session FROM {namespace}_sessions s
            WHERE s.handle = p_root AND s.tag = p_tag FOR UPDATE;
    ELSIF p_owner <> '' THEN
        PERFORM {namespace}_hold_owner(p_tag, p_owner);
    END IF;
    LOOP
        SELECT * INTO earlier FROM {namespace}_families f
            WHERE f.root = p_root AND f.of_session = p_of_session AND f.name = p_name FOR UPDATE;
        now_us := {namespace}_clock(p_offset_us);
        IF p_of_session THEN
            cause := {namespace}_judge(session, now_us);
            IF cause IS NULL AND earlier.root IS NULL THEN
                PERFORM {namespace}_make_room(p_root, p_maximum, now_us);
                -- It may have waited for a sweep, past the end of the session.
                now_us := {namespace}_clock(p_offset_us);
                cause := {namespace}_judge(session, now_us);
            END IF;
            IF cause IS NOT NULL THEN
                outcome := 'gone';
                RETURN;
            END IF;
        END IF;
        IF earlier.root IS NOT NULL THEN
            written_us := earlier.created_us;
            -- A holder whose token was exchanged or ended since must not be told that it is good.
            outcome := CASE
                WHEN earlier.tag = p_tag AND earlier.digest = p_digest AND earlier.ended_us IS NULL THEN 'created'
                ELSE 'taken'
            END;
            RETURN;
        END IF;
        IF NOT p_of_session AND p_owner <> '' THEN
            SELECT c.cut_us INTO cut FROM {namespace}_cuts c WHERE c.tag = p_tag AND c.owner = p_owner;
        END IF;
        written_us := greatest(now_us, cut + 1);
        INSERT INTO {namespace}_families (
            created_us, rotated_us, idle_us, absolute_us, due_us, generation, tag, of_session,
            root, name, digest, owner, subject, client, key, granted
        ) VALUES (
            written_us, written_us, p_idle_us, written_us + p_absolute_us,
            written_us + least(p_absolute_us, p_idle_us), 1, p_tag, p_of_session,
            p_root, p_name, p_digest, p_owner, p_subject, p_client, p_key, p_granted
        ) ON CONFLICT DO NOTHING;
        EXIT WHEN FOUND;
    END LOOP;
    outcome := 'created';
END
$$;
---
-- The table of core/ports.py, row by row. outcome: unknown, ended (cause, at_us), wrong_holder, kept, rotated,
-- replayed, reused. last_seen_us is the session's activity before this call.
CREATE FUNCTION {namespace}_rotate_refresh(
    p_tag integer, p_root text, p_name text, p_of_session boolean, p_generation bigint, p_digest text,
    p_successor text, p_sealed bytea, p_grace_us bigint, p_client text, p_key text,
    p_reason_reused text, p_tombstone_us bigint, p_offset_us bigint, p_deny_us bigint,
    OUT outcome text, OUT cause text, OUT at_us bigint, OUT session_ended boolean, OUT last_seen_us bigint,
    OUT now_us bigint, OUT successor bytea, OUT family {namespace}_families, OUT session {namespace}_sessions
)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    session_ended := false;
    last_seen_us := 0;
    IF p_of_session THEN
        SELECT * INTO session FROM {namespace}_sessions s
            WHERE s.handle = p_root AND s.tag = p_tag FOR UPDATE;
        last_seen_us := coalesce(session.seen_us, 0);
    END IF;
    SELECT * INTO family FROM {namespace}_families f
        WHERE f.root = p_root AND f.of_session = p_of_session AND f.name = p_name AND f.tag = p_tag FOR UPDATE;
    SELECT e.sealed INTO successor FROM {namespace}_seals e
        WHERE e.root = p_root AND e.of_session = p_of_session AND e.name = p_name FOR UPDATE;
    -- Nothing is waited for from here on: with an earlier clock a wait could carry a rotation past a deadline.
    now_us := {namespace}_clock(p_offset_us);
    IF p_of_session THEN
        cause := {namespace}_judge(session, now_us);
        IF session.handle IS NULL OR (session.ended_us IS NULL AND cause = 'unreadable') THEN
            -- What cannot be read is treated as absent.
            outcome := 'unknown';
            RETURN;
        ELSIF cause IS NOT NULL THEN
            outcome := 'ended';
            at_us := {namespace}_over_since(session, cause);
            RETURN;
        END IF;
    END IF;
    IF family.root IS NULL THEN
        outcome := 'unknown';
        RETURN;
    ELSIF family.client <> p_client OR family.key <> p_key THEN
        outcome := 'wrong_holder';
        RETURN;
    ELSIF family.ended_us IS NOT NULL THEN
        cause := family.reason;
        at_us := family.ended_us;
    ELSE
        IF NOT p_of_session AND family.owner <> '' THEN
            -- One that came from elsewhere (a restored backup) was not there to be ended.
            SELECT c.reason, c.cut_us INTO cause, at_us FROM {namespace}_cuts c
                WHERE c.tag = p_tag AND c.owner = family.owner AND family.created_us <= c.cut_us;
        END IF;
        IF cause IS NULL THEN
            cause := {namespace}_lapse(family.absolute_us, family.idle_us, family.rotated_us, now_us);
            at_us := CASE cause
                WHEN 'absolute_timeout' THEN family.absolute_us
                WHEN 'idle_timeout' THEN family.rotated_us + family.idle_us
            END;
        END IF;
    END IF;
    outcome := CASE
        WHEN cause IS NOT NULL THEN 'ended'
        WHEN p_generation = family.generation AND p_digest = family.digest THEN
            CASE WHEN now_us < family.rotated_us + p_grace_us THEN 'kept' ELSE 'rotated' END
        WHEN p_generation >= family.generation THEN 'unknown'
        WHEN p_generation < family.generation - 1 THEN 'reused'
        WHEN p_digest IS DISTINCT FROM family.prev_digest THEN 'unknown'
        WHEN p_successor = family.digest THEN 'repeated'
        WHEN now_us < family.grace_until_us THEN 'replayed'
        ELSE 'reused'
    END;
    IF outcome = 'rotated' THEN
        UPDATE {namespace}_families f SET
            generation = f.generation + 1,
            prev_digest = f.digest,
            digest = p_successor,
            rotated_us = now_us,
            grace_until_us = now_us + p_grace_us
            WHERE f.root = p_root AND f.of_session = p_of_session AND f.name = p_name
            RETURNING * INTO family;
    ELSIF outcome = 'reused' THEN
        session_ended := p_of_session AND family.client = '';
        IF session_ended THEN
            PERFORM {namespace}_end(p_root, p_reason_reused, now_us, p_tombstone_us);
        ELSE
            UPDATE {namespace}_families f SET
                ended_us = now_us, reason = p_reason_reused, owner = '', subject = '', granted = '',
                due_us = least(f.absolute_us, f.rotated_us + f.idle_us)
                WHERE f.root = p_root AND f.of_session = p_of_session AND f.name = p_name;
        END IF;
    END IF;
    IF outcome = 'rotated' AND p_grace_us > 0 THEN
        INSERT INTO {namespace}_seals AS e (until_us, of_session, root, name, sealed)
            VALUES (now_us + p_grace_us, p_of_session, p_root, p_name, p_sealed)
            ON CONFLICT (root, of_session, name) DO UPDATE SET until_us = excluded.until_us, sealed = excluded.sealed;
    ELSIF successor IS NOT NULL AND outcome IN ('rotated', 'kept', 'reused') THEN
        -- It was used, or its family is over. Without a grace nobody may ever read the new one: it is not kept at all.
        DELETE FROM {namespace}_seals e WHERE e.root = p_root AND e.of_session = p_of_session AND e.name = p_name;
    END IF;
    IF p_of_session AND outcome IN ('rotated', 'repeated', 'kept', 'replayed') THEN
        UPDATE {namespace}_sessions s SET seen_us = now_us WHERE s.handle = p_root AND s.seen_us < now_us;
    END IF;
    IF outcome = 'repeated' THEN
        outcome := 'rotated';
    ELSIF session_ended THEN
        PERFORM {namespace}_deny_sessions(p_tag, ARRAY[p_root], now_us, p_deny_us);
    END IF;
END
$$;
---
-- cause is NULL while a token of this session may be accepted.
CREATE FUNCTION {namespace}_standing(
    p_tag integer, p_handle text, p_jti text, p_offset_us bigint,
    OUT cause text, OUT at_us bigint, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    found_row {namespace}_sessions%ROWTYPE;
BEGIN
    SELECT * INTO found_row FROM {namespace}_sessions s
        WHERE s.handle = p_handle AND s.tag = p_tag;
    now_us := {namespace}_clock(p_offset_us);
    IF EXISTS (
        SELECT FROM {namespace}_denials d WHERE d.id = p_jti AND d.kind = 'jti' AND d.until_us > now_us
    ) THEN
        cause := 'denied';
        at_us := 0;
        RETURN;
    END IF;
    cause := {namespace}_judge(found_row, now_us);
    at_us := CASE WHEN cause IS NULL THEN 0 ELSE {namespace}_over_since(found_row, cause) END;
END
$$;
---
-- Entries after p_after that still decide something, in order; always at least one row, for the clock and the end of
-- the log. The end is read first: what commits meanwhile lies behind it and is left for the next call.
CREATE FUNCTION {namespace}_denials_after(
    p_after bigint, p_limit bigint, p_offset_us bigint
) RETURNS TABLE (
    now_us bigint, latest bigint, entry bigint, kind text, id text, until_us bigint, not_before_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_latest bigint := (SELECT coalesce(max(d.entry), 0) FROM {namespace}_denials d);
    v_now_us bigint := {namespace}_clock(p_offset_us);
BEGIN
    RETURN QUERY
    SELECT v_now_us, v_latest, p.* FROM (SELECT) AS always LEFT JOIN LATERAL (
        SELECT d.entry, d.kind::text, d.id::text, d.until_us, d.not_before_us FROM {namespace}_denials d
        WHERE d.entry > p_after AND d.entry <= v_latest AND d.until_us > v_now_us
        ORDER BY d.entry LIMIT p_limit
    ) AS p ON true;
END
$$;
---
CREATE FUNCTION {namespace}_read_ring(OUT version bigint, OUT packed bytea)
LANGUAGE sql VOLATILE AS $$
    SELECT r.version, r.packed FROM {namespace}_ring r
$$;
---
CREATE FUNCTION {namespace}_write_ring(p_packed bytea, p_expected bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF p_expected = 0 THEN
        INSERT INTO {namespace}_ring (version, sole, packed) VALUES (1, true, p_packed) ON CONFLICT DO NOTHING;
    ELSE
        UPDATE {namespace}_ring r SET version = r.version + 1, packed = p_packed WHERE r.version = p_expected;
    END IF;
    RETURN FOUND;
END
$$;
---
-- Rows that others hold are skipped: cleaning never waits for a request, and two cleaners share the work. Of sessions,
-- families, denials and cuts at most p_limit rows are removed each; answers how many of the first three, and no more
-- than p_limit. Seals and limits come and go with every request, so more of them go at once. Answers p_limit, too,
-- where more of anything may be waiting: the caller comes again, and nothing grows for ever.
CREATE OR REPLACE FUNCTION {namespace}_sweep(
    p_limit bigint, p_tombstone_us bigint, p_offset_us bigint
) RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    row_due record;
    now_us bigint := {namespace}_clock(p_offset_us);
    due bigint;
    looked bigint;
    examined bigint := 0;
    removed bigint := 0;
    families bigint := 0;
    denials bigint;
    seals bigint;
    limits bigint := 0;
    cuts bigint;
BEGIN
    LOOP
        looked := 0;
        FOR row_due IN
            SELECT s.handle, s.absolute_us, s.seen_us, s.idle_us, s.ended_us, s.alias_until_us
            FROM {namespace}_sessions s
            WHERE s.due_us <= now_us
            ORDER BY s.due_us LIMIT p_limit - removed FOR UPDATE SKIP LOCKED
        LOOP
            looked := looked + 1;
            due := least(
                row_due.absolute_us, coalesce(row_due.ended_us, row_due.seen_us + row_due.idle_us) + p_tombstone_us
            );
            IF due <= now_us THEN
                DELETE FROM {namespace}_sessions s WHERE s.handle = row_due.handle;
                DELETE FROM {namespace}_families f WHERE f.root = row_due.handle AND f.of_session;
                removed := removed + 1;
            ELSIF row_due.alias_until_us > now_us THEN
                UPDATE {namespace}_sessions s SET due_us = least(due, s.alias_until_us)
                    WHERE s.handle = row_due.handle;
            ELSE
                -- The grace of a rotation is over: what was sealed for it goes.
                UPDATE {namespace}_sessions s
                    SET due_us = due, alias_digest = NULL, alias_sealed = NULL, alias_until_us = NULL
                    WHERE s.handle = row_due.handle;
            END IF;
        END LOOP;
        examined := examined + looked;
        EXIT WHEN looked = 0 OR removed >= p_limit OR examined >= 20 * p_limit;
    END LOOP;
    examined := 0;
    LOOP
        looked := 0;
        FOR row_due IN
            SELECT f.root, f.of_session, f.name, f.absolute_us, f.rotated_us, f.idle_us
            FROM {namespace}_families f
            WHERE f.due_us <= now_us
            ORDER BY f.due_us LIMIT p_limit - families FOR UPDATE SKIP LOCKED
        LOOP
            looked := looked + 1;
            due := least(row_due.absolute_us, row_due.rotated_us + row_due.idle_us);
            IF due <= now_us THEN
                DELETE FROM {namespace}_families f
                    WHERE f.root = row_due.root AND f.of_session = row_due.of_session AND f.name = row_due.name;
                families := families + 1;
            ELSE
                UPDATE {namespace}_families f SET due_us = due
                    WHERE f.root = row_due.root AND f.of_session = row_due.of_session AND f.name = row_due.name;
            END IF;
        END LOOP;
        examined := examined + looked;
        EXIT WHEN looked = 0 OR families >= p_limit OR examined >= 20 * p_limit;
    END LOOP;
    DELETE FROM {namespace}_seals n WHERE (n.root, n.of_session, n.name) IN (
        SELECT e.root, e.of_session, e.name FROM {namespace}_seals e
        WHERE e.until_us <= now_us
        ORDER BY e.until_us LIMIT 20 * p_limit FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS seals = ROW_COUNT;
    -- The newest entry stays: the next one is numbered after it.
    DELETE FROM {namespace}_denials n WHERE n.entry IN (
        SELECT d.entry FROM {namespace}_denials d
        WHERE d.until_us <= now_us AND d.entry < (SELECT max(e.entry) FROM {namespace}_denials e)
        ORDER BY d.until_us LIMIT p_limit FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS denials = ROW_COUNT;
    FOR row_due IN
        SELECT l.key, l.arrival_us FROM {namespace}_limits l
        WHERE l.due_us <= now_us
        ORDER BY l.due_us LIMIT 20 * p_limit FOR UPDATE SKIP LOCKED
    LOOP
        limits := limits + 1;
        IF row_due.arrival_us <= now_us THEN
            DELETE FROM {namespace}_limits l WHERE l.key = row_due.key;
        ELSE
            UPDATE {namespace}_limits l SET due_us = l.arrival_us
                WHERE l.key = row_due.key;
        END IF;
    END LOOP;
    -- A cut is kept while it still ends something, and a day longer than any clock steps back.
    DELETE FROM {namespace}_cuts c WHERE (c.tag, c.owner) IN (
        SELECT d.tag, d.owner FROM {namespace}_cuts d
        WHERE d.cut_us <= now_us - p_tombstone_us
        AND NOT EXISTS (
            SELECT FROM {namespace}_sessions s
            WHERE s.tag = d.tag AND s.owner = d.owner
            AND s.owner <> '' AND s.ended_us IS NULL AND s.created_us <= d.cut_us AND s.handle <> d.kept
        )
        AND NOT EXISTS (
            SELECT FROM {namespace}_families f
            WHERE f.tag = d.tag AND f.owner = d.owner
            AND f.owner <> '' AND f.ended_us IS NULL AND NOT f.of_session AND f.created_us <= d.cut_us
        )
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS cuts = ROW_COUNT;
    IF cuts >= p_limit OR greatest(seals, limits) >= 20 * p_limit THEN
        RETURN p_limit;
    END IF;
    RETURN least(p_limit, removed + families + denials);
END
$$;
