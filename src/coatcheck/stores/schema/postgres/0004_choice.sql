-- What is chosen at a limit is ended in the statement that creates, or nothing is.
DROP FUNCTION {namespace}_create(
    integer, text, text, text, text, bigint, bigint, text, jsonb, bigint, boolean, text, text, text, bigint, bigint,
    bigint
);
---
-- Create, and admit under a limit where p_maximum is given. outcome: created, limit (handles: who is alive), taken.
-- p_shown and p_ending: what somebody chose at the limit, instead of p_evict; the first release had neither, and a node
-- that still runs it calls without them.
CREATE FUNCTION {namespace}_create(
    p_tag integer, p_handle text, p_digest text, p_owner text, p_subject text,
    p_idle_us bigint, p_absolute_us bigint, p_authority text, p_fields jsonb,
    p_maximum bigint, p_evict boolean, p_supersedes text,
    p_reason_superseded text, p_reason_evicted text, p_tombstone_us bigint, p_offset_us bigint,
    p_deny_us bigint DEFAULT 0, p_shown text[] DEFAULT NULL, p_ending text[] DEFAULT NULL,
    OUT outcome text, OUT written_us bigint, OUT handles text[], OUT now_us bigint
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    earlier {namespace}_sessions%ROWTYPE;
    alive text[];
    replaced text;
    leaving text[];
    surplus bigint;
    refused boolean;
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
            IF p_shown IS NULL THEN
                refused := surplus > 0 AND NOT p_evict;
                leaving := alive[1:surplus];
            ELSE
                leaving := ARRAY(
                    SELECT a.handle FROM unnest(alive) WITH ORDINALITY AS a (handle, rank)
                    WHERE a.handle = ANY (p_ending) ORDER BY a.rank
                );
                refused := NOT (alive @> p_shown AND alive <@ p_shown AND alive @> p_ending)
                    OR cardinality(leaving) < surplus;
            END IF;
            IF refused THEN
                outcome := 'limit';
                handles := alive;
                RETURN;
            END IF;
            IF p_maximum IS NOT NULL THEN
                handles := leaving;
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
