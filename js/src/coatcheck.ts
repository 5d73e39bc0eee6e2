/*! Coatcheck for browsers, Apache-2.0. Source: js/src/coatcheck.ts; built by `npm run build` in js/, never edited. */

/**
 * Keeps the access token of a page and tells it when the login is over.
 *
 * Decides when to refresh, who of several tabs does it, which request may carry the token and what may be sent twice.
 * It must never put the token where it can be found again: no storage, no cookie, no property, no DOM. It must never
 * send it to an origin that was not named, and never call a user signed out because a server or a network is away.
 *
 * There is no timer: a token is renewed when it is used, so that a forgotten tab does not keep a session alive.
 */

/** Why a login is over. */
export interface SignedOut {
  /** `logout`, or the code of the server's answer: `refresh_invalid`, `refresh_reused`, `session_ended`. */
  readonly code: string;
  /** What whoever ended the session gave as reason; `null` when nothing was said. */
  readonly reason: string | null;
  /** Somebody else ended it: another tab, another device, an administrator, the server. */
  readonly elsewhere: boolean;
}

/** A login has begun, or was found. */
export interface SignedIn {
  /** Another tab signed in, perhaps as somebody else: show nothing of before. */
  readonly elsewhere: boolean;
}

export interface ClientEvents {
  signedin: CustomEvent<SignedIn>;
  signedout: CustomEvent<SignedOut>;
}

export interface Options {
  /** Address under which Coatcheck is served, of the page's own origin. Default `/`; its API is at `api/` below it. */
  readonly base?: string;
  /** Other origins, such as `https://api.shop.example`, that may see the token. Default none; each sees all of it. */
  readonly origins?: readonly string[];
  /** Seconds before its end at which a token is renewed on use, at most half its life. Default 30. */
  readonly refreshBefore?: number;
  /** Sends requests; called with a `Request` or with a URL and options. Default the `fetch` of this moment. */
  readonly fetch?: typeof fetch;
  readonly onSignedOut?: (detail: SignedOut) => void;
  readonly onSignedIn?: (detail: SignedIn) => void;
  /** Name that the tabs of one application share for their lock and their channel. Default made from `base`. */
  readonly channel?: string;
}

export interface Client {
  /**
   * `fetch` with the token, for the own origin and the listed ones; plain `fetch` for all others.
   *
   * A token that was refused is renewed and the request sent once more, unless its body was a stream or belonged to a
   * `Request`. Redirects are refused. Rejects with a CoatcheckError when no token can be had for now.
   */
  readonly fetch: (input: RequestInfo | URL, init?: RequestInit) => Promise<Response>;
  /**
   * Sign in; resolves to the answer without its tokens. `{continue, end}` goes on after `session_limit`.
   *
   * Rejects with a CoatcheckError: `invalid_credentials`, `throttled`, `session_limit`, `unavailable` and so on.
   */
  readonly login: (credentials: Readonly<Record<string, unknown>>) => Promise<Record<string, unknown>>;
  /**
   * Sign out here and in every tab at once, then on the server. Rejects with a CoatcheckError when the server was not
   * reached: then the session lives on there, and calling again ends it.
   */
  readonly logout: () => Promise<void>;
  /** Get a new token now. Resolves to whether somebody is signed in; rejects with a CoatcheckError if unknown. */
  readonly refresh: () => Promise<boolean>;
  /** Whether somebody is signed in, as far as is known; false until the first `refresh`, `fetch` or `login`. */
  readonly isSignedIn: boolean;
  readonly addEventListener: <K extends keyof ClientEvents>(
    type: K,
    listener: (event: ClientEvents[K]) => void,
  ) => void;
  readonly removeEventListener: <K extends keyof ClientEvents>(
    type: K,
    listener: (event: ClientEvents[K]) => void,
  ) => void;
  /** Forget the token and leave the other tabs; the session goes on. The client is of no use afterwards. */
  readonly close: () => void;
}

/** A call that could not be carried out; nobody is signed out by it. */
export class CoatcheckError extends Error {
  override readonly name = "CoatcheckError";

  constructor(
    /** The server's stable code; `unavailable` when it gave none, `closed` after `close()`. */
    readonly code: string,
    /** HTTP status; 0 when there was no answer. */
    readonly status: number,
    /** Seconds to wait before the next attempt; 0 when nothing was said. */
    readonly retryAfter: number,
    /** The server's problem document (RFC 9457), or an empty object. */
    readonly problem: Readonly<Record<string, unknown>>,
    options?: ErrorOptions,
  ) {
    super(`coatcheck: ${code}`, options);
  }
}

/** An access token and when its life began, by two clocks: see `ageOf`. */
interface Held {
  readonly token: string;
  readonly lifetime: number;
  readonly wall: number;
  readonly steady: number;
}

interface Answer {
  readonly status: number;
  readonly members: Readonly<Record<string, unknown>>;
  readonly wait: number;
}

type Message =
  | { readonly kind: "token" | "login"; readonly token: string; readonly lifetime: number; readonly wall: number }
  | { readonly kind: "out"; readonly code: string; readonly reason: string | null }
  | { readonly kind: "busy"; readonly wait: number };

const PATIENCE = 15_000;
const LONGEST_PAUSE = 60_000;
// A message may overtake the lock or be overtaken by it; who waited for the lock waits this long for the message.
const MESSAGE_DELAY = 250;
const WANTS_TOKEN = ["invalid_token", "login_required", "session_ended"];
const LOGIN_IS_OVER = ["refresh_invalid", "refresh_reused", ...WANTS_TOKEN];

/**
 * A client for this page. Several on one page, or in several tabs, share one login.
 *
 * Throws: TypeError when `base` is of another origin or `origins` holds something else than origins.
 */
export function createClient(options: Options = {}): Client {
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
  // Neither exists everywhere: the lock API is missing on plain http and in old browsers.
  const locks = globalThis.navigator?.locks as LockManager | undefined;
  const channel = globalThis.BroadcastChannel ? new BroadcastChannel(shared) : undefined;
  const events = new EventTarget();

  let held: Held | undefined;
  let state: "unknown" | "in" | "out" = "unknown";
  /** Counts logins and their ends: an answer to a question of an earlier era says nothing about this one. */
  let era = 0;
  /** Counts what other tabs have told. */
  let told = 0;
  let wake: (() => void) | undefined;
  let pausedUntil = 0;
  let flight: Promise<boolean> | undefined;
  let tail: Promise<unknown> = Promise.resolve();
  let closed = false;

  // What is known, and who is told.

  function keep(found: Held, kind: "token" | "login", elsewhere: boolean): void {
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
      dispatch<SignedIn>("signedin", { elsewhere });
    }
  }

  function end(code: string, reason: string | null, heard: boolean): void {
    // Who was never known to be signed in is told only what is worth telling: that a session was ended.
    const isNews = state === "in" || (state === "unknown" && code !== "refresh_invalid");
    held = undefined;
    state = "out";
    era++;
    if (!heard) {
      tell({ kind: "out", code, reason });
    }
    if (isNews) {
      const elsewhere = code === "logout" ? heard : code !== "refresh_invalid";
      dispatch<SignedOut>("signedout", { code, reason, elsewhere });
    }
  }

  function tell(message: Message): void {
    if (!closed) {
      channel?.postMessage(message);
    }
  }

  function hear({ data }: MessageEvent<Message>): void {
    told++;
    switch (data.kind) {
      case "token":
      case "login": {
        const found = { token: data.token, lifetime: data.lifetime, wall: data.wall, steady: performance.now() };
        // A tab that was frozen reads its letters late: an older token does not replace a newer one.
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

  function dispatch<T>(type: keyof ClientEvents, detail: T): void {
    events.dispatchEvent(new CustomEvent<T>(type, { detail }));
  }

  /** A page that comes back from the back button's cache has missed what was told meanwhile. */
  function comeBack(event: PageTransitionEvent): void {
    if (event.persisted && state === "in") {
      held = undefined;
      renew().catch(() => undefined);
    }
  }

  // Calls to the server.

  async function call(path: string, body?: object, token?: string): Promise<Answer> {
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
        // The next cookie still arrives when the tab is closed in between.
        keepalive: true,
        headers,
        body: body ? JSON.stringify(body) : null,
        signal: AbortSignal.timeout?.(PATIENCE) ?? null,
      });
      const members = membersOf(await response.text());
      return { status: response.status, members, wait: waitOf(response.headers.get("retry-after")) };
    } catch (cause) {
      throw new CoatcheckError("unavailable", 0, 0, {}, { cause });
    }
  }

  /** Run `work` while no other call of any tab that could change the cookies is under way. */
  function exclusive<T>(work: () => Promise<T>): Promise<T> {
    if (locks) {
      return locks.request(shared, work) as Promise<T>;
    }
    const done = tail.then(work);
    tail = done.catch(() => undefined);
    return done;
  }

  function renew(): Promise<boolean> {
    flight ??= takeTurn().finally(() => {
      flight = undefined;
    });
    return flight;
  }

  async function takeTurn(): Promise<boolean> {
    const old = held;
    const seen = told;
    if (!locks) {
      return exclusive(() => exchange(old, seen));
    }
    const attempt = await locks.request(shared, { ifAvailable: true }, async (lock) =>
      lock ? { isSignedIn: await exchange(old, seen) } : undefined,
    );
    if (attempt) {
      return attempt.isSignedIn;
    }
    return exclusive(async () => {
      if (channel && told === seen) {
        await new Promise<void>((resolve) => {
          wake = resolve;
          setTimeout(resolve, MESSAGE_DELAY);
        });
      }
      return exchange(old, seen);
    });
  }

  /** Ask for a new token, unless another tab has told the answer meanwhile. */
  async function exchange(old: Held | undefined, seen: number): Promise<boolean> {
    for (let isFirst = true; ; isFirst = false) {
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
      // Another tab may have changed the cookie after this one was sent: it counts as it is now.
      if (code !== "refresh_invalid" || !isFirst) {
        end(code, typeof reason === "string" ? reason : null, false);
        return false;
      }
    }
  }

  function isDue(it: Held): boolean {
    return leftOf(it) <= Math.min(before, it.lifetime / 2);
  }

  // Requests of the application.

  /** The token for a request; `undefined` when nobody is signed in. */
  async function ready(): Promise<Held | undefined> {
    if (state !== "out" && (!held || isDue(held))) {
      try {
        await renew();
      } catch (failure) {
        if (!held || leftOf(held) <= 0) {
          throw failure;
        }
      }
    }
    return held;
  }

  function mayCarry(request: Request): boolean {
    return trusted.has(new URL(request.url).origin);
  }

  async function carry(request: Request, token: string): Promise<Response> {
    if (!mayCarry(request)) {
      throw new TypeError("coatcheck: the address of the request has changed");
    }
    const { redirect, referrer, referrerPolicy } = request;
    const headers = new Headers(request.headers);
    headers.set("authorization", `Bearer ${token}`);
    // Older browsers take the header along to the origin a redirect leads to, so none is followed.
    const manual = redirect === "error" ? redirect : "manual";
    const response = await send(new Request(request, { headers, redirect: manual, referrer, referrerPolicy }));
    if (response.type === "opaqueredirect" && redirect === "follow") {
      throw new TypeError(`coatcheck: ${request.url} answers with a redirect, which is not followed with a token`);
    }
    return response;
  }

  async function authorizedFetch(input: RequestInfo | URL, init?: RequestInit): Promise<Response> {
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

  // The client's methods.

  async function login(credentials: Readonly<Record<string, unknown>>): Promise<Record<string, unknown>> {
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

  async function logout(): Promise<void> {
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
      } finally {
        // A refresh that was under way in another tab may have signed everybody in again.
        end("logout", null, false);
      }
    });
  }

  function close(): void {
    closed = true;
    held = undefined;
    state = "out";
    era++;
    channel?.close();
    removeEventListener("pageshow", comeBack);
  }

  const { onSignedIn, onSignedOut } = options;
  if (onSignedIn) {
    events.addEventListener("signedin", (event) => onSignedIn((event as CustomEvent<SignedIn>).detail));
  }
  if (onSignedOut) {
    events.addEventListener("signedout", (event) => onSignedOut((event as CustomEvent<SignedOut>).detail));
  }
  channel?.addEventListener("message", hear);
  addEventListener("pageshow", comeBack);

  return Object.freeze<Client>({
    fetch: authorizedFetch,
    login,
    logout,
    refresh: renew,
    get isSignedIn() {
      return state === "in";
    },
    addEventListener: (type, listener) => events.addEventListener(type, listener as EventListener),
    removeEventListener: (type, listener) => events.removeEventListener(type, listener as EventListener),
    close,
  });
}

/**
 * Milliseconds since the token was asked for, by the clock that says more.
 *
 * The steady clock does not jump but may stand still while a laptop sleeps; the wall clock counts the sleep but may
 * be set. Too much costs one refresh, too little would send a token that is over.
 */
function ageOf(it: Held): number {
  return Math.max(performance.now() - it.steady, Date.now() - it.wall);
}

function leftOf(it: Held): number {
  return it.lifetime - ageOf(it);
}

function tokenIn({ status, members }: Answer, began: Pick<Held, "wall" | "steady">): Held | undefined {
  const { access_token: token, expires_in: seconds } = members;
  if (status !== 200 || typeof token !== "string" || typeof seconds !== "number" || !(seconds > 0)) {
    return undefined;
  }
  return { token, lifetime: seconds * 1000, ...began };
}

function refused({ status, members, wait }: Answer): CoatcheckError {
  const code = typeof members["code"] === "string" ? members["code"] : "unavailable";
  return new CoatcheckError(code, status, Math.ceil(wait / 1000), members);
}

/** The members of a JSON object; none when the text is something else, such as the page of a proxy. */
function membersOf(text: string): Record<string, unknown> {
  try {
    const found: unknown = JSON.parse(text);
    return typeof found === "object" && found !== null ? { ...found } : {};
  } catch {
    return {};
  }
}

/** Milliseconds that a Retry-After header asks for (RFC 9110 s10.2.3), within bounds. */
function waitOf(header: string | null): number {
  const wait = /^\d+$/.test(header ?? "") ? Number(header) * 1000 : Date.parse(header ?? "") - Date.now();
  return Math.min(Math.max(wait || 0, 0), LONGEST_PAUSE);
}

/** Whether a resource refuses the token itself (RFC 6750 s3.1), and not the person or the deed. */
async function wantsToken(response: Response): Promise<boolean> {
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

/** `promise`, or the signal's reason as soon as it aborts; what was begun for all goes on. */
function unlessAborted<T>(signal: AbortSignal, promise: Promise<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = (): void => reject(signal.reason);
    signal.addEventListener("abort", abort);
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
    if (signal.aborted) {
      abort();
    }
  });
}
