"""Which names stand for a secret, and text with secrets blanked (pure).

Whatever a job prints comes through here on its way to the log. So every pattern takes time that
grows with the length of the text alone: none has a repetition in a repetition.

A secret in text is known by what names it (`token=…`), by where it stands (a header, a URL, behind
`passphrase`), by its shape (a key block, `ghp_…`), or because it is long and random. Ids that
are meant to be read, as Ray's and a host key's fingerprint, are none.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator

REDACTED = "[redacted]"

_Span = tuple[int, int]

_SECRET_WORDS = frozenset(
    {"token", "tokens", "secret", "secrets", "key", "keys", "password", "passwords", "passwd"}
    | {"passphrase", "passphrases", "passcode", "pass", "pw", "pwd", "pswd", "psk", "apikey"}
    | {"credential", "credentials", "creds", "cookie", "cookies", "jwt", "bearer", "otp", "totp"}
    | {"signature", "sig", "sas", "sessionid", "csrf", "xsrf", "sid", "sessid", "jsessionid"}
    | {"phpsessid", "mfa", "passwort", "kennwort", "dbpass", "userpass", "mysqlpass", "pgpass"}
    | {"rootpass", "adminpass", "smtppass", "mailpass", "ftppass"}
)
_SECRET_ENDINGS = (
    *("password", "passwd", "passphrase", "token", "secret", "pwd", "apikey", "accesskey"),
    *("secretkey", "privatekey", "authkey", "signingkey", "encryptionkey"),
)
"""Of words that are written as one (`PGPASSWORD`)."""
_HARMLESS_ENDINGS = frozenset(
    {"path", "file", "fingerprint", "type", "algorithm", "mode", "name", "error", "errors"}
    | {"exception", "warning", "count", "size", "length", "limit", "usage", "ttl", "timeout"}
    | {"version", "stdin", "exchange", "authentication"}
)
"""Last words of names that speak about a secret without holding it (`RAY_AUTH_TOKEN_PATH`)."""
_WEAK = frozenset({"auth", "code", "hmac", "tok"})
"""Last words of names that hold a secret, or what everybody may know: only what nobody would write
in a sentence is taken for one."""
_SWITCHES = frozenset({"keep", "no"})
"""First words of names that say what to do about a secret (`--keep-token`)."""
_PUBLIC = frozenset({"public", "pub", "host", "primary", "sort", "partition"})
"""A key with one of these words before it is no secret one."""
_COUNTED = frozenset({"token", "tokens", "key", "keys", "secrets", "pass", "sig", "cookies"})
"""Words that also stand before a number of them (`max_tokens=4096`)."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")

_COLOUR = r"(?:\x1b|\\x1b|\\u001b)\[[0-9;]{0,12}m"
"""Of a terminal."""
_GAP = rf"(?:[ \t]|{_COLOUR}){{0,8}}"
_SEPARATOR = rf"{_GAP}(?::=|=>|->|[:=\uff1a]|%3[dD]|%3[aA]|\\uff1a|\\u003[dD]|&#61;)(?:%20)?{_GAP}"
_BEHIND_A_COLOUR = r"(?<=\[[0-9]m)|(?<=\[[0-9]{2}m)|(?<=;[0-9]m)|(?<=;[0-9]{2}m)|(?<=\[m)"
_NAMED = re.compile(
    # One of a list of names and values, in XML, YAML, JSON and as Python shows it.
    r"\b(?:[kK]ey|[nN]ame)\\*[\"']?[ \t]{0,4}[:=][ \t]{0,4}\\*[\"']?(?P<attribute>[\w.-]{1,80})"
    r"\\*[\"']?\s{0,4}[,;]?\s{0,40}\\*[\"']?[vV]alue\\*[\"']?[ \t]{0,4}[:=][ \t]{0,4}"
    rf"|(?:(?<![\w.-])|{_BEHIND_A_COLOUR})(?P<name>-{{0,2}}[A-Za-z_][\w.-]*)"
    rf"(?:\\*[\"']?\]?|&quot;){_SEPARATOR}"
    # One of a pair: ('cookie', '…'), ['--token', '…'].
    r"|(?P<quote>\\*[\"'])(?P<first>-{0,2}[A-Za-z][\w-]{1,80})(?P=quote)\s{0,4},\s{0,4}(?=\\*[\"']|b[\"'])"
    r"|(?<!\S)(?P<flag>--?[A-Za-z][\w-]*)[ \t]{1,8}(?![\s-])"
    r"|<(?P<tag>[A-Za-z][\w.-]*)(?:\s[^<>]{0,200})?>(?=[^<\s])"
)
"""A name and what makes it one: `x=`, `x:`, `'x':`, `\\"x\\":`, `["x"] =`, `--x `, `<x>`."""

_VALUE = re.compile(
    # What the system says of a file (`node.key: [Errno 13] …`) is none.
    r"(?!\[Errno [0-9])(?:"
    # What is given to a call (`SecretStr('…')`) is the value.
    r"(?:[A-Za-z_][\w.]{0,60}\((?=\\*[\"']))?(?:"
    r"[bBrRuUfF]{0,2}(?P<triple>(?:\\*\"){3}|(?:\\*'){3})(?P<text>(?s:.{0,4000}?))(?=(?P=triple)|\Z)"
    # In quotes, which may not be closed; where they are escaped, up to one escaped as often.
    r"|[bBrRuUfF]{0,2}(?P<slashes>\\+)(?P<mark>[\"'])(?P<escaped>.*?)"
    r"(?=(?<!\\)(?P=slashes)(?P=mark)|$)"
    r"|[bBrRuUfF]{0,2}\"(?P<double>(?:[^\"\\\n]|\\.)*)"
    r"|[bBrRuUfF]{0,2}'(?P<single>(?:[^'\\\n]|\\.)*))"
    r"|<(?P<angled>[^\s<>]{6,200})>"
    r"|(?P<several>[\[({][^\])}]*[\])}]?)"
    # Commas and their like are of the value unless something new begins behind them.
    r"|(?P<bare>(?:[^\s,;&\"'<]|[,;&](?!\s|$|[\"'{]|amp;|-{0,2}[\w.-]{1,60}=))+))",
    re.MULTILINE,
)
_LEFT_OF_A_WORD = re.compile(r"[\"'][\w+/-][^\s\"']*")
_BLOCK = re.compile(r"(?:[|>][+-]?[0-9]?[+-]?)?[ \t]*\n")
_LINE_OF_A_VALUE = re.compile(r"[ \t]+(?:- +)?(?:[\w.-]+: +)?\S+[ \t]*")

_HEADER = re.compile(
    r"(?<!\w)(?:(?:proxy-)?authorization|(?:set-)?cookie2?)\\*[\"']?[ \t]{0,8}[:=,][ \t]{0,8}"
    r"b?(?P<quote>\\*[\"'])?(?:(?:basic|bearer|token|digest|negotiate|aws4-hmac-sha256)[ \t]+)?",
    re.IGNORECASE,
)
"""Of HTTP: the rest of the line, or up to the quote that closes it, is the secret."""
_BEARER = re.compile(r"\bbearer[ \t]+(?P<value>[^\s\"'\\,;)}\]]+)", re.IGNORECASE)
_BASIC = re.compile(
    r"(?:\bbasic[ \t]+|auth\\*[\"']?[ \t]?[:=][ \t]?\\*[\"']?)(?P<value>[A-Za-z0-9+/]{6,}=*)",
    re.IGNORECASE,
)
_USERINFO = re.compile(
    r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://(?:[^\s/:@\"']*:(?P<value>[^\s/\"']+)"
    r"|(?P<user>[^\s/:@\"']{12,}))(?=@)",
    re.IGNORECASE,
)
"""A password in a URL: proxies are given so. Where there is a user only, that may be a token."""
_AT_A_HOST = re.compile(r"(?<![\w./:@-])[\w.-]{1,60}:(?P<value>[^\s:@/\"']{8,})(?=@[\w.-])")
"""`ann:…@host`."""
_LOGIN = re.compile(
    r"(?<!\S)(?:-u|--user|--proxy-user)(?:[= \t]\s{0,4})?[\"']?[^\s:\"']{1,80}:(?P<user>[^\s\"']+)"
    r"|\b(?:wandb|vault|hf|huggingface-cli|comet|neptune)[ \t]+(?:auth[ \t]+)?login[ \t]+"
    r"(?:--relogin[ \t]+)?(?P<cli>[A-Za-z0-9][\w.-]{11,})"
    r"|--from-literal[= ][^\s=]{1,80}=(?P<literal>\S+)"
    r"|\b(?:sshpass|mysql|mysqldump|mariadb|docker login)\b[^\n]{0,120}?\s-p\s?(?P<p>[^\s-]\S*)"
    r"|\blogin[ \t]+\S{1,80}\s{1,8}password[ \t]+(?P<netrc>\S+)"
)

_NOUN = (
    r"(?:token|password|passwd|passphrase|passcode|passwort|kennwort|secret|credentials?|\bjwt"
    r"|(?P<key>(?:\b|_|api|access|auth)key))"
)
_SAID = re.compile(
    rf"(?P<noun>{_NOUN})[ \t]+(?:(?:of|for|to|from|on)[ \t]+(?:the[ \t]+)?(?:key[ \t]+)?"
    r"[\w.@/'\"~-]{1,200}[ \t]*)?(?:(?:provided|given|supplied|received|used|sent)[ \t]*)?"
    r"(?::|=|\b(?:is|was|are|equals|became|set[ \t]+to)\b:?)[ \t]+(?:now[ \t]+)?"
    rf"|(?P<alone>{_NOUN.replace('key>', 'alone_key>')})"
    r"(?:[ \t]+(?:(?:->|\|)[ \t]{0,4})?[(<\[]?|[ \t]{0,4}\n[ \t]{0,40})",
    re.IGNORECASE,
)
"""`the token of gpu-1 is …`, `password for ann: …`; and `token …`."""
_STATE_WORDS = """
a absent accepted again allowed already an and asked at bad before blank blanked but by cached
changed checked created damaged default deleted denied derived different disabled down empty enabled
expected expired false file for found from generated given gone good handed here hidden if ignored
in incorrect invalid it its kept known left like longer lost made malformed missing named needed
neither never new no none not null of off old on one only optional or other out passed present
printed put read refused rejected removed required reset rotated same sent set shorter shown stale
still stored taken that the their there this to told too true turned unavailable unchanged undefined
unknown unset unsupported up used valid value what when where which whoever whose with without
written wrong yes yours
"""
"""What a secret may be called: what follows it is none."""
_STATES = frozenset(_STATE_WORDS.split())

_KEY_BEGINS = re.compile(r"(?:----[- ] ?)?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-?----")
_KEY_ENDS = re.compile(r"----[- ] ?END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-?----")
_KEY_LINE = re.compile(r"[>\s]*[A-Za-z0-9+/=]{1,100}\s*")
_PUTTY_KEY = re.compile(r"^Private-(?:Lines|MAC):[^\n]*(?:\n[A-Za-z0-9+/=]+$)*", re.MULTILINE)

_SHAPES = re.compile(
    r"(?:eyJ[\w-]{8,}(?:\.[\w-]*){0,4}"  # a JSON web token
    r"|A(?:[KS]IA|BIA|CCA|ROA|IDA|GPA)[A-Z0-9]{12,}"  # Amazon
    r"|gh[pousr]_\w{8,}|github_pat_\w{8,}|gl[a-z]{2,5}-[\w-]{12,}"  # GitHub, GitLab
    r"|hf_[A-Za-z0-9]{8,}|sk-(?!ssh-|ecdsa-)(?=[\w-]{0,60}[0-9])[\w-]{12,}"  # of models
    r"|xai-\w{16,}|gsk_\w{16,}|r8_\w{16,}|nvapi-[\w-]{16,}"
    r"|[srp]k_(?:live|test)_\w{8,}|whsec_[\w+/=]{12,}"  # Stripe
    r"|xox[a-z]-[\w-]{8,}|xapp-[\w-]{8,}|hooks\.slack\.com/services/\S+"
    r"|AIza[\w-]{20,}|ya29\.[\w.-]+|GOCSPX-[\w-]+|1//0[\w-]{20,}"  # Google
    r"|npm_\w{16,}|pypi-[\w-]{16,}|do[opr]_v1_\w{16,}|dckr_pat_[\w-]{8,}|dapi[0-9a-f]{16,}"
    r"|hv[sbr]\.[\w.-]{8,}|tskey-[\w-]{8,}|shp[a-z]{2}_\w{16,}|lsv2_\w{8,}"
    r"|ntn_\w{12,}|lin_api_\w{12,}|SK[0-9a-f]{32}|s\.[A-Za-z0-9]{24}(?!\w)"
    r"|[\w-]{14}\.atlasv1\.[\w-]+|discord(?:app)?\.com/api/webhooks/\S+"
    r"|SG\.[\w-]{8,}\.[\w-]{8,}|AGE-SECRET-KEY-1\w{8,}|PMAK-\w{16,}|ATATT\w{16,}"
    r"|\$(?:1|2[abxy]|5|6|7|y|gy|apr1|argon2(?:id?|d))\$[^\s:\"',]{8,}"  # crypt(5)
    r")"
)
_LONG = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{20,}={0,2}")
_CLASSES = re.compile(r"[a-z]+|[A-Z]+|[0-9]+")
_ID = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|(?<![0-9a-fA-F])(?:[0-9a-f]{48}|[0-9a-f]{56})(?![0-9a-fA-F])",
    re.IGNORECASE,
)
"""A UUID; Ray's ids of tasks, and of nodes, workers, objects and clusters."""
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_BEFORE_AN_ID = re.compile(
    r"(?:id|uuid|commit|revision|digest|checksum|fingerprint|invocation|trace|boot)\w{0,8}"
    r"\\*[\"']?[ :=(@/-]{1,3}\\*[\"']?$",
    re.IGNORECASE,
)
_BEFORE_A_DIGEST = re.compile(r"(?:SHA\d+|MD5)[:=-]$", re.IGNORECASE)
_PUBLIC_KEY = re.compile(r"AAAA(?:[BCE]3NzaC1|E2VjZHNh|GnNr|InNr)")
"""What an SSH public key begins with."""


def names_a_secret(name: str) -> bool:
    """Whether what `name` names must not be shown (`node_key`, `RAY_TOKEN`, `clientSecret`)."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _HARMLESS_ENDINGS or words[0] in _SWITCHES:
        return False
    named = {word for word in words if word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS)}
    return bool(named) and not (named <= {"key", "keys"} and _PUBLIC.intersection(words))


def _may_name(name: str) -> bool:
    """Whether what `name` names is a secret if it looks like one."""
    words = _WORD.findall(name)
    return bool(words) and words[-1].lower() in _WEAK


def is_secret_flag(word: str) -> bool:
    """Whether `word` is a flag whose value, the next word, must not be shown."""
    return _FLAG.fullmatch(word) is not None and names_a_secret(word)


def redact_command(argv: Iterable[str]) -> list[str]:
    """The words of a command with the values of flags that hold a secret blanked."""
    out: list[str] = []
    blank = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = is_secret_flag(name)
        if blank:
            out.append(REDACTED)
        else:
            out.append(f"{name}={REDACTED}" if secret and equals else word)
        blank = secret and not equals and not blank
    return out


def secrets_in(text: str) -> set[str]:
    """What `redact_text` would blank."""
    return {text[start:end] for start, end in _spans(text)}


def redact_text(text: str) -> str:
    """`text` without the values of what names a secret, and without what looks like one."""
    out: list[str] = []
    done = 0
    for start, end in _spans(text):
        out += (text[done:start], REDACTED)
        done = end
    return "".join((*out, text[done:])) if out else text


def _spans(text: str) -> list[_Span]:
    """Where secrets are: in order, none in another, nothing that is blanked already."""
    if len(text) < SHORTEST_TEXT:
        return []
    merged: list[_Span] = []
    low = text.lower()
    nets = (net for net, marks in _NETS if any(mark in low for mark in marks))
    for start, end in sorted(span for net in nets for span in net(text)):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start and not text.startswith(REDACTED, start):
            merged.append((start, end))
    return merged


def _named(text: str) -> Iterator[_Span]:
    """Values behind a name. A value is not searched again, so that all takes one pass."""
    position = 0
    while match := _NAMED.search(text, position):
        # What is in a tag may have names of its own.
        position = match.end("tag") if match["tag"] else match.end()
        name = next(match[group] for group in _NAMES if match[group])
        if names_a_secret(name) or _may_name(name):
            start, end = _value(text, match, name)
            if end > start:
                yield start, end
                position = end


_NAMES = ("name", "first", "flag", "tag", "attribute")


def _value(text: str, match: re.Match[str], name: str) -> _Span:
    """Where the value of `name` is; empty where there is none."""
    start = match.end()
    if match["tag"]:
        close = text.find("<", start)
        return start, len(text) if close < 0 else close
    if match["name"] and _BLOCK.match(text, start):
        return start, _end_of_block(text, match.start(), start)
    found = _VALUE.match(text, start)
    if found is None or found.lastgroup is None:
        return start, start
    begin, end = found.span(_group(found))
    value = text[begin:end]
    if _is_no_value(value, name) or not (names_a_secret(name) or _is_made_up(value)):
        return begin, begin
    if found["bare"] and match["name"] and _has_the_line(text, match, name):
        return begin, _end_of_line(text, begin)
    return begin, _end_of_quoted(text, end) if found["double"] or found["single"] else end


def _group(found: re.Match[str]) -> str:
    """Of `_VALUE`: which of them is the value."""
    group = str(found.lastgroup)
    return {"mark": "escaped", "triple": "text"}.get(group, group)


def _is_no_value(value: str, name: str) -> bool:
    """A word that says how a secret is, a fingerprint, or how many there are."""
    said = value.strip(".,;:!?()[]…`").lower()
    if said in _STATES or value.startswith(("SHA256:", "MD5:", "SIG")):
        return True
    counted = _WORD.findall(name)[-1].lower() in _COUNTED
    return counted and value.rstrip(".,;:)]}%").isdecimal() and len(value) < 10


def _has_the_line(text: str, match: re.Match[str], name: str) -> bool:
    """Whether an unquoted value may have blanks in it, as in YAML, and a passphrase has."""
    if not match[0].endswith((": ", "= ")):
        return False
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    whole_line = not line.strip(" \t-") and (name.islower() or name.isupper())
    return whole_line or name.lower().endswith("phrase")


def _end_of_quoted(text: str, close: int) -> int:
    """Where a word in quotes ends of which a part may be left, as quotes were escaped oddly."""
    rest = _LEFT_OF_A_WORD.match(text, close)
    return rest.end() if rest else close


def _end_of_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _end_of_block(text: str, name: int, start: int) -> int:
    """Where YAML's value on the lines below ends: the lines that are indented further.

    Without its mark (`|`, `>`), only lines that are a value, as code has a colon there, too.
    """
    indent = name - (text.rfind("\n", 0, name) + 1)
    marked = text[start] in "|>"
    end = below = _end_of_line(text, start)
    while below < len(text):
        line = text[below + 1 : _end_of_line(text, below + 1)]
        deeper = len(line) - len(line.lstrip(" \t")) > indent or not line.strip()
        if not deeper or not (marked or _LINE_OF_A_VALUE.fullmatch(line)):
            break
        below += 1 + len(line)
        end = below
    return end if end > _end_of_line(text, start) else start


def _headers(text: str) -> Iterator[_Span]:
    position = 0
    while match := _HEADER.search(text, position):
        start = position = match.end()
        line_end = _end_of_line(text, start)
        quote = match["quote"] or _open_quote(text, match.start())
        close = text.find(quote, start, line_end) if quote else -1
        end = line_end if close < 0 else close
        if not _is_no_value(text[start:end].partition(" ")[0], "authorization"):
            yield start, end
            position = end


def _open_quote(text: str, start: int) -> str:
    """The quote just before `start`: of a header that is given as one word."""
    return text[start - 1] if start and text[start - 1] in "\"'" else ""


def _urls(text: str) -> Iterator[_Span]:
    for match in _USERINFO.finditer(text):
        if match["value"]:
            yield match.span("value")
            user = match.start() + match[0].index("://") + 3
            if _is_made_up(name := text[user : match.start("value") - 1]) and len(name) >= 12:
                yield user, user + len(name)
        elif _is_made_up(match["user"]):
            yield match.span("user")
    for match in _AT_A_HOST.finditer(text):
        if _is_made_up(match["value"]):
            yield match.span("value")


def _logins(text: str) -> Iterator[_Span]:
    """Passwords on the command line of what takes them there."""
    yield from (match.span(match.lastgroup or 0) for match in _LOGIN.finditer(text))


def _schemes(text: str) -> Iterator[_Span]:
    """What stands behind `Bearer` and `Basic`, wherever they are."""
    for match in _BEARER.finditer(text):
        if not _is_no_value(match["value"], "bearer") and not match["value"].islower():
            yield match.span("value")
    for match in _BASIC.finditer(text):
        if _is_a_pair(match["value"]):
            yield match.span("value")


def _is_a_pair(word: str) -> bool:
    """Whether `word` is `user:password` in Base64."""
    try:
        plain = base64.b64decode(word + "=" * (-len(word) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return False
    return ":" in plain and plain.isprintable()


def _told(text: str) -> Iterator[_Span]:
    """What a sentence gives away."""
    position = 0
    while match := _SAID.search(text, position):
        start = position = match.end()
        found = _VALUE.match(text, start)
        if found is None or found.lastgroup in (None, "several"):
            continue
        group = _group(found)
        begin, end = found.span(group)
        value = text[begin:end]
        quoted = group != "bare"
        if _is_told(match, value, quoted):
            whole = (match["noun"] or "").lower() == "passphrase" and not quoted
            position = _end_of_line(text, begin) if whole else end
            yield begin, position


def _is_told(match: re.Match[str], value: str, quoted: bool) -> bool:
    said = value.strip(".,;:!?()[]…`")
    if not said or _is_no_value(said, "token") or said.startswith(("/", "~/", "[redacted")):
        return False
    if match["key"] or match["alone_key"]:
        return _is_made_up(said) and "=" not in said and len(said) >= SHORTEST_KEY
    if match["alone"]:
        return quoted or (_is_made_up(said) and "=" not in said)
    return quoted or _is_made_up(said) or not said.istitle()


SHORTEST_TEXT = 6
"""Characters of a text in which something may be blanked."""
SHORTEST_KEY = 12
"""Characters of what may be a key where a sentence speaks of one."""


def _is_made_up(word: str) -> bool:
    """Whether nobody would write `word` in a sentence: letters and digits in turns."""
    if len(word) < SHORTEST_TEXT or word.startswith(("ssh-", "ecdsa-", "id_", "rsa-", "sk-ssh")):
        return False
    runs = _CLASSES.findall(word)
    return any(run.isdecimal() for run in runs) and any(run.isalpha() for run in runs)


def _key_blocks(text: str) -> Iterator[_Span]:
    """Private keys, also half of one: a log is cut where it is cut."""
    if "PRIVATE KEY" in text:
        position = 0
        while match := _KEY_BEGINS.search(text, position):
            end = _KEY_ENDS.search(text, match.end())
            position = end.end() if end else len(text)
            yield match.start(), position
        for end in _KEY_ENDS.finditer(text):
            yield _start_of_key(text, end.start()), end.end()
    if "Private-" in text:
        yield from (match.span() for match in _PUTTY_KEY.finditer(text))


def _start_of_key(text: str, end: int) -> int:
    start = text.rfind("\n", 0, end) + 1
    while start > 0:
        above = text.rfind("\n", 0, start - 1) + 1
        if not _KEY_LINE.fullmatch(text[above : start - 1]):
            break
        start = above
    return start


def _shapes(text: str) -> Iterator[_Span]:
    for match in _SHAPES.finditer(text):
        if not (match.start() and text[match.start() - 1].isalnum()):
            yield match.span()


def _random(text: str) -> Iterator[_Span]:
    for match in _LONG.finditer(text):
        start, end = match.span()
        before = text[max(0, start - 32) : start]
        if _BEFORE_A_DIGEST.search(before) or _PUBLIC_KEY.match(text, start):
            continue
        if _HEX.fullmatch(match[0]) and _BEFORE_AN_ID.search(before):
            continue
        if _is_random(match[0]):
            yield start, end
        elif "/" in match[0]:
            for part in _PART.finditer(text, start, end):
                if _is_random(part[0]):
                    yield part.span()


_PART = re.compile(r"[^/]{20,}")


def _is_random(word: str) -> bool:
    """Whether the kinds of `word`'s characters change as often as by chance.

    Of 20 random letters and digits 12 pairs of neighbours are of two kinds, of a camelCaseName
    that long about 5.
    """
    if word.startswith("_Z"):  # a C++ symbol
        return False
    word = _ID.sub("", word)
    runs = _CLASSES.findall(word)
    size = sum(map(len, runs))
    kinds = {"a" if run.islower() else "A" if run.isupper() else "0" for run in runs}
    if size < 20 or len(kinds) == 1:
        return False
    if _HEX.fullmatch(word):
        return size >= 24
    changes = len(runs) - len(_BETWEEN.findall(word)) - 1
    if len(kinds) == 3:
        return changes >= 0.36 * size
    return size >= 24 and changes >= (0.25 if "0" in kinds else 0.38) * size


_BETWEEN = re.compile(r"(?<=[A-Za-z0-9])[^A-Za-z0-9]+(?=[A-Za-z0-9])")
_NAME_MARKS = (
    *("token", "secret", "key", "pass", "pw", "cred", "cookie", "jwt", "bearer", "otp", "psk"),
    *("pswd", "sig", "sas", "sessionid", "csrf", "xsrf", "sid", "sessid", "mfa", "wort"),
    *("auth", "code", "hmac", "tok"),
)
_SHAPE_MARKS = (
    *(
        "eyj",
        "akia",
        "asia",
        "abia",
        "acca",
        "aroa",
        "aida",
        "agpa",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
    ),
    *(
        "ghr_",
        "github_pat_",
        "gl",
        "hf_",
        "sk-",
        "xai-",
        "gsk_",
        "r8_",
        "nvapi-",
        "k_live",
        "k_test",
    ),
    *("whsec_", "xox", "xapp-", "hooks.slack", "aiza", "ya29.", "gocspx", "1//0", "npm_", "pypi-"),
    *(
        "_v1_",
        "dckr_pat",
        "dapi",
        "hvs.",
        "hvb.",
        "hvr.",
        "tskey",
        "shp",
        "lsv2_",
        "sg.",
        "age-secret",
        "ntn_",
        "lin_api_",
        "atlasv1.",
        "api/webhooks",
        "s.",
        "sk",
    ),
    *("pmak-", "atatt", "$"),
)
_NETS = (
    (_key_blocks, ("private",)),
    (_named, _NAME_MARKS),
    (_headers, ("authorization", "cookie")),
    (_urls, ("@",)),
    (_logins, ("-u", "user", "login", "sshpass", "mysql", "mariadb", "--from-literal")),
    (_schemes, ("bearer", "basic", "auth")),
    (_told, _NAME_MARKS),
    (_shapes, _SHAPE_MARKS),
    (_random, ("",)),
)
"""What finds secrets, and which texts (in small letters) it need look at: most lines have none."""
