"""What each of two processes does in ``test_ser_train.py``: DDP by the Trainer, then FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from mal_kernels.ser import runs
from mal_kernels.ser.model import DialogueModel, collate
from mal_kernels.ser.train import Settings

# ragged by the window: rows end at different steps, and labelled turns differ between the ranks
SETTINGS = dict(steps=5, batch=2, warmup=0, window=6, dialogues=6, head_dim=4, lr=3e-3)


def open_small() -> runs.Bench:
    runs.VALIDATION = 2
    return runs.open_bench(Settings(dialogues=6), ("train", "validation"), test=2)


def model_and_window(bench: runs.Bench, rows: slice) -> tuple[DialogueModel, dict[str, Tensor]]:
    model = runs.build(Settings(**SETTINGS), bench)
    torch.nn.init.constant_(model.memory.memory.to_out.weight, 0.01)
    window = collate([(d, 0, 16) for d in bench.encoded["train"][rows]], 16).as_dict()
    return model.train(), window


def gradients_of_one(bench: runs.Bench) -> tuple[Tensor, dict[str, Tensor]]:
    model, window = model_and_window(bench, slice(0, 4))
    loss = model(**window)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def sharded_gradients(bench: runs.Bench, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from mal_kernels.hosts import find_decoder

    model, window = model_and_window(bench, slice(2 * rank, 2 * rank + 2))
    mesh = init_device_mesh("cpu", (2,))
    for layer in find_decoder(model.host).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**window)["loss"]
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    return total / 2, found


def main() -> None:
    torch.set_num_threads(1)
    out, bench = Path(sys.argv[1]), open_small()
    runs.train_run(
        Settings(**SETTINGS),
        bench,
        out,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        ddp_backend="gloo",
    )
    rank = torch.distributed.get_rank()
    loss, gradients = sharded_gradients(bench, rank)
    if rank == 0:
        torch.save({"loss": loss, "gradients": gradients}, out / "fsdp2.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
