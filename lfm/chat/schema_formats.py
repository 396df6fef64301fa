"""The string formats of JSON Schema as patterns, so that they are generated like any other pattern.

Each pattern is at least as narrow as the specification. Formats that only describe (password, double, binary) or that
no pattern can hold (uri-template, json-pointer) constrain nothing and are reported to the client as such.
"""

from collections.abc import Mapping

_YEAR = r"[0-9]{4}"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = "|".join(
    [
        rf"{_YEAR}-(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])",
        rf"{_YEAR}-(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)",
        rf"{_YEAR}-02-(?:0[1-9]|1[0-9]|2[0-8])",
        rf"{_LEAP_YEAR}-02-29",
    ]
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DURATION_TIME = r"T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"
_DURATION_DATE = r"(?:[0-9]{1,9}D|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?)"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,7}}"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_WORD16 = r"[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        rf"(?:{_WORD16}:){{7}}{_WORD16}",
        *(rf"(?:{_WORD16}:){{{n}}}(?::{_WORD16}){{1,{7 - n}}}" for n in range(1, 7)),
        rf":(?::{_WORD16}){{1,7}}",
        rf"(?:{_WORD16}:){{1,7}}:",
        "::",
    ]
)
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,32}"
_URI_CHAR = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F]{2})"

FORMATS: Mapping[str, str] = {
    "date": rf"^(?:{_DATE})$",
    "time": rf"^{_TIME}$",
    "date-time": rf"^(?:{_DATE})T{_TIME}$",
    "duration": rf"^P(?:{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME}|[0-9]{{1,9}}W)$",
    "email": rf"^{_ATOM}(?:\.{_ATOM}){{0,3}}@{_HOSTNAME}$",
    "hostname": rf"^{_HOSTNAME}$",
    "ipv4": rf"^{_IPV4}$",
    "ipv6": rf"^(?:{_IPV6})$",
    "uuid": r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$",
    "uri": rf"^[a-zA-Z][a-zA-Z0-9+.-]{{0,20}}:{_URI_CHAR}*(?:\?(?:{_URI_CHAR}|\?)*)?(?:#(?:{_URI_CHAR}|\?)*)?$",
}

# Formats of OpenAPI for integers, as bounds.
INTEGER_FORMATS: Mapping[str, tuple[int, int]] = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
