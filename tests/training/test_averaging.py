import torch
from torch import nn

from reformer_lm.training.averaging import WeightAverage


def make() -> tuple[nn.Linear, WeightAverage]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model, WeightAverage(model, 0.9)


def test_averages_follow_the_weights_exponentially() -> None:
    model, average = make()
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.normal_()
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)


def test_a_saved_average_goes_on() -> None:
    model, average = make()
    with torch.no_grad():
        model.weight.normal_()
    average.update(1)
    # The model's file holds the averages, the state the weights.
    weights = {name: tensor.clone() for name, tensor in average.weights().items()}
    assert weights.keys() == {"weight"}
    with average.applied():
        published = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = nn.Linear(3, 2)
    again.load_state_dict(published)
    again.bias.requires_grad_(False)
    restored = WeightAverage(again, 0.9)
    restored.restore(weights)
    assert torch.equal(again.weight, model.weight)
    for one, its_average in ((model, average), (again, restored)):
        with torch.no_grad():
            one.weight += 1
        its_average.update(2)
    with average.applied(), restored.applied():
        assert torch.equal(again.weight, model.weight)
