"""What must not be read in a log or a report, and what must stay readable."""

from __future__ import annotations

import ast
import json
import re
import time
from pathlib import Path

import pytest

from rayfwd.system.redact import REDACTED, names_a_secret, redact_text, secrets_in

ROOT = Path(__file__).parents[2]

S = "Zq7xPl4ntedV4lue"
"""What must not be seen; `S` in a line below."""
RANDOM = "q8Zr3LxW0vTn5KdY2sHb7MfJ4pGc"
HEX = "5f2c9a7e1b3d4c6f8a0b9c8d7e6f5a4b"
PEM = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDhSfX1vT3nQ7bR"

PLANTED = [
    # Headers.
    "Authorization: Basic S",
    "authorization: bearer S",
    "Proxy-Authorization: Basic dXNlcjpodW50ZXIy S",
    '{"Authorization": "Basic S"}',
    "headers={'Authorization': 'Token S', 'Accept': '*/*'}",
    'curl -H \'Authorization: Digest username="ann", response="S"\' http://h/',
    "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20260101/us-east-1, Signature=S",
    "Cookie: session=S; theme=dark",
    "Set-Cookie: sid=S; Path=/; HttpOnly",
    "[('cookie', 'sid=S'), ('accept', '*/*')]",
    "X-Api-Key: S",
    "X-Auth-Token: S",
    "X-Vault-Token: S",
    # URLs.
    "http://ann:S@proxy.example:3128/",
    "postgresql://ann:p@S@db.example/x",
    "GET https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=S&X-Amz-Expires=9",
    "https://b.s3.amazonaws.com/k?X-Amz-Security-Token=S",
    "https://acc.blob.core.windows.net/c?sv=2022-11-02&sp=r&sig=S%2Bx%3D",
    "https://storage.googleapis.com/b/o?GoogleAccessId=x&Signature=S",
    "https://api.example/v1?access_token=S&x=1",
    "https://api.example/v1?apikey=S",
    "callback#access_token%3DS",
    "https://hooks.slack.com/services/T00000000/B00000000/S",
    # Names.
    "clientSecret=S",
    "accessToken: S",
    '{"secretKey":"S","region":"eu"}',
    "secretAccessKey=S",
    "PGPASSWORD=S psql -h db",
    "MYSQL_PWD=S",
    "Server=db;Uid=ann;Pwd=S;Encrypt=yes",
    "pass: S",
    "openssl rsa -in k -passin pass:S",
    "RAY_FOO_PW=S",
    "RAY_REDIS_PASSWORD='S word'",
    "dbpassword=S",
    "encryption_key = S",
    "aws_secret_access_key = S",
    "client-key-data: S",
    "export WANDB_API_KEY=S",
    "os.environ['HF_TOKEN'] = 'S'",
    "password=a,S",
    "password=a&S",
    "password => S",
    "psk: S",
    "ssid=x csrfmiddlewaretoken=S",
    # Dictionaries, lists, escapes.
    "{'aws_session_token': 'S', 'x': 1}",
    "{'password': b'S'}",
    "['curl', '--token', 'S']",
    '["curl", "--api-key", "S"]',
    "('password', 'S')",
    "api_keys: ['a', 'S']",
    '"{\\"token\\": \\"S\\"}"',
    r"{\\\"token\\\": \\\"S\\\"}",
    '{"env": "{\\"secret\\":\\"a b S\\"}"}',
    "<password>S</password>",
    '<add key="DbPassword" value="S"/>',
    "Config(token='S', port=1)",
    'token="a\\"S"',
    # Commands.
    "ray start --redis-password S --port=1",
    "ray start --redis-password=S",
    "tool -token S",
    "curl -u ann:S http://h/",
    "curl --user ann:S http://h/",
    "sshpass -p S ssh h",
    "mysql -h db -pS",
    "machine h login ann password S",
    # YAML.
    "password: |\n  one\n  S\nnext: 1",
    "spec:\n  token: >-\n    S\n  port: 1",
    "password:\n  S\n",
    "tokens:\n  - S\n  - two\n",
    "password: two words S",
    "users:\n- name: ann\n  user:\n    token: S\n",
    # Sentences.
    "token is S",
    "the token of gpu-1 is S",
    "password for ann is S",
    "Password for ann@host: S",
    "the secret was S, and now is gone",
    "your new password is now S",
    "passphrase S",
    "passphrase: correct horse S",
    "the passphrase is correct horse S",
    'using token "S"',
    "with password `S`",
    "the key is S",
    # Shapes that nothing names.
    "got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.S",
    "download with hf_S",
    "ghp_S",
    "remote: gho_S",
    "github_pat_S",
    "glpat-S",
    "sk-proj-S",
    "sk-ant-api03-S",
    "xoxb-123-S",
    "AIzaSyA0000000S",
    "npm_S0000",
    "pypi-AgEIcHlwaS5vcmcS",
    "sk_live_S",
    "hvs.S",
    "root:$6$salt$S:19000:0:99999:7:::",
    "ann:$2y$05$S",
    "AGE-SECRET-KEY-1S",
    # A private key, whole and in half.
    "-----BEGIN OPENSSH PRIVATE KEY-----\nS\n-----END OPENSSH PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nS",
    "S\nS==\n-----END PRIVATE KEY-----\nand on",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nS\n-----END PGP PRIVATE KEY BLOCK-----",
    "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nS\n---- END SSH2 ENCRYPTED PRIVATE KEY ----",
    '"private": "-----BEGIN PRIVATE KEY-----\\nS\\n-----END PRIVATE KEY-----\\n"',
    "Private-Lines: 1\nS\nPrivate-MAC: S",
    # Pairs of a name and a value, colours, escapes, half a key's first line.
    "{'name': 'HF_TOKEN', 'value': 'S'}",
    '{"Key":"password","Value":"S"}',
    "- name: HF_TOKEN\n  value: S\n",
    "name=password value=S",
    "\x1b[33mtoken\x1b[0m=S",
    "\x1b[1mpassword\x1b[0m: \x1b[32mS\x1b[0m",
    "\\x1b[31mtoken=\\x1b[0mS",
    "token%3A%20S",
    "{&quot;token&quot;:&quot;S&quot;}",
    "password\uff1a S",
    "BEGIN RSA PRIVATE KEY-----\nS\n",
    "password=SecretStr('S')",
    'password = """S"""',
    'password = """one\nS two"""',
    "token=<S>",
    # Names with a blank behind them, and those that are secrets only if they look like one.
    "AWS_SECRET_ACCESS_KEY S",
    "aws configure set aws_secret_access_key S",
    "apikey S",
    "X-Auth: S",
    "//registry.example/:_auth=S",
    "REDISCLI_AUTH=S",
    "https://h/cb?code=S",
    "JSESSIONID=S",
    "connect.sid=S",
    "curl -b 'sid=S' h",
    "mfa_code=S",
    "Passwort: S",
    # Where it stands alone.
    "https://S@github.com/x.git",
    "SENTRY_DSN=https://S@o1.ingest.sentry.io/1",
    "pip install --index-url https://S:x@h/simple",
    "user:S@host",
    "curl -uann:S h",
    "wandb login S",
    "kubectl create secret generic x --from-literal=a=S",
    "https://discord.com/api/webhooks/123/S",
    "token (S)",
    "token <S>",
    "token [S]",
    "token -> S",
    "token | S",
    "token\n  S",
    "JWT S",
    "Incorrect API key provided: S",
    "password is: S",
    "passphrase for key '/home/ann/.ssh/id': S",
]

BARE = [
    f"nothing names it: {RANDOM}",
    f"nothing names it: {HEX}",
    f"nothing names it: {HEX * 2}",
    f"/v1/hook/{RANDOM}/x",
    "AKIAIOSFODNN7EXAMPLE",
    "wJ4lr7Ut/nF3M1K7M9eNGb/PxR0iC5yX8mPl2Ke6",
    PEM,
    "Basic YW5uOmh1bnRlcjI=",
    '"auth": "YW5uOmh1bnRlcjI="',
]
"""Lines of which the last word is a secret."""

NODE = "0c1f5a7e9b3d4c6f8a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b"
HARMLESS = [
    "2026-11-24T10:00:00.123Z info    lane_up lane=interactive session=17c3f2a9b1e04d55 rtt_ms=12",
    f"ray_node_dead node_id={NODE} address=127.77.0.3",
    f"(raylet) worker-{NODE}-01000000-4321.out",
    f"ObjectRef({'0' * 38}ff0100000001000000)",
    f"actor_id={HEX}",
    "host_key fingerprint=SHA256:uNiVztksCsDhcc0u9e8BrrJXvGJyNNnSbXrVlDDIgVw",
    "the head's host key is SHA256:uNiVztksCsDhcc0u9e8BrrJXvGJyNNnSbXrVlDDIgVw",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl gpu-1",
    "boot_id=3e1f9c1a-7a38-4c5c-9d0a-2b1f9e1c7a55",
    "INVOCATION_ID=4f2c9a7e1b3d4c6f8a0b9c8d7e6f5a4b",
    "RAY_AUTH_TOKEN_PATH=/var/lib/rayfwd/ray_token",
    "the token is missing",
    "the token is not the head's",
    "Token authentication is required",
    "password authentication is disabled",
    "host key is not known",
    "host key verification failed",
    "Permission denied (publickey,password,keyboard-interactive).",
    "identity=/home/ann/.ssh/id_ed25519",
    "no key id_ed25519 in the agent",
    "max_tokens=4096, 512 tokens per second, num_tokens: 77",
    "KeyError: 'gpu-1'",
    "cannot read /var/lib/rayfwd/node.key: [Errno 13] Permission denied",
    "--monkey=1 --port=6379",
    "ray start --address=127.77.0.1:6379 --node-ip-address=127.77.0.3 --block",
    '  File "/opt/venv/lib/python3.11/site-packages/ray/worker.py", line 289, in <module>',
    "    ray._private.worker.global_worker.main_loop()",
    "    ~~~~~~~~~~~~~~~~~~~~~~~~~~^^^^^^^^^^^^^^^^^^^^",
    "    if token:\n        raise ValueError(token)",
    "TypeError: CoreWorkerDirectTaskSubmitter.submit_task() got an unexpected keyword argument 'x'",
    "[2026-11-28 15:00:57,123 I 4321 4321] (raylet) node_manager.cc:1234: Sending resource report",
    "/tmp/ray/session_2026-11-28_15-00-57_123456_4321/logs/raylet.out",
    "_ZN3ray4core10CoreWorker11ExecuteTaskERKNS_17TaskSpecificationE",
    "ray::core::CoreWorkerProcess::RunTaskExecutionLoop() + 0x1d [0x7f3c2a1b3c4d]",
    "torch-2.4.0+cu121-cp311-cp311-manylinux_2_17_x86_64.whl",
    "NVIDIA-A100-SXM4-80GB MIG 1g.10gb",
    "image@sha256:" + HEX * 2,
    "fe80::5054:ff:fe12:3456%eth0",
    "ssh -o IdentitiesOnly=yes ray@head.example",
    "git clone git@github.com:ray-project/ray.git; commit 9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d",
    "sk-learn-style estimators",
    "GET /api/jobs/?filter=running HTTP/1.1 200",
    "basic functionality; bearer of news",
    "first pass: 3 items, pass 2",
    "signal sig=SIGTERM",
    "2 keys, 3 tokens, 1 password",
    "https://docs.ray.io/en/latest/ray-core/configure.html#authentication",
    "auth: token",
    'ray.auth = "token"',
    "exit code: 137, signal 9",
    "code=ray_died node=w1",
    "HTTP status code = 401 Unauthorized",
    "git@github.com:ann/x.git",
    "ssh://ann@login1.example.org:22",
    "http://head-node-01.example:8265",
    "name: worker_count\nvalue: 12",
    "{'name': 'RAY_ADDRESS', 'value': '127.77.0.1:6379'}",
    "the key ssh-ed25519 of gpu-1",
    "| token | what Ray asks for |",
    "vault login failed",
]


@pytest.mark.parametrize("line", PLANTED)
def test_a_planted_secret(line: str) -> None:
    text = line.replace("S", S) if line.count("S") == 1 else _planted(line)
    assert S in text
    forms = [text, f"{text} after"]
    if not text.startswith("password: two") and "\n" not in text:
        # In the middle of a line; escaped, as in a traceback or in JSON.
        forms += [f"before {text}", repr(text), json.dumps({"line": text})]
    for form in forms:
        assert S not in redact_text(form)
        assert REDACTED in redact_text(form)
    assert any(S in found for found in secrets_in(text))


def _planted(line: str) -> str:
    """`S` where it stands for itself: no letter before or behind it, or a prefix."""
    return re.sub(r"(?<![A-Z])S(?![A-Za-z.\d])", S, line)


@pytest.mark.parametrize("line", BARE)
def test_a_secret_that_nothing_names(line: str) -> None:
    secret = max(line.replace('"', "").replace("/", " ").split(), key=len)
    if line.startswith("wJ"):
        secret = line
    assert secret not in redact_text(line)
    assert REDACTED in redact_text(line)


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redact_text(line) == line


def test_a_list_is_blanked_with_its_brackets() -> None:
    assert redact_text(f"api_keys: ['a', '{S}'], port: 1") == f"api_keys: {REDACTED}, port: 1"


def test_twice_is_once() -> None:
    for line in PLANTED:
        once = redact_text(line)
        assert redact_text(once) == once


def _own_sentences() -> list[str]:
    """All that rayfwd itself says: the texts in its source, and its pages."""
    said: list[str] = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name == "redact.py":
            continue
        tree = ast.parse(path.read_text())
        notes = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in notes:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "gpu-1" for p in node.values]
                said.append("".join(map(str, parts)))
    for name in ("conditions", "events", "status", "faults", "architecture"):
        said += (ROOT / "docs" / f"{name}.md").read_text().splitlines()
    return said


def test_what_rayfwd_says_itself_stays() -> None:
    blanked = {s: redact_text(s) for s in _own_sentences() if redact_text(s) != s}
    assert blanked == {}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a_" * 50_000,
            "token=" * 20_000,
            "token is " * 10_000,
            "a://" * 20_000,
            "'a', " * 20_000,
        ),
        *("-----END PRIVATE KEY-----\nAAAA\n" * 5_000, "AAAA\n" * 20_000 + "PRIVATE KEY"),
        *("-----BEGIN PRIVATE KEY-----" * 5_000, "password:\n  a\n" * 10_000, '\\"' * 50_000),
        *("mysql " * 20_000, "--a " * 30_000, "<a " * 30_000, "cookie:" * 10_000, "x" * 100_000),
        *(
            "aA0" * 30_000,
            "/aA0" * 30_000,
            "key: [" * 20_000,
            "a.-" * 40_000,
            "token:" + " " * 99_999,
        ),
    ],
    ids=lambda text: text[:16],
)
def test_no_text_takes_long(text: str) -> None:
    """Twice the text takes about twice the time: a job may print what it likes."""

    def seconds(part: str) -> float:
        before = time.process_time()
        redact_text(part)
        return time.process_time() - before

    size = len(text) // 4
    quarter = max(seconds(text[:size]), seconds(text[-size:]), 0.002)
    assert seconds(text) < 12 * quarter


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((n, True) for n in ("token", "nodeKey", "APIKey", "PGPASSWORD", "RAY_FOO_PW", "x-sig")),
        *((n, True) for n in ("authToken", "AWS_SECRET_ACCESS_KEY", "dbpasswd", "--api-key")),
        *(
            (n, False)
            for n in ("monkey", "host_key", "publicKey", "KeyError", "keyboard", "passed")
        ),
        *((n, False) for n in ("RAY_AUTH_TOKEN_PATH", "tokenizer", "secretName", "", "_", "basic")),
    ],
)
def test_names(name: str, secret: bool) -> None:
    assert names_a_secret(name) is secret
