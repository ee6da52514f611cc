"""A token server as docker-registry trusts one: it signs JSON web tokens for those who know the password, and remembers what was asked.

distribution.github.io/distribution/spec/auth/jwt
"""

from __future__ import annotations

import base64
import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from registry import SECRET, USER


def certified(folder: Path) -> tuple[Any, bytes, Path]:
    """A key, a certificate that it signed itself, and the file that holds both."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now, day = datetime.now(UTC), timedelta(days=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    signed = made.serial_number(1).not_valid_before(now - day).not_valid_after(now + day).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bundle.pem").write_bytes(signed.public_bytes(pem) + private)
    return key, signed.public_bytes(serialization.Encoding.DER), folder / "bundle.pem"


class TokenServer:
    """Gives docker-registry's tokens (JSON web tokens, signed) to who knows the password; keeps what was asked."""

    def __init__(self, folder: Path) -> None:
        self.key, self.certificate, self.bundle = certified(folder)
        self.asked: list[tuple[str, dict[str, list[str]], str]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Tokens,), {"tokens": self}))
        self.realm = f"http://127.0.0.1:{self.http.server_port}/token"

    def __enter__(self) -> TokenServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def token(self, service: str, scope: str) -> str:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        kind, name, actions = scope.split(":") if scope else ("", "", "")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}] if scope else []
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(self.certificate).decode()]}
        times = {"nbf": 0, "iat": 0, "exp": 1 << 33}
        claims = {"iss": "tests", "sub": USER, "aud": service, "jti": str(len(self.asked)), "access": access, **times}
        body = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims))
        r, s = utils.decode_dss_signature(self.key.sign(body.encode(), ec.ECDSA(hashes.SHA256())))
        signature = base64.urlsafe_b64encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")).decode().rstrip("=")
        return f"{body}.{signature}"


class _Tokens(BaseHTTPRequestHandler):
    tokens: TokenServer

    def log_message(self, *said: object) -> None:
        pass

    def _give(self, asked: dict[str, list[str]], allowed: bool) -> None:
        self.tokens.asked.append((self.command, asked, self.headers.get("Authorization", "")))
        raw = json.dumps({"token": self.tokens.token(asked["service"][0], asked.get("scope", [""])[0])} if allowed else {}).encode()
        self.send_response_only(200 if allowed else 401)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        basic = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
        self._give(parse_qs(urlsplit(self.path).query), self.headers.get("Authorization") == f"Basic {basic}")

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._give(asked, asked.get("refresh_token") == [SECRET] and asked.get("grant_type") == ["refresh_token"])
