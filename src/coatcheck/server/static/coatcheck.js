/*! Coatcheck for browsers, Apache-2.0. Source: js/src/coatcheck.ts; built by `npm run build` in js/, never edited. */
export class CoatcheckError extends Error {
    code;
    status;
    retryAfter;
    problem;
    name = "CoatcheckError";
    constructor(code, status, retryAfter, problem, options) {
        super(`coatcheck: ${code}`, options);
        this.code = code;
        this.status = status;
        this.retryAfter = retryAfter;
        this.problem = problem;
    }
}
const PATIENCE = 15_000;
const LONGEST_PAUSE = 60_000;
const MESSAGE_DELAY = 250;
const WANTS_TOKEN = ["invalid_token", "login_required", "session_ended"];
const LOGIN_IS_OVER = ["refresh_invalid", "refresh_reused", ...WANTS_TOKEN];
export function createClient(options = {}) {
    const base = new URL((options.base ?? "/").replace(/\/*$/, "/"), location.href);
    if (base.origin !== location.origin) {
        throw new TypeError("coatcheck: base must be of the page's own origin");
    }
    const trusted = new Set([base.origin]);
    for (const origin of options.origins ?? []) {
        if (!/^https?:/.test(origin) || new URL(origin).origin !== origin) {
            throw new TypeError(`coatcheck: ${origin} is not an origin; write it as https://api.shop.example`);
        }
        trusted.add(origin);
    }
    const before = (options.refreshBefore ?? 30) * 1000;
    const send = options.fetch ?? globalThis.fetch.bind(globalThis);
    const shared = options.channel ?? `coatcheck ${base.href}`;
    const locks = globalThis.navigator?.locks;
    const channel = globalThis.BroadcastChannel ? new BroadcastChannel(shared) : undefined;
    const events = new EventTarget();
    let held;
    let state = "unknown";
    let era = 0;
    let told = 0;
    let wake;
    let pausedUntil = 0;
    let flight;
    let tail = Promise.resolve();
    let closed = false;
    function keep(found, kind, elsewhere) {
        if (closed) {
            return;
        }
        const isNews = kind === "login" || state !== "in";
        held = found;
        state = "in";
        if (kind === "login") {
            era++;
        }
        if (!elsewhere) {
            tell({ kind, token: found.token, lifetime: found.lifetime, wall: found.wall });
        }
        if (isNews) {
            dispatch("signedin", { elsewhere });
        }
    }
    function end(code, reason, heard) {
        const isNews = state === "in" || (state === "unknown" && code !== "refresh_invalid");
        held = undefined;
        state = "out";
        era++;
        if (!heard) {
            tell({ kind: "out", code, reason });
        }
        if (isNews) {
            const elsewhere = code === "logout" ? heard : code !== "refresh_invalid";
            dispatch("signedout", { code, reason, elsewhere });
        }
    }
    function tell(message) {
        if (!closed) {
            channel?.postMessage(message);
        }
    }
    function hear({ data }) {
        told++;
        switch (data.kind) {
            case "token":
            case "login": {
                const found = { token: data.token, lifetime: data.lifetime, wall: data.wall, steady: performance.now() };
                if (data.kind === "login" || !held || leftOf(found) > leftOf(held)) {
                    keep(found, data.kind, true);
                }
                break;
            }
            case "out":
                end(data.code, data.reason, true);
                break;
            case "busy":
                pausedUntil = performance.now() + data.wait;
                break;
        }
        wake?.();
    }
    function dispatch(type, detail) {
        events.dispatchEvent(new CustomEvent(type, { detail }));
    }
    function comeBack(event) {
        if (event.persisted && state === "in") {
            held = undefined;
            renew().catch(() => undefined);
        }
    }
    async function call(path, body, token) {
        if (closed) {
            throw new CoatcheckError("closed", 0, 0, {});
        }
        const headers = new Headers({ accept: "application/json" });
        if (body) {
            headers.set("content-type", "application/json");
        }
        if (token) {
            headers.set("authorization", `Bearer ${token}`);
        }
        try {
            const response = await send(new URL(path, base).href, {
                method: "POST",
                mode: "same-origin",
                credentials: "same-origin",
                cache: "no-store",
                redirect: "error",
                keepalive: true,
                headers,
                body: body ? JSON.stringify(body) : null,
                signal: AbortSignal.timeout?.(PATIENCE) ?? null,
            });
            const members = membersOf(await response.text());
            return { status: response.status, members, wait: waitOf(response.headers.get("retry-after")) };
        }
        catch (cause) {
            throw new CoatcheckError("unavailable", 0, 0, {}, { cause });
        }
    }
    function exclusive(work) {
        if (locks) {
            return locks.request(shared, work);
        }
        const done = tail.then(work);
        tail = done.catch(() => undefined);
        return done;
    }
    function renew() {
        flight ??= takeTurn().finally(() => {
            flight = undefined;
        });
        return flight;
    }
    async function takeTurn() {
        const old = held;
        const seen = told;
        if (!locks) {
            return exclusive(() => exchange(old, seen));
        }
        const attempt = await locks.request(shared, { ifAvailable: true }, async (lock) => lock ? { isSignedIn: await exchange(old, seen) } : undefined);
        if (attempt) {
            return attempt.isSignedIn;
        }
        return exclusive(async () => {
            if (channel && told === seen) {
                await new Promise((resolve) => {
                    wake = resolve;
                    setTimeout(resolve, MESSAGE_DELAY);
                });
            }
            return exchange(old, seen);
        });
    }
    async function exchange(old, seen) {
        for (let isFirst = true;; isFirst = false) {
            if (told !== seen) {
                if (state === "out") {
                    return false;
                }
                if (held && held !== old && !isDue(held)) {
                    return true;
                }
            }
            const pause = pausedUntil - performance.now();
            if (pause > 0) {
                throw new CoatcheckError("unavailable", 503, Math.ceil(pause / 1000), {});
            }
            const asked = era;
            const began = { wall: Date.now(), steady: performance.now() };
            const answer = await call("api/refresh");
            if (asked !== era) {
                return state === "in";
            }
            const found = tokenIn(answer, began);
            if (found) {
                keep(found, "token", false);
                return true;
            }
            const { code, reason } = answer.members;
            if (answer.status !== 401 || typeof code !== "string" || !LOGIN_IS_OVER.includes(code)) {
                if (answer.wait) {
                    pausedUntil = performance.now() + answer.wait;
                    tell({ kind: "busy", wait: answer.wait });
                }
                throw refused(answer);
            }
            if (code !== "refresh_invalid" || !isFirst) {
                end(code, typeof reason === "string" ? reason : null, false);
                return false;
            }
        }
    }
    function isDue(it) {
        return leftOf(it) <= Math.min(before, it.lifetime / 2);
    }
    async function ready() {
        if (state !== "out" && (!held || isDue(held))) {
            try {
                await renew();
            }
            catch (failure) {
                if (!held || leftOf(held) <= 0) {
                    throw failure;
                }
            }
        }
        return held;
    }
    function mayCarry(request) {
        return trusted.has(new URL(request.url).origin);
    }
    async function carry(request, token) {
        if (!mayCarry(request)) {
            throw new TypeError("coatcheck: the address of the request has changed");
        }
        const { redirect, referrer, referrerPolicy } = request;
        const headers = new Headers(request.headers);
        headers.set("authorization", `Bearer ${token}`);
        const manual = redirect === "error" ? redirect : "manual";
        const response = await send(new Request(request, { headers, redirect: manual, referrer, referrerPolicy }));
        if (response.type === "opaqueredirect" && redirect === "follow") {
            throw new TypeError(`coatcheck: ${request.url} answers with a redirect, which is not followed with a token`);
        }
        return response;
    }
    async function authorizedFetch(input, init) {
        if (closed) {
            throw new CoatcheckError("closed", 0, 0, {});
        }
        const request = new Request(input, init);
        if (!mayCarry(request) || request.headers.has("authorization")) {
            return send(request);
        }
        const used = await unlessAborted(request.signal, ready());
        if (!used) {
            return send(request);
        }
        const response = await carry(request, used.token);
        if (!(await wantsToken(response))) {
            return response;
        }
        if (held === used) {
            await unlessAborted(request.signal, renew());
        }
        const isSpent = init?.body instanceof ReadableStream || (input instanceof Request && input.bodyUsed);
        if (!held || held === used || isSpent) {
            return response;
        }
        return carry(new Request(input, init), held.token);
    }
    async function login(credentials) {
        return exclusive(async () => {
            const began = { wall: Date.now(), steady: performance.now() };
            const answer = await call("continue" in credentials ? "api/login/continue" : "api/login", credentials);
            const found = tokenIn(answer, began);
            if (!found) {
                throw refused(answer);
            }
            keep(found, "login", false);
            const { access_token, refresh_token, token_type, expires_in, ...rest } = answer.members;
            return rest;
        });
    }
    async function logout() {
        const token = held && leftOf(held) > 0 ? held.token : undefined;
        end("logout", null, false);
        await exclusive(async () => {
            try {
                let answer = await call("api/logout", undefined, token);
                if (answer.status === 401 && token) {
                    answer = await call("api/logout");
                }
                if (answer.status >= 300 && answer.status !== 401) {
                    throw refused(answer);
                }
            }
            finally {
                end("logout", null, false);
            }
        });
    }
    function close() {
        closed = true;
        held = undefined;
        state = "out";
        era++;
        channel?.close();
        removeEventListener("pageshow", comeBack);
    }
    const { onSignedIn, onSignedOut } = options;
    if (onSignedIn) {
        events.addEventListener("signedin", (event) => onSignedIn(event.detail));
    }
    if (onSignedOut) {
        events.addEventListener("signedout", (event) => onSignedOut(event.detail));
    }
    channel?.addEventListener("message", hear);
    addEventListener("pageshow", comeBack);
    return Object.freeze({
        fetch: authorizedFetch,
        login,
        logout,
        refresh: renew,
        get isSignedIn() {
            return state === "in";
        },
        addEventListener: (type, listener) => events.addEventListener(type, listener),
        removeEventListener: (type, listener) => events.removeEventListener(type, listener),
        close,
    });
}
function ageOf(it) {
    return Math.max(performance.now() - it.steady, Date.now() - it.wall);
}
function leftOf(it) {
    return it.lifetime - ageOf(it);
}
function tokenIn({ status, members }, began) {
    const { access_token: token, expires_in: seconds } = members;
    if (status !== 200 || typeof token !== "string" || typeof seconds !== "number" || !(seconds > 0)) {
        return undefined;
    }
    return { token, lifetime: seconds * 1000, ...began };
}
function refused({ status, members, wait }) {
    const code = typeof members["code"] === "string" ? members["code"] : "unavailable";
    return new CoatcheckError(code, status, Math.ceil(wait / 1000), members);
}
function membersOf(text) {
    try {
        const found = JSON.parse(text);
        return typeof found === "object" && found !== null ? { ...found } : {};
    }
    catch {
        return {};
    }
}
function waitOf(header) {
    const wait = /^\d+$/.test(header ?? "") ? Number(header) * 1000 : Date.parse(header ?? "") - Date.now();
    return Math.min(Math.max(wait || 0, 0), LONGEST_PAUSE);
}
async function wantsToken(response) {
    if (response.status !== 401) {
        return false;
    }
    if (/\bbearer\b.*\berror\s*=\s*"?invalid_token\b/i.test(response.headers.get("www-authenticate") ?? "")) {
        return true;
    }
    if (!/\bjson\b/i.test(response.headers.get("content-type") ?? "")) {
        return false;
    }
    const { code } = membersOf(await response.clone().text());
    return typeof code === "string" && WANTS_TOKEN.includes(code);
}
function unlessAborted(signal, promise) {
    return new Promise((resolve, reject) => {
        const abort = () => reject(signal.reason);
        signal.addEventListener("abort", abort);
        promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
        if (signal.aborted) {
            abort();
        }
    });
}
