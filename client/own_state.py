"""What a run keeps of training at this site alone: layers of its own, and its control variate.

Both lie in the run's store, are written in the transaction of the message that makes them, and so
survive restarts. Neither ever leaves the site. Both are made from noised steps alone, so what a
patient adds to them is covered by the round's charge.

Source: FedBN, Li et al., ICLR 2021; Karimireddy et al., "SCAFFOLD", ICML 2020, algorithm 1,
option II.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np

from client.noise import ChaChaRandom
from shared.layout import VectorLayout
from shared.optimizers import ModelState
from shared.parameters import FlatVector

_PERSONAL, _CONTROL, _PENDING = "own layers", "control variate", "pending control variate"


class OwnState:
    """One site's own part of the model and of the optimiser.

    A control variate is kept as the update that it stands for (-K eta c_i of the paper). With
    option II the next one is this round's update less its correction; it counts once the round's
    sum is published with this site in it.
    """

    def __init__(self, layout: VectorLayout, store: MutableMapping[str, bytes], site: str) -> None:
        self._layout, self._store, self._site = layout, store, site
        sent = layout.sent_places
        everything = np.arange(layout.parameters)
        self.places = everything[:0] if sent is None else np.setdiff1d(everything, sent)
        self._corrects = layout.plan.optimizer.name == "scaffold"

    def parameters(self, state: ModelState) -> FlatVector:
        """The model as this site has it: the common one, with the site's own layers."""
        own = self._store.get(_PERSONAL)
        if not len(self.places) or own is None:
            return state.parameters
        mixed = state.parameters.copy()
        mixed[self.places] = np.frombuffer(own, "<f4")
        return mixed

    def correction(self, state: ModelState) -> FlatVector | None:
        """What a round's steps are to add up to beside their gradients; None for nothing."""
        control = self._store.get(_CONTROL)
        if not self._corrects or control is None:
            return None
        drift: FlatVector = state.first_moment - np.frombuffer(control, "<f4")
        drift[self.places] = 0.0
        return drift

    def trained(
        self, start: FlatVector, update: FlatVector, correction: FlatVector | None, round_no: int
    ) -> None:
        """Keep what a round of noised local steps made of the site's own part."""
        if len(self.places):
            self._keep(_PERSONAL, (start + update)[self.places])
        if self._corrects:
            control = update if correction is None else update - correction
            self._keep(_PENDING, control)
            self._store["pending round"] = round_no.to_bytes(8, "little")

    def stepped(
        self, start: FlatVector, clipped_sum: FlatVector, divisor: float, random: ChaChaRandom
    ) -> None:
        """In mode `distributed`: the own layers' step, with all of the noise, as nobody adds to it.

        Together with the sent part this is one Gaussian mechanism: a patient moves both parts
        jointly by at most the clip norm, and each carries at least the promised noise.
        """
        share, plan = self._layout.share, self._layout.plan
        if share is None or not len(self.places):
            return
        noise = random.gaussian(len(self.places))
        noise *= np.float32(share.noise_multiplier * plan.privacy.promise[2])
        step = (clipped_sum[self.places] + noise) / np.float32(divisor)
        self._keep(_PERSONAL, start[self.places] - np.float32(plan.training.learning_rate) * step)

    def published(self, round_no: int, contributors: tuple[str, ...]) -> None:
        """Take the control variate of a round whose sum holds this site's update."""
        pending = self._store.get("pending round")
        if pending is not None and int.from_bytes(pending, "little") == round_no:
            if self._site in contributors:
                self._store[_CONTROL] = self._store[_PENDING]
            del self._store["pending round"]

    def _keep(self, name: str, values: FlatVector) -> None:
        self._store[name] = np.ascontiguousarray(values, dtype="<f4").tobytes()
