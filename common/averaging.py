"""An average of the weights over optimizer steps (--ema_decay): less noisy than the weights of the last step, often better."""


class WeightAverage:
    """The exponential moving average of what trains in a model; of one with adapters, these alone. Memory: a copy of that.

    After n steps the means keep min(decay, (1 + n) / (10 + n)) of themselves, so that the first weights do not weigh on a short
    run (TensorFlow's ExponentialMovingAverage with num_updates has that warm-up). Buffers, such as BatchNorm's statistics, have
    no mean.
    """

    def __init__(self, model, decay: float):
        import torch

        def update(means: list, weights: list, steps) -> None:
            keep = ((1 + steps) / (10 + steps)).clamp(max=decay)  # a tensor () on the device: nobody waits for it
            for mean, weight in zip(means, weights, strict=True):
                mean.lerp_(weight, 1 - keep)

        self.weights = torch.nn.ParameterList([p for p in model.parameters() if p.requires_grad])  # the model's own
        self.means = torch.optim.swa_utils.AveragedModel(self.weights, multi_avg_fn=update)
        self.in_use = False

    def update(self) -> None:
        """After an optimizer step."""
        self.means.update_parameters(self.weights)

    def use(self, means: bool) -> None:
        """Gives the model the means for weights, to be judged and saved; use(False) gives back what trains, to the bit."""
        import torch

        if means != self.in_use:
            self.in_use = means
            with torch.no_grad():
                for mean, weight in zip(self.means.module, self.weights, strict=True):
                    kept = weight.clone()  # tensor by tensor, so that a second copy of the model is never needed
                    weight.copy_(mean)
                    mean.copy_(kept)

    def state_dict(self) -> dict:
        return self.means.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.means.load_state_dict(state)
