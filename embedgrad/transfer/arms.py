"""The arms of a transfer on the target model: text, transferred prompts and the control, as they are and trained."""

from __future__ import annotations

from dataclasses import dataclass

from embedgrad.compare.arm import Arm, Training, only
from embedgrad.maths.trust_region import TrustRegion
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.transfer.carry import SHUFFLED, Bridge

TEXT = "text"
TRAINED = "-trained"


@dataclass(frozen=True)
class Starts:
    """The starting prompts on the target by name: TEXT, the translators' names, SHUFFLED."""

    prompts: dict[str, SoftPrompt]

    @classmethod
    def of(cls, bridge: Bridge, region: TrustRegion, seed: int = 0) -> Starts:
        """All starts of a bridge. seed: of the shuffled control."""
        found = {TEXT: bridge.text}
        found |= {translator.name: bridge.carried(translator, region) for translator in bridge.translators}
        found[SHUFFLED] = bridge.shuffled(bridge.translators[0], region, seed)
        return cls(found)

    def arms(self) -> list[Arm]:
        """First every start as it is, then every start trained with each seed."""
        told = {TEXT: "its text", SHUFFLED: "control: shuffled displacement"}
        found = []
        for trained in (False, True):
            for name, prompt in self.prompts.items():
                title = told.get(name, f"transferred, {name}") + (", trained" if trained else "")
                start = only(lambda model, prompt=prompt: prompt)  # type: ignore[misc]
                training = Training() if trained else None
                found.append(Arm(name + (TRAINED if trained else ""), title, start, training, repeated=trained))
        return found
