"""No password in what people read: one place that takes it out of addresses and texts.

Always: what comes out has neither a password nor a token of the address; rather too much is hidden than too
little.
"""

from __future__ import annotations

import re

# Any scheme: a mistyped one comes with the password too.
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)([^\s:@/]*):[^\s]*@", re.IGNORECASE)
_SECRET_OPTIONS = re.compile(
    r"((?:tlsCertificateKeyFilePassword|proxyPassword|authMechanismProperties)=)[^&\s'\"]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """An address, or a text with addresses in it, without passwords.

    Args:
        text: `mongodb://user:password@host/db`, or any text.

    Returns:
        The same with `***` for the password, and for the options that hold secrets.
    """
    return _SECRET_OPTIONS.sub(r"\1***", _USERINFO.sub(r"\1\2:***@", text))
