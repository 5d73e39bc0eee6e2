-- Sessions and rate limits in PostgreSQL, version 1. Needs PostgreSQL 13 and a database in UTF8.
--
-- Every verb is one call of one function: one round trip and one transaction. A function is also what makes the verbs
-- exact at READ COMMITTED: each statement inside it takes a fresh snapshot, so what is read after a lock was granted is
-- what the previous holder committed. One large statement would judge by the snapshot it took before it began to wait.
--
-- Locks are always taken in the same order, or two verbs could wait for each other: first the advisory lock of an
-- owner, then session rows by ascending handle.
--
-- Times are Unix microseconds. The clock is read after the locks are held, with clock_timestamp(): now() is the start
-- of the transaction, and a verb that had waited would date a session before the revocation it waited for.

CREATE TABLE {namespace}_meta (
    name text COLLATE "C" PRIMARY KEY,
    value bytea NOT NULL
);
---
CREATE TABLE {namespace}_sessions (
    version bigint NOT NULL,
    created_us bigint NOT NULL,
    auth_us bigint NOT NULL,
    seen_us bigint NOT NULL,
    idle_us bigint NOT NULL,
    absolute_us bigint NOT NULL,
    -- When sweep looks at this row next; never later than the moment at which the row decides nothing any more.
    -- Activity moves seen_us and leaves due_us alone, so it changes no index and stays on its page: with this fill
    -- factor 99.9 % of touches are HOT updates of about 220 bytes of log.
    due_us bigint NOT NULL,
    ended_us bigint,
    alias_until_us bigint,
    tag integer NOT NULL,
    schema_number smallint NOT NULL,
    handle text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    -- Of a tombstone: the digest of the digest. It answers a repeated create and can open nothing.
    digest text COLLATE "C" NOT NULL,
    subject text NOT NULL,
    authority text NOT NULL,
    fields jsonb NOT NULL,
    reason text,
    alias_digest text COLLATE "C",
    alias_sealed bytea,
    -- Handles of the sessions that gave way to this one, for the answer to a repeated admit.
    evicted text[],
    PRIMARY KEY (handle),
    CONSTRAINT {namespace}_sessions_ended CHECK ((ended_us IS NULL) = (reason IS NULL)),
    -- Sums of any two of these stay within 64 bits: no row, however it came here, can make a verb overflow.
    CONSTRAINT {namespace}_sessions_times CHECK (
        least(created_us, auth_us, seen_us, idle_us, absolute_us, due_us) >= 0
        AND greatest(created_us, auth_us, seen_us, idle_us, absolute_us, due_us) < 4611686018427387904
    )
) WITH (fillfactor = 85);
---
CREATE INDEX {namespace}_sessions_owner ON {namespace}_sessions (tag, owner, created_us, handle)
    WHERE ended_us IS NULL AND owner <> '';
---
CREATE INDEX {namespace}_sessions_due ON {namespace}_sessions (due_us);
---
-- The latest revocation of a whole owner. Everything of the owner that was created until cut_us is over, but `kept`.
CREATE TABLE {namespace}_cuts (
    cut_us bigint NOT NULL,
    tag integer NOT NULL,
    owner text COLLATE "C" NOT NULL,
    kept text COLLATE "C" NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (tag, owner)
);
---
CREATE INDEX {namespace}_cuts_cut ON {namespace}_cuts (cut_us);
---
CREATE TABLE {namespace}_limits (
    arrival_us bigint NOT NULL,
    due_us bigint NOT NULL,
    key text COLLATE "C" NOT NULL,
    PRIMARY KEY (key)
) WITH (fillfactor = 70);
---
CREATE INDEX {namespace}_limits_due ON {namespace}_limits (due_us);
---
CREATE TYPE {namespace}_found AS (
    now_us bigint,
    edge text,
    tag integer,
    handle text,
    schema_number integer,
    version bigint,
    digest text,
    owner text,
    subject text,
    created_us bigint,
    auth_us bigint,
    idle_us bigint,
    absolute_us bigint,
    seen_us bigint,
    authority text,
    fields text
);
---
CREATE FUNCTION {namespace}_clock(p_offset_us bigint) RETURNS bigint
LANGUAGE sql VOLATILE AS $$
    SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint + p_offset_us
$$;
---
-- The rule of life (core/session.py): at the very microsecond of a deadline the session is over.
CREATE FUNCTION {namespace}_lapse(p_absolute_us bigint, p_idle_us bigint, p_seen_us bigint, p_now_us bigint) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN p_now_us >= p_absolute_us THEN 'absolute_timeout'
        WHEN p_now_us >= p_seen_us + p_idle_us THEN 'idle_timeout'
    END
$$;
---
CREATE FUNCTION {namespace}_buried(p_digest text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT encode(sha256(convert_to(p_digest, 'UTF8')), 'base64')
$$;
---
CREATE FUNCTION {namespace}_hold_owner(p_tag integer, p_owner text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    -- The driver sets this; a pooler may have handed over a session without it, and then no count would be exact.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE 'coatcheck needs default_transaction_isolation = read committed for this role';
    END IF;
    -- An advisory lock writes nothing; a row to lock would be one more dead tuple for every sign-in.
    PERFORM pg_advisory_xact_lock(hashtextextended(concat_ws(':', '{namespace}', p_tag, p_owner), 0));
END
$$;
---
-- Why there is nothing alive to act on, or NULL. The row is locked by the caller.
CREATE FUNCTION {namespace}_judge(p_row {namespace}_sessions, p_now_us bigint) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    cut_reason text;
BEGIN
    IF p_row.handle IS NULL THEN
        RETURN 'unknown';
    ELSIF p_row.ended_us IS NOT NULL THEN
        RETURN p_row.reason;
    ELSIF p_row.schema_number <> 1 OR jsonb_typeof(p_row.fields) <> 'object' THEN
        RETURN 'unreadable';
    ELSIF jsonb_path_exists(p_row.fields, 'strict $.* ? (@.type() != "string")') THEN
        RETURN 'unreadable';
    END IF;
    SELECT c.reason INTO cut_reason FROM {namespace}_cuts c
        WHERE c.tag = p_row.tag AND c.owner = p_row.owner
        AND p_row.created_us <= c.cut_us AND p_row.handle <> c.kept;
    RETURN coalesce(
        cut_reason, {namespace}_lapse(p_row.absolute_us, p_row.idle_us, p_row.seen_us, p_now_us)
    );
END
$$;
---
CREATE FUNCTION {namespace}_end(
    p_handle text, p_reason text, p_now_us bigint, p_tombstone_us bigint
) RETURNS void
LANGUAGE sql VOLATILE AS $$
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
    WHERE handle = p_handle AND ended_us IS NULL
$$;
---
CREATE FUNCTION {namespace}_id_keys(p_candidate bytea) RETURNS bytea
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    INSERT INTO {namespace}_meta (name, value) VALUES ('id_keys', p_candidate) ON CONFLICT DO NOTHING;
    -- Its own statement: it sees the winner's row even where the insert had to wait for the winner.
    RETURN (SELECT m.value FROM {namespace}_meta m WHERE m.name = 'id_keys');
END
$$;
---
-- Create, and admit under a limit where p_maximum is given. outcome: created, limit (handles: who is alive), taken.
CREATE FUNCTION {namespace}_create(
    p_tag integer, p_handle text, p_digest text, p_owner text, p_subject text,
    p_idle_us bigint, p_absolute_us bigint, p_authority text, p_fields jsonb,
    p_maximum bigint, p_evict boolean, p_supersedes text,
    p_reason_superseded text, p_reason_evicted text, p_tombstone_us bigint, p_offset_us bigint,
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
    outcome := 'created';
END
$$;
---
CREATE FUNCTION {namespace}_load(
    p_tag integer, p_handle text, p_offset_us bigint,
    OUT now_us bigint, OUT cut_us bigint, OUT cut_reason text,
    OUT schema_number integer, OUT version bigint, OUT digest text, OUT owner text, OUT subject text,
    OUT created_us bigint, OUT auth_us bigint, OUT idle_us bigint, OUT absolute_us bigint, OUT seen_us bigint,
    OUT authority text, OUT fields text, OUT ended_us bigint, OUT reason text,
    OUT alias_until_us bigint, OUT alias_digest text, OUT alias_sealed bytea
)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    SELECT c.cut_us, c.reason, s.schema_number, s.version, s.digest, s.owner, s.subject,
           s.created_us, s.auth_us, s.idle_us, s.absolute_us, s.seen_us, s.authority, s.fields::text,
           s.ended_us, s.reason, s.alias_until_us, s.alias_digest, s.alias_sealed
    INTO cut_us, cut_reason, schema_number, version, digest, owner, subject,
         created_us, auth_us, idle_us, absolute_us, seen_us, authority, fields,
         ended_us, reason, alias_until_us, alias_digest, alias_sealed
    FROM {namespace}_sessions s
    LEFT JOIN {namespace}_cuts c ON c.tag = s.tag AND c.owner = s.owner
        AND s.created_us <= c.cut_us AND s.handle <> c.kept
    WHERE s.handle = p_handle AND s.tag = p_tag;
    now_us := {namespace}_clock(p_offset_us);
END
$$;
---
-- outcome: committed, conflict, oversized, gone.
CREATE FUNCTION {namespace}_commit(
    p_tag integer, p_handle text, p_put jsonb, p_delete text[],
    p_octets bigint, p_fields bigint, p_expected bigint, p_offset_us bigint,
    OUT outcome text, OUT written_version bigint, OUT cause text, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    found_row {namespace}_sessions%ROWTYPE;
    merged jsonb;
    octets bigint;
    members bigint;
BEGIN
    SELECT * INTO found_row FROM {namespace}_sessions s
        WHERE s.handle = p_handle AND s.tag = p_tag FOR UPDATE;
    now_us := {namespace}_clock(p_offset_us);
    cause := {namespace}_judge(found_row, now_us);
    written_version := found_row.version;
    IF cause IS NOT NULL THEN
        outcome := 'gone';
        RETURN;
    ELSIF found_row.version <> p_expected THEN
        outcome := 'conflict';
        RETURN;
    END IF;
    merged := (found_row.fields - p_delete) || p_put;
    -- U+0001 only stands before an escaped character (stores/postgres.py): what is counted is the unescaped text.
    SELECT count(*), coalesce(sum(
            octet_length(replace(each.key, chr(1), '')) + octet_length(replace(each.value, chr(1), ''))
        ), 0)
        INTO members, octets FROM jsonb_each_text(merged) AS each;
    IF members > p_fields OR octets > p_octets THEN
        outcome := 'oversized';
        RETURN;
    END IF;
    UPDATE {namespace}_sessions s SET fields = merged, version = s.version + 1
        WHERE s.handle = p_handle
        RETURNING s.version INTO written_version;
    outcome := 'committed';
END
$$;
---
CREATE FUNCTION {namespace}_touch(
    p_tags integer[], p_handles text[], p_seen_us bigint[], p_offset_us bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    activity record;
    now_us bigint;
BEGIN
    FOR activity IN
        SELECT a.handle, a.tag, a.seen_us
        FROM unnest(p_handles, p_tags, p_seen_us) AS a (handle, tag, seen_us)
        ORDER BY a.handle COLLATE "C"
    LOOP
        now_us := {namespace}_clock(p_offset_us);
        UPDATE {namespace}_sessions s SET seen_us = least(activity.seen_us, now_us)
            WHERE s.handle = activity.handle AND s.tag = activity.tag
            AND s.ended_us IS NULL
            AND s.seen_us < least(activity.seen_us, now_us)
            AND {namespace}_lapse(s.absolute_us, s.idle_us, s.seen_us, now_us) IS NULL
            AND NOT EXISTS (
                SELECT FROM {namespace}_cuts c
                WHERE c.tag = s.tag AND c.owner = s.owner
                AND s.created_us <= c.cut_us AND s.handle <> c.kept
            );
    END LOOP;
END
$$;
---
-- outcome: rotated, converged, gone.
CREATE FUNCTION {namespace}_rotate(
    p_tag integer, p_handle text, p_old text, p_new text, p_sealed bytea, p_alias_us bigint,
    p_authority text, p_offset_us bigint,
    OUT outcome text, OUT written_version bigint, OUT cause text, OUT successor bytea, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    found_row {namespace}_sessions%ROWTYPE;
    aliased boolean := p_authority IS NULL AND p_alias_us > 0;
BEGIN
    SELECT * INTO found_row FROM {namespace}_sessions s
        WHERE s.handle = p_handle AND s.tag = p_tag FOR UPDATE;
    now_us := {namespace}_clock(p_offset_us);
    cause := {namespace}_judge(found_row, now_us);
    written_version := found_row.version;
    IF cause IS NOT NULL THEN
        outcome := 'gone';
    ELSIF found_row.digest = p_new THEN
        -- Nobody else can know 192 fresh bits: the same call again, whose answer was lost.
        outcome := 'rotated';
    ELSIF found_row.digest = p_old THEN
        -- An older alias goes in any case: it must not open the door to a changed authority.
        UPDATE {namespace}_sessions s SET
            digest = p_new,
            version = s.version + 1,
            authority = coalesce(p_authority, s.authority),
            alias_digest = CASE WHEN aliased THEN p_old END,
            alias_sealed = CASE WHEN aliased THEN p_sealed END,
            alias_until_us = CASE WHEN aliased THEN now_us + p_alias_us END,
            due_us = CASE WHEN aliased THEN least(s.due_us, now_us + p_alias_us) ELSE s.due_us END
            WHERE s.handle = p_handle
            RETURNING s.version INTO written_version;
        outcome := 'rotated';
    ELSIF p_authority IS NULL AND found_row.alias_digest = p_old AND now_us < found_row.alias_until_us THEN
        outcome := 'converged';
        successor := found_row.alias_sealed;
    ELSE
        -- A change of privileges is never answered with a successor that another rotation chose.
        outcome := 'gone';
        cause := 'replaced';
    END IF;
END
$$;
---
-- cause is NULL while the session is alive.
CREATE FUNCTION {namespace}_expire_idle(
    p_tag integer, p_handle text, p_tombstone_us bigint, p_offset_us bigint,
    OUT cause text, OUT last_seen_us bigint, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    found_row {namespace}_sessions%ROWTYPE;
BEGIN
    SELECT * INTO found_row FROM {namespace}_sessions s
        WHERE s.handle = p_handle AND s.tag = p_tag FOR UPDATE;
    now_us := {namespace}_clock(p_offset_us);
    cause := {namespace}_judge(found_row, now_us);
    last_seen_us := found_row.seen_us;
    IF found_row.ended_us IS NULL AND cause <> 'unreadable' THEN
        PERFORM {namespace}_end(p_handle, cause, now_us, p_tombstone_us);
    END IF;
END
$$;
---
CREATE FUNCTION {namespace}_revoke(
    p_tag integer, p_handle text, p_reason text, p_tombstone_us bigint, p_offset_us bigint,
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
    IF NOT FOUND OR found_row.ended_us IS NOT NULL THEN
        RETURN;
    END IF;
    cause := {namespace}_judge(found_row, now_us);
    -- What this release cannot read may be alive to a newer one: it is ended like any other.
    ended := cause IS NULL OR cause = 'unreadable';
    PERFORM {namespace}_end(
        p_handle, CASE WHEN ended THEN p_reason ELSE cause END, now_us, p_tombstone_us
    );
END
$$;
---
CREATE FUNCTION {namespace}_revoke_owner(
    p_tag integer, p_owner text, p_reason text, p_keep text,
    p_tombstone_us bigint, p_offset_us bigint,
    OUT handles text[], OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    each record;
    newest bigint;
BEGIN
    PERFORM {namespace}_hold_owner(p_tag, p_owner);
    PERFORM 1 FROM {namespace}_sessions s
        WHERE s.tag = p_tag AND s.owner = p_owner
        AND s.owner <> '' AND s.ended_us IS NULL
        ORDER BY s.handle FOR UPDATE;
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
    -- A clock that stepped back must not leave the cut before a session that is there already.
    INSERT INTO {namespace}_cuts AS c (cut_us, tag, owner, kept, reason)
        VALUES (greatest(now_us, newest), p_tag, p_owner, coalesce(p_keep, ''), p_reason)
        ON CONFLICT (tag, owner) DO UPDATE SET
            cut_us = greatest(c.cut_us, excluded.cut_us), kept = excluded.kept, reason = excluded.reason;
END
$$;
---
-- Alive sessions of an owner after (p_created_us, p_handle), oldest first; always at least one row, for the clock.
CREATE FUNCTION {namespace}_list_by_owner(
    p_tag integer, p_owner text, p_created_us bigint, p_handle text, p_limit bigint, p_offset_us bigint
) RETURNS SETOF {namespace}_found
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now_us bigint := {namespace}_clock(p_offset_us);
BEGIN
    RETURN QUERY
    SELECT v_now_us, NULL::text, p.* FROM (SELECT) AS always LEFT JOIN LATERAL (
        SELECT s.tag, s.handle::text, s.schema_number::integer, s.version, s.digest::text, s.owner::text, s.subject,
               s.created_us, s.auth_us, s.idle_us, s.absolute_us, s.seen_us, s.authority, s.fields::text
        FROM {namespace}_sessions s
        WHERE s.tag = p_tag AND s.owner = p_owner
        AND s.owner <> '' AND s.ended_us IS NULL
        AND (s.created_us, s.handle) > (p_created_us, p_handle)
        AND {namespace}_judge(s, v_now_us) IS NULL
        ORDER BY s.created_us, s.handle LIMIT p_limit
    ) AS p ON true;
END
$$;
---
-- Alive sessions of everybody after p_handle, by handle. A page looks at no more than p_examined rows, so that a
-- million tombstones cannot hold it up; edge is where it stopped looking, NULL at the end.
CREATE FUNCTION {namespace}_scan(
    p_handle text, p_limit bigint, p_examined bigint, p_offset_us bigint
) RETURNS SETOF {namespace}_found
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now_us bigint := {namespace}_clock(p_offset_us);
    v_edge text;
BEGIN
    SELECT s.handle INTO v_edge FROM {namespace}_sessions s
        WHERE s.handle > p_handle
        ORDER BY s.handle OFFSET p_examined - 1 LIMIT 1;
    RETURN QUERY
    SELECT v_now_us, v_edge, p.* FROM (SELECT) AS always LEFT JOIN LATERAL (
        SELECT s.tag, s.handle::text, s.schema_number::integer, s.version, s.digest::text, s.owner::text, s.subject,
               s.created_us, s.auth_us, s.idle_us, s.absolute_us, s.seen_us, s.authority, s.fields::text
        FROM {namespace}_sessions s
        WHERE s.handle > p_handle
        AND (v_edge IS NULL OR s.handle <= v_edge)
        AND s.ended_us IS NULL AND {namespace}_judge(s, v_now_us) IS NULL
        ORDER BY s.handle LIMIT p_limit
    ) AS p ON true;
END
$$;
---
-- Rows that others hold are skipped: cleaning never waits for a request, and two cleaners share the work.
CREATE FUNCTION {namespace}_sweep(
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
    FOR row_due IN
        SELECT l.key, l.arrival_us FROM {namespace}_limits l
        WHERE l.due_us <= now_us
        ORDER BY l.due_us LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
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
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    );
    RETURN removed;
END
$$;
---
-- Generic cell rate algorithm: arrival_us is the theoretical arrival time of the next attempt.
CREATE FUNCTION {namespace}_hit(
    p_key text, p_interval_us bigint, p_burst_us bigint, p_cost_us bigint, p_offset_us bigint,
    OUT allowed boolean, OUT reached_us bigint, OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    -- A counter need not outlive a power cut: not waiting for the disk makes a refusal cheaper than an attempt.
    PERFORM set_config('synchronous_commit', 'off', true);
    IF p_cost_us <= p_burst_us THEN
        -- The clock is read where the row is already locked: a time from before the wait would refuse an attempt that
        -- there is room for.
        INSERT INTO {namespace}_limits AS l (arrival_us, due_us, key)
            VALUES (
                {namespace}_clock(p_offset_us) + p_cost_us, {namespace}_clock(p_offset_us) + p_burst_us, p_key
            )
            ON CONFLICT (key) DO UPDATE
                SET arrival_us = greatest(l.arrival_us, {namespace}_clock(p_offset_us)) + p_cost_us
                WHERE greatest(l.arrival_us - {namespace}_clock(p_offset_us), 0) + p_cost_us <= p_burst_us
            RETURNING l.arrival_us INTO reached_us;
    END IF;
    now_us := {namespace}_clock(p_offset_us);
    allowed := reached_us IS NOT NULL;
    IF NOT allowed THEN
        SELECT greatest(l.arrival_us, now_us) INTO reached_us FROM {namespace}_limits l WHERE l.key = p_key;
        reached_us := coalesce(reached_us, now_us);
    END IF;
END
$$;
