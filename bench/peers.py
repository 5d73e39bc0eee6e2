"""What does it cost a request to know who is asking? Coatcheck and what else people use, inside the same framework.

No HTTP server is between: an ASGI or WSGI call with the headers a browser sends, 1,000 sessions in turn, the same
path, and the same body: the subject. The handler asks who it is and answers 401 if it is nobody, but in the bare
application, which answers one name without looking. Every candidate is asked once before it is timed (the right one
must get in, a forged credential must not) and once after. Those that are used in two ways stand here twice: as their
documentation sets them up, and at their best.

Peers do not all do the same: starsessions writes back what it has loaded, changed or not, fastapi-users fetches the
user (here from a dictionary), a signed cookie or token cannot be ended before it expires.
"""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import jwt
from fastapi import Depends, FastAPI, Security
from fastapi.responses import PlainTextResponse as FastAPIPlainTextResponse
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin
from fastapi_users.authentication import (
    AuthenticationBackend,
    BearerTransport,
    CookieTransport,
    JWTStrategy,
    RedisStrategy,
)
from fastapi_users.authentication.strategy import Strategy
from fastapi_users.db import BaseUserDatabase
from joserfc import jwt as joserfc_jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starsessions import SessionAutoloadMiddleware
from starsessions import SessionMiddleware as StarSessions
from starsessions.stores.redis import RedisStore

from bench.harness import Candidate, Result, compare, with_notes
from bench.traffic import (
    BROWSER,
    HOST,
    OTHER_COOKIES,
    SESSIONS,
    Pairs,
    asgi_answer,
    asgi_runner,
    cookie_pair,
    forged,
    hold_answer,
    hold_refusal,
    sign_in,
    sign_in_async,
    subject,
    with_bearer,
    with_cookie,
    wsgi_answer,
    wsgi_runner,
)
from coatcheck import AsyncCoatcheck, Coatcheck, Settings
from coatcheck.session import Principal
from coatcheck.web import asgi, starlette, wsgi
from coatcheck.web.fastapi import Auth
from tests.servers.valkey import ValkeySingle

PARTS = ("starlette", "fastapi", "flask", "django")

SECRET = "a-secret-of-the-benchmark-of-48-letters-and-more"
LIFETIME = 36_000
ISSUER, AUDIENCE = "https://id.example.test", "https://api.example.test"
OURS = "Coatcheck, valkey, warm"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One way to know who is asking: the application, and the requests of people who are signed in."""

    name: str
    app: Any
    requests: Sequence[Pairs]
    forged: Pairs | None
    path: str = "/me"
    repeat: int = 400


def run(*, rounds: int, full: bool, part: str) -> list[Result]:
    """One framework's table."""
    with ExitStack() as stack:
        valkey = stack.enter_context(ValkeySingle())
        build: Callable[[ExitStack, ValkeySingle, int], Result] = {
            "starlette": _starlette,
            "fastapi": _fastapi,
            "flask": _flask,
            "django": _django,
        }[part]
        # CPU-bound rows need the rounds more than the seconds: one round takes a fraction of one.
        return [build(stack, valkey, max(rounds, 21))]


def _bare() -> list[Pairs]:
    return [(*BROWSER, ("cookie", f"{OTHER_COOKIES}; seen={number % 10}")) for number in range(SESSIONS)]


def _compare_asgi(
    framework: str, loop: asyncio.AbstractEventLoop, valkey: ValkeySingle, stacks: Sequence[Stack], rounds: int
) -> Result:
    def ask(each: Stack, headers: Pairs) -> tuple[int, bytes, list[str]]:
        return loop.run_until_complete(asgi_answer(each.app, headers))

    def rest() -> None:
        # A server's loop turns between requests; this one only when it is told to.
        loop.run_until_complete(asyncio.sleep(0.002))

    runners = {each.name: asgi_runner(loop, each.app, each.requests) for each in stacks}
    return _compare(framework, valkey, stacks, runners, ask, rounds, rest)


def _compare_wsgi(framework: str, valkey: ValkeySingle, stacks: Sequence[Stack], rounds: int) -> Result:
    def ask(each: Stack, headers: Pairs) -> tuple[int, bytes, list[str]]:
        return wsgi_answer(each.app, headers, each.path)

    runners = {each.name: wsgi_runner(each.app, each.requests, each.path) for each in stacks}
    return _compare(framework, valkey, stacks, runners, ask, rounds, None)


def _compare(
    framework: str,
    valkey: ValkeySingle,
    stacks: Sequence[Stack],
    runners: Mapping[str, Callable[[int], None]],
    ask: Callable[[Stack, Pairs], tuple[int, bytes, list[str]]],
    rounds: int,
    rest: Callable[[], None] | None,
) -> Result:
    def check() -> None:
        for each in stacks:
            numbers = (0,) if each.forged is None else (0, 1, SESSIONS // 2, SESSIONS - 1)
            for number in numbers:
                hold_answer(each.name, ask(each, each.requests[number]), number)
            if each.forged is not None:
                hold_refusal(each.name, ask(each, each.forged))

    check()
    notes = {}
    for each in stacks:
        # Once round warms what is to be warm; the second time round is counted.
        runners[each.name](SESSIONS)
        if rest is not None:
            rest()
        with valkey.record() as sent:
            runners[each.name](SESSIONS)
        notes[each.name] = f"{len(sent) / SESSIONS:.2f} store commands a request"
    found = compare(
        f"One authenticated request: {framework}",
        [Candidate(name=each.name, run=runners[each.name], repeat=each.repeat, prepare=rest) for each in stacks],
        rounds=rounds,
        yardstick=OURS,
        facts={"sessions in turn": SESSIONS, "store": valkey.version},
    )
    check()
    return with_notes(found, notes)


# -- Starlette ------------------------------------------------------------------------------------------------------


def _starlette(stack: ExitStack, valkey: ValkeySingle, rounds: int) -> Result:
    loop = _loop(stack)
    coat = _async_coat(stack, loop, valkey)
    values = loop.run_until_complete(sign_in_async(coat, range(SESSIONS)))
    ours = [with_cookie(cookie_pair(coat, value)) for value in values]
    wrong = with_cookie(cookie_pair(coat, forged(values[0])))

    def ours_says(request: Request) -> str | None:
        return asgi.session_of(request.scope).subject

    tokens = [token_claims(number) for number in range(SESSIONS)]
    by_jwt = [jwt.encode(claims, SECRET, algorithm="HS256") for claims in tokens]
    key = OctKey.import_key(SECRET)
    by_joserfc = [joserfc_jwt.encode({"alg": "HS256"}, claims, key) for claims in tokens]
    stacks = [
        Stack(name="bare Starlette", app=_app(lambda _: subject(0)), requests=_bare(), forged=None),
        Stack(
            name=OURS,
            app=_app(ours_says, Middleware(asgi.CoatcheckMiddleware, coat=coat), load=True),
            requests=ours,
            forged=wrong,
        ),
        Stack(
            name="Coatcheck through request.user",
            app=_app(lambda request: request.user.subject, Middleware(starlette.CoatcheckMiddleware, coat=coat)),
            requests=ours,
            forged=wrong,
        ),
        _signed_in(
            loop,
            "Starlette SessionMiddleware (signed cookie)",
            Middleware(SessionMiddleware, secret_key=SECRET, https_only=True),
        ),
        Stack(
            name="joserfc HS256 bearer",
            app=_app(lambda request: request.scope["subject"], Middleware(BearerCheck, check=_joserfc_check(key))),
            requests=[with_bearer(token) for token in by_joserfc],
            forged=with_bearer(forged(by_joserfc[0])),
        ),
        Stack(
            name="PyJWT HS256 bearer",
            app=_app(lambda request: request.scope["subject"], Middleware(BearerCheck, check=pyjwt_check)),
            requests=[with_bearer(token) for token in by_jwt],
            forged=with_bearer(forged(by_jwt[0])),
        ),
    ]
    redis = RedisStore(valkey.url)
    stack.callback(lambda: loop.run_until_complete(redis._connection.aclose()))
    stacks.append(
        _signed_in(
            loop,
            "starsessions, valkey",
            Middleware(StarSessions, store=redis, cookie_https_only=True, lifetime=LIFETIME),
            Middleware(SessionAutoloadMiddleware),
            repeat=100,
        )
    )
    return _compare_asgi("Starlette", loop, valkey, stacks, rounds)


def _app(who: Callable[[Request], str | None], *middleware: Middleware, load: bool = False) -> Any:
    async def me(request: Request) -> Response:
        if load:
            await asgi.session_of(request.scope).load()
        found = who(request)
        return PlainTextResponse("", status_code=401) if found is None else PlainTextResponse(found)

    async def login(request: Request) -> Response:
        request.session["user"] = request.path_params["subject"]
        return PlainTextResponse("")

    return Starlette(routes=[Route("/me", me), Route("/login/{subject}", login)], middleware=middleware)


def _signed_in(loop: asyncio.AbstractEventLoop, name: str, *middleware: Middleware, repeat: int = 400) -> Stack:
    """A session that the peer's own sign-in has made."""
    app = _app(lambda request: request.session.get("user"), *middleware)
    pairs = []
    for number in range(SESSIONS):
        _, _, cookies = loop.run_until_complete(asgi_answer(app, BROWSER, f"/login/{subject(number)}"))
        pairs.append(cookies[0].split(";")[0])
    return Stack(
        name=name,
        app=app,
        requests=[with_cookie(pair) for pair in pairs],
        forged=with_cookie(forged(pairs[0])),
        repeat=repeat,
    )


class BearerCheck:
    """As little as an application can do around a token library: one look at the raw headers."""

    def __init__(self, app: Any, check: Callable[[str], str | None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope["headers"]:
            if name == b"authorization" and value.startswith(b"Bearer "):
                scope["subject"] = self._check(value[7:].decode("latin-1"))
                break
        else:
            scope["subject"] = None
        await self._app(scope, receive, send)


def token_claims(number: int) -> dict[str, Any]:
    """What a token of this session says."""
    now = int(time.time())
    return {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject(number),
        "iat": now,
        "exp": now + LIFETIME,
        "jti": f"{number:032x}",
    }


def pyjwt_check(token: str) -> str | None:
    """The subject of a token that PyJWT accepts, or None."""
    try:
        claims = jwt.decode(token, SECRET, algorithms=["HS256"], audience=AUDIENCE, issuer=ISSUER)
    except jwt.InvalidTokenError:
        return None
    found: str = claims["sub"]
    return found


def _joserfc_check(key: OctKey) -> Callable[[str], str | None]:
    registry = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": AUDIENCE}, exp={"essential": True}
    )

    def check(token: str) -> str | None:
        try:
            claims = joserfc_jwt.decode(token, key, algorithms=["HS256"]).claims
            registry.validate(claims)
        except (JoseError, ValueError):
            return None
        found: str = claims["sub"]
        return found

    return check


# -- FastAPI --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class User:
    """What fastapi-users asks of a user."""

    id: UUID
    email: str
    hashed_password: str = ""
    is_active: bool = True
    is_superuser: bool = False
    is_verified: bool = True


class Users(BaseUserDatabase[User, UUID]):
    """Users in a dictionary: the cheapest there can be."""

    def __init__(self, users: Mapping[UUID, User]) -> None:
        self._users = users

    async def get(self, id: UUID) -> User | None:
        """The user, or None."""
        return self._users.get(id)


class UserManager(UUIDIDMixin, BaseUserManager[User, UUID]):
    """As the documentation begins."""


def _fastapi(stack: ExitStack, valkey: ValkeySingle, rounds: int) -> Result:
    loop = _loop(stack)
    coat = _async_coat(stack, loop, valkey)
    auth = Auth(coat)
    values = loop.run_until_complete(sign_in_async(coat, range(SESSIONS)))

    def with_route(*dependencies: Any, who: Callable[[Any], str]) -> FastAPI:
        app = FastAPI()
        if not dependencies:

            @app.get("/me", response_class=FastAPIPlainTextResponse)
            async def me() -> str:
                return who(None)
        else:

            @app.get("/me", response_class=FastAPIPlainTextResponse)
            async def me_with(found: Any = dependencies[0]) -> str:
                return who(found)

        return app

    async def trivial() -> str:
        return subject(0)

    guarded = FastAPI()

    @guarded.get("/me", response_class=FastAPIPlainTextResponse)
    async def me(user: Principal = Security(auth.user)) -> str:
        return user.subject

    auth.install(guarded)
    stacks = [
        Stack(name="bare FastAPI", app=with_route(who=lambda _: subject(0)), requests=_bare(), forged=None),
        Stack(
            name="one trivial dependency",
            app=with_route(Depends(trivial), who=lambda found: str(found)),
            requests=_bare(),
            forged=None,
        ),
        Stack(
            name=OURS,
            app=guarded,
            requests=[with_cookie(cookie_pair(coat, value)) for value in values],
            forged=with_cookie(cookie_pair(coat, forged(values[0]))),
        ),
    ]
    users = {
        UUID(subject(number)): User(id=UUID(subject(number)), email=f"u{number}@example.test")
        for number in range(SESSIONS)
    }
    client = AsyncRedis.from_url(valkey.url, decode_responses=True)
    stack.callback(lambda: loop.run_until_complete(client.aclose()))
    for best in (True, False):
        how = "async strategy" if best else "as documented"
        stacks.append(
            _fastapi_users(
                loop,
                f"fastapi-users JWT, {how}",
                BearerTransport(tokenUrl="login"),
                lambda: JWTStrategy(secret=SECRET, lifetime_seconds=LIFETIME),
                users,
                best=best,
            )
        )
        stacks.append(
            _fastapi_users(
                loop,
                f"fastapi-users Redis, {how}",
                CookieTransport(cookie_max_age=LIFETIME),
                lambda: RedisStrategy(client, lifetime_seconds=LIFETIME),
                users,
                best=best,
            )
        )
    return _compare_asgi("FastAPI", loop, valkey, stacks, rounds)


def _fastapi_users(
    loop: asyncio.AbstractEventLoop,
    name: str,
    transport: BearerTransport | CookieTransport,
    make: Callable[[], Strategy[User, UUID]],
    users: Mapping[UUID, User],
    *,
    best: bool,
) -> Stack:
    database = Users(users)

    async def get_user_db() -> Any:
        yield database

    async def get_user_manager(user_db: Any = Depends(get_user_db)) -> Any:
        yield UserManager(user_db)

    def get_strategy() -> Strategy[User, UUID]:
        return make()

    async def get_strategy_async() -> Strategy[User, UUID]:
        return make()

    backend = AuthenticationBackend(
        name="bench",
        transport=transport,
        get_strategy=get_strategy_async if best else get_strategy,
    )
    current = FastAPIUsers[User, UUID](get_user_manager, [backend]).current_user(active=True)
    app = FastAPI()

    @app.get("/me", response_class=FastAPIPlainTextResponse)
    async def me(user: Any = Depends(current)) -> str:
        return str(user.id)

    async def tokens() -> list[str]:
        return [await make().write_token(user) for user in users.values()]

    found = loop.run_until_complete(tokens())
    cookie = transport.cookie_name if isinstance(transport, CookieTransport) else None

    def as_headers(token: str) -> Pairs:
        return with_bearer(token) if cookie is None else with_cookie(f"{cookie}={token}")

    return Stack(
        name=name,
        app=app,
        requests=[as_headers(token) for token in found],
        forged=as_headers(forged(found[0])),
        repeat=60,
    )


# -- Flask ----------------------------------------------------------------------------------------------------------


def _flask(stack: ExitStack, valkey: ValkeySingle, rounds: int) -> Result:
    flask: Any = import_module("flask")
    coat = _blocking_coat(stack, valkey)
    values = sign_in(coat, SESSIONS)

    def made(who: Callable[[], str | None], **settings: Any) -> Any:
        app = flask.Flask("bench")
        app.config.update(SECRET_KEY=SECRET, SESSION_COOKIE_SECURE=True, **settings)

        def me() -> Any:
            found = who()
            return ("", 401) if found is None else found

        def login(who: str) -> str:
            flask.session["user"] = who
            return ""

        app.add_url_rule("/me", view_func=me)
        app.add_url_rule("/login/<who>", view_func=login)
        return app

    bare = made(lambda: subject(0))
    guarded = made(lambda: wsgi.session_of(flask.request.environ).subject)
    guarded.wsgi_app = wsgi.CoatcheckMiddleware(guarded.wsgi_app, coat)
    stacks = [
        Stack(name="bare Flask", app=bare, requests=_bare(), forged=None, repeat=150),
        Stack(
            name=OURS,
            app=guarded,
            requests=[with_cookie(cookie_pair(coat, value)) for value in values],
            forged=with_cookie(cookie_pair(coat, forged(values[0]))),
            repeat=150,
        ),
        _flask_stack("Flask session (signed cookie)", made(lambda: flask.session.get("user"))),
        _flask_stack("Flask-Login over it", _with_flask_login(made)),
    ]
    flask_session: Any = import_module("flask_session")
    client = Redis.from_url(valkey.url)
    stack.callback(client.close)
    for how, refresh in (("no refresh", False), ("as documented", True)):
        app = made(
            lambda: flask.session.get("user"),
            SESSION_TYPE="redis",
            SESSION_REDIS=client,
            SESSION_KEY_PREFIX=f"{how}:",
            SESSION_REFRESH_EACH_REQUEST=refresh,
        )
        flask_session.Session(app)
        stacks.append(_flask_stack(f"Flask-Session, valkey, {how}", app, repeat=50))
    return _compare_wsgi("Flask", valkey, stacks, rounds)


def _with_flask_login(made: Callable[..., Any]) -> Any:
    flask_login: Any = import_module("flask_login")

    def who() -> str | None:
        user = flask_login.current_user
        found: str | None = user.get_id() if user.is_authenticated else None
        return found

    app = made(who)
    manager = flask_login.LoginManager(app)
    known = {subject(number): _flask_user(flask_login, subject(number)) for number in range(SESSIONS)}
    manager.user_loader(known.get)

    def login(who: str) -> str:
        flask_login.login_user(known[who])
        return ""

    app.view_functions["login"] = login
    return app


def _flask_user(flask_login: Any, id_: str) -> Any:
    user = flask_login.UserMixin()
    user.id = id_
    return user


def _flask_stack(name: str, app: Any, *, repeat: int = 150) -> Stack:
    pairs = []
    for number in range(SESSIONS):
        _, _, cookies = wsgi_answer(app, BROWSER, f"/login/{subject(number)}")
        pairs.append(cookies[0].split(";")[0])
    return Stack(
        name=name,
        app=app,
        requests=[with_cookie(pair) for pair in pairs],
        forged=with_cookie(forged(pairs[0])),
        repeat=repeat,
    )


# -- Django ---------------------------------------------------------------------------------------------------------

DJANGO_ENGINES = {
    "signed_cookies": "Django signed_cookies",
    "cached_db": "Django cached_db (Redis and SQLite)",
    "cache": "Django cache (Redis)",
    "db": "Django db (SQLite, connection kept)",
}


def _django(stack: ExitStack, valkey: ValkeySingle, rounds: int) -> Result:
    coat = _blocking_coat(stack, valkey)
    values = sign_in(coat, SESSIONS)
    directory = Path(stack.enter_context(TemporaryDirectory()))
    _set_up_django(directory, valkey.url)
    wsgi_handler: Any = import_module("django.core.handlers.wsgi").WSGIHandler
    override: Any = import_module("django.test.utils").override_settings
    connections: Any = import_module("django.db").connections
    stack.callback(connections.close_all)
    stacks = [
        Stack(name="bare Django", app=wsgi_handler(), requests=_bare(), forged=None, path="/bare", repeat=150),
        Stack(
            name=OURS,
            app=wsgi.CoatcheckMiddleware(wsgi_handler(), coat),
            requests=[with_cookie(cookie_pair(coat, value)) for value in values],
            forged=with_cookie(cookie_pair(coat, forged(values[0]))),
            path="/coat",
            repeat=150,
        ),
    ]
    for engine, name in DJANGO_ENGINES.items():
        module = f"django.contrib.sessions.backends.{engine}"
        with override(SESSION_ENGINE=module, MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"]):
            # The handler reads these once, when it is made.
            app = wsgi_handler()
        keys = list(_django_sessions(import_module(module).SessionStore))
        stacks.append(
            Stack(
                name=name,
                app=app,
                requests=[with_cookie(f"sessionid={key}") for key in keys],
                forged=with_cookie(f"sessionid={forged(keys[0])}"),
                path="/sess",
                repeat=150 if engine == "signed_cookies" else 50,
            )
        )
    return _compare_wsgi("Django", valkey, stacks, rounds)


def _django_sessions(store: Any) -> Iterator[str]:
    for number in range(SESSIONS):
        session = store()
        session["user"] = subject(number)
        session.save()
        yield session.session_key


def _set_up_django(directory: Path, url: str) -> None:
    conf: Any = import_module("django.conf")
    urls: Any = import_module("django.urls")
    http: Any = import_module("django.http")

    def view(who: Callable[[Any], str | None]) -> Callable[[Any], Any]:
        def answer(request: Any) -> Any:
            found = who(request)
            return http.HttpResponse(status=401) if found is None else http.HttpResponse(found)

        return answer

    pages = types.ModuleType("bench_django_urls")
    pages.__dict__["urlpatterns"] = [
        urls.path("bare", view(lambda request: subject(0))),
        urls.path("coat", view(lambda request: wsgi.session_of(request.environ).subject)),
        urls.path("sess", view(lambda request: request.session.get("user"))),
    ]
    conf.settings.configure(
        SECRET_KEY=SECRET,
        ALLOWED_HOSTS=[HOST],
        ROOT_URLCONF=pages,
        INSTALLED_APPS=["django.contrib.sessions"],
        MIDDLEWARE=[],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(directory / "django.db"),
                # The default opens the file anew for each request: the peer at its best is measured.
                "CONN_MAX_AGE": None,
            }
        },
        CACHES={"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}},
        USE_TZ=True,
    )
    import_module("django").setup()
    import_module("django.core.management").call_command("migrate", verbosity=0)


# -- ours -----------------------------------------------------------------------------------------------------------


def _loop(stack: ExitStack) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    stack.callback(lambda: loop.run_until_complete(loop.shutdown_default_executor()))
    return loop


def _async_coat(stack: ExitStack, loop: asyncio.AbstractEventLoop, valkey: ValkeySingle) -> AsyncCoatcheck:
    coat = AsyncCoatcheck(valkey.url, settings=Settings(namespace="bench", server_key=b"k" * 32))
    stack.callback(lambda: loop.run_until_complete(coat.close()))
    loop.run_until_complete(coat.start())
    return coat


def _blocking_coat(stack: ExitStack, valkey: ValkeySingle) -> Coatcheck:
    return stack.enter_context(Coatcheck(valkey.url, settings=Settings(namespace="bench", server_key=b"k" * 32)))
