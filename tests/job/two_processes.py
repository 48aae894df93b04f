"""What each of two processes of torchrun does in test_together.py: `python -m torch.distributed.run ... OUT`."""

import sys
from types import SimpleNamespace

import torch
from monai.engines import SupervisedTrainer

from semisam_o1 import processes
from semisam_o1.job import together

IMAGES = (1.0, 3.0)  # the only voxel of each process's only scan
STEPS, RATE = 2, 0.1


def trainer_of(number: int) -> tuple[SupervisedTrainer, torch.nn.Module]:
    """A trainer of w x + b towards 0 with squared errors; each process starts from other weights."""
    network = torch.nn.Conv3d(1, 1, 1)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1.0 + number)
    image = torch.full((1, 1, 1, 1, 1), IMAGES[number])
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"image": image, "label": torch.zeros_like(image)}] * STEPS,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=RATE),
        loss_function=torch.nn.MSELoss(),
        decollate=False,
    )
    return trainer, network


class Config:
    """A config that can be built in the first process alone."""

    def setting(self, id: str) -> int:
        return 5

    def build(self, id: str, round: int, **changed):
        if id == "iterations":
            return 500
        if processes.number() == 1:
            raise ValueError("no memory")
        return changed


def main(out: str) -> None:
    processes.join()
    trainer, network = trainer_of(processes.number())
    together.run({"trainer": trainer, "state": SimpleNamespace(objects={"network": network})})
    try:
        together.everywhere(Config(), 1)
        failure = None
    except Exception as error:  # noqa: BLE001
        failure = f"{type(error).__name__}: {error}"
    found = {
        "network": network.state_dict(),
        "failure": failure,
        "seed": together.seed_of(Config()),
        "numbers": processes.of_all(processes.number()),
    }
    torch.save(found, f"{out}/{processes.number()}.pt")
    if processes.number():
        together.Helper().run()
    processes.leave()


if __name__ == "__main__":
    main(sys.argv[1])
