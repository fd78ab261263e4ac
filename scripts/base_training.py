"""What the recipes of the small bases share: the loop over optimizer steps and the learning rate."""

import math


def start(config):
    """Makes torch's results a function of the seed."""
    import torch

    torch.manual_seed(config.seed)
    torch.set_num_threads(1)  # sums come in one order, and on a busy machine two threads are slower than one


def train(model, optimizer, config, count, generator, loss_of):
    """config.steps optimizer steps on batches of `count` samples; all of them come before one comes again.

    loss_of(step, rows) is the loss of the samples with the indices `rows`, int64 (B,).
    """
    import torch
    from tqdm import tqdm

    scheduler = warmup_cosine(optimizer, config.steps, warmup=100, constant=0.4)
    order = torch.empty(0, dtype=torch.long)
    bar = tqdm(range(config.steps), desc="training", mininterval=5)
    for step in bar:
        while len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[: config.batch_size], order[config.batch_size :]
        loss = loss_of(step, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def warmup_cosine(optimizer, steps, warmup, constant):
    """Linear rise over `warmup` steps, full rate up to the share `constant` of all steps, then a half cosine down to nought."""
    from torch.optim.lr_scheduler import LambdaLR

    def factor(step):
        done = max(step / steps - constant, 0) / (1 - constant)
        return min((step + 1) / warmup, 1) * (1 + math.cos(math.pi * min(done, 1))) / 2

    return LambdaLR(optimizer, factor)


def reload(kind, folder):
    """The model that was saved in a folder, by a class of transformers, in eval mode; all its weights must be there."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def write_card(folder, card, model, config, seconds, **facts):
    """README.md of a base. card: text with places for the weights of the model, the steps, the batch and the facts."""
    weights = sum(p.numel() for p in model.parameters())
    shared = {"weights": weights, "steps": config.steps, "batch": config.batch_size, "seed": config.seed, "minutes": seconds / 60}
    (folder / "README.md").write_text(card.format(**shared, **facts))
