"""Which node is which site: a question to every node, and signed answers."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import ProtocolError
from shared.identity import verify
from shared.messages import decode, encode
from shared.study import Present, Rollcall, SignedPresent


class RollCall:
    """One roll call of a run; an answer to another one, or in another's name, is refused."""

    def __init__(self, run_id: str, roster: Mapping[str, bytes], nonce: bytes) -> None:
        """`nonce` is 32 fresh random bytes: an old answer does not serve again."""
        self._roster = roster
        self._asked = (run_id, nonce)
        self.question = encode(Rollcall(run_id, nonce))

    def answer(self, reply: bytes) -> Present:
        """Check one node's answer.

        Raises:
            ProtocolError: it is not signed by a site of the roster, or answers another question.
        """
        signed = decode(SignedPresent, reply)
        present = decode(Present, signed.present)
        if (present.run_id, present.nonce) != self._asked:
            raise ProtocolError("the answer is to another roll call")
        if present.site not in self._roster:
            raise ProtocolError("the answer is of a site that is not on the roster")
        public = self._roster[present.site]
        verify(public, "present", signed.present, signed.signature, who=present.site)
        return present

    def name_of(self, reply: bytes) -> str:
        """The site that gave an answer; see `answer`."""
        return self.answer(reply).site
