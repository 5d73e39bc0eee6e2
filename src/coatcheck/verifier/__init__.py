"""The face for services that hold no store: access tokens checked here, revocations told by the issuer.

with Verifier("https://id.example", audience="orders", feed_credential=...) as verifier:
    token = verifier.verify(text)
"""

from coatcheck.verifier.face import Verifier, VerifierStatus

__all__ = ["Verifier", "VerifierStatus"]
