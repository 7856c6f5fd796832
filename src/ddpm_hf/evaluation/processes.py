"""The processes among which `accelerate launch` or torchrun shares out a measurement."""

import dataclasses
import datetime
import os

import torch


@dataclasses.dataclass(frozen=True)
class Processes:
    """The process that runs this code, and how many there are; by default one alone.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: the device of this process among several; None where the process is alone and may choose.
    """

    rank: int = 0
    world_size: int = 1
    device: str | None = None

    @classmethod
    def launched(cls) -> "Processes":
        """Join the processes that the launcher started; one alone without a launcher."""
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            return cls()
        from accelerate import PartialState

        # a process may wait hours for a slower one, or for one that packs 50,000 images; NCCL ends a program after 10 minutes
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=datetime.timedelta(days=7))
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """The rows of `total` that this process takes: neighboring ones, so that `gather` restores their order."""
        return slice(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Join the rows (N_r, ...) of all processes in the order of their ranks: (N, ...) on the CPU, in every process."""
        rows = rows.cpu()
        if self.world_size == 1:
            return rows
        from accelerate.utils import gather_object

        return torch.cat(gather_object([rows]))

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def leave(self) -> None:
        """End the group of processes; the last call of a program."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
