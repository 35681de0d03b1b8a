"""What a training asks of its device besides arithmetic: its own random numbers, its speed in bf16, a clock."""

import time
import timeit
from functools import cache

import torch


class Every:
    """A clock that is due when so many seconds have passed since it was made, or last due."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether they have passed; they start anew then."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed this device alone: cheaper than `torch.manual_seed`, which seeds all."""
    cuda = torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else None
    (cuda or torch.default_generator).manual_seed(seed)


@cache
def slowness_of_bf16() -> float:
    """How many times as long a matrix product takes on this CPU in bf16 as in float32."""
    took = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        took.append(min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=5)))
    return took[1] / took[0]
